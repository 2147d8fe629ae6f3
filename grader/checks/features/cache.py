"""Exercise 2.4: compute features once, keep them in files, and notice when they are no longer the right ones."""

import builtins
import copy
import hashlib
import inspect
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Subject, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import cached_features

exercise = Exercise(__name__, "2.4", cached_features)

_RUNS = itertools.count()


class _OutOfMemory(RuntimeError):
    """What `compute` raises when it is told to fail."""


class _Ask:
    """Asks a subject for features, always with the same folder, and counts how often it computed them.

    One of the settings is a new number in every run, though it changes no feature: a subject that remembers
    the last check of this kernel finds nothing of this one.
    """

    def __init__(self, subject: Subject, folder: str) -> None:
        self.subject, self.folder = subject, Path(folder)
        self.size = 8 + next(_RUNS)  # pixels that are kept of each side of an image: of 8, all
        self.asked = []  # alive as long as this is, so that no id is given twice
        self.computed, self.fails = 0, False

        def compute(backbone, images, mean=0.0, std=1.0, size=8):
            if self.fails:
                raise _OutOfMemory("not enough memory")
            self.computed += 1
            return _features(backbone, images[..., :size, :size], {"mean": mean, "std": std})

        self.compute = compute

    def __call__(self, backbone, images, settings, *, fails=False, catch=()) -> dict[str, Any]:
        """What came of one call. With `fails`, `compute` raises.

        An exception in `catch` is an answer too, unless it came after `compute`: then it is not about a file.
        """
        self.computed, self.fails = 0, fails
        self.asked += [backbone, images]
        features = raised = None
        try:
            answer = self.subject(self.folder, self.compute, backbone, images, settings | {"size": self.size})
            features = expect_tensor(answer, (len(images), backbone[-1].num_features), "the features").detach().clone()
        except catch as error:
            if self.computed:
                raise
            raised = f"{type(error).__name__}: {error}"
        return {"computed": self.computed, "features": features, "raised": raised}


def _features(backbone: nn.Module, images: Tensor, settings: dict) -> Tensor:
    with torch.no_grad():
        return backbone((images - settings.get("mean", 0.0)) / settings.get("std", 1.0))


def _task(trial: Trial) -> dict:
    """A backbone, images of more than 1000 pixels whose sums are exact in any order, and one setting."""
    return {
        "backbone": _backbone(trial, width=trial.integer(4, 7)),
        "images": torch.randint(0, 256, (20, 1, 8, 8), generator=trial.generator) / 256,
        "settings": {"mean": trial.integer(3, 7) / 16},
    }


def _backbone(trial: Trial, width: int) -> nn.Sequential:
    """A small network in eval mode, all of odd sixteenths: printed with four digits, each is exact."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width)).eval()
    with torch.no_grad():
        for tensor in _changeable(backbone):
            tensor.copy_(2 * torch.randint(-4, 4, tensor.shape, generator=trial.generator) + 1).div_(16)
        backbone[-1].running_var.abs_()
    return backbone


def _changeable(backbone: nn.Sequential) -> list[Tensor]:
    """All that features depend on: the parameters, and two of the three buffers."""
    return [*backbone.parameters(), backbone[-1].running_mean, backbone[-1].running_var]


class _OneTask(Experiment):
    """Draws one task, and asks a subject for its features several times, always with the same folder."""

    def draw(self, trial: Trial) -> dict:
        return _task(trial)

    def measure(self, subject, inputs):
        with TemporaryDirectory() as folder:
            return self.ask_for(_Ask(subject, folder), inputs)

    def ask_for(self, ask: _Ask, inputs: dict) -> dict:
        """The answers, as raw results."""
        raise NotImplementedError


@exercise.experiment("computed once")
class ComputedOnce(_OneTask):
    points = 2

    def ask_for(self, ask, inputs):
        return {"first": ask(**inputs), "second": ask(**copy.deepcopy(inputs))}

    def facts(self, raw, inputs):
        wanted = _features(**inputs)
        return {
            "the first call": _word(raw["first"], wanted),
            "the second call, with equal copies": _word(raw["second"], wanted),
            "dtype of the features in the second call": str(raw["second"]["features"].dtype),
        }


@exercise.experiment("every result stays")
class EveryResultStays(_OneTask):
    def draw(self, trial: Trial) -> dict:
        task = _task(trial)
        tuned = task | {"backbone": _backbone(trial, task["backbone"][-1].num_features)}
        return {"tasks": [task, tuned, task, tuned]}

    def ask_for(self, ask, inputs):
        return {"answers": [ask(**task) for task in inputs["tasks"]]}

    def facts(self, raw, inputs):
        words = [_word(answer, _features(**task)) for answer, task in zip(raw["answers"], inputs["tasks"], strict=True)]
        return {"calls with one backbone, another, the first, the other": words}


class _Notices(_OneTask):
    """Asks twice for the same, and then once for each of some variations.

    Only a cache that reads can fail to notice, so without a second call that reads nothing is observed here.
    The variations are new to the subject, and so small that features from a file could pass for the right ones.
    """

    def variations(self, inputs: dict) -> Iterator[tuple[str, dict]]:
        """What is varied, in words, and the inputs; changes in place last until the next variation."""
        raise NotImplementedError

    def ask_for(self, ask, inputs):
        return {
            "reads": [ask(**inputs)["computed"], ask(**inputs)["computed"]] == [1, 0],
            "answers": [ask(**varied) for _, varied in self.variations(inputs)],
        }

    def facts(self, raw, inputs):
        words: dict[str, set[str]] = {}
        for answer, (what, varied) in zip(raw["answers"], self.variations(inputs), strict=True):
            words.setdefault(what, set()).add(_word(answer, _features(**varied)) if answer["computed"] else "reads")
        return {what: _together(answers) if raw["reads"] else None for what, answers in words.items()}


@exercise.experiment("notices other weights")
class NoticesOtherWeights(_Notices):
    points = 2

    def variations(self, inputs):
        for tensor in _changeable(inputs["backbone"]):
            before = tensor.detach().clone()
            with torch.no_grad():
                tensor.view(-1)[tensor.numel() // 2] += 1e-5  # a small step of an optimizer
            yield f"one number of a {'parameter' if tensor.requires_grad else 'buffer'} changed", inputs
            with torch.no_grad():
                tensor.copy_(before)


@exercise.experiment("notices other images")
class NoticesOtherImages(_Notices):
    def variations(self, inputs):
        last = len(inputs["images"]) - 1
        for where, image, pixel in (
            ("at the edge", 0, 0),
            ("at the edge", last, 7),
            ("in the middle", 0, 3),
            ("in the middle", last // 2, 4),
        ):
            images = inputs["images"].clone()
            images[image, 0, pixel, pixel] += 1 / 256
            yield f"one pixel {where} of an image changed", inputs | {"images": images}
        yield "the same images in another order", inputs | {"images": inputs["images"].roll(7, dims=0)}


@exercise.experiment("notices other settings")
class NoticesOtherSettings(_Notices):
    def variations(self, inputs):
        value = inputs["settings"]["mean"]
        yield "one value changed", inputs | {"settings": {"mean": value + 1 / 64}}
        yield "the same value under another name", inputs | {"settings": {"std": value}}


@exercise.experiment("damaged file")
class DamagedFile(_OneTask):
    def ask_for(self, ask, inputs):
        answers = []
        ask(**inputs)
        for share in (0.5, 0.0):
            _cut(ask.folder, share)
            answers.append([ask(**inputs, catch=Exception), ask(**inputs, catch=Exception)])
        return {"answers": answers}

    def facts(self, raw, inputs):
        wanted = _features(**inputs)
        for damaged, after in raw["answers"]:  # of the first file that is not replaced, if there is one
            words = _word(damaged, wanted), _word(after, wanted)
            if words != ("computes", "reads"):
                break
        meaning = {
            "computes": "counts as no file",
            "reads": "is not looked at",
            "raises": "is taken for a result",
            "reads, and gives wrong features": "is taken for a result",
        }
        return {
            "a file cut to half its length, or to nothing": meaning.get(words[0], words[0]),
            "the call after that": words[1] if words[0] == "computes" else None,
        }

    def notes(self, raw, inputs):
        raised = [damaged["raised"] for damaged, _ in raw["answers"] if damaged["raised"]]
        return {"a file cut to half its length, or to nothing": raised[0]} if raised else {}


@exercise.experiment("interrupted computation")
class InterruptedComputation(_OneTask):
    def ask_for(self, ask, inputs):
        first = ask(**inputs, fails=True, catch=(_OutOfMemory, WrongReturn))
        return {"first": first, "second": ask(**inputs, catch=Exception)}

    def facts(self, raw, inputs):
        reached = (raw["first"]["raised"] or "").startswith(_OutOfMemory.__name__)
        word = _word(raw["second"], _features(**inputs))
        return {
            "what compute raises": "reaches the caller" if reached else "does not reach the caller",
            "the next call": word if raw["second"]["computed"] else "takes what was left for a result",
        }

    def notes(self, raw, inputs):
        return {"the next call": raw["second"]["raised"]} if raw["second"]["raised"] else {}


@exercise.experiment("only the folder remembers")
class OnlyTheFolderRemembers(_OneTask):
    def ask_for(self, ask, inputs):
        ask(**inputs)
        with _next_kernel(ask.subject):
            kernel = ask(**copy.deepcopy(inputs))
        shutil.rmtree(ask.folder)
        ask.folder.mkdir()
        emptied = ask(**inputs)
        with TemporaryDirectory() as folder:
            ask.folder = Path(folder)
            return {"kernel": kernel, "without files": [emptied, ask(**inputs)]}

    def facts(self, raw, inputs):
        computed = all(answer["computed"] for answer in raw["without files"])
        return {
            "the first call of the next kernel, with equal copies": _word(raw["kernel"], _features(**inputs)),
            "in an emptied folder, and in another": "computes" if computed else "not always computed",
        }


def _word(answer: dict, wanted: Tensor) -> str:
    """What a call did, in a word or two."""
    if answer["features"] is None:
        return "raises"
    did = ("reads", "computes", "computes more than once")[min(answer["computed"], 2)]
    return did if near(answer["features"], wanted) else f"{did}, and gives wrong features"


def _together(words: set[str]) -> str:
    return words.pop() if len(words) == 1 else ", ".join(f"{word} for some" for word in sorted(words))


def _cut(folder: Path, share: float) -> None:
    """Replace every file by one that holds the first share of it; a tensor that is mapped to the old file stays whole."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: int(share * len(content))])


@contextmanager
def _next_kernel(subject: Subject) -> Iterator[None]:
    """Give the subject's `hash` other numbers for texts and bytes, as Python's own has in every new process."""
    subject = subject.func if isinstance(subject, partial) else subject
    call = subject if inspect.isroutine(subject) else type(subject).__call__
    names = getattr(inspect.unwrap(call), "__globals__", {})
    if "hash" in names:
        yield
        return
    names["hash"] = lambda thing: builtins.hash(thing) ^ _holds_text(thing)
    try:
        yield
    finally:
        names.pop("hash", None)


def _holds_text(thing: object) -> bool:
    return isinstance(thing, str | bytes) or (isinstance(thing, tuple | frozenset) and any(map(_holds_text, thing)))


def _contents(*tensors: Tensor) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def _state(backbone: nn.Module) -> list[bytes]:
    return _contents(*backbone.state_dict().values())


def _digest(key: tuple) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _read(path: Path) -> Tensor | None:
    try:
        return torch.load(path)
    except (OSError, EOFError, RuntimeError):
        return None


def _write(path: Path, features: Tensor) -> None:
    torch.save(features, path)


def cached(
    folder, compute, backbone, images, settings, *, weights=_state, pixels=_contents, name=_digest, read=_read, write=_write
):
    """A right solution: what the key has of backbone and images, the file name made from it, reading, writing."""
    path = folder / f"{name((weights(backbone), pixels(images), settings))}.pt"
    features = read(path)
    if features is None:
        features = compute(backbone, images, **settings)
        write(path, features)
    return features


def _write_alone(path: Path, features: Tensor) -> None:
    for file in path.parent.iterdir():
        file.unlink()
    _write(path, features)


def _read_or_take_the_place(path: Path) -> Tensor | None:
    features = _read(path)
    if features is None:
        _write(path, torch.zeros(0))
    return features


_MEMORY: dict[Path, Tensor] = {}

CHANGES = {
    "one file for everything": {"name": lambda key: "features"},
    "weights not in the key": {"weights": repr},
    "buffers not in the key": {"weights": lambda backbone: _contents(*backbone.parameters())},
    "weights as they are printed in the key": {"weights": lambda backbone: str(backbone.state_dict())},
    "only the shape of the images in the key": {"pixels": lambda images: images.shape},
    "order of the images not in the key": {"pixels": lambda images: _contents(images.sum(0))},
    "images as they are printed in the key": {"pixels": str},
    "settings not in the key": {"name": lambda key: _digest(key[:2])},
    "objects in place of contents in the key": {"weights": hash, "pixels": hash},
    "more than contents in the key": {"weights": lambda backbone: (_state(backbone), id(backbone))},
    "a key for one kernel": {"name": lambda key: hash(repr(key))},
    "one result at a time": {"write": _write_alone},
    "damaged file believed": {"read": lambda path: torch.load(path) if path.exists() else None},
    "file made before the features": {"read": _read_or_take_the_place},
    "nothing is kept": {"read": lambda path: None},
    "kept in memory": {"read": _MEMORY.get, "write": _MEMORY.__setitem__},
}
exercise.misconceptions_of(cached, CHANGES)
