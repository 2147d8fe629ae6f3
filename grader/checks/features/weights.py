"""Exercise 2.5: what a network sees, in words, with the preprocessing and the categories that its weights bring along."""

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.features import photographs
from grader.checks.features.photographs import ALL, CATEGORIES
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near, which
from helpers import expect
from helpers.backbones import classify
from helpers.features import extract

exercise = Exercise(__name__, "2.5", classify, core=5)

NUMBERS = "the numbers of all categories of an image"  # one fact in two experiments: a name has to explain both
_CALL = "weights", "model", "images", "k"
_MANY = 1000  # categories; sorts of few numbers go well by chance
_RED_AND_BLUE = (220, 40, 60), (30, 70, 210)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@exercise.experiment("own normalisation", 1, 3)
class OwnNormalisation(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        # A red, a green and a blue image, so that sizes play no part, and no two normalisations are nearly the same.
        dark, bright = trial.normal(2, 3, 3).abs().clamp(max=2) * 15 + torch.tensor([0, 200]).view(2, 1, 1)
        colours = dark.where(torch.eye(3) == 0, bright).to(torch.uint8)[trial.permutation(3)]
        sizes = (12, 20), (20, 14), (17, 17)
        images = [colour.view(3, 1, 1).repeat(1, *size) for colour, size in zip(colours, sizes, strict=True)]
        return {"weights": photographs.weights(trial), "model": photographs.plain_network(trial), "images": images}

    def measure(self, subject, inputs):
        return _answer(subject, **inputs)

    def facts(self, raw, inputs):
        transforms, model = inputs["weights"].transforms(), inputs["model"]
        once = [transforms(image) for image in inputs["images"]]
        colours = torch.stack([image[:, :1, :1] for image in inputs["images"]]) / 255
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in _IMAGENET.values())
        own_mean, own_std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (transforms.mean, transforms.std))
        known = {
            "by the mean and std of the weights": torch.stack(once),
            "by the mean and std of ImageNet": (colours - mean) / std,
            "by the mean and std of the weights, twice": torch.stack([transforms(image) for image in once]),
            "by the mean and std of the weights, values from 0 to 255": (255 * colours - own_mean) / own_std,
            "not at all, values from 0 to 1": colours,
            "not at all, values from 0 to 255": 255 * colours,
        }
        how, order = None, None
        if (probabilities := _as_probabilities(raw["numbers"])) is not None:
            how, half = "in another way", _half_a_digit(raw["numbers"])
            for name, prepared in known.items():
                with torch.no_grad():
                    places = _places(probabilities, model(prepared).softmax(1), half)
                if places is not None:
                    # With values up to 255 nearly all of the probability is in one class, for several images in the same one.
                    seen = not name.endswith("from 0 to 255")
                    how, order = name, ("that of the images" if places == sorted(places) else "another") if seen else None
                    break
        return {"the images were normalised": how, "the order of the results": order}


@exercise.experiment("own crop", 1)
class OwnCrop(Experiment):
    shapes: ClassVar = {"a square image": (40, 40), "a wide image": (40, 80), "a tall image": (80, 40)}

    def draw(self, trial: Trial) -> dict:
        images = []
        for turn, size in enumerate(self.shapes.values()):
            colour = torch.tensor([90.0, 125.0, 160.0]).roll(turn).view(3, 1, 1)
            images.append((colour + 20 * trial.normal(3, *size)).clamp(60, 190).to(torch.uint8))
        plain = torch.tensor([90, 125, 160], dtype=torch.uint8).view(3, 1, 1)
        # The preset keeps the central 20 x 20 pixels; of an image that was squeezed to a square, it would keep 20 x 40.
        calls = {
            "as drawn": images,
            "before": [photographs.bright(image, -math.inf, -15) for image in images],
            "behind": [photographs.bright(image, 15, math.inf) for image in images],
            "inside": [photographs.bright(image, 5, 9) for image in images],
            "one colour": [plain.expand(3, *size).clone() for size in ((40, 40), (24, 90), (90, 24))],
            "striped": [photographs.striped(images[0], first) for first in (2, 4)],
        }
        model = photographs.trained_network(trial, norm=False, dropout=False)
        return {"weights": photographs.weights(trial), "model": model, "calls": calls}

    def measure(self, subject, inputs):
        calls = inputs["calls"].items()
        return {what: _answer(subject, inputs["weights"], inputs["model"], images) for what, images in calls}

    def facts(self, raw, inputs):
        drawn, before, behind, inside, plain, striped = map(_by_category, raw.values())
        facts = {}
        for number, shape in enumerate(self.shapes):
            values = list(drawn[number].values())
            seen = not near(values, values[0])
            for where, calls in (("that the crop leaves out", (before, behind)), ("at the edge of what it keeps", (inside,))):
                count = {not _close(drawn[number], changed[number]) for changed in calls}
                word = "count on one side" if len(count) == 2 else "count" if count == {True} else "do not count"
                facts[f"pixels of {shape} {where}"] = word if seen else None
        values = list(plain[0].values())
        alike = "the same" if all(_close(image, plain[0]) for image in plain) else "different"
        facts["the numbers of images of one colour and any shape"] = None if near(values, values[0]) else alike
        skipped = any(_close(drawn[0], image) for image in striped)
        facts["pixels between those that a resize without antialiasing looks at"] = "do not count" if skipped else "count"
        return facts


@exercise.experiment("names of the outputs", 2)
class NamesOfTheOutputs(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = photographs.plain_network(trial)
        model[2].weight.data.zero_()  # the same logits whatever the image
        return {"weights": photographs.weights(trial), "model": model, "images": photographs.photos(trial, 2)}

    def measure(self, subject, inputs):
        return _answer(subject, **inputs)

    def facts(self, raw, inputs):
        if any(near(gap, 0) for gap in raw["numbers"].sort().values.diff().flatten()):  # two equal outputs
            return {"the names, from the largest output to the smallest": None}
        categories = inputs["weights"].meta["categories"]
        order = inputs["model"][2].bias.argsort(descending=True).tolist()
        known = {
            "categories by their index": [categories[i] for i in order],
            "categories in alphabetical order": [sorted(categories)[i] for i in order],
            "categories in their order, whatever the outputs": categories,
        }
        matching = (name for name, names in known.items() if all(row == names for row in _ranked(raw)))
        return {"the names, from the largest output to the smallest": next(matching, "different")}


class _FewAndAll(Experiment):
    """Asks for the k likeliest categories of some photos, and for all categories."""

    def draw(self, trial: Trial) -> dict:
        k = trial.integer(3, 5)
        model = photographs.trained_network(trial, norm=False, dropout=False)
        return {"weights": photographs.weights(trial), "model": model, "images": photographs.photos(trial, 3), "k": k}

    def measure(self, subject, inputs):
        return {"some": _answer(subject, **inputs), "all": _answer(subject, **inputs | {"k": ALL})}


@exercise.experiment("likeliest first", 3)
class LikeliestFirst(_FewAndAll):
    def draw(self, trial: Trial) -> dict:
        names = [f"{word} {number}" for word in CATEGORIES for number in range(_MANY // ALL)]
        model = photographs.plain_network(trial, _MANY)
        model[2].weight.data.zero_()  # the same outputs whatever the image, and none near another
        model[2].bias.data.mul_(3)
        return super().draw(trial) | {"many": {"weights": photographs.weights(trial, names), "model": model}}

    def measure(self, subject, inputs):
        one, many = inputs | {"images": inputs["images"][:1]}, inputs | inputs["many"]
        calls = {"some": inputs, "all": inputs | {"k": ALL}, "single": one | {"k": 1}, "single, all": one | {"k": ALL}}
        calls |= {"many": many | {"k": _MANY // 3}, "many, all": many | {"k": _MANY}}
        return {name: _answer(subject, **{part: call[part] for part in _CALL}) for name, call in calls.items()}

    def facts(self, raw, inputs):
        k, numbers = inputs["k"], raw["some"]["numbers"]
        falling, rising = ((way * numbers.diff(dim=1) >= 0).all() for way in (-1, 1))
        listed = [set(names) for names in raw["some"]["names"]]
        likeliest, least = ([set(names[part]) for names in _ranked(raw["all"])] for part in (slice(k), slice(-k, None)))
        which = "the likeliest" if listed == likeliest else "the least likely" if listed == least else "different"
        every, (first,) = raw["single, all"]["numbers"], raw["single"]["names"]
        alone = "the likeliest" if first == _ranked(raw["single, all"])[0][:1] else "another"
        return {
            "the categories listed": which,
            "a single category of a single image": None if near(every, every[0, 0].item()) else alone,
            "their numbers": "falling" if falling else "rising" if rising else "neither falling nor rising",
            f"the categories listed, of {_MANY}": self.listed(raw),
        }

    def listed(self, raw: dict) -> str | None:
        if near(raw["many, all"]["numbers"], raw["many, all"]["numbers"][0, 0].item()):
            return None
        found = set()
        for numbers, names in zip(_by_category(raw["many, all"]), raw["many"]["names"], strict=True):
            listed, wanted = [numbers[name] for name in names], sorted(numbers.values(), reverse=True)[: len(names)]
            right = "the likeliest in another order" if sorted(listed, reverse=True) == wanted else "different"
            found.add("the likeliest in their order" if listed == wanted else right)
        return found.pop() if len(found) == 1 else "different"


@exercise.experiment("probabilities", 4)
class Probabilities(_FewAndAll):
    points = 2

    def facts(self, raw, inputs):
        images, listed = _by_category(raw["all"]), _by_category(raw["some"])
        same = all(
            _close({name: image.get(name, math.inf) for name in few}, few) for image, few in zip(images, listed, strict=True)
        )
        return {
            NUMBERS: _nature(raw["all"]["numbers"], images),
            "a category's number when fewer are listed": "the same" if same else "another",
        }

    def notes(self, raw, inputs):
        numbers = raw["all"]["numbers"]
        return {NUMBERS: f"from {numbers.min():.2g} to {numbers.max():.2g}"}


@exercise.experiment("softmax of the outputs", 4)
class SoftmaxOfTheOutputs(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = photographs.plain_network(trial)
        model[2].weight.data.zero_()  # the same outputs whatever the image
        model[2].bias.data.mul_(6)  # so that small probabilities are small indeed, and cannot be rounded without loss
        return {"weights": photographs.weights(trial), "model": model, "images": photographs.photos(trial, 2)}

    def measure(self, subject, inputs):
        return _answer(subject, **inputs)

    def facts(self, raw, inputs):
        outputs = inputs["model"][2].bias.double().sort().values
        numbers = raw["numbers"].sort(dim=1).values
        shares = {"the softmax of the outputs": outputs.softmax(0), "the sigmoid of each output": outputs.sigmoid()}
        known = {name: share.clamp_min(1e-12).log() for name, share in shares.items()}
        known |= {"the outputs themselves": outputs, "the logarithm of their softmax": outputs.log_softmax(0)}
        found = set()
        for row in numbers:
            comparable = row.clamp_min(1e-12).log() if (row >= 0).all() else row
            how = which(comparable, known | {"all alike": row.mean().expand(ALL).log()}, "something else")
            half = _half_a_digit(row)
            rounded = half and how == "something else" and (row - outputs.softmax(0)).abs().max() <= half
            found.add("the softmax of the outputs, rounded" if rounded else how)
        return {NUMBERS: found.pop() if len(found) == 1 else "something else"}

    def notes(self, raw, inputs):
        return {NUMBERS: f"from {raw['numbers'].min():.2g} to {raw['numbers'].max():.2g}"}


@exercise.experiment("by itself", 5)
class ByItself(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {
            "weights": photographs.weights(trial),
            "models": {
                "BatchNorm": photographs.trained_network(trial, dropout=False),
                "dropout": photographs.trained_network(trial, norm=False),
            },
            "images": photographs.photos(trial, 5),
            "colours": [torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, 16, 16) for colour in _RED_AND_BLUE],
        }

    def measure(self, subject, inputs):
        image, a, b, c, d = inputs["images"]
        calls = {
            kind: [_answer(subject, inputs["weights"], model, images) for images in ([a, image, b], [c, image, d])]
            for kind, model in inputs["models"].items()
        }
        model = inputs["models"]["BatchNorm"]
        return {"calls": calls, "alone": [_answer(subject, inputs["weights"], model, [plain]) for plain in inputs["colours"]]}

    def facts(self, raw, inputs):
        facts = {}
        for kind, calls in raw["calls"].items():
            first, second = (_by_category(call)[1] for call in calls)
            same = "the same" if _close(first, second) else "different"
            facts[f"the numbers of one image in other company, with {kind}"] = same
        # A BatchNorm that sees one image of one colour makes the same of any, unless it goes by stored statistics.
        red, blue = (_by_category(call)[0] for call in raw["alone"])
        values = list(red.values())
        alike = "the same" if _close(red, blue) else "different"
        facts["the numbers of a red image and of a blue one, each alone"] = None if near(values, values[0]) else alike
        return facts


@exercise.experiment("left as found", 6)
class LeftAsFound(Experiment):
    def draw(self, trial: Trial) -> dict:
        layers = photographs.trained_network(trial)
        layers[4].eval()  # one BatchNorm is in eval mode, as a frozen one would be, and the block that it is in is not
        layers[0].requires_grad_(False)
        model = nn.Sequential(layers[:3], layers[3:7], layers[7:])
        return {"weights": photographs.weights(trial), "model": model, "images": photographs.photos(trial, 3)}

    def measure(self, subject, inputs):
        _answer(subject, **inputs, k=2)
        return {"traces": traces.of(inputs["model"]), "hooks": traces.hooks(inputs["model"])}

    def facts(self, raw, inputs):
        changes = traces.changes(inputs["model"], raw["traces"], "buffers", "flags", "modes")
        return changes | {"hooks that are left": traces.some(range(raw["hooks"]))}


def _answer(subject, weights, model: nn.Module, images: list[Tensor], k: int = ALL) -> dict:
    """The answer as names, a list of k strings for each image, and numbers, (n, k); or a sentence about its form."""
    names, numbers = [], []
    for result in _listed(subject(weights, model, list(images), k), len(images), "the results, one per image,"):
        pairs = _listed(result, k, "the result of an image, k pairs,")
        pairs = [_listed(pair, 2, "a pair (category, probability)") for pair in pairs]
        for name, _ in pairs:
            if not isinstance(name, str):
                wanted = "a pair is (category, probability): the category must be a string"
                raise WrongReturn(f"{wanted}, got {expect.describe(name)}.")
        names.append([str(name) for name, _ in pairs])
        if len(set(names[-1])) < k:
            raise WrongReturn(f"the {k} categories of an image must be {k} different ones, got {', '.join(names[-1])}.")
        numbers.append([expect_number(number, "a probability") for _, number in pairs])
    return {"names": names, "numbers": torch.tensor(numbers, dtype=torch.float64)}


def _listed(value: object, length: int, what: str) -> list:
    """Anything that can be listed and has that length, or what came in its place."""
    if isinstance(value, str | dict | Tensor) or not isinstance(value, Iterable):
        raise wrong_return(f"{what} must be a list or tuple", value)
    items = list(value)
    if len(items) != length:
        raise WrongReturn(f"{what} must be a list or tuple of {length}, got {len(items)}.")
    return items


def _by_category(raw: dict) -> list[dict[str, float]]:
    return [dict(zip(*row, strict=True)) for row in zip(raw["names"], raw["numbers"].tolist(), strict=True)]


def _ranked(raw: dict) -> list[list[str]]:
    """The names of each image, from the largest number to the smallest."""
    return [sorted(image, key=image.get, reverse=True) for image in _by_category(raw)]


def _close(numbers: dict[str, float], expected: dict[str, float]) -> bool:
    values = list(expected.values())
    largest = max(map(abs, values)) or 1.0  # of small numbers the changes are small, too
    return numbers.keys() == expected.keys() and near([numbers[name] for name in expected], values, largest)


def _nature(numbers: Tensor, images: list[dict[str, float]]) -> str:
    """What the numbers of all categories are, n images in the rows of `numbers`."""
    if (numbers >= 0).all() and (near(numbers.sum(1), 1) or _add_up(numbers)):
        return "are at least 0 and add up to 1"
    if (numbers <= 0).all() and near(numbers.exp().sum(1), 1):
        return "are logarithms of probabilities"
    if (numbers < 0).any():
        return "are below 0 in part"
    if near(numbers.sum(1) / 100, 1):
        return "add up to 100"
    if near([sum(image.get(name, 0.0) for image in images) for name in CATEGORIES], 1):
        return "do not add up to 1, but those of a category in all images do"
    return "are at least 0 and do not add up to 1"


def _as_probabilities(numbers: Tensor) -> Tensor | None:
    """The probabilities behind the numbers of all categories, if they are those, percent, logarithms or logits."""
    if (numbers < 0).any():
        return numbers.softmax(1)
    total = numbers.sum(1, keepdim=True)
    if _add_up(numbers):
        return numbers
    return next((numbers / whole for whole in (1, 100) if near(total / whole, 1)), None)


def _half_a_digit(numbers: Tensor) -> float:
    """How far numbers that are all rounded to 2, 3 or 4 digits can be from what they were; 0 for all others."""
    scaled = ((digits, numbers * 10**digits) for digits in (2, 3, 4))
    return next((0.51 / 10**digits for digits, values in scaled if (values - values.round()).abs().max() < 1e-3), 0.0)


def _add_up(numbers: Tensor) -> bool:
    """Whether numbers that were rounded add up to 1, as far as they can."""
    return bool(((numbers.sum(1) - 1).abs() < _half_a_digit(numbers) * numbers.shape[1]).all())


def _places(rows: Tensor, expected: Tensor, half: float) -> list[int] | None:
    """Where each row of `expected` is found in `rows`, rounded by up to `half`, whatever the order of the columns."""
    rows, expected = (values.double().sort(dim=1).values for values in (rows, expected))
    if not half:  # as logarithms, which are far apart where small probabilities differ
        rows, expected = (values.clamp_min(1e-9).log() for values in (rows, expected))

    def found(row: Tensor, wanted: Tensor) -> bool:
        return bool((row - wanted).abs().max() < half) if half else near(row, wanted)

    places = [next((i for i, row in enumerate(rows) if found(row, wanted)), None) for wanted in expected]
    return None if None in places else places


def _prepare(weights, image: Tensor, **changes) -> Tensor:
    """What enters the network; `changes` are other numbers for the preset of the weights."""
    return weights.transforms(**changes)(image)


def _squeezed(image: Tensor) -> Tensor:
    from torchvision.transforms import functional as TF  # here: it takes as long to import as torch

    return TF.resize(image, [224, 224], antialias=True)


_SHARES = nn.Softmax(dim=1)


def classified(weights, model, images, k, *, prepare=_prepare, outputs=extract, shares=_SHARES, best=torch.topk, names=list):
    """A right solution: an image prepared, the network's outputs, shares of 1, the k best of them, names by index."""
    logits = outputs(model, torch.stack([prepare(weights, image) for image in images]))
    values, columns = best(shares(logits), k)
    categories = names(weights.meta["categories"])
    rows = zip(columns.tolist(), values.tolist(), strict=True)
    return [[(categories[column], value) for column, value in zip(*row, strict=True)] for row in rows]


def _with_norms_in_eval_mode(model: nn.Module, batch: Tensor) -> Tensor:
    with traces.kept(model, "modes"), torch.no_grad():
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d) and module.training)
        return model(batch)


def _shares_of_the_best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = logits.topk(k)
    return values.softmax(1), columns


CHANGES = {
    "ImageNet's mean and std": {"prepare": partial(_prepare, **_IMAGENET)},
    "not normalised": {"prepare": partial(_prepare, mean=(0, 0, 0), std=(1, 1, 1))},
    "not divided by 255": {"prepare": lambda weights, image: _prepare(weights, image.float())},
    "squeezed to a square": {"prepare": lambda weights, image: _prepare(weights, _squeezed(image))},
    "preprocessed twice": {"prepare": lambda weights, image: _prepare(weights, _prepare(weights, image))},
    "other sizes than the preset's": {"prepare": partial(_prepare, resize_size=256, crop_size=224)},
    "logits for probabilities": {"shares": nn.Identity()},
    "sigmoid in place of softmax": {"shares": torch.sigmoid},
    "softmax over the images": {"shares": nn.Softmax(dim=0)},
    "softmax over the k listed": {"shares": nn.Identity(), "best": _shares_of_the_best},
    "rounded": {"shares": lambda logits: logits.softmax(1).double().mul(1e4).round() / 1e4},
    "categories in alphabetical order": {"names": sorted},
    "least likely": {"best": partial(torch.topk, largest=False)},
    "likeliest last": {"best": lambda shares, k: [part.flip(1) for part in shares.topk(k)]},
    "train mode": {"outputs": lambda model, batch: model(batch)},
    "only BatchNorm in eval mode": {"outputs": _with_norms_in_eval_mode},
    "left in eval mode": {"outputs": lambda model, batch: extract(model.eval(), batch)},
}
exercise.misconceptions_of(classified, CHANGES)
