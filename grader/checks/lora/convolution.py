"""Exercise 6.5: LoRA for a convolution, whatever its arguments are."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.lora.layer import attempt, beside_base, failed, gradients, how_far, module, name_of
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.lora import Conv2d

exercise = Exercise(__name__, "6.5", Conv2d, name="LoRAConv2d")

AS_BASE = "as base, but for the weight"
NOT_AS_BASE = "not as base"
NUMBER = 0.5  # what everything that trains is filled with to see the factor


def _inputs(trial: Trial, **arguments) -> dict:
    """A convolution, a rank and an alpha that make no two of the factors in `name_of` equal, and images."""
    base = nn.Conv2d(4, 8, **({"kernel_size": 3, "padding": 1} | arguments))
    for parameter in base.parameters():
        parameter.data.copy_(trial.normal(*parameter.shape))
    return {
        "base": base,
        "of base": {name: parameter.detach().clone() for name, parameter in base.named_parameters()},
        "rank": 3 + 2 * trial.integer(0, 1),  # divided by no number of groups
        "alpha": (7, 8, 11)[trial.integer(0, 2)],
        "x": trial.normal(4, 4, 8, 7),
        "seed": trial.integer(0, 10**6),
    }


@exercise.experiment("fresh layer")
class FreshLayer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _inputs(trial)
        return inputs | {"g": trial.normal(4, 8, 8, 7)}

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        adapter = _adapter(layer, inputs)
        y = self._output(layer, inputs)
        raw = {"y": y.detach(), "fresh": gradients((y * inputs["g"]).sum(), adapter)}
        _fill(adapter, inputs)
        raw["filled"] = gradients((self._output(layer, inputs) * inputs["g"]).sum(), adapter)
        _fill(adapter, inputs, 0.0)
        return raw | {"zero": self._output(layer, inputs).detach()}

    def facts(self, raw, inputs):
        with torch.no_grad():
            y = inputs["base"](inputs["x"])
        reached, filled, zero = None, None, None
        if raw["fresh"]:
            reached = "at least a part" if any(g.any() for g in raw["fresh"]) else "none"
            filled = "all" if all(g.any() for g in raw["filled"]) else "some" if any(g.any() for g in raw["filled"]) else "none"
            zero = beside_base(raw["zero"], y)
        return {
            "its outputs are": beside_base(raw["y"], y),
            "of what trains, a gradient reaches": reached,
            "with random numbers in it, a gradient reaches": filled,
            "with zeros in it, its outputs are": zero,
        }

    def notes(self, raw, inputs):
        with torch.no_grad():
            return {"its outputs are": how_far(raw["y"], inputs["base"](inputs["x"]))}

    @staticmethod
    def _output(layer: nn.Module, inputs: dict) -> Tensor:
        return expect_tensor(layer(inputs["x"]), inputs["g"].shape, f"the output for an input {tuple(inputs['x'].shape)}")


@exercise.experiment("the update")
class TheUpdate(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        adapter = _adapter(layer, inputs)
        raw = {}
        for name, number in (("zero", 0.0), ("filled", None), ("constant", NUMBER)):
            if adapter:
                _fill(adapter, inputs, number)
                raw[name] = _output(layer, inputs["x"])
        return raw

    def facts(self, raw, inputs):
        kernels = [_kernel(raw[name], inputs) for name in ("zero", "filled", "constant")] if raw else [None]
        exists = None if not raw else NOT_AS_BASE if any(kernel is None for kernel in kernels) else AS_BASE
        where, size, factor = None, None, None
        if exists == AS_BASE:
            update, constant = kernels[1] - kernels[0], kernels[2] - kernels[0]
            where = _where(update)
            size = _rank(update, inputs["rank"]) if where == "everywhere" else None
            factor = self._factor(constant, inputs)
            factor = None if factor is None else name_of(factor, inputs)
        return {
            "with numbers in all that trains it computes": exists,
            "where in the kernel the update is": where,
            "the update's rank, as a matrix of out_channels rows": size,
            "the factor before the product": factor,
        }

    @staticmethod
    def _factor(update: Tensor, inputs: dict) -> float | None:
        """What multiplies the sum of rank products of the same two numbers."""
        values = update[:, :, _there(update)]
        if values.numel() == 0 or not near(values / values.mean(), 1):
            return None
        return float(values.mean()) / (inputs["rank"] * NUMBER**2)


@exercise.experiment("what trains")
class WhatTrains(Experiment):
    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        return _trainable(_layer(subject, inputs), inputs)

    def facts(self, raw, inputs):
        return {
            "numbers that train besides base's": _count(raw, inputs),
            "the layer's base.weight is": "trainable" if "weight" in raw["of base"] else "frozen",
            "the layer's base.bias is": "trainable" if "bias" in raw["of base"] else "frozen",
        }

    def notes(self, raw, inputs):
        wanted = _wanted(inputs)
        return {"numbers that train besides base's": f"{raw['numbers']}, and A and B have {wanted}"}


class _Arguments(Experiment):
    """An experiment that compares what a layer computes with base, for bases with other arguments."""

    bases: ClassVar[dict[str, dict]]  # name of a fact -> arguments of nn.Conv2d

    def draw(self, trial: Trial) -> dict:
        return {name: _inputs(trial, **arguments) for name, arguments in ({"control": {}} | self.bases).items()}

    def measure(self, subject, inputs):
        raw = {"control": _filled_output(subject, inputs["control"])}  # what raises here raises for any base
        for name in self.bases:
            raw[name] = attempt(lambda name=name: _filled_output(subject, inputs[name]))
        return raw

    def facts(self, raw, inputs):
        control = _kernel(raw["control"], inputs["control"])
        if control is None or _where(control - inputs["control"]["of base"]["weight"]) != "everywhere":
            return dict.fromkeys(self.bases)  # what is wrong is no matter of the arguments
        return {name: AS_BASE if _as_base(raw[name], inputs[name]) else NOT_AS_BASE for name in self.bases}

    def notes(self, raw, inputs):
        notes = {}
        for name in self.bases:
            if failed(raw[name]):
                notes[name] = failed(raw[name])
            elif (shape := inputs[name]["base"](inputs[name]["x"]).shape) != raw[name].shape:
                notes[name] = f"outputs of shape {tuple(raw[name].shape)}, base's are {tuple(shape)}"
        return notes


@exercise.experiment("stride and padding")
class StrideAndPadding(_Arguments):
    bases: ClassVar = {
        "stride 2": {"stride": 2},
        "stride (1, 2)": {"stride": (1, 2)},
        "padding (2, 0)": {"padding": (2, 0)},
        "padding 'same'": {"padding": "same"},
        "a kernel of (1, 3)": {"kernel_size": (1, 3), "padding": (0, 1)},
    }


@exercise.experiment("dilation")
class Dilation(_Arguments):
    bases: ClassVar = {"dilation 2": {"dilation": 2}, "dilation (1, 2)": {"dilation": (1, 2)}}


@exercise.experiment("padding modes")
class PaddingModes(_Arguments):
    points = 2
    bases: ClassVar = {
        "padding_mode 'circular'": {"padding_mode": "circular"},
        "padding_mode 'reflect'": {"padding_mode": "reflect"},
        "padding_mode 'replicate'": {"padding_mode": "replicate"},
        "padding_mode 'circular' and padding 'same'": {"padding_mode": "circular", "padding": "same"},
    }


@exercise.experiment("groups")
class Groups(_Arguments):
    points = 2
    bases: ClassVar = {"groups 2": {"groups": 2}, "groups 4, one channel each": {"groups": 4}}

    def draw(self, trial: Trial) -> dict:
        return super().draw(trial) | {"again": _inputs(trial, groups=2)}

    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        return raw | {"again": attempt(lambda: self._again(subject, inputs["again"]))}

    def facts(self, raw, inputs):
        facts, again = super().facts(raw, inputs), inputs["again"]
        size, count = None, None
        if None not in facts.values():
            facts = {name: "an error" if failed(raw[name]) else fact for name, fact in facts.items()}
            if "an error" not in facts.values():
                count = _count(raw["again"], again)
            if set(facts.values()) == {AS_BASE}:
                filled, zero = (_kernel(raw["again"][name], again) for name in ("filled", "zero"))
                size = None if filled is None or zero is None else _rank(filled - zero, again["rank"])
        return facts | {"groups 2, the update's rank": size, "groups 2, numbers that train besides base's": count}

    @staticmethod
    def _again(subject, inputs: dict) -> dict:
        layer = _layer(subject, inputs)
        raw, adapter = _trainable(layer, inputs), _adapter(layer, inputs)
        for name, number in (("filled", None), ("zero", 0.0)):
            _fill(adapter, inputs, number)
            raw[name] = _output(layer, inputs["x"])
        return raw


# --- what the experiments observe -----------------------------------------------------------------------------------


def _layer(subject, inputs: dict) -> nn.Module:
    return module(subject(inputs["base"], inputs["rank"], inputs["alpha"]), "LoRAConv2d")


def _is_bases(parameter: Tensor, inputs: dict) -> str | None:
    """Which of base's parameters this is, or is a copy of."""
    return next((name for name, own in inputs["of base"].items() if torch.equal(own, parameter)), None)


def _adapter(layer: nn.Module, inputs: dict) -> list[nn.Parameter]:
    """What trains and is not base's, in whatever shapes."""
    return [p for p in layer.parameters() if p.requires_grad and _is_bases(p, inputs) is None]


def _trainable(layer: nn.Module, inputs: dict) -> dict:
    of_base = [_is_bases(parameter, inputs) for parameter in layer.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in _adapter(layer, inputs))
    return {"numbers": numbers, "of base": [name for name in of_base if name]}


def _wanted(inputs: dict) -> int:
    weight = inputs["base"].weight
    return inputs["rank"] * (weight[0].numel() + len(weight))


def _count(raw: dict, inputs: dict) -> str:
    more = raw["numbers"] - _wanted(inputs)
    rank, outside = inputs["rank"], inputs["base"].out_channels
    known = {0: "those of A and B", rank: "also a bias", outside: "also a bias", rank + outside: "also two biases"}
    return "none" if raw["numbers"] == 0 else known.get(more, "more" if more > 0 else "fewer")


def _fill(adapter: list[nn.Parameter], inputs: dict, number: float | None = None) -> None:
    """Write a number, or random numbers, into all that trains."""
    generator = torch.Generator().manual_seed(inputs["seed"])
    with torch.no_grad():
        for parameter in adapter:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(random if number is None else torch.full_like(random, number))


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return expect_tensor(y, ("n", "out_channels", "height", "width"), "the output of the layer").detach()


def _filled_output(subject, inputs: dict, number: float | None = None) -> Tensor:
    layer = _layer(subject, inputs)
    _fill(_adapter(layer, inputs), inputs, number)
    return _output(layer, inputs["x"])


def _kernel(y: Tensor, inputs: dict) -> Tensor | None:
    """The weight with which base would compute y, whatever is added for each channel; None if there is no such weight."""
    base, x = inputs["base"], inputs["x"].double()
    reach = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
    sides = [(r // 2, r - r // 2) for r in reach] if base.padding == "same" else [(p, p) for p in base.padding]
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = F.pad(x, (*sides[1], *sides[0]), mode=mode)
    size = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, base.stride, strict=True)]
    if y.shape != (len(x), base.out_channels, *size):
        return None
    patches = F.unfold(x, base.kernel_size, base.dilation, 0, base.stride).transpose(1, 2)  # (n, positions, in * kh * kw)
    kernels = []
    for seen, made in zip(
        patches.chunk(base.groups, 2), y.double().flatten(2).transpose(1, 2).chunk(base.groups, 2), strict=True
    ):
        rows, wanted = F.pad(seen, (0, 1), value=1.0).flatten(0, 1), made.flatten(0, 1)  # the last column is for the bias
        kernel = torch.linalg.lstsq(rows, wanted).solution
        if not near(rows @ kernel, wanted):
            return None
        kernels.append(kernel[:-1].T)
    return torch.cat(kernels).view_as(base.weight)


def _as_base(y: Tensor | dict, inputs: dict) -> bool:
    """Whether a filled layer computed what base would with another weight than its own."""
    kernel = None if failed(y) else _kernel(y, inputs)
    return kernel is not None and not near(kernel, inputs["of base"]["weight"])


def _there(update: Tensor) -> Tensor:
    """In which places of a kernel there is an update, (kh, kw)."""
    return torch.tensor([[not near(place, 0) for place in row] for row in update.permute(2, 3, 0, 1)])


def _where(update: Tensor) -> str:
    there = _there(update)
    if there.all() or not there.any():
        return "everywhere" if there.all() else "nowhere"
    there[there.shape[0] // 2, there.shape[1] // 2] = False
    return "in other places" if there.any() else "in the middle alone"


def _rank(update: Tensor, rank: int) -> str:
    values = torch.linalg.svdvals(update.flatten(1))
    largest = float(values[0]) or 1.0
    found = sum(not near(value, 0, scale=largest) for value in values)
    return "rank" if found == rank else "above rank" if found > rank else "below rank"


# --- the misconceptions ---------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.scaling = rank, self.scale(rank, alpha)
        self.A, self.B = self.matrices()

    def scale(self, rank, alpha):
        return alpha / rank

    def matrices(self):
        weight = self.base.weight
        a = torch.randn(self.rank, weight[0].numel()) / math.sqrt(weight[0].numel())
        return nn.Parameter(a), nn.Parameter(torch.zeros(len(weight), self.rank))

    def delta(self):
        return self.scaling * (self.B @ self.A).view_as(self.base.weight)

    def padded(self, x):
        if self.base.padding_mode != "zeros":
            return F.pad(x, self.base._reversed_padding_repeated_twice, self.base.padding_mode), 0
        return x, self.base.padding

    def convolve(self, x, weight, stride, dilation):
        x, padding = self.padded(x)
        return F.conv2d(x, weight, None, stride, padding, dilation, self.base.groups)

    def update(self, x):
        return self.convolve(x, self.delta(), self.base.stride, self.base.dilation)

    def forward(self, x):
        return self.base(x) + self.update(x)


@exercise.misconception("no scaling")
class NoScaling(_Layer):
    def scale(self, rank, alpha):
        return 1.0


@exercise.misconception("alpha alone")
class AlphaAlone(_Layer):
    def scale(self, rank, alpha):
        return alpha


@exercise.misconception("both start at zero")
class BothZero(_Layer):
    def matrices(self):
        a, b = super().matrices()
        return nn.Parameter(torch.zeros_like(a)), b


@exercise.misconception("both start at random")
class BothRandom(_Layer):
    def matrices(self):
        a, b = super().matrices()
        return a, nn.Parameter(torch.randn_like(b))


@exercise.misconception("values instead of parameters")
class ValuesInsteadOfParameters(_Layer):
    def delta(self):
        return super().delta().detach()


@exercise.misconception("a 1 x 1 A")
class OneByOne(_Layer):
    def matrices(self):
        inside = self.base.weight.shape[1]
        return nn.Parameter(torch.randn(self.rank, inside)), nn.Parameter(torch.zeros(self.base.out_channels, self.rank))

    def delta(self):
        _, _, height, width = self.base.weight.shape
        around = (width // 2, (width - 1) // 2, height // 2, (height - 1) // 2)
        return F.pad(self.scaling * (self.B @ self.A)[:, :, None, None], around)


@exercise.misconception("B with a kernel of its own")
class KernelForB(_Layer):
    def matrices(self):
        a, _ = super().matrices()
        return a, nn.Parameter(torch.zeros(self.base.out_channels, self.rank, 3, 3))

    def update(self, x):
        base, a = self.base, self.A.view(self.rank, *self.base.weight.shape[1:]).repeat(self.base.groups, 1, 1, 1)
        low = self.convolve(x, a, base.stride, base.dilation)
        return self.scaling * F.conv2d(low, self.B, padding=1, groups=base.groups)


@exercise.misconception("flattened in another order")
class AnotherOrder(_Layer):
    def delta(self):
        return self.scaling * (self.A.T @ self.B.T).reshape(self.base.weight.shape)


@exercise.misconception("stride forgotten")
class StrideForgotten(_Layer):
    def update(self, x):
        return self.convolve(x, self.delta(), 1, self.base.dilation)


@exercise.misconception("dilation forgotten")
class DilationForgotten(_Layer):
    def update(self, x):
        return self.convolve(x, self.delta(), self.base.stride, 1)


@exercise.misconception("padding_mode forgotten")
class PaddingModeForgotten(_Layer):
    def padded(self, x):
        return x, self.base.padding


@exercise.misconception("padding always a pair of numbers")
class PaddingAPair(_Layer):
    def padded(self, x):
        high, wide = self.base.padding[0], self.base.padding[1]
        mode = "constant" if self.base.padding_mode == "zeros" else self.base.padding_mode
        return F.pad(x, (wide, wide, high, high), mode), 0


@exercise.misconception("groups forgotten")
class GroupsForgotten(_Layer):
    def matrices(self):
        base = self.base
        a = torch.randn(self.rank, base.in_channels * math.prod(base.kernel_size))
        return nn.Parameter(a), nn.Parameter(torch.zeros(base.out_channels, self.rank))

    def update(self, x):
        x, padding = self.padded(x)
        weight = (self.B @ self.A).view(-1, self.base.in_channels, *self.base.kernel_size)
        return self.scaling * F.conv2d(x, weight, None, self.base.stride, padding, self.base.dilation)


@exercise.misconception("an error with groups")
class AnErrorWithGroups(_Layer):
    def matrices(self):
        base = self.base
        a = torch.randn(self.rank, base.in_channels * math.prod(base.kernel_size))
        return nn.Parameter(a), nn.Parameter(torch.zeros(base.out_channels, self.rank))


@exercise.misconception("biases in the adapter")
class BiasesInTheAdapter(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.inner = nn.Parameter(torch.zeros(rank))

    def update(self, x):
        return super().update(x) + self.scaling * (self.B @ self.inner)[:, None, None]


@exercise.misconception("base's bias trains")
class BiasTrains(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        if base.bias is not None:
            base.bias.requires_grad_(True)
