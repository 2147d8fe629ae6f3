"""Pre-trained weights from the places that publish them, or one sentence that says why not.

A file counts only if its SHA-256 is the published one. That is checked after a download and on every cache hit, so a
file that a full disk or a bad copy has damaged is noticed before a model is made of it. Files land in the caches that
torch.hub and huggingface_hub keep anyway; a file that either of them fetched earlier is used, and the other way round.

    WARMSTART_OFFLINE=1          open no connection
    WARMSTART_MIRROR=http://...  fetch torchvision's files from this folder; for Hugging Face, HF_ENDPOINT does that
    WARMSTART_TIMEOUT=60         give an attempt up after so many seconds without a byte (default: 20)
"""

import hashlib
import os
import re
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from http.client import responses
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import nn
    from torchvision.models import WeightsEnum

STALL_SECONDS = 20.0
ATTEMPTS = 3
# What AutoModel and AutoTokenizer read. No *.bin: a pickle runs code of whoever wrote it.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "vocab.txt", "merges.txt")
# What went wrong, by the class of an exception or of one inside it. urllib, httpx and httpx2 have exceptions of their
# own, but hold the operating system's inside; the first line that fits is the most telling one.
REASONS = {
    "gaierror": "the name of the host could not be resolved",
    "ConnectionRefusedError": "nothing answers there",
    "SSLError": "no secure connection could be made",
    "TimeoutError": "nothing came for {seconds:g} s",
    "TimeoutException": "nothing came for {seconds:g} s",
    "ConnectionResetError": "the connection broke off",
    "RemoteProtocolError": "the connection broke off{counts}",
    "_BrokeOff": "the connection broke off{counts}",
    "JSONDecodeError": "the answer is not from a hub, perhaps a login page",
    "FileMetadataError": "the answer is not from a hub, perhaps a login page",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache does not hold all of it",
    "_GaveUp": "no complete answer came",
    "URLError": "there is no connection",
    "ConnectError": "there is no connection",
    "LocalEntryNotFoundError": "the cache does not hold all of it",
}
INSTEAD = 'or go on without it: the profile "embedded" needs no network.'


class DownloadFailed(OSError):
    """What was wanted, from where, what went wrong, and what to do instead."""


def offline() -> bool:
    """Is the network forbidden? Yes if WARMSTART_OFFLINE is set to anything but "" and "0"."""
    return os.environ.get("WARMSTART_OFFLINE", "") not in ("", "0")


def torchvision_model(weights: "WeightsEnum | str") -> "nn.Module":
    """The torchvision model that these weights are for, with the weights in it, in train mode as torchvision gives it.

    Args:
        weights: a member such as ResNet18_Weights.IMAGENET1K_V1, or its name as a string.

    Raises:
        DownloadFailed: the file is not to be had.
        ValueError: no model has such weights; the message lists close names.
    """
    from torchvision.models import get_model

    model, weights = _find(weights)
    weights_file(weights)
    return get_model(model, weights=weights)  # finds the file in the cache


def weights_file(weights: "WeightsEnum | str") -> Path:
    """The file of these torchvision weights in torch.hub's cache, downloaded if it is not there or damaged.

    The file's name ends with the first eight digits of its SHA-256 (`resnet18-f37072fd.pth`): enough to notice any
    damage, too few to stop a forger. A download gets its name only when it is complete and checked.

    Raises:
        DownloadFailed: the file is not to be had.
        ValueError: no model has such weights, or the name of their file holds no hash.
    """
    import torch

    _, weights = _find(weights)
    name = Path(urllib.parse.urlsplit(weights.url).path).name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    mirror = os.environ.get("WARMSTART_MIRROR")
    url = f"{mirror.rstrip('/')}/{name}" if mirror else weights.url
    failed = partial(_failed, name, url, f"Put the file at {path}")
    hashed = re.search(r"-([0-9a-f]{8,})\.", name)
    if not hashed:
        raise ValueError(
            f"the name {name} holds no SHA-256, so {weights} cannot be verified. Load them with torchvision if you trust {url}."
        )
    cached = _digest(path) if path.is_file() else None
    if cached and cached.startswith(hashed[1]):
        return path
    if offline():
        state = f"the cached file is damaged (its SHA-256 begins with {cached[:8]})" if cached else "the cache does not hold it"
        raise failed(f"WARMSTART_OFFLINE is set, and {state}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{name}.{uuid.uuid4().hex}.part")
    try:
        _download(url, draft, failed)
        came = _digest(draft)
        if not came.startswith(hashed[1]):
            raise failed(f"what came is not that file, its SHA-256 begins with {came[:8]}")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def huggingface_folder(name: str, revision: str = "main") -> Path:
    """A folder with the configuration, tokenizer and safetensors weights of a model on the Hugging Face Hub.

    `AutoModel.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` then open no connection. If the
    Hub cannot be reached, a complete copy in the cache will do. Files are checked by the hashes that name them in the
    cache; on Windows without symbolic links it holds plain copies, which nothing can check.

    Args:
        name: "owner/model" as on the Hub, or a local folder with a config.json, which is returned as it is.
        revision: a branch, tag or commit; a commit always gives the same files.

    Raises:
        DownloadFailed: the files are not to be had.
        ValueError: `name` is neither.
    """
    local = Path(name).expanduser()
    if (local / "config.json").is_file():
        return local
    from huggingface_hub import constants

    failed = partial(_failed, name, f"{constants.ENDPOINT}/{name}", "Pass a folder that holds its files")
    for _ in "cached", "fetched again":
        folder = _snapshot(name, revision, failed)
        damaged = _damaged(folder)
        if offline() or not damaged:
            break
        for blob in damaged.values():
            blob.unlink(missing_ok=True)  # the next snapshot fetches what is missing, and only that
    if damaged:
        files = ", ".join(sorted(file.name for file in damaged))
        raise failed(f"WARMSTART_OFFLINE is set, and the cached {files} is damaged" if offline() else f"no sound {files} came")
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]
    if missing:
        raise failed(f"{'the cache' if offline() else 'it'} holds no {' and no '.join(missing)}")
    return folder


def oxford_pets() -> Path:
    """The folder of the Oxford-IIIT Pets, with `images/` and `annotations/`, fetched by torchvision (800 MB) if missing.

    Raises:
        DownloadFailed: it is not to be had.
    """
    import torch
    from torchvision.datasets import OxfordIIITPet

    root = Path(torch.hub.get_dir()).parent / "datasets"
    folder = root / "oxford-iiit-pet"
    failed = partial(_failed, "the Oxford-IIIT Pets", "www.robots.ox.ac.uk", f"Put them into {folder}")
    if not folder.is_dir():
        if offline():
            raise failed("WARMSTART_OFFLINE is set, and they are not there")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_patience())  # torchvision sets none
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as draft:  # extracting takes long; half of it must not count
                OxfordIIITPet(draft, download=True)
                Path(draft, folder.name).replace(folder)
        except (OSError, RuntimeError) as error:
            raise failed(_reason(error) or str(error)) from None
        finally:
            socket.setdefaulttimeout(before)
    return folder


def _failed(what: str, where: str, instead: str, reason: str) -> DownloadFailed:
    return DownloadFailed(f"could not get {what} from {where}: {reason}. {instead}, {INSTEAD}")


def _find(weights: "WeightsEnum | str") -> tuple[str, "WeightsEnum"]:
    """The name of the model, and the member."""
    from torchvision.models import WeightsEnum, get_model_weights, list_models

    from helpers import expect

    if not isinstance(weights, WeightsEnum | str):
        raise TypeError(
            f"weights must be a member such as ResNet18_Weights.IMAGENET1K_V1 or its name, got {expect.describe(weights)}."
        )
    known = {}
    for model in list_models():
        with suppress(ValueError):  # somebody's own model, registered without weights
            enum = get_model_weights(model)
            known |= {f"{enum.__name__}.{key}": (model, member) for key, member in enum.__members__.items()}
    for name, (model, member) in known.items():
        if weights is member or weights == name:
            return model, member
    lower = {name.lower(): name for name in known}
    close = [lower[name] for name in get_close_matches(str(weights).lower(), lower, cutoff=0)]
    raise ValueError(f"not weights of a torchvision model: {str(weights)!r}. Closest: {close}.")


class _BrokeOff(Exception):
    """The answer ended before its announced length."""


def _download(url: str, path: Path, failed: Callable[[str], DownloadFailed]) -> None:
    """One file, with a progress bar. What the server decided (HTTP 404) is final; a lost connection is tried again."""
    request = urllib.request.Request(url, headers={"User-Agent": "warmstart"})
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=_patience()) as answer, path.open("wb") as file:
                size = int(answer.headers.get("Content-Length", 0))
                name = path.name.partition(".")[0]
                # To stdout, as `helpers.progress` does: a notebook shows stderr like an error.
                with tqdm(desc=name, total=size or None, unit="B", unit_scale=True, leave=False, file=sys.stdout) as bar:
                    while block := answer.read1(1 << 20):
                        bar.update(file.write(block))
                if file.tell() < size:
                    raise _BrokeOff(f"received {file.tell()} bytes, expected {size}")
            return
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise failed(reason) from None
            if attempt == ATTEMPTS:
                raise failed(f"{reason}, {ATTEMPTS} times") from None
            time.sleep(_patience() / 20)


def _snapshot(name: str, revision: str, failed: Callable[[str], DownloadFailed]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with _bounded():
            return Path(snapshot_download(name, revision=revision, allow_patterns=[*PATTERNS], local_files_only=offline()))
    except HFValidationError:
        raise ValueError(
            f"name must be a folder with a config.json or a model on the Hub, got {name!r}. "
            "An example: 'sentence-transformers/all-MiniLM-L6-v2'."
        ) from None
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise failed(f"WARMSTART_OFFLINE is set, and {reason}" if offline() else reason) from None


class _GaveUp(Exception):
    """A file was asked for too often."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside the `with`, huggingface_hub asks for a file ATTEMPTS times at most and waits as long as WARMSTART_TIMEOUT says.

    Left alone it has no limit: its count of retries starts afresh after every byte (2.4, `http_get`), so that a server
    which stalls halfway is asked for ever. Xet transfers run outside Python, out of reach of a limit, and are turned off.
    """
    from huggingface_hub import constants, get_session

    seconds, asked = _patience(), Counter()

    def limit(request) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        asked[request.method, request.url] += 1
        if asked[request.method, request.url] > ATTEMPTS:
            raise _GaveUp

    session, xet = get_session(), constants.HF_HUB_DISABLE_XET
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        session.event_hooks = hooks
        constants.HF_HUB_DISABLE_XET = xet


def _damaged(folder: Path) -> dict[Path, Path]:
    """Files of a snapshot whose blob is missing or not what its name says: {file: blob}."""
    blobs = {file: file.parent / file.readlink() for file in folder.rglob("*") if file.is_symlink()}
    return {file: blob for file, blob in blobs.items() if not _sound(blob)}


def _sound(blob: Path) -> bool:
    """A large file's blob is named by its SHA-256; a small one's by git, SHA-1 of "blob", its size, a zero, its bytes."""
    if not blob.is_file():
        return False
    if len(blob.name) == 64:
        return _digest(blob) == blob.name
    git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    return len(blob.name) != 40 or _digest(blob, lambda: git) == blob.name


def _digest(path: Path, start: Callable = hashlib.sha256) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()


def _patience() -> float:
    """Seconds without a byte after which an attempt has failed."""
    value = os.environ.get("WARMSTART_TIMEOUT") or STALL_SECONDS
    with suppress(ValueError):
        if 0 < float(value) < float("inf"):
            return float(value)
    raise ValueError(f"WARMSTART_TIMEOUT must be seconds above 0, got {value!r}. Unset, it is {STALL_SECONDS:g}.")


def _reason(error: BaseException) -> str | None:
    """What went wrong, in plain words, or None if the network is not to blame."""
    chain = []
    while error:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        status = getattr(link, "code", None) or getattr(getattr(link, "response", None), "status_code", None)
        if status:
            return f"HTTP {status} {responses.get(status, '')}".rstrip()
        if "Consistency check failed" in str(link):  # how huggingface_hub says it
            return "what came is not of the announced size"
    counts = re.search(r"received (\d+) bytes, expected (\d+)", " ".join(map(str, chain)))
    counts = f" after {counts[1]} of {counts[2]} bytes" if counts else ""
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    for kind, reason in REASONS.items():
        if kind in kinds:
            return reason.format(seconds=_patience(), counts=counts)
    return None
