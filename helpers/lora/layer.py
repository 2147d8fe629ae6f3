"""The LoRA layer: a frozen base, and adapters beside it.

    W' = W + scaling * B A          W (out, in) is frozen; A (rank, in) and B (out, rank) train

Source: Hu et al. 2021, section 4.1.
"""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import expect, finetune


class Adapter(nn.Module):
    """What trains of one layer: A (rank, in), B (out, rank), and how much of their product counts.

    Args:
        weight: of the base, as a matrix (out, in). The adapter gets its dtype and device.
        rank, alpha, dropout, rank_stabilised: as for `Layer`.

    A subclass with another W' names the option of `Layer` that asks for it: `class DoRA(Adapter, option="dora")`.
    """

    kinds: ClassVar[dict[str, type["Adapter"]]] = {}  # option -> the subclass
    alone = False  # whether it cannot be active beside others

    def __init_subclass__(cls, option: str | None = None) -> None:
        if option:
            Adapter.kinds[option] = cls

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float = 0.0, rank_stabilised: bool = False) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        advice = f"The weight is the matrix ({out_features}, {in_features})."
        self.rank = expect.whole_number("rank", rank, most=min(weight.shape), advice=advice)
        self.alpha = expect.positive("alpha", alpha)
        self.rank_stabilised = rank_stabilised
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.dropout = nn.Dropout(dropout)
        self.A = nn.Parameter(weight.new_empty(rank, in_features))
        self.B = nn.Parameter(weight.new_zeros(out_features, rank))
        self.register_parameter("magnitude", None)  # of DoRA alone
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts its weight

    def delta(self, weight: Tensor) -> Tensor:
        """W' - W = scaling * B A, (out, in), in float32 or wider. The weight W itself matters to DoRA alone."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(wide) @ self.A.to(wide))

    def forward(self, layer: "Layer", x: Tensor, y: Tensor) -> Tensor:
        """The base's output y on x, and what the adapter adds to it."""
        return y + layer.product(self, self.dropout(x))


class Layer(nn.Module):
    """A frozen base layer and its adapters. Use `Linear`, `Conv1d`, `Conv2d`, `Conv3d` or `Embedding`.

    `A`, `B` and `scaling` are those of the first active adapter. `weight` is W', for code that reads a layer's weight
    instead of calling it.

    Args:
        base: the layer to adapt, itself, not a copy. Its parameters are frozen.
        rank: from 1 to the smaller side of the weight as a matrix.
        alpha: above 0; the update counts alpha / rank.
        adapter: name of the adapter; `add` gives the layer another.
        dropout: probability with which inputs of the update, not of the base, are dropped in train mode.
        rank_stabilised: rsLoRA; the update counts alpha / sqrt(rank).
        dora: an adapter of the kind `DoRA`.

    Raises:
        ValueError: a number out of range, or a base that is not supported.
    """

    kinds: ClassVar[list[type["Layer"]]] = []  # the subclasses that have a `base_type`
    base_type: type[nn.Module]
    __jit_unused_properties__ = ("weight", "bias", "adapter", "A", "B", "scaling")  # torch.jit.trace would compile them

    def __init_subclass__(cls) -> None:
        if "base_type" in vars(cls):
            Layer.kinds.append(cls)

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, adapter: str = "default", **options) -> None:
        super().__init__()
        kind = kind_of(base)
        if not isinstance(self, kind):
            wanted = self.base_type.__name__
            raise ValueError(f"the base must be an nn.{wanted}, got {expect.describe(base)}. Take lora.{kind.__name__}.")
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self.add(adapter, rank, alpha, **options)
        self.trained = finetune.freeze(base)  # the names of what trained until now, for `remove`

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return _without_gradient(self, y)
        for name in self.active:
            y = self.adapters[name](self, x, y)
        return y

    def product(self, adapter: Adapter, x: Tensor) -> Tensor:
        """scaling * B A x. What is scaled is A x, the smallest tensor on the way."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """W' - W in the shape of the base's weight: scaling * B A, summed over the active adapters in float32 or wider."""
        weight = self.matrix(getattr(self, "original", self.base.weight))
        deltas = (self.adapters[name].delta(weight) for name in self.active)
        return self.shaped(sum(deltas, torch.zeros_like(weight)))

    @property
    def weight(self) -> Tensor:
        """W' in the dtype of W, rounded once."""
        if self.merged or not self.active:
            return self.base.weight
        return (self.base.weight + self.delta()).to(self.base.weight.dtype)

    def merge(self) -> None:
        """Give the base the weight W', in place, and keep the old one as `original`; forward is then the base's alone.

        A state dict of a merged layer holds both. A layer that loads one becomes merged; loading another unmerges it.
        """
        must_be_merged(False, {"the layer": self})
        weight = self.weight.detach().clone()
        self.original = self.base.weight  # the same Parameter, so that unmerge loses no bit and no tie
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Put the old weight back, bit for bit, in place."""
        must_be_merged(True, {"the layer": self})
        self.base.weight = self.original
        del self.original
        self.merged = False

    # several adapters

    def add(self, name: str, rank: int, alpha: float, **options) -> None:
        """Add an adapter, in place, and make it the only active one; the arguments are those of the layer."""
        self.check_new(name)
        self.adapters[name] = self.start(self.matrix(self.base.weight.detach()), rank, alpha, **options)
        self.activate(name)

    def activate(self, *names: str) -> None:
        """Let exactly these adapters count and train, in place: the sum of several; without any, the base alone."""
        self.check_active(names)
        for name, adapter in self.adapters.items():
            (finetune.unfreeze if name in names else finetune.freeze)(adapter)
        self.active = tuple(dict.fromkeys(names))

    def check_new(self, name: str) -> None:
        must_be_merged(False, {"the layer": self})
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"adapter must be a new name, got {name!r}, which the layer has. Take another.")

    def check_active(self, names: Iterable[str]) -> None:
        must_be_merged(False, {"the layer": self})
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"not an adapter of the layer: {name!r}. Choose from {list(self.adapters)}.")
        if len(set(names)) > 1 and any(self.adapters[name].alone for name in names):
            raise ValueError(f"an adapter with dora=True must be active alone, got {list(names)}. Activate one of them.")

    @property
    def adapter(self) -> Adapter:
        return self.adapters[next(iter((*self.active, *self.adapters)))]

    @property
    def A(self) -> nn.Parameter:  # noqa: N802
        return self.adapter.A

    @property
    def B(self) -> nn.Parameter:  # noqa: N802
        return self.adapter.B

    @property
    def scaling(self) -> float:
        return self.adapter.scaling

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    # what kinds of layers differ in

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """A weight of the base as (out, in)."""
        return weight.flatten(1)

    def shaped(self, matrix: Tensor) -> Tensor:
        """(out, in) in the shape of the base's weight."""
        return matrix.reshape(self.base.weight.shape)

    def column(self, values: Tensor) -> Tensor:
        """One value for each output, (out,), in a shape that multiplies what the layer gives."""
        return values

    @classmethod
    def start(cls, weight: Tensor, rank: int, alpha: float, **options) -> Adapter:
        """A new adapter for the weight as (out, in), of the kind that the options name."""
        asked = [kind for option, kind in Adapter.kinds.items() if options.pop(option, False)]
        return (asked or [Adapter])[0](weight, rank, alpha, **options)

    # torch's own

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        keeps = hasattr(self, "original")
        if f"{prefix}original" in state_dict and not keeps:
            self.merge()
        elif f"{prefix}original" not in state_dict and keeps and any(key.startswith(prefix) for key in state_dict):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"active={self.active}, merged={self.merged}"


class Linear(Layer):
    """y = W x + bias + scaling * B A x, for x (..., in)."""

    base_type = nn.Linear

    def product(self, adapter: Adapter, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, adapter.A) * adapter.scaling, adapter.B)


def kind_of(base: nn.Module) -> type[Layer]:
    """The kind of LoRA layer for a base.

    Raises:
        ValueError: there is none.
    """
    expect.module("base", base)
    kind = next((kind for kind in Layer.kinds if isinstance(base, kind.base_type)), None)
    why = ""
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        why = " of an nn.MultiheadAttention, which reads its weight and never calls it"
    elif kind and type(base).forward is not kind.base_type.forward:
        why = " with a forward of its own"
    elif kind and "weight" not in base._parameters:
        why = " whose weight is computed from other parameters"
    elif kind and nn.parameter.is_lazy(base.weight):
        why = " whose weight has no shape before its first forward"
    elif isinstance(base, nn.Embedding) and (base.sparse or base.scale_grad_by_freq):
        why = f" with {'sparse' if base.sparse else 'scale_grad_by_freq'}=True"
    elif kind:
        return kind
    kinds = ", ".join(f"nn.{kind.base_type.__name__}" for kind in Layer.kinds)
    raise ValueError(f"the base must be one of {kinds}, got {expect.describe(base)}{why}. Adapt other layers.")


def check_name(adapter: str) -> None:
    """Raise a ValueError for what cannot be an adapter's name."""
    if not isinstance(adapter, str) or not adapter.isidentifier() or hasattr(nn.ModuleDict, adapter):
        raise ValueError(f"adapter must be a name of letters, digits and _, got {expect.describe(adapter)}. Take another.")


def must_be_merged(merged: bool, layers: dict[str, Layer]) -> None:
    """Raise a ValueError, with their names, if layers are merged that must not be, or the other way round."""
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if wrong and merged:
        raise ValueError(f"{listed(wrong)} must be merged before this. Call merge first.")
    if wrong:
        raise ValueError(f"{listed(wrong)} must not be merged before this. Call unmerge first.")


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _without_gradient(layer: Layer, y: Tensor) -> Tensor:
    """The output of a merged layer. A gradient on its way to the adapter, which is not in use, will raise."""
    trains = layer.training and layer.active and layer.A.requires_grad
    return _NoGradient.apply(y, layer.A) if trains else y


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, parameter: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise RuntimeError(
            "an adapter must be unmerged to train, got a gradient for one that is merged. "
            "Call unmerge(model) first, or freeze it if only other parts are to train."
        )
