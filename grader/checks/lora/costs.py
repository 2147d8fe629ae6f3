"""Exercise 6.2: what an adapter costs, in numbers and in bytes."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near, which
from helpers.lora import cost

exercise = Exercise(__name__, "6.2", cost)

KEYS = ("full", "adapter", "gradient_bytes", "optimizer_bytes")
MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2}
PRIMES = (11, 13, 17, 19, 23)  # of two different ones the sum and the product have no factor in common
ANOTHER = "another number"
_which = partial(which, otherwise=ANOTHER)


def _linear(trial: Trial, dtype: torch.dtype = torch.float32) -> nn.Linear:
    sizes = (PRIMES[place] for place in trial.permutation(len(PRIMES))[:2])
    return nn.Linear(*sizes, bias=False, dtype=dtype)


def _convolution(trial: Trial) -> nn.Conv2d:
    """Three groups, a kernel that is not square, and sizes at which no two ways to count give one number."""
    channels, filters = 3 * trial.integer(2, 4), 3 * (2 * trial.integer(3, 5) + 1)
    return nn.Conv2d(channels, filters, kernel_size=(3, 5), stride=2, padding=1, groups=3, bias=False)


def _rank(trial: Trial) -> int:
    return 2 * trial.integer(1, 2) + 1  # odd: no rank is a number of bytes or of moments


class _OneLayer(Experiment):
    """How many numbers of A and B are counted for one layer, in terms of its sizes."""

    points = 2

    def measure(self, subject, inputs):
        return _counted(subject, [inputs["layer"]], inputs["rank"])

    def facts(self, raw, inputs):
        layer, rank = inputs["layer"], inputs["rank"]
        for side in layer.weight.flatten(1).shape:
            of_a_side = {
                "rank x one side of the matrix alone": rank * side,
                "2 x rank x one side of the matrix": 2 * rank * side,
            }
            name = _which(raw["adapter"], self.names(layer, rank) | of_a_side)
            if name != ANOTHER:
                break
        return {"numbers in A and B": name}

    def notes(self, raw, inputs):
        return {"numbers in A and B": f"{raw['adapter']:g} at rank {inputs['rank']} for {inputs['layer']}"}

    def names(self, layer: nn.Module, rank: int) -> dict[str, int]:
        """Ways to count."""
        raise NotImplementedError


@exercise.experiment("linear layer")
class LinearLayer(_OneLayer):
    def draw(self, trial: Trial) -> dict:
        return {"layer": _linear(trial), "rank": _rank(trial)}

    def names(self, layer, rank):
        out, in_ = layer.weight.shape
        return {
            "rank x (in + out)": rank * (in_ + out),
            "in + out, without the rank": in_ + out,
            "rank x in x out": rank * in_ * out,
            "in x out": in_ * out,
        }


@exercise.experiment("convolution")
class Convolution(_OneLayer):
    def draw(self, trial: Trial) -> dict:
        return {"layer": _convolution(trial), "rank": _rank(trial)}

    def names(self, layer, rank):
        out, kernel = layer.out_channels, math.prod(layer.kernel_size)
        channels, group = layer.in_channels, layer.in_channels // layer.groups
        return {
            "rank x (in / groups x kernel + out)": rank * (group * kernel + out),
            "rank x (in / groups + out)": rank * (group + out),
            "rank x (in x kernel + out)": rank * (channels * kernel + out),
            "rank x (in + out)": rank * (channels + out),
            "rank x out x in / groups x kernel": rank * out * group * kernel,
        }


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
        plain, size, convolution = raw["plain"], inputs["plain"].weight.numel(), inputs["convolution"]
        numbers, kernel = convolution.weight.numel(), math.prod(convolution.kernel_size)
        names = {
            "out x in / groups x kernel": numbers,
            "out x in x kernel": numbers * convolution.groups,
            "out x in / groups": numbers / kernel,
            "out x in": numbers * convolution.groups / kernel,
        }
        bias = {"nothing": 0, "its numbers": inputs["biased"].bias.numel()}
        return {
            "a Linear": _which(plain, {"in x out": size, "rank x in x out": 3 * size}),
            "a bias adds": _which(raw["biased"] - plain, bias) if plain else None,
            "a frozen Linear": _which(raw["frozen"], {"as before": plain, "nothing": 0}) if plain else None,
            "a convolution with groups": _which(raw["convolution"], names),
        }


@exercise.experiment("gradients")
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        dtypes = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
        return {"layers": {name: _linear(trial, dtype) for name, dtype in dtypes.items()}, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layers, rank = inputs["layers"], inputs["rank"]
        together = [layers["float32"], layers["bfloat16"]]
        return {name: _counted(subject, [layer], rank, "sgd") for name, layer in layers.items()} | {
            "together": [_counted(subject, order, rank, "sgd")["gradient_bytes"] for order in (together, together[::-1])]
        }

    def facts(self, raw, inputs):
        alone = {f"bytes for each number of A and B, {name}": _bytes_each(raw[name]) for name in inputs["layers"]}
        parts = raw["float32"], raw["bfloat16"]
        numbers = sum(part["adapter"] for part in parts)
        sizes = [part["gradient_bytes"] / part["adapter"] for part in parts if part["adapter"]]
        how = ANOTHER
        if near(raw["together"], sum(part["gradient_bytes"] for part in parts)):
            how = "as each by itself"
        elif all(any(near(order, size * numbers) for size in sizes) for order in raw["together"]):
            how = "all as one of them"
        return alone | {"a float32 and a bfloat16 layer together": how if numbers else None}


@exercise.experiment("optimizer state")
class OptimizerState(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _linear(trial), "half": _linear(trial, torch.bfloat16), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layer, half, rank = (inputs[name] for name in ("layer", "half", "rank"))
        raw = {name: _counted(subject, [layer], rank, name) for name in MOMENTS}
        return raw | {"half": _counted(subject, [half], rank, "adamw")}

    def facts(self, raw, inputs):
        facts = {f"numbers of state for each of A and B, {name}": _state_each(raw[name], size=4) for name in MOMENTS}
        return facts | {"the same, adamw in bfloat16": _state_each(raw["half"], size=2)}


@exercise.experiment("every weight once")
class EveryWeightOnce(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        linear = _linear(trial)
        sizes = linear.in_features, linear.out_features
        sharing, equal = nn.Linear(*sizes, bias=False), nn.Linear(*sizes, bias=False)
        sharing.weight = linear.weight
        equal.load_state_dict(linear.state_dict())
        return {
            "linear": linear,
            "convolution": _convolution(trial),
            "sharing": sharing,
            "equal": equal,
            "rank": _rank(trial),
        }

    def measure(self, subject, inputs):
        linear, convolution = inputs["linear"], inputs["convolution"]
        lists = {
            "linear": [linear],
            "convolution": [convolution],
            "both": [linear, convolution],
            "twice": [linear, convolution, linear],
            "sharing": [linear, inputs["sharing"]],
            "equal": [linear, inputs["equal"]],
        }
        counts = {name: _counted(subject, layers, inputs["rank"]) for name, layers in lists.items()}
        return {name: torch.tensor([count[key] for key in KEYS], dtype=torch.float64) for name, count in counts.items()}

    def facts(self, raw, inputs):
        linear, convolution = raw["linear"], raw["convolution"]
        both = linear + convolution
        full_once = linear * torch.tensor([1, 2, 2, 2])
        sums = {"add up": both, "count as the first": linear, "count as the last": convolution}
        times = {"count once": linear, "count twice": 2 * linear, "count once in full, twice in the adapters": full_once}
        facts = {
            "two different layers": _which(raw["both"], sums),
            "the same layer twice": _which(raw["twice"], {"counts once": both, "counts twice": both + linear}),
            "two layers of one weight": _which(raw["sharing"], times),
            "two equal layers": _which(raw["equal"], times),
        }
        return facts if linear.all() else dict.fromkeys(facts)


def _counted(subject, layers: list[nn.Module], rank: int, optimizer: str = "adamw") -> dict[str, float]:
    """The four numbers that a subject returns."""
    value = subject(list(layers), rank, optimizer)
    if not isinstance(value, Mapping):
        raise wrong_return("cost must return a dict", value)
    if missing := [key for key in KEYS if key not in value]:
        raise WrongReturn(f"cost must return a dict with the keys {list(KEYS)}, {missing} not among those that came.")
    return {key: expect_number(value[key], f"cost(...)['{key}']") for key in KEYS}


def _each(size: float, unit: float, counts: dict[str, float]) -> Fact:
    """How many times `unit` bytes there are for each number of A and B, or, in words, for each of different numbers."""
    adapter, full = counts["adapter"], counts["full"]
    if not adapter:
        return None
    whose = {
        "": adapter,
        " for each number of the full weight instead": full,
        " for these and those of the full weight": full + adapter,
    }
    for name, numbers in whose.items():
        for times in range(9):
            if near(size, times * unit * numbers):
                return f"{times}{name}" if name else times
    return ANOTHER


def _bytes_each(counts: dict[str, float]) -> Fact:
    """Bytes of gradients for each number that trains."""
    return _each(counts["gradient_bytes"], 1, counts)


def _state_each(counts: dict[str, float], size: int) -> Fact:
    """Numbers of optimizer state for each number that trains, if one takes as many bytes as its gradient, or `size`."""
    own = _bytes_each(counts)
    units = [own, size] if isinstance(own, int) and own else [size]
    facts = [_each(counts["optimizer_bytes"], unit, counts) for unit in units]
    return next((fact for fact in facts if fact != ANOTHER), ANOTHER)


# --- the misconceptions ---------------------------------------------------------------------------------------------


def cost_of(
    layers: list[nn.Module],
    rank: int,
    optimizer: str,
    *,
    full=lambda layer: layer.weight.numel(),
    sides=lambda layer: layer.weight.flatten(1).shape,
    adapter=lambda rank, rows, columns: rank * (rows + columns),
    trained=lambda layer, numbers: numbers,
    size=lambda layer, layers: layer.weight.element_size(),
    kept=lambda layer, numbers: numbers,
    size_kept=lambda size: size,
    moments=MOMENTS,
    key=lambda layer: id(layer.weight),
) -> dict[str, int]:
    """The four numbers: a right solution, with an option for each piece of it."""
    total = dict.fromkeys(KEYS, 0)
    for layer in {key(layer): layer for layer in layers}.values():
        numbers, bytes_each = adapter(rank, *sides(layer)), size(layer, layers)
        total["full"] += full(layer)
        total["adapter"] += numbers
        total["gradient_bytes"] += trained(layer, numbers) * bytes_each
        total["optimizer_bytes"] += moments[optimizer] * kept(layer, numbers) * size_kept(bytes_each)
    return total


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


CHANGES = {
    "one matrix alone": {"adapter": lambda rank, rows, columns: rank * columns},
    "rank times the whole weight": {"adapter": lambda rank, rows, columns: rank * rows * columns},
    "as if the weight were square": {"adapter": lambda rank, rows, columns: 2 * rank * rows},
    "kernel forgotten": {"sides": lambda layer: layer.weight.shape[:2]},
    "groups ignored": {"sides": lambda layer: (len(layer.weight), _groups(layer) * layer.weight[0].numel())},
    "channels alone": {"sides": lambda layer: (len(layer.weight), _groups(layer) * layer.weight.shape[1])},
    "biases counted": {"full": lambda layer: sum(parameter.numel() for parameter in layer.parameters())},
    "trainable parameters only": {"full": lambda layer: sum(p.numel() for p in layer.parameters() if p.requires_grad)},
    "weight without its groups": {"full": lambda layer: _groups(layer) * layer.weight.numel()},
    "four bytes each": {"size": lambda layer, layers: 4},
    "one dtype for all": {"size": lambda layer, layers: layers[0].weight.element_size()},
    "gradients of the full weight": {"trained": lambda layer, numbers: layer.weight.numel()},
    "one moment for AdamW": {"moments": MOMENTS | {"adamw": 1}},
    "state of the full weight": {"kept": lambda layer, numbers: layer.weight.numel()},
    "moments in float32": {"size_kept": lambda size: 4},
    "counted twice": {"key": lambda layer: object()},
    "told apart by their modules": {"key": id},
}
exercise.misconceptions_of(cost_of, CHANGES)
