"""Exercise 2.4: compute features once, keep them in files, and notice when they are no longer the right ones."""

import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from grader.checks.features import contents
from grader.experiment import Exercise, Experiment, Subject, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import cached_features

exercise = Exercise(__name__, "2.4", cached_features, core=3)

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
            return contents.features(backbone, images[..., :size, :size], {"mean": mean, "std": std})

        self.compute = compute

    def __call__(self, backbone, images, settings, *, fails=False, catch=(), turned=False) -> dict[str, Any]:
        """What came of one call. With `fails`, `compute` raises; with `turned`, the settings come in another order.

        An exception in `catch` is an answer too, unless it came after `compute`: then it is not about a file.
        """
        self.computed, self.fails = 0, fails
        self.asked += [backbone, images]
        settings = settings | {"size": self.size}
        given = dict(reversed(settings.items())) if turned else dict(settings)
        features = raised = None
        try:
            answer = self.subject(self.folder, self.compute, backbone, images, given)
            features = expect_tensor(answer, (len(images), backbone[-1].num_features), "the features").detach().clone()
        except catch as error:
            if self.computed:
                raise
            raised = f"{type(error).__name__}: {error}"
        if given != settings:
            raise WrongReturn("cached_features changed its settings: work on a copy of them.")
        return {"computed": self.computed, "features": features, "raised": raised}


class _OneTask(Experiment):
    """Draws one task, and asks a subject for its features several times, always with the same folder."""

    def draw(self, trial: Trial) -> dict:
        return contents.task(trial)

    def measure(self, subject, inputs):
        with TemporaryDirectory() as folder:
            return self.ask_for(_Ask(subject, folder), inputs)

    def ask_for(self, ask: _Ask, inputs: dict) -> dict:
        """The answers, as raw results."""
        raise NotImplementedError


@exercise.experiment("computed once", 1)
class ComputedOnce(_OneTask):
    points = 2

    def ask_for(self, ask, inputs):
        answers = {"first": ask(**inputs), "second": ask(**copy.deepcopy(inputs))}
        shutil.rmtree(ask.folder)
        ask.folder.mkdir()
        single = inputs | {"images": inputs["images"][:1]}
        return answers | {"one image": [ask(**single), ask(**single)]}

    def facts(self, raw, inputs):
        wanted = contents.features(**inputs)
        return {
            "the first call": _word(raw["first"], wanted),
            "the second call, with equal copies": _word(raw["second"], wanted),
            "dtype of the features in the second call": str(raw["second"]["features"].dtype),
            "two calls for a single image": [_word(answer, wanted[:1]) for answer in raw["one image"]],
        }


@exercise.experiment("every result stays", 2)
class EveryResultStays(_OneTask):
    def draw(self, trial: Trial) -> dict:
        task = contents.task(trial)
        tuned = task | {"backbone": contents.network(trial, task["backbone"][-1].num_features)}
        return {"tasks": [task, tuned, task, tuned]}

    def ask_for(self, ask, inputs):
        return {"answers": [ask(**task) for task in inputs["tasks"]]}

    def facts(self, raw, inputs):
        tasks = zip(raw["answers"], inputs["tasks"], strict=True)
        words = [_word(answer, contents.features(**task)) for answer, task in tasks]
        return {"calls with one backbone, another, the first, the other": words}


class _Notices(_OneTask):
    """Asks twice for the same, and then once for each of some changes.

    Only a cache that reads can fail to notice, so without a second call that reads nothing is observed here.
    The changes are new to the subject, and so small that features from a file could pass for the right ones.
    """

    def changes(self, inputs: dict) -> contents.Changes:
        raise NotImplementedError

    def ask_for(self, ask, inputs):
        return {
            "reads": [ask(**inputs)["computed"], ask(**inputs)["computed"]] == [1, 0],
            "answers": [ask(**changed, catch=WrongReturn) for _, changed in self.changes(inputs)],
        }

    def facts(self, raw, inputs):
        words: dict[str, set[str]] = {}
        for answer, (what, changed) in zip(raw["answers"], self.changes(inputs), strict=True):
            word = _word(answer, contents.features(**changed)) if answer["computed"] else "reads"
            words.setdefault(what, set()).add(word)
        return {what: _together(answers) if raw["reads"] else None for what, answers in words.items()}


@exercise.experiment("notices other weights", 2)
class NoticesOtherWeights(_Notices):
    points = 2

    def changes(self, inputs):
        yield from contents.other_weights(inputs)
        yield from contents.exchanged_weights(inputs)


@exercise.experiment("notices other images", 2)
class NoticesOtherImages(_Notices):
    def changes(self, inputs):
        yield from contents.other_images(inputs)
        yield from contents.exchanged_images(inputs)


@exercise.experiment("notices other settings", 2)
class NoticesOtherSettings(_Notices):
    def changes(self, inputs):
        yield from contents.other_settings(inputs)
        yield from contents.exchanged_settings(inputs)


@exercise.experiment("only the folder remembers", 1, 3)
class OnlyTheFolderRemembers(_OneTask):
    def ask_for(self, ask, inputs):
        ask(**inputs)
        with contents.next_kernel(ask.subject):
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
            "the first call of the next kernel, with equal copies": _word(raw["kernel"], contents.features(**inputs)),
            "in an emptied folder, and in another": "computes" if computed else "not always computed",
        }


@exercise.experiment("damaged file", 4)
class DamagedFile(_OneTask):
    def ask_for(self, ask, inputs):
        answers = []
        ask(**inputs)
        for share in (0.5, 0.0):
            _cut(ask.folder, lambda content, share=share: int(share * len(content)))
            answers.append([ask(**inputs, catch=Exception), ask(**inputs, catch=Exception)])
        _cut(ask.folder, lambda content: max(0, len(content) - 2))
        end = ask(**inputs, catch=Exception)
        shutil.rmtree(ask.folder)
        ask.folder.mkdir()
        return {"answers": answers, "without its end": end, "without a file": ask(**inputs, catch=Exception)}

    def facts(self, raw, inputs):
        wanted = contents.features(**inputs)
        for damaged, after in raw["answers"]:  # of the first file that is not replaced, if there is one
            words = _word(damaged, wanted), _word(after, wanted)
            if words != ("computes", "reads"):
                break
        meaning = {
            "computes": "counts as no file",
            "reads": "is not looked at" if raw["without a file"]["computed"] else None,
            "raises": "is taken for a result",
            "reads, and gives wrong features": "is taken for a result",
        }
        end = _word(raw["without its end"], wanted)
        return {
            "a file cut to half its length, or to nothing": meaning.get(words[0], words[0]),
            "the call after that": words[1] if words[0] == "computes" else None,
            # Two bytes may be white space: who reads the right features then has lost nothing.
            "a file without its last two bytes": "does no harm" if end in ("computes", "reads") else meaning.get(end, end),
        }

    def notes(self, raw, inputs):
        answers = [*(damaged for damaged, _ in raw["answers"]), raw["without its end"]]
        raised = [answer["raised"] for answer in answers if answer["raised"]]
        return {"a file cut to half its length, or to nothing": raised[0]} if raised else {}


@exercise.experiment("interrupted computation", 5)
class InterruptedComputation(_OneTask):
    def ask_for(self, ask, inputs):
        first = ask(**inputs, fails=True, catch=(_OutOfMemory, WrongReturn))
        return {"first": first, "second": ask(**inputs, catch=Exception)}

    def facts(self, raw, inputs):
        reached = (raw["first"]["raised"] or "").startswith(_OutOfMemory.__name__)
        word = _word(raw["second"], contents.features(**inputs))
        return {
            "what compute raises": "reaches the caller" if reached else "does not reach the caller",
            "the next call": word if raw["second"]["computed"] else "takes what was left for a result",
        }

    def notes(self, raw, inputs):
        return {"the next call": raw["second"]["raised"]} if raw["second"]["raised"] else {}


@exercise.experiment("settings in any order, to the last digit", 6)
class SettingsInAnyOrder(_Notices):
    def ask_for(self, ask, inputs):
        turned = [ask(**inputs), ask(**inputs, turned=True)]
        return super().ask_for(ask, inputs | {"settings": {"mean": 0.1306}}) | {"turned": turned}

    def changes(self, inputs):
        return contents.close_settings(inputs)

    def facts(self, raw, inputs):
        word = _word(raw["turned"][1], contents.features(**inputs)) if raw["reads"] else None
        return {"equal settings in another order": word} | super().facts(raw, inputs)


@exercise.experiment("images of another shape", 7)
class ImagesOfAnotherShape(_Notices):
    def changes(self, inputs):
        return contents.other_shapes(inputs)

    def facts(self, raw, inputs):
        black, smaller = super().facts(raw, inputs).values()
        return {"four times as many black images, of a quarter of the size": smaller if black == "computes" else None}


def _word(answer: dict, wanted: Tensor) -> str:
    """What a call did, in a word or two."""
    if answer["features"] is None:
        return "raises"
    did = ("reads", "computes", "computes more than once")[min(answer["computed"], 2)]
    return did if near(answer["features"], wanted) else f"{did}, and gives wrong features"


def _together(words: set[str]) -> str:
    return words.pop() if len(words) == 1 else ", ".join(f"{word} for some" for word in sorted(words))


def _cut(folder: Path, length: Callable[[bytes], int]) -> None:
    """Replace every file by one that holds its beginning; a tensor that is mapped to the old file stays whole."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[: length(content)])


def _read(path: Path) -> Tensor | None:
    try:
        return torch.load(path)
    except (OSError, EOFError, RuntimeError):
        return None


def _write(path: Path, features: Tensor) -> None:
    torch.save(features, path)


def _name(key: tuple) -> str:
    weights, images, settings = key
    return contents.digest(weights, images, settings)


def cached(
    folder,
    compute,
    backbone,
    images,
    settings,
    *,
    weights=contents.state,
    pixels=contents.contents,
    order=lambda settings: sorted(settings.items()),
    name=_name,
    read=_read,
    write=_write,
):
    """A right solution: what the key has of backbone, images and settings, the file name made from it, reading, writing."""
    path = folder / f"{name((weights(backbone), pixels(images), order(settings)))}.pt"
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
    "buffers not in the key": {"weights": lambda backbone: contents.contents(*backbone.parameters())},
    "weights as they are printed in the key": {"weights": lambda backbone: str(backbone.state_dict())},
    "sums in place of contents in the key": {
        "weights": lambda backbone: [tensor.double().sum().item() for tensor in backbone.state_dict().values()],
        "pixels": lambda images: (images.shape, images.double().sum().item()),
    },
    "only the shape of the images in the key": {"pixels": lambda images: images.shape},
    "order of the images not in the key": {"pixels": lambda images: contents.contents(images.sum(0))},
    "images as they are printed in the key": {"pixels": str},
    "bytes without their shape in the key": {"pixels": lambda images: images.numpy().tobytes()},
    "settings not in the key": {"order": lambda settings: None},
    "settings rounded in the key": {"order": lambda settings: sorted(f"{name} {settings[name]:.3f}" for name in settings)},
    "settings in the order in which they come": {"order": str},
    "objects in place of contents in the key": {"weights": hash, "pixels": hash},
    "more than contents in the key": {"weights": lambda backbone: (contents.state(backbone), id(backbone))},
    "a key for one kernel": {"name": lambda key: hash(repr(key))},
    "one result at a time": {"write": _write_alone},
    "damaged file believed": {"read": lambda path: torch.load(path) if path.exists() else None},
    "file made before the features": {"read": _read_or_take_the_place},
    "nothing is kept": {"read": lambda path: None},
    "kept in memory": {"read": _MEMORY.get, "write": _MEMORY.__setitem__},
}
exercise.misconceptions_of(cached, CHANGES)
