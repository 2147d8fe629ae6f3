"""Exercise 6.2: what an adapter costs, in numbers and in bytes."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near
from helpers.lora import cost

exercise = Exercise(__name__, "6.2", cost)

KEYS = ("full", "adapter", "gradient_bytes", "optimizer_bytes")
MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2}
PRIMES = (11, 13, 17, 19, 23)  # of two different ones the sum and the product have no factor in common


def _linear(trial: Trial, **how) -> nn.Linear:
    one, other = trial.permutation(len(PRIMES))[:2].tolist()
    return nn.Linear(PRIMES[one], PRIMES[other], **{"bias": False, **how})


def _convolution(trial: Trial) -> nn.Conv2d:
    """Three groups, a kernel that is not square, and sizes at which no two ways to count give one number."""
    channels, filters = 3 * trial.integer(2, 4), 3 * (2 * trial.integer(3, 5) + 1)
    return nn.Conv2d(channels, filters, kernel_size=(3, 5), stride=2, padding=1, groups=3, bias=False)


def _rank(trial: Trial) -> int:
    return 2 * trial.integer(1, 2) + 1  # odd: no rank is a number of bytes or of moments


@exercise.experiment("linear layer")
class LinearLayer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _linear(trial), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        return _counted(subject, [inputs["layer"]], inputs["rank"])

    def facts(self, raw, inputs):
        out, in_ = inputs["layer"].weight.shape
        matrices = {"rank x (in + out)": in_ + out, "in + out, without the rank": (in_ + out) / inputs["rank"]}
        names = matrices | {"rank x in x out": in_ * out, "in x out": in_ * out / inputs["rank"]}
        return {"numbers in A and B": _which(raw["adapter"] / inputs["rank"], names, sides=(in_, out))}

    def notes(self, raw, inputs):
        out, in_ = inputs["layer"].weight.shape
        return {"numbers in A and B": f"{raw['adapter']:g} for {in_} -> {out} at rank {inputs['rank']}"}


@exercise.experiment("convolution")
class Convolution(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _convolution(trial), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        return _counted(subject, [inputs["layer"]], inputs["rank"])

    def facts(self, raw, inputs):
        layer = inputs["layer"]
        out, (high, wide) = layer.out_channels, layer.kernel_size
        channels, group, kernel = layer.in_channels, layer.in_channels // layer.groups, high * wide
        names = {
            "rank x (in / groups x kernel + out)": group * kernel + out,
            "rank x (in / groups + out)": group + out,
            "rank x (in x kernel + out)": channels * kernel + out,
            "rank x (in + out)": channels + out,
            "rank x out x in / groups x kernel": out * group * kernel,
        }
        return {"numbers in A and B": _which(raw["adapter"] / inputs["rank"], names, sides=(group * kernel, out))}

    def notes(self, raw, inputs):
        return {"numbers in A and B": f"{raw['adapter']:g} at rank {inputs['rank']} for {inputs['layer']}"}


@exercise.experiment("full weights")
class FullWeights(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        plain = _linear(trial)
        biased = nn.Linear(plain.in_features, plain.out_features)
        frozen = nn.Linear(plain.in_features, plain.out_features, bias=False).requires_grad_(False)
        return {"plain": plain, "biased": biased, "frozen": frozen, "convolution": _convolution(trial)}

    def measure(self, subject, inputs):
        return {name: _counted(subject, [layer], rank=3)["full"] for name, layer in inputs.items()}

    def facts(self, raw, inputs):
        size = inputs["plain"].weight.numel()
        bias = inputs["biased"].bias.numel()
        convolution = inputs["convolution"]
        numbers = convolution.weight.numel()
        kernel = math.prod(convolution.kernel_size)
        names = {
            "out x in / groups x kernel": numbers,
            "out x in x kernel": numbers * convolution.groups,
            "out x in / groups": numbers / kernel,
            "out x in": numbers * convolution.groups / kernel,
        }
        return {
            "a Linear": _which(raw["plain"], {"in x out": size, "rank x in x out": 3 * size}),
            "a bias adds": _which(raw["biased"] - raw["plain"], {"nothing": 0, "its numbers": bias}) if raw["plain"] else None,
            "a frozen Linear": _which(raw["frozen"], {"as before": raw["plain"], "nothing": 0}) if raw["plain"] else None,
            "a convolution with groups": _which(raw["convolution"], names),
        }


@exercise.experiment("gradients")
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        dtypes = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
        return {"layers": {name: _linear(trial, dtype=dtype) for name, dtype in dtypes.items()}, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layers, rank = inputs["layers"], inputs["rank"]
        together = [layers["float32"], layers["bfloat16"]]
        return {name: _counted(subject, [layer], rank, "sgd") for name, layer in layers.items()} | {
            "together": [_counted(subject, order, rank, "sgd") for order in (together, together[::-1])]
        }

    def facts(self, raw, inputs):
        alone = {f"bytes for each number of A and B, {name}": _bytes_each(raw[name]) for name in inputs["layers"]}
        parts = raw["float32"], raw["bfloat16"]
        sizes = [part["gradient_bytes"] / part["adapter"] if part["adapter"] else 0 for part in parts]
        numbers = sum(part["adapter"] for part in parts)
        orders = [order["gradient_bytes"] for order in raw["together"]]
        if not numbers:
            how = None
        elif near(orders[0], orders[1]) and near(orders[0], sum(part["gradient_bytes"] for part in parts)):
            how = "as each by itself"
        elif all(any(near(order, size * numbers) for size in sizes) for order in orders):
            how = "all as one of them"
        else:
            how = "another number"
        return alone | {"a float32 and a bfloat16 layer together": how}


@exercise.experiment("optimizer state")
class OptimizerState(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        layer = _linear(trial)
        return {"layer": layer, "half": _linear(trial, dtype=torch.bfloat16), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layer, half, rank = (inputs[name] for name in ("layer", "half", "rank"))
        return {name: _counted(subject, [layer], rank, name) for name in MOMENTS} | {
            "half": _counted(subject, [half], rank, "adamw")
        }

    def facts(self, raw, inputs):
        facts = {f"numbers of state for each of A and B, {name}": _state_each(raw[name], size=4) for name in MOMENTS}
        return facts | {"the same, adamw in bfloat16": _state_each(raw["half"], size=2)}


@exercise.experiment("every weight once")
class EveryWeightOnce(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        one = _linear(trial)
        sizes = one.in_features, one.out_features
        sharing, equal = nn.Linear(*sizes, bias=False), nn.Linear(*sizes, bias=False)
        sharing.weight = one.weight
        equal.load_state_dict(one.state_dict())
        return {"one": one, "other": _convolution(trial), "sharing": sharing, "equal": equal, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        one, other, rank = inputs["one"], inputs["other"], inputs["rank"]
        lists = {
            "one": [one],
            "other": [other],
            "both": [one, other],
            "twice": [one, other, one],
            "sharing": [one, inputs["sharing"]],
            "equal": [one, inputs["equal"]],
        }
        return {name: _counted(subject, layers, rank) for name, layers in lists.items()}

    def facts(self, raw, inputs):
        one, other = raw["one"], raw["other"]
        if not all(one.values()):
            facts = "two different layers", "the same layer twice", "two layers of one weight", "two equal layers"
            return dict.fromkeys(facts)
        added = {key: one[key] + other[key] for key in KEYS}
        again = {key: added[key] + one[key] for key in KEYS}
        return {
            "two different layers": _as(raw["both"], {"add up": added, "count as the first": one, "count as the last": other}),
            "the same layer twice": _as(raw["twice"], {"counts once": added, "counts twice": again}),
            "two layers of one weight": _as(raw["sharing"], _times(one)),
            "two equal layers": _as(raw["equal"], _times(one)),
        }


def _counted(subject, layers: list[nn.Module], rank: int, optimizer: str = "adamw") -> dict[str, float]:
    """The four numbers that a subject returns."""
    value = subject(list(layers), rank, optimizer)
    if not isinstance(value, Mapping):
        raise wrong_return("cost must return a dict", value)
    if missing := [key for key in KEYS if key not in value]:
        raise WrongReturn(f"cost must return a dict with the keys {list(KEYS)}, {missing} not among those that came.")
    return {key: expect_number(value[key], f"cost(...)['{key}']") for key in KEYS}


def _which(number: float, names: dict[str, float], sides: tuple[int, ...] = ()) -> str:
    """The name of a number; `sides` are those of the matrix, for a number that stands for the rank times one of them."""
    if name := next((name for name, value in names.items() if near(number, value)), None):
        return name
    for side in sides:
        for times, name in ((1, "rank x one side of the matrix alone"), (2, "2 x rank x one side of the matrix")):
            if near(number, times * side):
                return name
    return "another number"


def _as(counts: dict[str, float], names: dict[str, dict[str, float]]) -> str:
    """The name of four numbers."""
    same = (name for name, wanted in names.items() if all(near(counts[key], wanted[key]) for key in KEYS))
    return next(same, "another number")


def _times(one: dict[str, float]) -> dict[str, dict[str, float]]:
    twice = {key: 2 * number for key, number in one.items()}
    return {"count once": one, "count twice": twice, "count once in full, twice in the adapters": twice | {"full": one["full"]}}


def _bytes_each(counts: dict[str, float]) -> Fact:
    """Bytes of gradients for each number that trains; bytes for as many numbers as the full weight has are called that."""
    adapter, full, given = counts["adapter"], counts["full"], counts["gradient_bytes"]
    if not adapter:
        return None
    for size in (1, 2, 4, 8):
        if full and near(given, size * full):
            return f"{size} for each number of the full weight instead"
        if full and near(given, size * (full + adapter)):
            return f"{size} for these and those of the full weight"
    size = given / adapter
    return round(size) if near(size, round(size)) else "another number"


def _state_each(counts: dict[str, float], size: int) -> Fact:
    """Numbers of optimizer state for each number that trains, if one takes as many bytes as its gradient, or `size`."""
    adapter, full, given = counts["adapter"], counts["full"], counts["optimizer_bytes"]
    if not adapter:
        return None
    own = _bytes_each(counts)
    for unit in ([own] if isinstance(own, int) and own else []) + [size]:
        for times in range(5):
            if near(given, times * unit * adapter):
                return times
        for times in range(1, 5):
            if near(given, times * unit * full):
                return f"{times} for each number of the full weight instead"
            if near(given, times * unit * (full + adapter)):
                return f"{times} for these and those of the full weight"
    return "another number"


def _total(
    layers: list[nn.Module],
    rank: int,
    optimizer: str,
    *,
    full=lambda layer: layer.weight.numel(),
    adapter=lambda layer, rank: rank * sum(layer.weight.flatten(1).shape),
    trained=lambda layer, numbers: numbers,
    size=lambda layer: layer.weight.element_size(),
    kept=lambda layer, numbers: numbers,
    moments=MOMENTS,
    key=lambda layer: id(layer.weight),
) -> dict[str, int]:
    """The four numbers; what a misconception does otherwise is given by name."""
    total = dict.fromkeys(KEYS, 0)
    for layer in {key(layer): layer for layer in layers}.values():
        numbers = adapter(layer, rank)
        total["full"] += full(layer)
        total["adapter"] += numbers
        total["gradient_bytes"] += trained(layer, numbers) * size(layer)
        total["optimizer_bytes"] += moments[optimizer] * kept(layer, numbers) * size(layer)
    return total


@exercise.misconception("one matrix alone")
def one_matrix_alone(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * layer.weight[0].numel())


@exercise.misconception("rank times the whole weight")
def rank_times_the_whole_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * layer.weight.numel())


@exercise.misconception("as if the weight were square")
def as_if_square(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: 2 * rank * layer.weight.shape[0])


@exercise.misconception("kernel forgotten")
def kernel_forgotten(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * (layer.weight.shape[0] + layer.weight.shape[1]))


@exercise.misconception("groups ignored")
def groups_ignored(layers, rank, optimizer):
    def adapter(layer, rank):
        groups = getattr(layer, "groups", 1)
        return rank * (layer.weight.shape[0] + groups * layer.weight[0].numel())

    return _total(layers, rank, optimizer, adapter=adapter)


@exercise.misconception("channels alone")
def channels_alone(layers, rank, optimizer):
    def adapter(layer, rank):
        return rank * (layer.weight.shape[0] + getattr(layer, "groups", 1) * layer.weight.shape[1])

    return _total(layers, rank, optimizer, adapter=adapter)


@exercise.misconception("biases counted")
def biases_counted(layers, rank, optimizer):
    return _total(layers, rank, optimizer, full=lambda layer: sum(parameter.numel() for parameter in layer.parameters()))


@exercise.misconception("trainable parameters only")
def trainable_parameters_only(layers, rank, optimizer):
    def full(layer):
        return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)

    return _total(layers, rank, optimizer, full=full)


@exercise.misconception("weight without its groups")
def weight_without_its_groups(layers, rank, optimizer):
    return _total(layers, rank, optimizer, full=lambda layer: layer.weight.numel() * getattr(layer, "groups", 1))


@exercise.misconception("four bytes each")
def four_bytes_each(layers, rank, optimizer):
    return _total(layers, rank, optimizer, size=lambda layer: 4)


@exercise.misconception("one dtype for all")
def one_dtype_for_all(layers, rank, optimizer):
    size = layers[0].weight.element_size()
    return _total(layers, rank, optimizer, size=lambda layer: size)


@exercise.misconception("gradients of the full weight")
def gradients_of_the_full_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, trained=lambda layer, numbers: layer.weight.numel())


@exercise.misconception("one moment for AdamW")
def one_moment_for_adamw(layers, rank, optimizer):
    return _total(layers, rank, optimizer, moments=MOMENTS | {"adamw": 1})


@exercise.misconception("state of the full weight")
def state_of_the_full_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, kept=lambda layer, numbers: layer.weight.numel())


@exercise.misconception("moments in float32")
def moments_in_float32(layers, rank, optimizer):
    counts = _total(layers, rank, optimizer)
    return counts | {"optimizer_bytes": 4 * MOMENTS[optimizer] * counts["adapter"]}


@exercise.misconception("counted twice")
def counted_twice(layers, rank, optimizer):
    places = iter(range(len(layers)))
    return _total(layers, rank, optimizer, key=lambda layer: next(places))


@exercise.misconception("told apart by their modules")
def told_apart_by_modules(layers, rank, optimizer):
    return _total(layers, rank, optimizer, key=id)
