"""Exercise 2.5: what a network sees, in words, with the preprocessing and the categories that its weights bring along."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near
from helpers import expect
from helpers.backbones import classify
from helpers.features import extract

exercise = Exercise(__name__, "2.5", classify)

_CATEGORIES = ("accordion", "beaver", "gondola", "kite", "lighthouse", "pretzel", "teapot", "zebra")
_ALL = len(_CATEGORIES)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _weights(trial: Trial):
    """A member of a weights enum: torchvision's own preset with unusual numbers, and categories in random order."""
    from torchvision.models import ResNet18_Weights, Weights, WeightsEnum  # here: it takes as long to import as torch

    preset = partial(
        ResNet18_Weights.DEFAULT.transforms.func,
        resize_size=16,
        crop_size=8,  # the central half of an image: ImageNet's 224 of 256 is more
        mean=[trial.integer(10, 30) / 100 for _ in range(3)],
        std=[trial.integer(45, 65) / 100 for _ in range(3)],
    )
    categories = [_CATEGORIES[i] for i in trial.permutation(_ALL)]
    return WeightsEnum("TinyNet_Weights", {"V1": Weights("", preset, {"categories": categories})}).V1


def _plain_network(trial: Trial) -> nn.Sequential:
    """Logits that are an affine function of the mean colour, the same in train and in eval mode."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, _ALL))
    network[2].weight.data.copy_(trial.normal(_ALL, 3))
    network[2].bias.data.copy_(torch.linspace(-1, 1, _ALL)[trial.permutation(_ALL)])
    return network


def _trained_network(trial: Trial) -> nn.Sequential:
    """A network with BatchNorm and dropout, in train mode, whose statistics are not those of a fresh layer."""
    norms = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    for norm in norms:
        norm.running_mean.copy_(trial.normal(6))
        norm.running_var.copy_(0.5 + trial.normal(6).square())
    head = nn.Linear(6, _ALL)
    head.weight.data.copy_(trial.normal(_ALL, 6))
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 6, 1), norms[1], nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), head),
    )


def _photos(trial: Trial, n: int) -> list[Tensor]:
    """Images of n sizes, each with a colour and a texture of its own."""
    images = []
    for _ in range(n):
        colour, texture = 40 + 175 * torch.rand(3, 1, 1, generator=trial.generator), trial.normal(3, 20, 24)
        size = trial.integer(12, 20), trial.integer(12, 24)
        images.append((colour + 15 * texture).clamp(0, 255).to(torch.uint8)[:, : size[0], : size[1]].clone())
    return images


@exercise.experiment("own normalisation")
class OwnNormalisation(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        # A red, a green and a blue image, so that sizes play no part, and no two normalisations are nearly the same.
        dark, bright = trial.normal(2, 3, 3).abs().clamp(max=2) * 15 + torch.tensor([0, 200]).view(2, 1, 1)
        colours = dark.where(torch.eye(3) == 0, bright).to(torch.uint8)[trial.permutation(3)]
        sizes = (12, 20), (20, 14), (17, 17)
        images = [colour.view(3, 1, 1).repeat(1, *size) for colour, size in zip(colours, sizes, strict=True)]
        return {"weights": _weights(trial), "model": _plain_network(trial), "images": images}

    def measure(self, subject, inputs):
        return _seen(subject, **inputs, k=_ALL)

    def facts(self, raw, inputs):
        transforms, model = inputs["weights"].transforms(), inputs["model"]
        once = [transforms(image) for image in inputs["images"]]
        colours = torch.stack([image[:, :1, :1] for image in inputs["images"]]) / 255
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in _IMAGENET.values())
        known = {
            "by the mean and std of the weights": torch.stack(once),
            "by the mean and std of ImageNet": (colours - mean) / std,
            "by the mean and std of the weights, twice": torch.stack([transforms(image) for image in once]),
            "not at all, values from 0 to 1": colours,
            "not at all, values from 0 to 255": 255 * colours,
        }
        how, order = None, None
        if (seen := _as_probabilities(raw["numbers"])) is not None:
            how = "in another way"
            for name, prepared in known.items():
                with torch.no_grad():
                    expected = model(prepared).softmax(1)
                if (places := _places(seen, expected)) is not None:
                    how, order = name, "that of the images" if places == sorted(places) else "another"
                    break
        return {"the images were normalised": how, "the order of the results": order}


@exercise.experiment("own crop")
class OwnCrop(Experiment):
    def draw(self, trial: Trial) -> dict:
        image = (127 + 20 * trial.normal(3, 40, 40)).clamp(60, 190).to(torch.uint8)
        return {
            "weights": _weights(trial),
            "model": _plain_network(trial),
            # The preset keeps the central 20 x 20 pixels.
            "images": [image, _with_frame(image, 0, 5), _with_frame(image, 11, 15)],
        }

    def measure(self, subject, inputs):
        calls = [_seen(subject, inputs["weights"], inputs["model"], [image], _ALL) for image in inputs["images"]]
        return {"calls": calls}

    def facts(self, raw, inputs):
        original, outside, inside = (_by_category(call)[0] for call in raw["calls"])
        if near(list(original.values()), next(iter(original.values()))):
            return {"pixels that the crop leaves out": None, "pixels at the edge of what it keeps": None}
        return {
            "pixels that the crop leaves out": "do not count" if _close(original, outside) else "count",
            "pixels at the edge of what it keeps": "do not count" if _close(original, inside) else "count",
        }


@exercise.experiment("names of the outputs")
class NamesOfTheOutputs(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial)
        model[2].weight.data.zero_()  # the same logits whatever the image
        return {"weights": _weights(trial), "model": model, "images": _photos(trial, 2)}

    def measure(self, subject, inputs):
        return _seen(subject, **inputs, k=_ALL)

    def facts(self, raw, inputs):
        if any(near(gap, 0) for gap in raw["numbers"].sort().values.diff().flatten()):  # two equal outputs
            return {"the names, from the largest output to the smallest": None}
        categories = inputs["weights"].meta["categories"]
        order = inputs["model"][2].bias.argsort(descending=True).tolist()
        seen = [_sorted_names(names, numbers) for names, numbers in _rows(raw)]
        known = {
            "categories by their index": [categories[i] for i in order],
            "categories in alphabetical order": [sorted(categories)[i] for i in order],
            "categories in their order, whatever the outputs": categories,
        }
        matching = (name for name, names in known.items() if all(row == names for row in seen))
        return {"the names, from the largest output to the smallest": next(matching, "different")}


@exercise.experiment("likeliest first")
class LikeliestFirst(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {
            "weights": _weights(trial),
            "model": _plain_network(trial),
            "images": _photos(trial, 3),
            "k": trial.integer(3, 5),
        }

    def measure(self, subject, inputs):
        return {"some": _seen(subject, **inputs), "all": _seen(subject, **inputs | {"k": _ALL})}

    def facts(self, raw, inputs):
        k, numbers = inputs["k"], raw["some"]["numbers"]
        falling, rising = ((way * numbers.diff(dim=1) >= 0).all() for way in (-1, 1))
        listed = [set(names) for names in raw["some"]["names"]]
        ranked = [_sorted_names(names, numbers) for names, numbers in _rows(raw["all"])]
        likeliest, least = ([set(names[part]) for names in ranked] for part in (slice(k), slice(-k, None)))
        which = "the likeliest" if listed == likeliest else "the least likely" if listed == least else "different"
        return {
            "the categories listed": which,
            "their numbers": "falling" if falling else "rising" if rising else "neither falling nor rising",
        }


@exercise.experiment("probabilities")
class Probabilities(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"weights": _weights(trial), "model": _plain_network(trial), "images": _photos(trial, 3)}

    def measure(self, subject, inputs):
        return {"all": _seen(subject, **inputs, k=_ALL), "some": _seen(subject, **inputs, k=2)}

    def facts(self, raw, inputs):
        every, some = _by_category(raw["all"]), _by_category(raw["some"])
        same = all(near(every[i].get(name, math.inf), number) for i, image in enumerate(some) for name, number in image.items())
        return {
            "the numbers of all categories of an image": _nature(raw["all"]["numbers"], every),
            "a category's number when fewer are listed": "the same" if same else "another",
        }

    def notes(self, raw, inputs):
        numbers = raw["all"]["numbers"]
        return {"the numbers of all categories of an image": f"from {numbers.min():.2g} to {numbers.max():.2g}"}


@exercise.experiment("by itself")
class ByItself(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"weights": _weights(trial), "model": _trained_network(trial), "images": _photos(trial, 5)}

    def measure(self, subject, inputs):
        image, a, b, c, d = inputs["images"]
        calls = [a, image, b], [c, image, d]
        one, two = (_seen(subject, inputs["weights"], inputs["model"], images, _ALL) for images in calls)
        return {"one": one, "two": two}

    def facts(self, raw, inputs):
        one, two = (_by_category(raw[call])[1] for call in ("one", "two"))
        return {"the numbers of one image in other company": "the same" if _close(one, two) else "different"}


@exercise.experiment("left as found")
class LeftAsFound(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _trained_network(trial)
        model[4].eval()  # one BatchNorm is in eval mode, as a frozen one would be
        return {"weights": _weights(trial), "model": model, "images": _photos(trial, 3)}

    def measure(self, subject, inputs):
        _seen(subject, **inputs, k=2)
        model = inputs["model"]
        return {
            "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
            "modes": [module.training for module in model.modules()],
        }

    def facts(self, raw, inputs):
        before = inputs["model"]
        same = [torch.equal(raw["buffers"][name], buffer) for name, buffer in before.named_buffers()]
        changes = {(module.training, mode) for module, mode in zip(before.modules(), raw["modes"], strict=True)}
        return {
            "buffers that moved": "none" if all(same) else "some",
            "modules switched to eval mode": "some" if (True, False) in changes else "none",
            "modules switched to train mode": "some" if (False, True) in changes else "none",
        }


def _seen(subject, weights, model: nn.Module, images: list[Tensor], k: int) -> dict:
    """The answer as names, a list of k strings for each image, and numbers, (n, k); or a sentence about its form."""
    results = _listed(subject(weights, model, list(images), k), len(images), "the results, one per image,")
    names, numbers = [], []
    for result in results:
        pairs = [
            _listed(pair, 2, "a pair (category, probability)")
            for pair in _listed(result, k, "the result of an image, k pairs,")
        ]
        for name, _ in pairs:
            if not isinstance(name, str):
                raise WrongReturn(
                    f"a pair is (category, probability): the category must be a string, got {expect.describe(name)}."
                )
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


def _rows(raw: dict) -> list[tuple[list[str], list[float]]]:
    return list(zip(raw["names"], raw["numbers"].tolist(), strict=True))


def _by_category(raw: dict) -> list[dict[str, float]]:
    return [dict(zip(names, numbers, strict=True)) for names, numbers in _rows(raw)]


def _sorted_names(names: list[str], numbers: list[float]) -> list[str]:
    """The names from the largest number to the smallest."""
    return [names[i] for i in sorted(range(len(names)), key=lambda i: -numbers[i])]


def _close(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and near([one[name] for name in other], list(other.values()))


def _nature(numbers: Tensor, images: list[dict[str, float]]) -> str:
    """What the numbers of all categories are, n images in the rows of `numbers`."""
    if (numbers >= 0).all() and near(numbers.sum(1), 1):
        return "are at least 0 and add up to 1"
    if (numbers <= 0).all() and near(numbers.exp().sum(1), 1):
        return "are logarithms of probabilities"
    if (numbers < 0).any():
        return "are below 0 in part"
    if near(numbers.sum(1) / 100, 1):
        return "add up to 100"
    if near([sum(image.get(name, 0.0) for image in images) for name in _CATEGORIES], 1):
        return "do not add up to 1, but those of a category in all images do"
    return "are at least 0 and do not add up to 1"


def _as_probabilities(numbers: Tensor) -> Tensor | None:
    """The probabilities behind the numbers of all categories, if they are those, percent, logarithms or logits."""
    if (numbers < 0).any():
        return numbers.softmax(1)
    total = numbers.sum(1, keepdim=True)
    return next((numbers / whole for whole in (1, 100) if near(total / whole, 1)), None)


def _places(seen: Tensor, expected: Tensor) -> list[int] | None:
    """Where each row of `expected` is found in `seen`, whatever the order of the columns."""
    # As logarithms, which are far apart where small probabilities differ.
    seen, expected = (rows.double().clamp_min(1e-9).log().sort(dim=1).values for rows in (seen, expected))
    places = [next((i for i, row in enumerate(seen) if near(row, wanted)), None) for wanted in expected]
    return None if None in places else places


def _with_frame(image: Tensor, start: int, stop: int) -> Tensor:
    """A copy whose pixels from `start` to `stop` from the nearest edge are bright."""
    row = torch.arange(image.shape[1])
    depth = torch.minimum(row, row.flip(0))
    distance = torch.minimum(depth[:, None], depth)
    return image.where((distance < start) | (distance >= stop), torch.tensor(255, dtype=torch.uint8))


def _logits(weights, model, images, **changes) -> Tensor:
    """Logits, (n, classes), for the misconceptions below; `changes` are other numbers for the preset of the weights."""
    transforms = weights.transforms(**changes)
    return extract(model, torch.stack([transforms(image) for image in images]))


def _listing(categories, numbers: Tensor, k: int, largest: bool = True) -> list[list[tuple[str, float]]]:
    values, columns = numbers.topk(k, largest=largest)
    return [
        [(categories[column], value) for column, value in zip(*row, strict=True)]
        for row in zip(columns.tolist(), values.tolist(), strict=True)
    ]


@exercise.misconception("ImageNet's mean and std")
def imagenet_mean_and_std(weights, model, images, k):
    logits = _logits(weights, model, images, **_IMAGENET)
    return _listing(weights.meta["categories"], logits.softmax(1), k)


@exercise.misconception("not normalised")
def not_normalised(weights, model, images, k):
    logits = _logits(weights, model, images, mean=(0, 0, 0), std=(1, 1, 1))
    return _listing(weights.meta["categories"], logits.softmax(1), k)


@exercise.misconception("preprocessed twice")
def preprocessed_twice(weights, model, images, k):
    transforms = weights.transforms()
    logits = extract(model, torch.stack([transforms(transforms(image)) for image in images]))
    return _listing(weights.meta["categories"], logits.softmax(1), k)


@exercise.misconception("other sizes than the preset's")
def other_sizes_than_the_presets(weights, model, images, k):
    logits = _logits(weights, model, images, resize_size=256, crop_size=224)
    return _listing(weights.meta["categories"], logits.softmax(1), k)


@exercise.misconception("logits for probabilities")
def logits_for_probabilities(weights, model, images, k):
    return _listing(weights.meta["categories"], _logits(weights, model, images), k)


@exercise.misconception("softmax over the images")
def softmax_over_the_images(weights, model, images, k):
    return _listing(weights.meta["categories"], _logits(weights, model, images).softmax(0), k)


@exercise.misconception("softmax over the k listed")
def softmax_over_the_k_listed(weights, model, images, k):
    listing = _listing(weights.meta["categories"], _logits(weights, model, images), k)
    shares = [torch.tensor([logit for _, logit in pairs]).softmax(0).tolist() for pairs in listing]
    return [
        [(name, share) for (name, _), share in zip(pairs, row, strict=True)] for pairs, row in zip(listing, shares, strict=True)
    ]


@exercise.misconception("categories in alphabetical order")
def categories_in_alphabetical_order(weights, model, images, k):
    return _listing(sorted(weights.meta["categories"]), _logits(weights, model, images).softmax(1), k)


@exercise.misconception("least likely")
def least_likely(weights, model, images, k):
    return _listing(weights.meta["categories"], _logits(weights, model, images).softmax(1), k, largest=False)


@exercise.misconception("likeliest last")
def likeliest_last(weights, model, images, k):
    listing = _listing(weights.meta["categories"], _logits(weights, model, images).softmax(1), k)
    return [pairs[::-1] for pairs in listing]


@exercise.misconception("train mode")
def train_mode(weights, model, images, k):
    transforms = weights.transforms()
    with torch.no_grad():
        logits = model(torch.stack([transforms(image) for image in images]))
    return _listing(weights.meta["categories"], logits.softmax(1), k)


@exercise.misconception("left in eval mode")
def left_in_eval_mode(weights, model, images, k):
    model.eval()
    return _listing(weights.meta["categories"], _logits(weights, model, images).softmax(1), k)
