"""The real code in fresh processes, against real servers on loopback and caches that the tests fill. Nothing is replaced.

torchvision's side: a small model that the child registers with torchvision's own `register_model`, and resnet18 for
what fails before its 45 MB matter. Hugging Face's side: a tiny BERT, behind a server with the calls that
`snapshot_download` makes. What goes wrong is chosen by a word in the path: /stall/, /break/, /wrong/, /missing/, /mute/.
"""

import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.hub import huggingface_folder, offline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RESNET = "resnet18-f37072fd.pth"
COMMIT = "c0ffee" + "0" * 34
INSTEAD = 'or go on without it: the profile "embedded" needs no network.'
CHILD = """
import json, os, sys
from pathlib import Path
from helpers import hub

def outcome(call, *args):
    try:
        return str(call(*args))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

# -- servers and processes ----------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if "mute" in words:
            self.server.over.wait(30)
        elif "portal" in words:
            self.answer(b"<html>Please log in.</html>")
        elif words[:2] == ["api", "models"]:
            self.answer(json.dumps(self.about("/".join(words[2:4]), words[4])).encode())
        elif "resolve" in words:
            self.resolve("/".join(words[:2]), words[0], words[-1])
        else:
            self.answer_file(words, self.server.files.get(words[-1]))

    def about(self, name, question):
        """What the Hub's API says of a repository: its commit, or a list of its files."""
        files = []
        for file, content in self.server.repository.items():
            entry = {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
            if file.endswith(".safetensors"):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
                entry["xetHash"] = sha256(content)
            if name != "bare/bert" or "lfs" not in entry:
                files.append(entry)
        siblings = [{"rfilename": entry["path"]} for entry in files]
        return {"id": name, "sha": COMMIT, "siblings": siblings} if question == "revision" else files

    def resolve(self, name, mode, file):
        """A small file comes from here, a large one from where the answer points to, as on the Hub."""
        content = self.server.repository[file]
        if not file.endswith(".safetensors"):
            return self.answer(content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": COMMIT})
        digest = sha256(content)
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        headers |= {"Location": f"http://localhost:{self.server.server_port}/cdn/{mode}/{digest}", "X-Xet-Hash": digest}
        return self.answer(b"", headers, status=302)

    def answer_file(self, words, content):
        if content is None or "missing" in words:
            self.answer(b"", status=404)
        elif "busy" in words:
            self.answer(b"", status=503)
        elif "wrong" in words:
            self.answer(b"x" * len(content))
        elif "short" in words:
            self.answer(content[:-1])
        elif "stall" in words and not self.server.well:
            self.answer(content, send=100)
            self.server.over.wait(30)
        elif "break" in words:
            self.answer(content, send=100)
        else:
            self.answer(content)

    def answer(self, content, headers=(), status=200, send=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:send])

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """`files` are found under any folder, `repository` under any name, `requests` were asked; if `well`, none stalls."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.repository, self.requests, self.well = {}, {}, [], False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def asked(self, word, method="GET"):
        return [request for request in self.requests if f"/{word}/" in request and request.startswith(method)]

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a child that has given up
            super().handle_error(request, client_address)

    def close(self):
        self.over.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


@pytest.fixture
def server():
    with closing(Server()) as server:
        yield server


@pytest.fixture(scope="module")
def dead_url():
    """An address on which nothing listens, for as long as the tests run: bound, but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def environment(home, **changes):
    kept = {key: value for key, value in os.environ.items() if not re.match("(?i)WARMSTART_|HF_|TORCH_HOME|.*_proxy", key)}
    ours = {"TORCH_HOME": str(home / "torch"), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, **changes}


def python(code, home, *arguments, **changes):
    """Run `code` in a fresh interpreter; return what it printed last, from JSON."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD + code, *map(str, arguments)],
        env=environment(home, **changes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "B/s" not in done.stderr, "the bar of a download is for stdout: a notebook shows stderr like an error"
    return json.loads(done.stdout.splitlines()[-1])


def interrupted(code, home, server, word, by, **changes):
    """Run `code` until it has asked for /word/, then send it the signal `by`; return what it wrote to stderr."""
    environ = environment(home, **changes)
    command = [sys.executable, "-c", CHILD + code]
    with subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
        until = time.monotonic() + 60
        while not server.asked(word) and time.monotonic() < until and child.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3)  # it has the first bytes now, and waits
        child.send_signal(by)
        try:
            return child.communicate(timeout=30)[1]
        finally:
            child.kill()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_in(folder):
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def test_importing_it_imports_none_of_the_libraries(tmp_path):
    imported = set(python("print(json.dumps(sorted(sys.modules)))", tmp_path))
    assert imported & {"helpers.hub", "torch", "torchvision", "transformers", "huggingface_hub"} == {"helpers.hub"}


@pytest.mark.parametrize(("value", "forbidden"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_offline_is_any_value_but_0(monkeypatch, value, forbidden):
    monkeypatch.delenv("WARMSTART_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("WARMSTART_OFFLINE", value)
    assert offline() is forbidden


# -- torchvision --------------------------------------------------------------------------------------------------------

SMALL = """
import torch
from torchvision.models import Weights, WeightsEnum
from torchvision.models._api import register_model

class Small_Weights(WeightsEnum):
    TINY_V1 = Weights(url=sys.argv[1], transforms=None, meta={})

@register_model()
def small(*, weights: Small_Weights | None = None, progress: bool = True) -> torch.nn.Module:
    model = torch.nn.Linear(3, 2)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model

def logits(weights):
    return hub.torchvision_model(weights)(torch.ones(1, 3)).tolist()
"""


@pytest.fixture
def small(server):
    """The name of a file that the server has, and the logits of the model whose weights are in it."""
    model, file = nn.Linear(3, 2), io.BytesIO()
    torch.save(model.state_dict(), file)
    name = f"small-{sha256(file.getvalue())[:8]}.pth"
    server.files[name] = file.getvalue()
    return name, model(torch.ones(1, 3)).tolist()


def test_a_torchvision_model_is_the_saved_one_and_later_needs_neither_server_nor_network(server, small, dead_url, tmp_path):
    name, logits = small
    code = """
found = [logits("Small_Weights.TINY_V1")]
os.environ["WARMSTART_MIRROR"] = sys.argv[2]
found.append(logits(Small_Weights.TINY_V1))
os.environ["WARMSTART_OFFLINE"] = "1"
print(json.dumps([*found, logits(Small_Weights.TINY_V1)]))
"""
    assert python(SMALL + code, tmp_path, f"{server.url}/models/{name}", dead_url) == [logits, logits, logits]
    assert server.requests == [f"GET /models/{name}"]
    assert files_in(tmp_path / "torch") == [name]


def test_a_mirror_stands_in_and_a_damaged_file_is_noticed_and_replaced(server, small, dead_url, tmp_path):
    name, logits = small
    code = """
mirror = os.environ["WARMSTART_MIRROR"]
path = hub.weights_file(Small_Weights.TINY_V1)
steps = {"path": str(path)}
path.write_bytes(path.read_bytes()[:-1] + b"?")
os.environ["WARMSTART_OFFLINE"] = "1"
steps["offline"] = outcome(logits, Small_Weights.TINY_V1)
os.environ["WARMSTART_OFFLINE"] = "0"
os.environ["WARMSTART_MIRROR"] = sys.argv[1]
steps["no server"] = outcome(logits, Small_Weights.TINY_V1)
os.environ["WARMSTART_MIRROR"] = mirror
steps["online"] = logits(Small_Weights.TINY_V1)
print(json.dumps(steps))
"""
    steps = python(SMALL + code, tmp_path, f"{dead_url}/{name}", WARMSTART_MIRROR=f"{server.url}/classroom")
    path = tmp_path / "torch/hub/checkpoints" / name
    damaged = sha256(server.files[name][:-1] + b"?")[:8]
    assert steps == {
        "path": str(path),
        "offline": f"DownloadFailed: could not get {name} from {server.url}/classroom/{name}: WARMSTART_OFFLINE is set, and "
        f"the cached file is damaged (its SHA-256 begins with {damaged}). Put the file at {path}, {INSTEAD}",
        "no server": f"DownloadFailed: could not get {name} from {dead_url}/{name}/{name}: nothing answers there, 3 times. "
        f"Put the file at {path}, {INSTEAD}",
        "online": logits,
    }
    assert path.read_bytes() == server.files[name]
    assert len(server.requests) == 2


RESNET_FAILURES = {
    "wrong": ("what came is not that file, its SHA-256 begins with {digest}", 1),
    "missing": ("HTTP 404 Not Found", 1),
    "busy": ("HTTP 503 Service Unavailable, 3 times", 3),
    "stall": ("nothing came for 0.5 s, 3 times", 3),
    "mute": ("nothing came for 0.5 s, 3 times", 3),
    "break": ("the connection broke off after 100 of 5000 bytes, 3 times", 3),
    "dead": ("nothing answers there, 3 times", 0),
    "tls": ("no secure connection could be made, 3 times", 0),
    "offline": ("WARMSTART_OFFLINE is set, and the cache does not hold it", 0),
}


@pytest.fixture(scope="module")
def failures(dead_url, tmp_path_factory):
    """Of each failure what was said, where, how often the server was asked, and the cache; what was said of no weights."""
    home = tmp_path_factory.mktemp("resnet")
    code = """
from torchvision.models import ResNet18_Weights
from torchvision.models.quantization import ResNet18_QuantizedWeights
from torchvision.models._api import register_model
messages = {}
for word, os.environ["WARMSTART_MIRROR"] in json.loads(sys.argv[1]).items():
    os.environ["WARMSTART_OFFLINE"] = "1" if word == "offline" else ""
    messages[word] = outcome(hub.torchvision_model, ResNet18_Weights.IMAGENET1K_V1)
register_model("untrained")(lambda: None)
wrong = ["resnet18_weights.imagenet1k_v3", ResNet18_Weights, ResNet18_QuantizedWeights.IMAGENET1K_FBGEMM_V1]
print(json.dumps([messages, [outcome(hub.weights_file, weights) for weights in wrong]]))
"""
    with closing(Server()) as server:
        server.files[RESNET] = b"r" * 5000
        mirrors = {word: f"{server.url}/{word}/" for word in RESNET_FAILURES}
        mirrors |= {"dead": dead_url, "tls": server.url.replace("http:", "https:"), "offline": ""}
        messages, of_none = python(code, home, json.dumps(mirrors), WARMSTART_TIMEOUT="0.5")
    mirrors["offline"] = "https://download.pytorch.org/models"
    by_word = {
        word: (messages[word], f"{url.rstrip('/')}/{RESNET}", len(server.asked(word)), home / "torch/hub/checkpoints")
        for word, url in mirrors.items()
    }
    return by_word, of_none


@pytest.mark.parametrize("word", RESNET_FAILURES)
def test_a_torchvision_download_that_fails_says_so_in_one_sentence_and_leaves_nothing(failures, word):
    error, url, asked, cache = failures[0][word]
    reason, tries = RESNET_FAILURES[word]
    reason = reason.format(digest=sha256(b"x" * 5000)[:8])
    assert error == f"DownloadFailed: could not get {RESNET} from {url}: {reason}. Put the file at {cache / RESNET}, {INSTEAD}"
    assert asked == tries
    assert files_in(cache) == []


def test_a_torchvision_download_that_is_interrupted_leaves_nothing(server, tmp_path):
    server.files[RESNET] = b"r" * 5000
    code = "hub.weights_file('ResNet18_Weights.IMAGENET1K_V1')"
    assert "KeyboardInterrupt" in interrupted(
        code, tmp_path, server, "stall", signal.SIGINT, WARMSTART_MIRROR=f"{server.url}/stall/"
    )
    assert files_in(tmp_path / "torch") == []


def test_weights_that_are_none_are_told_in_one_sentence(failures):
    assert failures[1] == [
        "ValueError: not weights of a torchvision model: 'resnet18_weights.imagenet1k_v3'. Closest: "
        "['ResNet18_Weights.IMAGENET1K_V1', 'ResNet152_Weights.IMAGENET1K_V2', 'ResNet152_Weights.IMAGENET1K_V1'].",
        "TypeError: weights must be a member such as ResNet18_Weights.IMAGENET1K_V1 or its name, got an EnumType.",
        "ValueError: the name resnet18_fbgemm_16fa66dd.pth holds no SHA-256, so ResNet18_QuantizedWeights.IMAGENET1K_FBGEMM_V1 "
        "cannot be verified. Load them with torchvision if you trust "
        "https://download.pytorch.org/models/quantized/resnet18_fbgemm_16fa66dd.pth.",
    ]


# -- Hugging Face -------------------------------------------------------------------------------------------------------

FETCH = "print(json.dumps(outcome(hub.huggingface_folder, 'tiny/bert')))"
BERT = """
import torch

def outputs(folder):
    from transformers import AutoModel, AutoTokenizer
    tokens = AutoTokenizer.from_pretrained(folder)("a warm start", return_tensors="pt")
    with torch.no_grad():
        return tokens["input_ids"].tolist(), AutoModel.from_pretrained(folder)(**tokens).last_hidden_state.tolist()
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The files of a tiny BERT as its author saved them, and what it computes."""
    home = tmp_path_factory.mktemp("bert")
    make = """
from transformers import AutoTokenizer, BertConfig, BertModel
folder = Path(sys.argv[1])
words = "[PAD] [UNK] [CLS] [SEP] [MASK] a warm start".split()
config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BertModel(config).save_pretrained(folder)
(folder / "vocab.txt").write_text("\\n".join(words))
AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
print(json.dumps(outputs(folder)))
"""
    computed = python(BERT + make, home, home / "saved")
    return {file.name: file.read_bytes() for file in (home / "saved").iterdir()}, computed


@pytest.fixture
def hub(server, bert):
    """The server, with that model in every repository, and a pickle that nobody is to fetch."""
    server.repository = {**bert[0], "pytorch_model.bin": b"code"}
    server.files = {sha256(content): content for content in server.repository.values()}
    return server


def cached(home, name):
    return home / "hf" / "hub" / f"models--{name.replace('/', '--')}"


def advice(name, url, reason):
    return f"DownloadFailed: could not get {name} from {url}/{name}: {reason}. Pass a folder that holds its files, {INSTEAD}"


def test_a_hugging_face_model_is_the_saved_one_and_later_needs_neither_server_nor_network(hub, bert, dead_url, tmp_path):
    files, computed = bert
    code = "folder = hub.huggingface_folder('tiny/bert'); print(json.dumps([str(folder), outputs(folder)]))"
    folder = cached(tmp_path, "tiny/bert") / "snapshots" / COMMIT
    assert python(FETCH, tmp_path, HF_ENDPOINT=hub.url) == str(folder)
    assert files_in(folder) == sorted(files)
    assert len(hub.asked("cdn")) == 1
    before = list(hub.requests)
    assert python(BERT + code, tmp_path, HF_ENDPOINT=hub.url, WARMSTART_OFFLINE="1") == [str(folder), computed]
    assert hub.requests == before
    assert python(FETCH, tmp_path, HF_ENDPOINT=dead_url) == str(folder)


def test_without_a_network_an_empty_cache_says_what_to_do(hub, dead_url, tmp_path):
    assert python(FETCH, tmp_path, HF_ENDPOINT=hub.url, WARMSTART_OFFLINE="1") == advice(
        "tiny/bert", hub.url, "WARMSTART_OFFLINE is set, and the cache does not hold all of it"
    )
    assert hub.requests == []
    assert python(FETCH, tmp_path, HF_ENDPOINT=dead_url) == advice("tiny/bert", dead_url, "nothing answers there")


def test_a_damaged_hugging_face_file_is_noticed_and_fetched_again(hub, dead_url, tmp_path):
    code = """
folder = hub.huggingface_folder("tiny/bert")
for file in ("model.safetensors", "config.json"):
    (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b"?")
messages = []
for os.environ["WARMSTART_OFFLINE"] in "10":
    messages.append(outcome(hub.huggingface_folder, "tiny/bert"))
print(json.dumps(messages))
"""
    folder = cached(tmp_path, "tiny/bert") / "snapshots" / COMMIT
    assert python(code, tmp_path, HF_ENDPOINT=hub.url) == [
        advice(
            "tiny/bert",
            hub.url,
            "WARMSTART_OFFLINE is set, and the cached config.json, model.safetensors is damaged",
        ),
        str(folder),
    ]
    saved = {name: content for name, content in hub.repository.items() if name != "pytorch_model.bin"}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == saved
    times = {name: len([request for request in hub.asked("resolve") if request.endswith(f"/{name}")]) for name in saved}
    assert times == {name: {"model.safetensors": 0, "config.json": 2}.get(name, 1) for name in saved}
    assert len(hub.asked("cdn")) == 2
    (folder / "vocab.txt").write_bytes(b"?")
    assert python(FETCH, tmp_path, HF_ENDPOINT=dead_url) == advice("tiny/bert", dead_url, "nothing answers there")


HF_FAILURES = {  # name: reason, how often the weights are asked for at most
    "wrong/bert": ("no sound model.safetensors came", 2),
    "short/bert": ("what came is not of the announced size", 1),
    "missing/bert": ("HTTP 404 Not Found", 1),
    "stall/bert": ("nothing came for 0.5 s", 3),
    "mute/bert": ("nothing came for 0.5 s", 0),
    "break/bert": ("the connection broke off after 100 of {size} bytes", 3),
    "bare/bert": ("it holds no *.safetensors", 0),
    "portal/bert": ("the answer is not from a hub, perhaps a login page", 0),
}


@pytest.fixture(scope="module")
def hf_failures(bert, tmp_path_factory):
    home = tmp_path_factory.mktemp("failures")
    code = "print(json.dumps({name: outcome(hub.huggingface_folder, name) for name in json.loads(sys.argv[1])}))"
    with closing(Server()) as server:
        server.repository = bert[0]
        server.files = {sha256(content): content for content in bert[0].values()}
        messages = python(code, home, json.dumps(list(HF_FAILURES)), HF_ENDPOINT=server.url, WARMSTART_TIMEOUT="0.5")
    return server, home, messages


@pytest.mark.parametrize("name", HF_FAILURES)
def test_a_hugging_face_download_that_fails_says_so_in_one_sentence_and_leaves_no_weights(hf_failures, name):
    server, home, messages = hf_failures
    reason, tries = HF_FAILURES[name]
    weights = server.repository["model.safetensors"]
    assert messages[name] == advice(name, server.url, reason.format(size=len(weights)))
    assert len(server.asked(f"cdn/{name.split('/')[0]}")) <= tries
    assert not {"model.safetensors", sha256(weights)} & set(files_in(cached(home, name)))


def test_a_hugging_face_download_that_is_killed_leaves_no_weights_and_can_be_repeated(hub, tmp_path):
    code = "print(json.dumps(outcome(hub.huggingface_folder, 'stall/bert')))"
    interrupted(code, tmp_path, hub, "cdn", signal.SIGKILL, HF_ENDPOINT=hub.url)
    assert len(hub.asked("cdn")) == 1
    assert "model.safetensors" not in files_in(cached(tmp_path, "stall/bert"))
    hub.well = True
    folder = Path(python(code, tmp_path, HF_ENDPOINT=hub.url))
    assert (folder / "model.safetensors").read_bytes() == hub.repository["model.safetensors"]


def test_a_local_folder_passes_and_what_is_no_model_is_told_in_one_sentence(bert, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    code = """
names = [sys.argv[1] + "/mine", sys.argv[1] + "/none", "two words"]
print(json.dumps([outcome(hub.huggingface_folder, name) for name in names]))
"""
    wanted = "ValueError: name must be a folder with a config.json or a model on the Hub, got {!r}. "
    wanted += "An example: 'sentence-transformers/all-MiniLM-L6-v2'."
    assert python(code, tmp_path, tmp_path, WARMSTART_OFFLINE="1") == [
        str(tmp_path / "mine"),
        wanted.format(f"{tmp_path}/none"),
        wanted.format("two words"),
    ]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_a_time_out_that_is_none_is_told_in_one_sentence(monkeypatch, value):
    monkeypatch.setenv("WARMSTART_TIMEOUT", value)
    with pytest.raises(ValueError) as error:
        huggingface_folder("tiny/bert")
    assert str(error.value) == f"WARMSTART_TIMEOUT must be seconds above 0, got {value!r}. Unset, it is 20."


def test_huggingface_hub_is_left_as_it_was(bert, dead_url, tmp_path):
    code = """
from huggingface_hub import constants, get_session
before = constants.HF_HUB_DISABLE_XET, len(get_session().event_hooks["request"])
message = outcome(hub.huggingface_folder, "tiny/bert")
print(json.dumps([message, before == (constants.HF_HUB_DISABLE_XET, len(get_session().event_hooks["request"]))]))
"""
    assert python(code, tmp_path, HF_ENDPOINT=dead_url) == [advice("tiny/bert", dead_url, "nothing answers there"), True]
