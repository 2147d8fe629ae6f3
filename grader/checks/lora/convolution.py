"""Exercise 6.5: LoRA for a convolution, whatever its arguments are."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.lora import adapters
from grader.checks.lora.adapters import Layer, attempt, beside_base, failed, gradients, layer_of
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.lora import Conv2d

exercise = Exercise(__name__, "6.5", Conv2d, name="LoRAConv2d", core=4)

AS_BASE = "as base, but for the weight"
NOT_AS_BASE = "not as base"
RANK, FACTOR, COUNT = "the update's rank", "the factor before the product", "numbers that train besides base's"
WANTED = {RANK: "rank", FACTOR: "alpha / rank", COUNT: "those of A and B"}
NUMBER = 0.5  # what everything that trains is filled with to see the factor


def _inputs(trial: Trial, **arguments) -> dict:
    """A convolution, a rank, an alpha, and images. No number of groups divides the rank."""
    base = nn.Conv2d(4, 8, **({"kernel_size": 3, "padding": 1} | arguments))
    inputs = adapters.rank_and_alpha(trial) | adapters.beside(base, trial.normal(3, 4, 9, 5), trial)
    inputs["rank"] = min(inputs["rank"], *base.weight.flatten(1).shape)
    of_base = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    return inputs | {"of base": of_base, "seed": trial.integer(0, 10**6)}


@exercise.experiment("the update", 1)
class TheUpdate(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        layer = layer_of(subject, inputs)
        adapter = _adapter(layer, inputs)
        return _filled(layer, adapter, inputs, {"zero": 0.0, "filled": None, "constant": NUMBER}) if adapter else {}

    def facts(self, raw, inputs):
        exists, where, size, factor = None, None, None, None
        if raw:
            kernels = [_kernel(raw[name], inputs) for name in ("zero", "filled", "constant")]
            exists = NOT_AS_BASE if any(kernel is None for kernel in kernels) else AS_BASE
        if exists == AS_BASE:
            zero, filled, constant = kernels
            where = _where(filled - zero)
            size = _rank(filled - zero, inputs["rank"]) if where == "everywhere" else None
            factor = _factor(constant - zero, inputs)
        return {
            "with numbers in all that trains it computes": exists,
            "where in the kernel the update is": where,
            "the update's rank, as a matrix of out_channels rows": size,
            FACTOR: factor,
        }


@exercise.experiment("fresh layer", 2)
class FreshLayer(adapters.FreshLayer):
    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        layer = layer_of(subject, inputs)
        adapter = _adapter(layer, inputs)
        y = self._output(layer, inputs)
        start = torch.cat([parameter.detach().flatten() for parameter in adapter] or [y.new_zeros(0)])
        raw = {"y": y.detach(), "start": start, "fresh": gradients((y * inputs["g"]).sum(), adapter)}
        _fill(adapter, inputs)
        raw["filled"] = gradients((self._output(layer, inputs) * inputs["g"]).sum(), adapter)
        _fill(adapter, inputs, 0.0)
        return raw | {"zero": self._output(layer, inputs).detach()}

    def facts(self, raw, inputs):
        reached, filled, zero = None, None, None
        if raw["fresh"]:
            reached = "at least a part" if any(gradient.any() for gradient in raw["fresh"]) else "none"
            filled = traces.how_many(gradient.any() for gradient in raw["filled"])
            zero = beside_base(raw["zero"], inputs["y"])
        return super().facts(raw, inputs) | {
            "of what trains, what is not zero starts as": _start(raw["start"]),
            "of what trains, a gradient reaches": reached,
            "with random numbers in it, a gradient reaches": filled,
            "with zeros in it, its outputs are": zero,
        }

    @staticmethod
    def _output(layer: nn.Module, inputs: dict) -> Tensor:
        return expect_tensor(layer(inputs["x"]), inputs["y"].shape, f"the output for an input {tuple(inputs['x'].shape)}")


@exercise.experiment("what trains", 3)
class WhatTrains(Experiment):
    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        return _trainable(layer_of(subject, inputs), inputs)

    def facts(self, raw, inputs):
        return {
            COUNT: _count(raw, inputs),
            "the layer's base.weight is": "trainable" if "weight" in raw["of base"] else "frozen",
            "the layer's base.bias is": "trainable" if "bias" in raw["of base"] else "frozen",
        }

    def notes(self, raw, inputs):
        return {COUNT: f"{raw['numbers']}, and A and B have {_of_a_and_b(inputs)}"}


class _Arguments(Experiment):
    """An experiment that compares what a layer computes with base, for bases with other arguments."""

    bases: ClassVar[dict[str, dict]]  # name of a fact -> arguments of nn.Conv2d
    controls: ClassVar[tuple[dict, ...]] = ({},)  # arguments of bases that have to be right before others can be looked at

    def draw(self, trial: Trial) -> dict:
        controls = {f"control {k}": arguments for k, arguments in enumerate(({}, *self.controls))}
        return {name: _inputs(trial, **arguments) for name, arguments in (controls | self.bases).items()}

    def measure(self, subject, inputs):
        raw = {"control 0": self._output(subject, inputs["control 0"])}  # what raises here raises for any base
        controls = [f"control {k}" for k in range(1, len(self.controls) + 1)]
        return raw | {name: attempt(lambda name=name: self._output(subject, inputs[name])) for name in (*controls, *self.bases)}

    def facts(self, raw, inputs):
        plain = _kernel(raw["control 0"], inputs["control 0"])
        everywhere = plain is not None and _where(plain - inputs["control 0"]["of base"]["weight"]) == "everywhere"
        if not everywhere or not all(_as_base(raw[name], inputs[name]) for name in raw if name.startswith("control")):
            return dict.fromkeys(self.bases)  # what is wrong is no matter of these arguments
        return {name: AS_BASE if _as_base(raw[name], inputs[name]) else NOT_AS_BASE for name in self.bases}

    def notes(self, raw, inputs):
        notes = {}
        for name in self.bases:
            if failed(raw[name]):
                notes[name] = failed(raw[name])
            elif (shape := inputs[name]["y"].shape) != raw[name].shape:
                notes[name] = f"outputs of shape {tuple(raw[name].shape)}, base's are {tuple(shape)}"
        return notes

    @staticmethod
    def _output(subject, inputs: dict) -> Tensor:
        layer = layer_of(subject, inputs)
        return _filled(layer, _adapter(layer, inputs), inputs, {"random": None})["random"]


@exercise.experiment("stride and padding", 4)
class StrideAndPadding(_Arguments):
    bases: ClassVar = {
        "no bias": {"bias": False},
        "stride 2": {"stride": 2},
        "stride (1, 2)": {"stride": (1, 2)},
        "padding (2, 0)": {"padding": (2, 0)},
        "a kernel of 1": {"kernel_size": 1, "padding": 0},
        "a kernel of (1, 3)": {"kernel_size": (1, 3), "padding": (0, 1)},
        "a kernel of (4, 2), stride 2": {"kernel_size": (4, 2), "stride": 2},
    }


@exercise.experiment("dilation", 4)
class Dilation(_Arguments):
    controls: ClassVar = ({"stride": (1, 2), "padding": (2, 1)},)
    bases: ClassVar = {
        "dilation 2": {"dilation": 2},
        "dilation (1, 2)": {"dilation": (1, 2)},
        "dilation (2, 1), stride (1, 2), padding (2, 1)": {"dilation": (2, 1), "stride": (1, 2), "padding": (2, 1)},
    }


@exercise.experiment("padding 'same'", 5)
class PaddingSame(_Arguments):
    # An even kernel with an odd dilation needs one row more on one side; torch would warn of that.
    controls: ClassVar = ({"kernel_size": (4, 2), "dilation": (1, 2), "padding": (3, 1)},)
    bases: ClassVar = {
        "padding 'same'": {"padding": "same"},
        "padding 'same', dilation (1, 2)": {"padding": "same", "dilation": (1, 2)},
        "padding 'same', a kernel of (4, 2), dilation 2": {"padding": "same", "kernel_size": (4, 2), "dilation": 2},
    }


@exercise.experiment("padding modes", 6)
class PaddingModes(_Arguments):
    points = 2
    bases: ClassVar = {
        "padding_mode 'circular'": {"padding_mode": "circular"},
        "padding_mode 'reflect'": {"padding_mode": "reflect"},
        "padding_mode 'replicate'": {"padding_mode": "replicate"},
        "padding_mode 'reflect', padding (2, 1)": {"padding_mode": "reflect", "padding": (2, 1)},
    }


@exercise.experiment("groups", 7)
class Groups(_Arguments):
    points = 2
    bases: ClassVar = {"groups 2": {"groups": 2}, "groups 4, one channel each": {"groups": 4}}

    def draw(self, trial: Trial) -> dict:
        return super().draw(trial) | {"plain": _inputs(trial), "again": _inputs(trial, groups=2)}

    def measure(self, subject, inputs):
        more = {name: attempt(lambda name=name: self._more(subject, inputs[name])) for name in ("plain", "again")}
        return super().measure(subject, inputs) | more

    def facts(self, raw, inputs):
        facts = super().facts(raw, inputs)
        if None not in facts.values():
            facts = {name: "an error" if failed(raw[name]) else fact for name, fact in facts.items()}
        plain, more = (self._seen(raw[name], inputs[name]) for name in ("plain", "again"))
        if set(facts.values()) != {AS_BASE}:
            more |= {RANK: None, FACTOR: None, COUNT: None if "an error" in facts.values() else more[COUNT]}
        return facts | {f"groups 2, {name}": more[name] if plain[name] == WANTED[name] else None for name in WANTED}

    @staticmethod
    def _more(subject, inputs: dict) -> dict:
        layer = layer_of(subject, inputs)
        numbers = {"filled": None, "zero": 0.0, "constant": NUMBER}
        return _trainable(layer, inputs) | _filled(layer, _adapter(layer, inputs), inputs, numbers)

    @staticmethod
    def _seen(raw: dict, inputs: dict) -> dict[str, str | None]:
        """Rank, factor and numbers of the update; None where base computes no such thing with any weight."""
        seen = dict.fromkeys(WANTED)
        if not failed(raw):
            seen[COUNT] = _count(raw, inputs)
            filled, zero, constant = (_kernel(raw[name], inputs) for name in ("filled", "zero", "constant"))
            if not any(kernel is None for kernel in (filled, zero, constant)):
                seen |= {RANK: _rank(filled - zero, inputs["rank"]), FACTOR: _factor(constant - zero, inputs)}
        return seen


@exercise.experiment("in combination", 5, 6, 7)
class InCombination(_Arguments):
    numbers: ClassVar = {"stride": (2, 1), "dilation": (1, 2), "padding": (2, 1), "bias": False}
    controls: ClassVar = (
        numbers,
        *({"padding_mode": mode} for mode in ("circular", "replicate")),
        *({"padding": "same", "dilation": (2, 1)}, {"groups": 2}, {"groups": 4}),
    )
    bases: ClassVar = {
        "padding_mode 'circular', padding 'same', dilation 2": {"padding_mode": "circular", "padding": "same", "dilation": 2},
        "padding_mode 'replicate' and groups 2, stride (2, 1), dilation (1, 2), padding (2, 1)": numbers
        | {"padding_mode": "replicate", "groups": 2},
        "padding 'same' and groups 4, dilation (2, 1)": {"padding": "same", "groups": 4, "dilation": (2, 1)},
    }


# --- what the experiments observe -----------------------------------------------------------------------------------


def _adapter(layer: nn.Module, inputs: dict) -> list[nn.Parameter]:
    """What trains and is not base's, in whatever shapes."""
    return [p for p in layer.parameters() if p.requires_grad and adapters.name_in_base(p, inputs["of base"]) is None]


def _trainable(layer: nn.Module, inputs: dict) -> dict:
    of_base = [adapters.name_in_base(p, inputs["of base"]) for p in layer.parameters() if p.requires_grad]
    numbers = sum(parameter.numel() for parameter in _adapter(layer, inputs))
    return {"numbers": numbers, "of base": [name for name in of_base if name]}


def _of_a_and_b(inputs: dict) -> int:
    """How many numbers A and B have together."""
    return inputs["rank"] * sum(inputs["base"].weight.flatten(1).shape)


def _count(raw: dict, inputs: dict) -> str:
    more = raw["numbers"] - _of_a_and_b(inputs)
    rank, outside = inputs["rank"], inputs["base"].out_channels
    known = {0: "those of A and B", rank: "also a bias", outside: "also a bias", rank + outside: "also two biases"}
    return "none" if raw["numbers"] == 0 else known.get(more, "more" if more > 0 else "fewer")


def _start(numbers: Tensor) -> str | None:
    """How many different numbers there are besides zero."""
    numbers = numbers[numbers != 0]
    different = len(numbers.unique())
    if different <= 1:
        return "one number" if different else None
    return "different ones" if different > 0.9 * len(numbers) else "some numbers, again and again"


def _fill(adapter: list[nn.Parameter], inputs: dict, number: float | None = None) -> None:
    """Write a number, or random numbers, into all that trains."""
    generator = torch.Generator().manual_seed(inputs["seed"])
    with torch.no_grad():
        for parameter in adapter:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(random if number is None else torch.full_like(random, number))


def _filled(layer: nn.Module, adapter: list[nn.Parameter], inputs: dict, numbers: dict[str, float | None]) -> dict[str, Tensor]:
    """The layer's outputs with each of the numbers in all that trains."""
    outputs = {}
    for name, number in numbers.items():
        _fill(adapter, inputs, number)
        y = expect_tensor(layer(inputs["x"]), ("n", "out_channels", "height", "width"), "the output of the layer")
        outputs[name] = y.detach()
    return outputs


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
    outputs = y.double().flatten(2).transpose(1, 2)  # (n, positions, out)
    kernels = []
    for patch, output in zip(patches.chunk(base.groups, 2), outputs.chunk(base.groups, 2), strict=True):
        rows, wanted = F.pad(patch, (0, 1), value=1.0).flatten(0, 1), output.flatten(0, 1)  # the last column is for the bias
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


def _factor(update: Tensor, inputs: dict) -> str | None:
    """What multiplies the sum of rank products of the same two numbers."""
    values = update[:, :, _there(update)]
    if values.numel() == 0 or not near(values / values.mean(), 1):
        return None
    return adapters.factor_name(float(values.mean()) / (inputs["rank"] * NUMBER**2), inputs)


def _rank(update: Tensor, rank: int) -> str:
    values = torch.linalg.svdvals(update.flatten(1))
    largest = float(values[0]) or 1.0
    count = sum(not near(value, 0, scale=largest) for value in values)
    return "rank" if count == rank else "above rank" if count > rank else "below rank"


# --- the misconceptions ---------------------------------------------------------------------------------------------


class Convolution(Layer):
    """A right solution, in pieces that a misconception replaces."""

    def padded(self, x):
        """x with its padding, and how much of it is left to the convolution."""
        if self.base.padding_mode != "zeros":
            return F.pad(x, self.base._reversed_padding_repeated_twice, self.base.padding_mode), 0
        return x, self.base.padding

    def arguments(self):
        return {name: getattr(self.base, name) for name in ("stride", "dilation", "groups")}

    def update(self, x):
        x, padding = self.padded(x)
        return F.conv2d(x, self.delta(), self.constant(), padding=padding, **self.arguments())


def _in_the_middle(layer):
    high, wide = layer.base.kernel_size
    around = (wide // 2, (wide - 1) // 2, high // 2, (high - 1) // 2)
    return F.pad(layer.scaling * (layer.B @ layer.A)[:, :, None, None], around)


def _two_kernels(layer, x):
    x, padding = layer.padded(x)
    groups, a = layer.base.groups, layer.A.unflatten(1, layer.base.weight.shape[1:])
    low = F.conv2d(x, a.repeat(groups, 1, 1, 1), padding=padding, **layer.arguments())
    return layer.scaling * F.conv2d(low, layer.B, padding=1, groups=groups)


def _padded_alike(layer, x, high, wide):
    mode = "constant" if layer.base.padding_mode == "zeros" else layer.base.padding_mode
    return F.pad(x, (wide, wide, high, high), mode), 0


def _half_a_kernel_for_a_word(layer, x):
    if layer.base.padding != "same":
        return Convolution.padded(layer, x)
    return _padded_alike(layer, x, *(k // 2 for k in layer.base.kernel_size))


def _for_all_channels(layer, rank):
    base = layer.base
    return {"A": (rank, base.in_channels * math.prod(base.kernel_size)), "B": (base.out_channels, rank)}


def _by_group(layer, name):
    return getattr(layer, name).unflatten(0, (layer.base.groups, -1))


def _otherwise(**arguments):
    return {"arguments": lambda layer: Convolution.arguments(layer) | arguments}


CHANGES = adapters.CHANGES | {
    "rsLoRA's factor": {"scale": lambda layer, rank, alpha: alpha / math.sqrt(rank)},
    "starts at one number": {"trained": lambda layer, tensor: nn.Parameter(tensor.any() * torch.full_like(tensor, 0.1))},
    "base trains too": {"frozen": lambda layer: []},
    "a 1 x 1 A": {
        "shapes": lambda layer, rank: {"A": (rank, layer.base.weight.shape[1]), "B": (layer.base.out_channels, rank)},
        "delta": _in_the_middle,
    },
    "B with a kernel of its own": {
        "shapes": lambda layer, rank: Layer.shapes(layer, rank) | {"B": (layer.base.out_channels, rank, 3, 3)},
        "update": _two_kernels,
    },
    "flattened in another order": {
        "delta": lambda layer: layer.scaling * (layer.A.T @ layer.B.T).reshape(layer.base.weight.shape)
    },
    "stride forgotten": _otherwise(stride=1),
    "dilation forgotten": _otherwise(dilation=1),
    "padding_mode forgotten": {"padded": lambda layer, x: (x, layer.base.padding)},
    "half a kernel for 'same'": {"padded": _half_a_kernel_for_a_word},
    "padding always a pair of numbers": {"padded": lambda layer, x: _padded_alike(layer, x, *layer.base.padding)},
    "groups forgotten": {"shapes": _for_all_channels} | _otherwise(groups=1),
    "an error with groups": {"shapes": _for_all_channels},
    "an adapter for each group": {
        "shapes": lambda layer, rank: Layer.shapes(layer, rank) | {"A": Layer.shapes(layer, layer.base.groups * rank)["A"]},
        "delta": lambda layer: layer.scaling * (_by_group(layer, "B") @ _by_group(layer, "A")).view_as(layer.base.weight),
    },
}
exercise.misconceptions_of(Convolution, CHANGES)
