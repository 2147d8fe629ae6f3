"""Exercise 2.4a: a name for what a backbone makes of images, the same for equal contents and for nothing else."""

import copy
import re

import torch
from torch import nn

from grader.checks.features import contents
from grader.experiment import Exercise, Experiment, Trial, wrong_return
from helpers.features import cache_key

exercise = Exercise(__name__, "2.4a", cache_key, core=5)


def _key(subject, backbone: nn.Module, images, settings: dict) -> str:
    key = subject(backbone, images, dict(settings))
    if not isinstance(key, str):
        raise wrong_return("cache_key must return a str", key)
    return str(key)


class _Compared(Experiment):
    """Draws one task, and asks a subject for keys of it."""

    def draw(self, trial: Trial) -> dict:
        return contents.task(trial)


@exercise.experiment("equal contents", 1)
class EqualContents(_Compared):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return super().draw(trial) | {"settings": {"mean": trial.integer(3, 7) / 16, "std": 0.3081, "size": 8}}

    def measure(self, subject, inputs):
        backbone, images, settings = inputs.values()
        key = _key(subject, *inputs.values())
        keys = {
            "asked again": _key(subject, backbone, images, settings),
            "a copy of the backbone": _key(subject, copy.deepcopy(backbone), images, settings),
            "a copy of the images": _key(subject, backbone, images.clone(), settings),
            "a copy in train mode, and frozen": _key(
                subject, copy.deepcopy(backbone).train().requires_grad_(False), images, settings
            ),
            "settings in another order": _key(subject, backbone, images, dict(reversed(settings.items()))),
        }
        with contents.next_kernel(subject):
            keys["the next kernel"] = _key(subject, *copy.deepcopy(inputs).values())
        return {"equal": {what: other == key for what, other in keys.items()}}

    def facts(self, raw, inputs):
        facts = {what: "the same key" if equal else "another key" for what, equal in raw["equal"].items()}
        if not raw["equal"]["a copy of the backbone"] or not raw["equal"]["a copy of the images"]:
            facts |= dict.fromkeys(("the next kernel", "a copy in train mode, and frozen"))  # they are copies
        return facts


class _Notices(_Compared):
    """Asks for a key, and then for the key after each of some changes."""

    def changes(self, inputs: dict) -> contents.Changes:
        raise NotImplementedError

    def measure(self, subject, inputs):
        keys, asked = {_key(subject, *inputs.values())}, []
        noticed: dict[str, list[bool]] = {}
        for what, changed in self.changes(inputs):
            asked.append(changed)  # alive to the end, so that no id is given twice
            key = _key(subject, *changed.values())
            noticed.setdefault(what, []).append(key not in keys)
            keys.add(key)
        return {"noticed": noticed}

    def facts(self, raw, inputs):
        words = {True: "another key", False: "the same key"}
        return {
            what: words[noticed[0]] if len(set(noticed)) == 1 else "another key for some"
            for what, noticed in raw["noticed"].items()
        }


@exercise.experiment("other weights", 2)
class OtherWeights(_Notices):
    points = 2

    def changes(self, inputs):
        yield from contents.other_weights(inputs)
        yield from contents.exchanged_weights(inputs)
        backbone = inputs["backbone"]
        numbers = backbone[2].weight.detach().view(-1)
        numbers[numbers.argmax()] += 8e-5  # which print shows, and half precision does not
        yield "a number of a parameter changed in its fourth digit", inputs
        for number in (2**24, 2**24 + 1):  # one number to those who turn all into float32
            backbone.register_buffer("places", torch.tensor([1, number, 3], device=numbers.device))
            yield "a large whole number of a buffer changed", inputs


@exercise.experiment("other images", 3)
class OtherImages(_Notices):
    def changes(self, inputs):
        yield from contents.other_images(inputs)
        yield from contents.exchanged_images(inputs)
        yield "the first 19 of the images", inputs | {"images": inputs["images"][:-1]}
        yield "the last 19", inputs | {"images": inputs["images"][1:]}


@exercise.experiment("other settings", 4)
class OtherSettings(_Notices):
    def changes(self, inputs):
        yield from contents.other_settings(inputs)
        yield from contents.exchanged_settings(inputs)
        yield from contents.close_settings(inputs)
        yield "no settings", inputs | {"settings": {}}
        yield "whole numbers", inputs | {"settings": {"batch": 3, "size": 12}}
        yield "whole numbers of the same digits", inputs | {"settings": {"batch": 31, "size": 2}}
        yield "a name that ends in a digit", inputs | {"settings": {"layer1": 2.5}}
        yield "the same letters and digits, cut elsewhere", inputs | {"settings": {"layer": 12.5}}
        yield "a name in capitals", inputs | {"settings": {"LAYER": 12.5}}
        for number in range(300):
            small = inputs | {"backbone": nn.Flatten(), "images": inputs["images"][:1]}
            yield "three hundred values", small | {"settings": {"mean": number / 4}}

    def facts(self, raw, inputs):
        """How many of the last digits are seen is of no matter."""
        facts, close = super().facts(raw, inputs), "a value that differs in its last digits"
        return facts | {close: "another key" if facts[close] == "another key" else "the same key"}


@exercise.experiment("name of a file", 5)
class NameOfAFile(_Compared):
    def measure(self, subject, inputs):
        many = {f"setting {number}": number for number in range(99)}
        return {"keys": [_key(subject, *(inputs | {"settings": settings}).values()) for settings in (inputs["settings"], many)]}

    def facts(self, raw, inputs):
        longest = max(map(len, raw["keys"]))
        plain = all(re.fullmatch(r"[A-Za-z0-9_-]*", key) for key in raw["keys"])
        return {
            "characters of the key": "letters, digits, - and _" if plain else "others, too",
            "length of the key": "from 1 to 200" if 1 <= longest <= 200 else "0" if longest == 0 else "more than 200",
        }

    def notes(self, raw, inputs):
        longest = max(raw["keys"], key=len)
        return {"length of the key": f"{len(longest)}", "characters of the key": repr(longest[:40])}


@exercise.experiment("buffers that are not saved", 6)
class BuffersThatAreNotSaved(_Notices):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["backbone"][0].register_buffer("scale", trial.normal(3), persistent=False)
        return inputs

    def changes(self, inputs):
        inputs["backbone"][-1].running_mean[1] += 1
        yield "one number changed in a buffer", inputs
        inputs["backbone"][0].scale[1] += 1
        yield "one number changed in a buffer that is not persistent", inputs

    def facts(self, raw, inputs):
        saved, not_saved = super().facts(raw, inputs).items()
        return {not_saved[0]: not_saved[1] if saved[1] == "another key" else None}


@exercise.experiment("shape and dtype", 7)
class ShapeAndDtype(_Notices):
    def changes(self, inputs):
        yield from contents.other_shapes(inputs)
        black = inputs["images"].new_zeros(20, 1, 8, 8, dtype=torch.int32)
        yield "black images in whole numbers of as many bytes", inputs | {"images": black}
        for what, layer in (("zeros as weights, 6 -> 4", nn.Linear(6, 4)), ("zeros as weights, 4 -> 6", nn.Linear(4, 6))):
            layer.to(black.device).bias = None
            layer.weight.detach().zero_()
            yield what, inputs | {"backbone": layer}
        ones, zeros = torch.ones(3, device=black.device), torch.zeros(3, device=black.device)
        kinds = {"ones as a buffer": ones, "zeros as a buffer": zeros, "zeros as a buffer of whole numbers": zeros.int()}
        for what, buffer in kinds.items():
            layer = nn.Flatten()
            layer.register_buffer("places", buffer)
            yield what, inputs | {"backbone": layer}

    def facts(self, raw, inputs):
        """Where buffers do not count at all, their dtype cannot be seen."""
        facts = super().facts(raw, inputs)
        noticed = [facts.pop("ones as a buffer"), facts.pop("zeros as a buffer")]
        return facts if "the same key" not in noticed else facts | {"zeros as a buffer of whole numbers": None}


@exercise.experiment("place in memory", 8)
class PlaceInMemory(_Compared):
    def measure(self, subject, inputs):
        backbone, images, settings = inputs.values()
        wide = torch.stack([images, images.flip(0)], dim=-1)[..., 0]  # the same numbers, with others between them
        turned = images.transpose(2, 3).contiguous().transpose(2, 3)
        rows = torch.cat([images, images])[len(images) :]
        keys = [_key(subject, backbone, some, settings) for some in (images, images.clone(), wide, turned, rows)]
        return {"equal": [key == keys[0] for key in keys[1:]]}

    def facts(self, raw, inputs):
        copied, *equal = raw["equal"]
        names = "with other numbers between them", "column by column", "as the end of a larger tensor"
        words = ("the same key" if same else "another key" for same in equal)
        return {f"images that lie in memory {name}": word if copied else None for name, word in zip(names, words, strict=True)}


def keyed(
    backbone,
    images,
    settings,
    *,
    weights=contents.state,
    pixels=contents.contents,
    order=lambda settings: sorted(settings.items()),
    name=contents.digest,
):
    """A right solution: what the key has of backbone, images and settings, and the text that is made from it."""
    return name(weights(backbone), pixels(images), order(settings))


def _saved(backbone: nn.Module) -> list:
    return contents.contents(*backbone.state_dict().values())


def _bytes(images) -> bytes:
    return images.numpy().tobytes()


CHANGES = {
    "weights not in the key": {"weights": repr},
    "buffers not in the key": {"weights": lambda backbone: contents.contents(*backbone.parameters())},
    "state dict for all buffers": {"weights": _saved},
    "weights as they are printed": {
        "weights": lambda backbone: str([t.detach() for t in (*backbone.parameters(), *backbone.buffers())])
    },
    "sums in place of contents": {
        "weights": lambda backbone: [t.double().sum().item() for t in (*backbone.parameters(), *backbone.buffers())],
        "pixels": lambda images: (images.dtype, images.shape, images.double().sum().item()),
    },
    "images not in the key": {"pixels": lambda images: (images.dtype, images.shape)},
    "order of the images not in the key": {"pixels": lambda images: (images.dtype, images.shape, sorted(map(_bytes, images)))},
    "images as they are printed": {"pixels": lambda images: (images.dtype, images.shape, str(images))},
    "bytes without their shape": {"pixels": _bytes},
    "settings not in the key": {"order": lambda settings: None},
    "settings rounded": {"order": lambda settings: sorted(f"{name} {settings[name]:.3f}" for name in settings)},
    "names of the settings not in the key": {"order": lambda settings: [settings[name] for name in sorted(settings)]},
    "settings in the order in which they come": {"order": str},
    "objects in place of contents": {"weights": hash, "pixels": hash},
    "more than contents": {
        "weights": lambda backbone: (contents.state(backbone), id(backbone)),
        "pixels": lambda images: (contents.contents(images), id(images)),
    },
    "a key for one kernel": {"name": lambda *parts: f"{hash(repr(parts)):x}"},
}
exercise.misconceptions_of(keyed, CHANGES)
