"""What exercises 6.1 and 6.5 share: inputs, words for what a layer does, and a right solution in pieces."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Experiment, Trial, wrong_return
from grader.near import near, which


def rank_and_alpha(trial: Trial) -> dict[str, int]:
    """Numbers that make no two of the factors in `factor_name` equal: with rank 2, twice alpha / rank would be alpha."""
    return {"rank": 3 + 2 * trial.integer(0, 1), "alpha": (7, 8, 11)[trial.integer(0, 2)]}


def beside(base: nn.Module, x: Tensor, trial: Trial) -> dict:
    """`base` with random numbers in it, an input x, what base computes for it, y, and g, a gradient of y."""
    for parameter in base.parameters():
        parameter.data.copy_(trial.normal(*parameter.shape))
    y = base(x).detach()
    return {"base": base, "x": x, "y": y, "g": trial.normal(*y.shape)}


class FreshLayer(Experiment):
    """What a new layer computes, beside base."""

    points = 2

    def facts(self, raw, inputs):
        outputs = beside_base(raw["y"], inputs["y"])
        # What A and B add at first is compared with what zeros add, where nothing is rounded: a small update is one, too.
        if outputs == "base's" and "zero" in raw and not near(raw["y"], raw["zero"], scale=0.01):
            outputs = "base's and an update" if near(raw["zero"], inputs["y"]) else "different"
        return {"its outputs are": outputs}

    def notes(self, raw, inputs):
        return {"its outputs are": f"off by up to {(raw['y'] - inputs['y']).abs().max():.2g}"}


# --- what experiments observe ---------------------------------------------------------------------------------------


def layer_of(subject: Callable, inputs: dict) -> nn.Module:
    """The layer that a subject makes of base."""
    layer = subject(inputs["base"], inputs["rank"], inputs["alpha"])
    if not isinstance(layer, nn.Module):
        name = f"LoRA{type(inputs['base']).__name__}"  # LoRALinear, LoRAConv2d
        raise wrong_return(f"{name}(base, rank, alpha) must be an nn.Module", layer)
    return layer


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
    return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))


def beside_base(y: Tensor, base_y: Tensor) -> str:
    """What outputs (n, channels, ...) are, in terms of base's; a constant is one number for each channel."""
    if near(y, base_y):
        return "base's"
    channels = (y - base_y).transpose(0, 1).flatten(1)
    if near(channels - channels[:, :1], 0, scale=max(1.0, float(base_y.abs().max()))):
        return "base's and a constant"
    return "different" if ratio(y, base_y) is None else "base's times a number"


def ratio(result: Tensor, basis: Tensor) -> float | None:
    """The number by which `basis` is multiplied in `result`, if there is such a number and it is not zero."""
    number = float((result * basis).sum() / (basis * basis).sum())
    there = not near(number, 0) and near(result, number * basis, scale=abs(number) * float(basis.abs().max()))
    return number if there else None


def factor_name(factor: float, inputs: dict, first: str | None = None) -> str:
    """A factor in the words of the statement; where several fit, `first` if it is one of them."""
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
    known = {name: known[name] for name in sorted(known, key=lambda name: name != first)}
    return which(factor, known, otherwise="another number")


def name_in_base(parameter: Tensor, own: Mapping[str, Tensor]) -> str | None:
    """Which of base's own parameters this is, or is a copy of."""
    return next((name for name, tensor in own.items() if torch.equal(tensor, parameter)), None)


# --- the misconceptions ---------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A right solution for an nn.Linear, in pieces that a misconception replaces; a convolution replaces `update`."""

    random = ("A",)  # what starts at random; all else that trains starts at zero

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scaling = self.adapted(base), self.scale(rank, alpha)
        for parameter in self.frozen():
            parameter.requires_grad_(False)
        for name, shape in self.shapes(rank).items():
            start = self.drawn if name in self.random else nn.init.zeros_
            setattr(self, name, self.trained(start(self.empty(*shape))))

    def adapted(self, base):
        return base

    def scale(self, rank, alpha):
        return alpha / rank

    def frozen(self):
        return self.base.parameters()

    def shapes(self, rank):
        rows, columns = self.base.weight.flatten(1).shape
        return {"A": (rank, columns), "B": (rows, rank)}

    def empty(self, *shape):
        return self.base.weight.new_empty(shape)

    def drawn(self, tensor):
        """As `nn.Linear` draws its weight."""
        bound = tensor.shape[-1] ** -0.5
        return nn.init.uniform_(tensor, -bound, bound)

    def trained(self, tensor):
        return nn.Parameter(tensor)

    def delta(self):
        return self.scaling * (self.B @ self.A).unflatten(1, (-1, *self.base.weight.shape[2:]))

    def constant(self):
        """What the update adds to each output, whatever the input is."""
        return None

    def update(self, x):
        return F.linear(x, self.delta(), self.constant())

    def unchanged(self, x):
        return self.base(x)

    def forward(self, x):
        return self.unchanged(x) + self.update(x)


CHANGES = {
    "no scaling": {"scale": lambda layer, rank, alpha: 1.0},
    "alpha alone": {"scale": lambda layer, rank, alpha: alpha},
    "both start at zero": {"random": ()},
    "both start at random": {"random": ("A", "B")},
    "values instead of parameters": {"delta": lambda layer: Layer.delta(layer).detach()},
    "biases in the adapter": {
        "shapes": lambda layer, rank: Layer.shapes(layer, rank) | {"inner": (rank,)},
        "constant": lambda layer: layer.scaling * layer.B @ layer.inner,
    },
    "base's bias trains": {"frozen": lambda layer: [layer.base.weight]},
}
