"""Exercise 6.2: what an adapter costs, in numbers and in bytes."""

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near, which
from helpers.lora import cost

exercise = Exercise(__name__, "6.2", cost, core=5)

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


def _like(layer: nn.Module, bias: bool = False) -> nn.Module:
    """A layer of the same sizes."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=bias)
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    return nn.Conv2d(*sizes, groups=layer.groups, bias=bias)


def _rank(trial: Trial) -> int:
    return 2 * trial.integer(1, 2) + 1  # odd: no rank is a number of bytes or of moments


class _OneLayer(Experiment):
    """How many numbers of A and B are counted for one layer, in terms of its sizes."""

    points = 2
    kind = ""

    def measure(self, subject, inputs):
        layer, rank = inputs["layer"], inputs["rank"]
        alike = {"plain": layer, "biased": _like(layer, bias=True), "frozen": _like(layer).requires_grad_(False)}
        return {name: _counted(subject, [each], rank)["adapter"] for name, each in alike.items()}

    def facts(self, raw, inputs):
        layer, rank = inputs["layer"], inputs["rank"]
        for side in layer.weight.flatten(1).shape:
            of_a_side = {
                "rank x one side of the matrix alone": rank * side,
                "2 x rank x one side of the matrix": 2 * rank * side,
            }
            name = _which(raw["plain"], self.names(layer, rank) | of_a_side)
            if name != ANOTHER:
                break
        words = {"biased": "a bias", "frozen": "freezing it"}
        changes = [name for name in words if not near(raw[name], raw["plain"])]
        return {
            f"numbers in A and B of a {self.kind}": name,
            f"what changes that of a {self.kind}": words[changes[0]] if changes else "nothing",
        }

    def notes(self, raw, inputs):
        return {f"numbers in A and B of a {self.kind}": f"{raw['plain']:g} at rank {inputs['rank']} for {inputs['layer']}"}

    def names(self, layer: nn.Module, rank: int) -> dict[str, int]:
        """Ways to count."""
        raise NotImplementedError


@exercise.experiment("linear layer", 2)
class LinearLayer(_OneLayer):
    kind = "linear layer"

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


@exercise.experiment("convolution", 2)
class Convolution(_OneLayer):
    kind = "convolution"

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


@exercise.experiment("full weights", 1)
class FullWeights(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        layers = {"linear": _linear(trial), "convolution": _convolution(trial)}
        biased = {f"{name}, biased": _like(layer, bias=True) for name, layer in layers.items()}
        return layers | biased | {"frozen": _like(layers["linear"]).requires_grad_(False)}

    def measure(self, subject, inputs):
        return {name: _counted(subject, [layer], rank=3)["full"] for name, layer in inputs.items()}

    def facts(self, raw, inputs):
        size, convolution = inputs["linear"].weight.numel(), inputs["convolution"]
        numbers, kernel = convolution.weight.numel(), math.prod(convolution.kernel_size)
        names = {
            "out x in / groups x kernel": numbers,
            "out x in x kernel": numbers * convolution.groups,
            "out x in / groups": numbers / kernel,
            "out x in": numbers * convolution.groups / kernel,
        }
        added = [raw[f"{name}, biased"] - raw[name] for name in ("linear", "convolution")]
        own = [inputs[f"{name}, biased"].bias.numel() for name in ("linear", "convolution")]
        return {
            "a Linear": _which(raw["linear"], {"in x out": size, "rank x in x out": 3 * size}),
            "a bias adds": _which(added, {"nothing": [0, 0], "its numbers": own}) if all(raw.values()) else None,
            "a frozen Linear": _which(raw["frozen"], {"as before": raw["linear"], "nothing": 0}) if raw["linear"] else None,
            "a convolution with groups": _which(raw["convolution"], names),
        }


@exercise.experiment("gradients", 3)
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        names = "float64", "float32", "bfloat16", "float16"
        return {"layers": {name: _linear(trial, getattr(torch, name)) for name in names}, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layers, rank = inputs["layers"], inputs["rank"]
        together = [layers["float32"], layers["bfloat16"]]
        alone = layers | {"biased": _like(layers["float32"], bias=True)}
        return {name: _counted(subject, [layer], rank, "sgd") for name, layer in alone.items()} | {
            "together": [_counted(subject, order, rank, "sgd")["gradient_bytes"] for order in (together, together[::-1])]
        }

    def facts(self, raw, inputs):
        alone = {f"bytes for each number of A and B, {name}": _bytes_each(raw[name]) for name in inputs["layers"]}
        parts = raw["float32"], raw["bfloat16"]
        numbers = sum(part["adapter"] for part in parts)
        sizes = [part["gradient_bytes"] / part["adapter"] for part in parts if part["adapter"]]
        how = None  # nothing that the dtypes explain
        if near(raw["together"], sum(part["gradient_bytes"] for part in parts)):
            how = "as each by itself"
        elif all(any(near(order, size * numbers) for size in sizes) for order in raw["together"]):
            how = "all as one of them"
        return alone | {
            "bytes of a float32 and a bfloat16 layer together": how if numbers else None,
            "gradients for a layer's bias": _some(raw["biased"]["gradient_bytes"] != raw["float32"]["gradient_bytes"]),
        }


@exercise.experiment("optimizer state", 4)
class OptimizerState(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _linear(trial), "half": _linear(trial, torch.bfloat16), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layer, half, rank = (inputs[name] for name in ("layer", "half", "rank"))
        raw = {name: _counted(subject, [layer], rank, name) for name in MOMENTS}
        also = {"half": half, "biased": _like(layer, bias=True)}
        return raw | {name: _counted(subject, [each], rank, "adamw") for name, each in also.items()}

    def facts(self, raw, inputs):
        facts = {
            f"numbers of state for each of A and B, {name}": _state_each(raw[name], size=4, kept=kept)
            for name, kept in MOMENTS.items()
        }
        return facts | {
            "the same, adamw in bfloat16": _state_each(raw["half"], size=2, kept=MOMENTS["adamw"]),
            "state for a layer's bias": _some(raw["biased"]["optimizer_bytes"] != raw["adamw"]["optimizer_bytes"]),
        }


class _Lists(Experiment):
    """What is counted of several layers: a linear one, a convolution, and others like the first or with its weight."""

    points = 2
    lists: ClassVar[dict[str, tuple[str, ...]]] = {}

    def draw(self, trial: Trial) -> dict:
        linear = _linear(trial)
        layers = {name: _like(linear) for name in ("sharing", "sharing too", "equal")}
        layers["equal"].load_state_dict(linear.state_dict())
        for name in ("sharing", "sharing too"):
            layers[name].weight = linear.weight
        return {"linear": linear, "convolution": _convolution(trial), "rank": _rank(trial)} | layers

    def measure(self, subject, inputs):
        lists = {"linear": ("linear",), "convolution": ("convolution",)} | self.lists
        counts = {name: _counted(subject, [inputs[each] for each in layers], inputs["rank"]) for name, layers in lists.items()}
        return {name: torch.tensor([count[key] for key in KEYS], dtype=torch.float64) for name, count in counts.items()}


@exercise.experiment("layers add up", 5)
class LayersAddUp(_Lists):
    lists: ClassVar = {
        "both": ("linear", "convolution"),
        "three": ("convolution", "equal", "linear"),
    }

    def facts(self, raw, inputs):
        linear, convolution = raw["linear"], raw["convolution"]
        sums = {"add up": linear + convolution, "count as the first": linear, "count as the last": convolution}
        times = {"count each": convolution + 2 * linear, "count once": convolution + linear, "count as the last": linear}
        return {
            "two different layers": _which(raw["both"], sums) if linear.all() else None,
            "two equal layers beside another": _which(raw["three"], times) if linear.all() else None,
        }


@exercise.experiment("every weight once", 6)
class EveryWeightOnce(_Lists):
    lists: ClassVar = {
        "twice": ("linear", "convolution", "linear"),
        "sharing": ("sharing too", "sharing", "linear"),
    }

    def facts(self, raw, inputs):
        linear, convolution = raw["linear"], raw["convolution"]
        both, full_once = linear + convolution, linear * torch.tensor([1, 3, 3, 3])
        twice = {"counts once": both, "counts twice": both + linear}
        times = {"count once": linear, "count each": 3 * linear, "count once in full, each in the adapters": full_once}
        facts = {
            "the same layer, listed twice": _which(raw["twice"], twice),
            "three layers that share a weight": _which(raw["sharing"], times),
        }
        adds_up = linear.all() and facts["the same layer, listed twice"] != ANOTHER  # or nothing can be said here
        return facts if adds_up else dict.fromkeys(facts)


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
        for times in range(65):  # bits, too
            if abs(size - times * unit * numbers) < 0.5:
                return f"{times}{name}" if name else times
    return ANOTHER


def _some(more: bool) -> str:
    return "some" if more else "none"


def _bytes_each(counts: dict[str, float]) -> Fact:
    """Bytes of gradients for each number that trains."""
    return _each(counts["gradient_bytes"], 1, counts)


def _state_each(counts: dict[str, float], size: int, kept: int) -> Fact:
    """Numbers of optimizer state for each number that trains, one of which takes `size` bytes, or as many as its gradient.

    If `kept`, the right number, fits either way, it is that.
    """
    own = _bytes_each(counts)
    units = [own, size] if isinstance(own, int) and own else [size]
    facts = [fact for fact in (_each(counts["optimizer_bytes"], unit, counts) for unit in units) if fact != ANOTHER]
    return kept if kept in facts else next(iter(facts), ANOTHER)


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
    kept_of=lambda before, now: before + now,
) -> dict[str, int]:
    """The four numbers: a right solution, with an option for each piece of it."""
    total = dict.fromkeys(KEYS, 0)
    for layer in {key(layer): layer for layer in layers}.values():
        numbers, bytes_each = adapter(rank, *sides(layer)), size(layer, layers)
        own = {
            "full": full(layer),
            "adapter": numbers,
            "gradient_bytes": trained(layer, numbers) * bytes_each,
            "optimizer_bytes": moments[optimizer] * kept(layer, numbers) * size_kept(bytes_each),
        }
        total = {key: kept_of(total[key], own[key]) for key in KEYS}
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
    "bits instead of bytes": {"size": lambda layer, layers: 8 * layer.weight.element_size()},
    "one dtype for all": {"size": lambda layer, layers: layers[0].weight.element_size()},
    "gradients of the full weight": {"trained": lambda layer, numbers: layer.weight.numel()},
    "one moment for AdamW": {"moments": MOMENTS | {"adamw": 1}},
    "state of the full weight": {"kept": lambda layer, numbers: layer.weight.numel()},
    "moments in float32": {"size_kept": lambda size: 4},
    "counted twice": {"key": lambda layer: object()},
    "told apart by their modules": {"key": id},
    "equal weights counted once": {"key": lambda layer: tuple(layer.weight.flatten().tolist())},
    "the last layer only": {"kept_of": lambda before, now: now},
}
exercise.misconceptions_of(cost_of, CHANGES)
