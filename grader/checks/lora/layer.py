"""Exercise 6.1: a linear layer that stays as it is, and two small matrices beside it that train."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers import expect
from helpers.lora import Linear

exercise = Exercise(__name__, "6.1", Linear, name="LoRALinear")

SOMETHING_ELSE = "something else"
AN_ERROR = "an error"


def _base(trial: Trial, bias: bool = True) -> dict:
    """A linear layer, a rank, an alpha, and numbers for A and B. No two of the sizes are equal.

    Neither rank nor alpha make two of the factors in `_factors` equal: with rank 2, twice alpha / rank would be alpha.
    """
    rank = 3 + 2 * trial.integer(0, 1)
    inside, outside = rank + trial.integer(1, 2), rank + trial.integer(3, 4)
    base = nn.Linear(inside, outside, bias=bias)
    for parameter in base.parameters():
        parameter.data.copy_(trial.normal(*parameter.shape))
    return {
        "base": base,
        "rank": rank,
        "alpha": (7, 8, 11)[trial.integer(0, 2)],
        "A": trial.normal(rank, inside),
        "B": trial.normal(outside, rank),
        "x": trial.normal(4, inside),
    }


@exercise.experiment("fresh layer")
class FreshLayer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _base(trial)
        return inputs | {"g": trial.normal(4, inputs["base"].out_features)}

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        y = _output(layer, inputs["x"], inputs)
        raw = {"y": y.detach(), "gradients": gradients((y * inputs["g"]).sum(), _adapter(layer, inputs))}
        if _fill(layer, inputs, times=0):
            raw["zero"] = _output(layer, inputs["x"], inputs).detach()
        return raw

    def facts(self, raw, inputs):
        with torch.no_grad():
            y = inputs["base"](inputs["x"])
        reached = None
        if raw["gradients"]:
            reached = "A or B" if any(g.any() for g in raw["gradients"]) else "neither A nor B"
        return {
            "its outputs are": beside_base(raw["y"], y),
            "a gradient reaches": reached,
            "once A and B are zero, its outputs are": beside_base(raw["zero"], y) if "zero" in raw else None,
        }

    def notes(self, raw, inputs):
        with torch.no_grad():
            return {"its outputs are": how_far(raw["y"], inputs["base"](inputs["x"]))}


@exercise.experiment("the update")
class TheUpdate(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _base(trial)

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        if not _fill(layer, inputs):
            return {}
        filled = _matrix(layer, inputs)
        _fill(layer, inputs, times=0)
        return {"filled": filled, "zero": _matrix(layer, inputs)}

    def facts(self, raw, inputs):
        what, number = _product(raw["filled"] - raw["zero"], inputs["A"], inputs["B"]) if raw else (None, None)
        factor = None if number is None else name_of(number, inputs)
        return {"the update is, but for a factor": what, "the factor": factor}

    def notes(self, raw, inputs):
        number = _product(raw["filled"] - raw["zero"], inputs["A"], inputs["B"])[1] if raw else None
        if number is None:
            return {}
        return {"the factor": f"{number:.3g} with rank {inputs['rank']} and alpha {inputs['alpha']}"}


@exercise.experiment("gradients")
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _base(trial, bias=False)
        return inputs | {"g": trial.normal(4, inputs["base"].out_features)}

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        if not _fill(layer, inputs):
            return {}
        matrix = _matrix(layer, inputs)
        x = inputs["x"].clone().requires_grad_(True)
        y = _output(layer, x, inputs)
        return {"matrix": matrix, "gradients": gradients((y * inputs["g"]).sum(), [*_adapter(layer, inputs), x])}

    def facts(self, raw, inputs):
        if not raw:
            return dict.fromkeys(("a gradient reaches A", "a gradient reaches B", "the input's gradient comes through"))
        g, weight, (a, b, x) = inputs["g"], inputs["base"].weight.detach(), raw["gradients"]
        ways = {
            "base and update": g @ raw["matrix"],
            "base alone": g @ weight,
            "the update alone": g @ (raw["matrix"] - weight),
            "neither base nor update": torch.zeros_like(x),
        }
        return {
            "a gradient reaches A": "yes" if a.any() else "no",
            "a gradient reaches B": "yes" if b.any() else "no",
            "the input's gradient comes through": next((name for name, w in ways.items() if near(x, w)), SOMETHING_ELSE),
        }


@exercise.experiment("what trains")
class WhatTrains(Experiment):
    def draw(self, trial: Trial) -> dict:
        return _base(trial)

    def measure(self, subject, inputs):
        parameters = _layer(subject, inputs).parameters()
        return {"trainable": [parameter.detach().clone() for parameter in parameters if parameter.requires_grad]}

    def facts(self, raw, inputs):
        base, besides = inputs["base"], []
        counts = {"A": 0, "B": 0, "base.weight": 0, "base.bias": 0}
        for tensor in raw["trainable"]:
            names = [name for name in ("A", "B") if _fits(tensor, inputs[name])]
            names += [f"base.{name}" for name, one in base.named_parameters() if torch.equal(tensor, one)]
            if names:
                counts[names[0]] += 1
            else:
                besides.append(tensor)
        return {
            "trainable parameters with the shape of A": counts["A"],
            "trainable parameters with the shape of B": counts["B"],
            "the layer's base.weight is": "trainable" if counts["base.weight"] else "frozen",
            "the layer's base.bias is": "trainable" if counts["base.bias"] else "frozen",
            "trainable besides": kinds(besides),
        }


@exercise.experiment("base itself")
class BaseItself(Experiment):
    def draw(self, trial: Trial) -> dict:
        inputs = _base(trial)
        return inputs | {"new": trial.normal(*inputs["base"].weight.shape)}

    def measure(self, subject, inputs):
        weight = inputs["base"].weight
        layer = _layer(subject, inputs)
        _fill(layer, inputs)
        with torch.no_grad():
            _output(layer, inputs["x"], inputs)
            used = weight.detach().clone()
            weight.copy_(inputs["new"])
            _fill(layer, inputs, times=0)
            return {"weight": used, "y": _output(layer, inputs["x"], inputs)}

    def facts(self, raw, inputs):
        base, x = inputs["base"], inputs["x"]
        with torch.no_grad():
            weights = {"the new numbers": inputs["new"], "the old numbers": base.weight}
            like = {name: beside_base(raw["y"], F.linear(x, weight, base.bias)) for name, weight in weights.items()}
        return {
            "base.weight, once the layer was used, is": "as before" if torch.equal(raw["weight"], base.weight) else "changed",
            "with new numbers in base.weight the outputs follow": next(
                (name for name, how in like.items() if how != "different"), "neither the new nor the old"
            ),
        }


@exercise.experiment("takes what base takes")
class TakesWhatBaseTakes(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _base(trial)
        shapes = (), (1,), (2, 3), (2, 1, 3)
        xs = [trial.normal(*shape, inputs["base"].in_features) for shape in shapes]
        elsewhere = nn.Linear(inputs["base"].in_features, inputs["base"].out_features, device="meta")
        return inputs | {"xs": xs, "in float64": copy.deepcopy(inputs["base"]).double(), "elsewhere": elsewhere}

    def measure(self, subject, inputs):
        layer = _layer(subject, inputs)
        _fill(layer, inputs)
        rows = [_output(layer, x.reshape(-1, x.shape[-1]), inputs).detach() for x in inputs["xs"]]
        raw = {"rows": rows, "outputs": [attempt(lambda x=x: layer(x).detach().clone()) for x in inputs["xs"]]}
        double = inputs["x"].double()
        moved = attempt(lambda: str(layer.to(torch.float64)(double).dtype))
        made = _layer(subject, inputs | {"base": inputs["in float64"]})
        return raw | {
            "moved": moved,
            "dtypes": [str(parameter.dtype) for parameter in _adapter(made, inputs)],
            "made": attempt(lambda: str(made(double).dtype)),
            "devices": attempt(lambda: self._devices(subject, inputs)),
        }

    def facts(self, raw, inputs):
        alike = all(map(_as_in_rows, raw["outputs"], inputs["xs"], raw["rows"]))
        dtype = None
        if raw["dtypes"]:
            dtype = "float64" if set(raw["dtypes"]) == {"torch.float64"} else "another dtype"
        there = None
        if raw["dtypes"]:
            # A layer that cannot be made of a base without numbers may be right on a real device.
            there = "base's device" if failed(raw["devices"]) or set(raw["devices"]) == {"meta"} else "another"
        return {
            "inputs of 1, 2, 3 and 4 dimensions": "each vector as in a matrix" if alike else "not each as in a matrix",
            "after .to(torch.float64) it returns": _dtype(raw["moved"]),
            "made from a float64 base, A and B are of": dtype,
            "and it returns": _dtype(raw["made"]) if dtype == "float64" else None,
            "made from a base on another device, A and B are on": there,
        }

    def notes(self, raw, inputs):
        first = next((y for y in raw["outputs"] if failed(y)), None)
        seen = {
            "inputs of 1, 2, 3 and 4 dimensions": first,
            "after .to(torch.float64) it returns": raw["moved"],
            "and it returns": raw["made"],
        }
        return {fact: failed(value) for fact, value in seen.items() if failed(value)}

    @staticmethod
    def _devices(subject, inputs: dict) -> list[str]:
        layer = _layer(subject, inputs | {"base": inputs["elsewhere"]})
        return [parameter.device.type for parameter in _adapter(layer, inputs)]


# --- what experiments observe, here and in exercise 6.5 -------------------------------------------------------------


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` returns or, if it raises, how: for what may fail where a plain call before did not."""
    try:
        return run()
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"}


def failed(value: Any) -> str | None:
    """What was raised in `attempt`."""
    return value.get("raised") if isinstance(value, dict) else None


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The gradient of the loss for each tensor; zeros where the loss does not depend on it."""
    if not tensors or not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def beside_base(y: Tensor, base_y: Tensor) -> str:
    """What outputs (n, channels, ...) are, in terms of base's; a constant is one number for each channel."""
    if near(y, base_y):
        return "base's"
    channels = (y - base_y).transpose(0, 1).flatten(1)
    if near(channels - channels[:, :1], 0, scale=max(1.0, float(base_y.abs().max()))):
        return "base's and a constant"
    return "different" if ratio(y, base_y) is None else "base's times a number"


def how_far(y: Tensor, base_y: Tensor) -> str:
    return f"off by up to {(y - base_y).abs().max():.2g}"


def ratio(one: Tensor, other: Tensor) -> float | None:
    """The number by which `other` is multiplied in `one`, if there is such a number and it is not zero."""
    number = float((one * other).sum() / (other * other).sum())
    there = not near(number, 0) and near(one, number * other, scale=abs(number) * float(other.abs().max()))
    return number if there else None


def name_of(factor: float, inputs: dict) -> str:
    """A factor in the words of the statement."""
    rank, alpha = inputs["rank"], inputs["alpha"]
    known = {
        "alpha / rank": alpha / rank,
        "1": 1.0,
        "alpha": alpha,
        "1 / rank": 1 / rank,
        "rank / alpha": rank / alpha,
        "alpha / sqrt(rank)": alpha / math.sqrt(rank),
        "2 alpha / rank": 2 * alpha / rank,
    }
    return next((name for name, value in known.items() if near(factor / value, 1)), "another number")


def kinds(tensors: list[Tensor]) -> str:
    if not tensors:
        return "nothing"
    return "vectors" if all(tensor.ndim == 1 for tensor in tensors) else "other tensors"


def module(value: object, name: str) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise WrongReturn(f"{name}(base, rank, alpha) must be an nn.Module, got {expect.describe(value)}.")
    return value


def _layer(subject, inputs: dict) -> nn.Module:
    return module(subject(inputs["base"], inputs["rank"], inputs["alpha"]), "LoRALinear")


def _output(layer: nn.Module, x: Tensor, inputs: dict) -> Tensor:
    wanted = len(x), inputs["B"].shape[0]
    return expect_tensor(layer(x), wanted, f"the output for an input of shape {tuple(x.shape)}")


def _matrix(layer: nn.Module, inputs: dict) -> Tensor:
    """What the layer multiplies its input by, (out_features, in_features), whatever it adds."""
    a = inputs["A"]
    y = _output(layer, F.pad(torch.eye(a.shape[1], device=a.device), (0, 0, 0, 1)), inputs).detach()
    return (y[:-1] - y[-1]).T.clone()


def _fits(tensor: Tensor, matrix: Tensor) -> bool:
    """Whether it has the shape of the matrix, or of its transpose: how a matrix is kept is free."""
    return tensor.shape in (matrix.shape, matrix.T.shape)


def _adapter(layer: nn.Module, inputs: dict) -> list[nn.Parameter]:
    """The trainable parameters that have the shapes of A and of B; nothing if there is not one of each."""
    found = []
    for name in ("A", "B"):
        fits = [p for p in layer.parameters() if p.requires_grad and _fits(p, inputs[name])]
        if len(fits) != 1:
            return []
        found += fits
    return found


def _fill(layer: nn.Module, inputs: dict, times: float = 1.0) -> bool:
    """Write the numbers drawn for A and B into the layer; False if it has no such parameters."""
    parameters = _adapter(layer, inputs)
    with torch.no_grad():
        for parameter, name in zip(parameters, ("A", "B"), strict=False):
            matrix = inputs[name] if parameter.shape == inputs[name].shape else inputs[name].T
            parameter.copy_(times * matrix)
    return bool(parameters)


def _product(update: Tensor, a: Tensor, b: Tensor) -> tuple[str, float | None]:
    """What an update is made of, and the factor before it."""
    if near(update, 0):
        return "nothing", None
    number = ratio(update, b @ a)
    if number is not None:
        return "B A", number
    reshaped_a, reshaped_b = a.reshape(a.T.shape).T, b.reshape(b.T.shape).T
    for product in (b @ reshaped_a, reshaped_b @ a, reshaped_b @ reshaped_a):
        number = ratio(update, product)
        if number is not None:
            return "B A of matrices reshaped, not transposed", number
    return SOMETHING_ELSE, None


def _as_in_rows(y: Any, x: Tensor, rows: Tensor) -> bool:
    """Whether the output for x holds the same vectors as the one for a matrix of x's vectors."""
    return isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1] and y.numel() == rows.numel() and near(y.view_as(rows), rows)


def _dtype(found: str | dict) -> str:
    return AN_ERROR if failed(found) else found.removeprefix("torch.")


# --- the misconceptions ---------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = self.matrices(rank)
        self.scaling = self.scale(rank, alpha)

    def matrices(self, rank):
        like = {"device": self.base.weight.device, "dtype": self.base.weight.dtype}
        a = torch.randn(rank, self.base.in_features, **like) / math.sqrt(self.base.in_features)
        return nn.Parameter(a), nn.Parameter(torch.zeros(self.base.out_features, rank, **like))

    def scale(self, rank, alpha):
        return alpha / rank

    def update(self, x):
        return self.scaling * (x @ self.A.T @ self.B.T)

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


@exercise.misconception("1 / rank alone")
class OneOverRank(_Layer):
    def scale(self, rank, alpha):
        return 1 / rank


@exercise.misconception("rank / alpha")
class RankOverAlpha(_Layer):
    def scale(self, rank, alpha):
        return rank / alpha


@exercise.misconception("both start at zero")
class BothZero(_Layer):
    def matrices(self, rank):
        a, b = super().matrices(rank)
        return nn.Parameter(torch.zeros_like(a)), b


@exercise.misconception("both start at random")
class BothRandom(_Layer):
    def matrices(self, rank):
        a, b = super().matrices(rank)
        return a, nn.Parameter(torch.randn_like(b))


@exercise.misconception("base's bias trains")
class BiasTrains(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        if base.bias is not None:
            base.bias.requires_grad_(True)


@exercise.misconception("base trains too")
class BaseTrains(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.requires_grad_(True)


@exercise.misconception("values instead of parameters")
class ValuesInsteadOfParameters(_Layer):
    def update(self, x):
        return self.scaling * (x @ self.A.data.T @ self.B.data.T)


@exercise.misconception("the update under no_grad")
class UpdateUnderNoGrad(_Layer):
    def forward(self, x):
        y = self.base(x)
        with torch.no_grad():
            update = self.update(x)
        return y + update


@exercise.misconception("base under no_grad")
class BaseUnderNoGrad(_Layer):
    def forward(self, x):
        with torch.no_grad():
            y = self.base(x)
        return y + self.update(x)


@exercise.misconception("not registered")
class NotRegistered(_Layer):
    def __init__(self, base, rank, alpha):
        nn.Module.__init__(self)
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.A, self.B = (parameter.detach().requires_grad_(True) for parameter in self.matrices(rank))


@exercise.misconception("the sum is scaled")
class TheSumIsScaled(_Layer):
    def forward(self, x):
        return self.scaling * (self.base(x) + x @ self.A.T @ self.B.T)


@exercise.misconception("added twice")
class AddedTwice(_Layer):
    def forward(self, x):
        weight = self.base.weight + self.scaling * self.B @ self.A
        return F.linear(x, weight, self.base.bias) + self.update(x)


@exercise.misconception("biases in the adapter")
class BiasesInTheAdapter(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.inner = nn.Parameter(base.weight.new_zeros(rank))

    def update(self, x):
        return self.scaling * ((x @ self.A.T + self.inner) @ self.B.T)


@exercise.misconception("a random bias in B")
class ARandomBias(BiasesInTheAdapter):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.outer = nn.Parameter(torch.randn_like(base.weight[:, 0]))

    def update(self, x):
        return super().update(x) + self.scaling * self.outer


@exercise.misconception("base copied")
class BaseCopied(_Layer):
    def __init__(self, base, rank, alpha):
        super().__init__(copy.deepcopy(base), rank, alpha)


@exercise.misconception("added into base.weight")
class AddedIntoBase(_Layer):
    def forward(self, x):
        self.base.weight.data += self.scaling * (self.B @ self.A).detach()
        return self.base(x)


@exercise.misconception("float32 on the CPU")
class Float32OnTheCPU(_Layer):
    def matrices(self, rank):
        a, b = torch.randn(rank, self.base.in_features), torch.zeros(self.base.out_features, rank)
        return nn.Parameter(a), nn.Parameter(b)


@exercise.misconception("float32 on base's device")
class Float32(_Layer):
    def matrices(self, rank):
        return tuple(nn.Parameter(p.detach().float()) for p in super().matrices(rank))


@exercise.misconception("samples in rows only")
class SamplesInRowsOnly(_Layer):
    def update(self, x):
        return self.scaling * torch.mm(x, self.A.T).mm(self.B.T)


@exercise.misconception("reshaped, not transposed")
class ReshapedNotTransposed(_Layer):
    def update(self, x):
        return self.scaling * (x @ self.A.view(self.A.T.shape) @ self.B.T)
