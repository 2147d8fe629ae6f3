"""LoRA: leave a weight as it is, and train a product of two thin matrices beside it.

    W' = W + scaling * B A          W (out, in) is frozen; A (rank, in) and B (out, rank) train
    scaling = alpha / rank          with rsLoRA alpha / sqrt(rank)

A starts at random and B at zero, so a new layer computes what its base computes, and the first gradient reaches B.
rank * (in + out) numbers train in place of in * out: 12,288 in place of 589,824 for 768 x 768 and rank 8.

Every layer here keeps one contract: it is its base with W' in place of W, and all other arguments as they are. A
convolution's weight counts as the matrix (out_channels, in_channels / groups * kernel), an embedding's as
(embedding_dim, num_embeddings).

    inject(model, ["query", "value"], rank=8, train=["head"])       # the names of what was replaced
    merge(model)                                                    # no cost at inference; unmerge(model) gives every bit back
    remove(model)                                                   # plain layers again

Files are in `helpers.adapters`.

Sources: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import expect, finetune

# --- the layer ----------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """What trains of one layer: A (rank, in), B (out, rank), and how much of their product counts.

    Args:
        weight: of the base, as a matrix (out, in). The adapter gets its dtype and device.
        rank, alpha, dropout, rank_stabilised: as for `Layer`.
    """

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

    base_type: type[nn.Module]
    __jit_unused_properties__ = ("weight", "bias", "adapter", "A", "B", "scaling")  # torch.jit.trace would compile them

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, adapter: str = "default", **options) -> None:
        super().__init__()
        kind = _kind(base)
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
        _must_be(False, {"the layer": self})
        weight = self.weight.detach().clone()
        self.original = self.base.weight  # the same Parameter, so that unmerge loses no bit and no tie
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Put the old weight back, bit for bit, in place."""
        _must_be(True, {"the layer": self})
        self.base.weight = self.original
        del self.original
        self.merged = False

    # several adapters

    def add(self, name: str, rank: int, alpha: float, **options) -> None:
        """Add an adapter, in place, and make it the only active one; the arguments are those of the layer."""
        self._check_new(name)
        self.adapters[name] = self.start(self.matrix(self.base.weight.detach()), rank, alpha, **options)
        self.activate(name)

    def activate(self, *names: str) -> None:
        """Let exactly these adapters count and train, in place: the sum of several; without any, the base alone."""
        self._check_active(names)
        for name, adapter in self.adapters.items():
            (finetune.unfreeze if name in names else finetune.freeze)(adapter)
        self.active = tuple(dict.fromkeys(names))

    def _check_new(self, name: str) -> None:
        _must_be(False, {"the layer": self})
        _check_name(name)
        if name in self.adapters:
            raise ValueError(f"adapter must be a new name, got {name!r}, which the layer has. Take another.")

    def _check_active(self, names: Iterable[str]) -> None:
        _must_be(False, {"the layer": self})
        for name in names:
            if name not in self.adapters:
                raise ValueError(f"not an adapter of the layer: {name!r}. Choose from {list(self.adapters)}.")
        if len(set(names)) > 1 and any(isinstance(self.adapters[name], DoRA) for name in names):
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
    def start(cls, weight: Tensor, rank: int, alpha: float, *, dora: bool = False, **options) -> Adapter:
        """A new adapter for the weight as (out, in)."""
        return (DoRA if dora else Adapter)(weight, rank, alpha, **options)

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


# --- beyond nn.Linear ---------------------------------------------------------------------------------------------


class _Conv(Layer):
    """The convolution with W'; stride, padding, padding mode, dilation and groups are the base's.

    A is a convolution of the base's kernel to rank channels, B one of kernel 1. With groups, all groups have the same A
    and each its own rows of B.
    """

    def product(self, adapter: Adapter, x: Tensor) -> Tensor:
        base = self.base
        shared = adapter.A if base.groups == 1 else adapter.A.repeat(base.groups, 1)  # no copy where none is needed
        kernels = shared.view(-1, *base.weight.shape[1:])
        low = base._conv_forward(x, kernels, None) * adapter.scaling  # what its forward calls with its own weight
        return self.convolve(low, adapter.B.view(*adapter.B.shape, *self._ones()), groups=base.groups)

    def column(self, values: Tensor) -> Tensor:
        return values.view(-1, *self._ones())

    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.base.kernel_size)


class Conv1d(_Conv):
    base_type, convolve = nn.Conv1d, staticmethod(F.conv1d)


class Conv2d(_Conv):
    base_type, convolve = nn.Conv2d, staticmethod(F.conv2d)


class Conv3d(_Conv):
    base_type, convolve = nn.Conv3d, staticmethod(F.conv3d)


class Embedding(Layer):
    """Rows of W' for indices x (...): row i is changed by scaling * B A[:, i].

    Here A starts at zero and B at random, as in the authors' loralib. The row `padding_idx` is W's, always. With
    `max_norm`, rows of W' are shortened as nn.Embedding would, without a change of W. There is no dropout of indices.
    """

    base_type = nn.Embedding

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        if self.merged:
            return super().forward(x)
        y = rows = base(x) if base.max_norm is None else F.embedding(x, base.weight, base.padding_idx)
        for name in self.active:
            rows = self.adapters[name](self, x, rows)
        if base.padding_idx is not None:
            rows = torch.where((x == base.padding_idx).unsqueeze(-1), y, rows)
        if base.max_norm is None:
            return rows
        norm = torch.linalg.vector_norm(rows.detach(), base.norm_type, dim=-1, keepdim=True)
        keep = (base.max_norm / (norm + 1e-7)).clamp(max=1)
        return rows - ((1 - keep) * rows).detach()  # as for nn.Embedding, gradients pass as if nothing were shortened

    def product(self, adapter: Adapter, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, adapter.A.T) * adapter.scaling, adapter.B)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.T

    def shaped(self, matrix: Tensor) -> Tensor:
        weight = matrix.T.clone()
        if self.base.padding_idx is not None:
            weight[self.base.padding_idx] = 0
        return weight

    @classmethod
    def start(cls, weight: Tensor, rank: int, alpha: float, *, dropout: float = 0.0, **options) -> Adapter:
        if dropout:
            raise ValueError(f"dropout must be 0 for an nn.Embedding, which takes indices, got {dropout}. Inject it by itself.")
        adapter = super().start(weight, rank, alpha, **options)
        nn.init.zeros_(adapter.A)
        nn.init.normal_(adapter.B)
        return adapter


class DoRA(Adapter):
    """W' = magnitude * (W + scaling * B A) / |W + scaling * B A|, where |.| is the norm of each row of the matrix (out, in).

    magnitude (out,) starts at |W| and trains too. The norm counts as a constant in the gradient.

    Source: Liu et al. 2024, sections 4.1 and 4.3.
    """

    def __init__(self, weight: Tensor, *args, **options) -> None:
        super().__init__(weight, *args, **options)
        self.magnitude = nn.Parameter(self.norm(weight))

    def norm(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).to(self.A.dtype)

    def gain(self, weight: Tensor) -> Tensor:
        """magnitude / |W + scaling * B A|, (out,); exactly 1 in a new adapter."""
        with torch.no_grad():
            norm = self.norm(weight + super().delta(weight))
        return self.magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a row of zeros stays one

    def delta(self, weight: Tensor) -> Tensor:
        return self.gain(weight).unsqueeze(1) * (weight + super().delta(weight)) - weight

    def forward(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        dropped = self.dropout(x)
        plain = layer.base(dropped) if self.dropout.training and self.dropout.p else y
        bias = getattr(layer.base, "bias", None)
        if bias is not None:
            plain = plain - layer.column(bias)
        gain = layer.column(self.gain(layer.matrix(layer.base.weight)))
        return y + (gain * (plain + layer.product(self, dropped)) - plain)


KINDS = (Linear, Conv1d, Conv2d, Conv3d, Embedding)

# --- in a model ---------------------------------------------------------------------------------------------------


def replace(model: nn.Module, targets: str | Sequence[str], make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put `make(layer)` in the place of every layer that a target names, in place.

    A layer that the model holds under several names is one layer: it is replaced once, at all its places, if a target
    names one of them. What is inside a LoRA layer is not looked at.

    Args:
        model: any model.
        targets: names, or ends of names, in whole components: "query" is the end of "layer.0.query", not of "subquery".
        make: called once for each layer.

    Returns:
        The names of the layers that were replaced, each the first of its names, in the order of `model.named_modules()`.

    Raises:
        ValueError: a target that names nothing, or two of which one is inside the other; the model is as it was.
    """
    found = _find(model, targets)
    _put(model, {layer: expect.module("what make gives", make(layer)) for layer in found.values()})
    return list(found)


def inject(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int = 8,
    alpha: float = 16,
    *,
    adapter: str = "default",
    train: str | Sequence[str] = (),
    **options,
) -> list[str]:
    """Put LoRA layers in the place of every layer that a target names, in place, and freeze everything else.

    A LoRA layer that is there already gets one more adapter. In the whole model, `adapter` is then the only active one.

    Args:
        targets: as for `replace`.
        rank, alpha, adapter, options: as for `Layer`.
        train: names of parts that train whole, such as a new head.

    Returns:
        The names of the layers, as `replace` gives them: worth an assertion.

    Raises:
        ValueError: as for `replace` and `Layer`, a layer that has this adapter or is merged, or a part in `train` that
            is not there or holds what is adapted. The model is as it was.
    """
    found = _find(model, targets)
    _must_be(False, layers(model))
    for name, layer in found.items():
        try:
            _check_adapter(layer, adapter, rank, alpha, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    train = [train] if isinstance(train, str) else list(train)
    _check_train(model, train, layers(model) | found)
    new = {}
    for layer in found.values():
        if isinstance(layer, Layer):
            layer.add(adapter, rank, alpha, **options)
        else:
            new[layer] = _kind(layer)(layer, rank, alpha, adapter=adapter, **options)
    _put(model, new)
    finetune.train_only(model, train)
    activate(model, adapter)
    return list(found)


def layers(model: nn.Module) -> dict[str, Layer]:
    """The LoRA layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters count and train, in place, in the layers that have them; without any, the bases alone.

    Raises:
        ValueError: no layer has an adapter of that name, a layer is merged, or DoRA is to be active beside another.
    """
    found = _adapted(model)
    there = list(dict.fromkeys(name for layer in found.values() for name in layer.adapters))
    for name in names:
        if name not in there:
            raise ValueError(f"not an adapter of {type(model).__name__}: {name!r}. Choose from {there}.")
    _must_be(False, found)
    chosen = {layer: [name for name in names if name in layer.adapters] for layer in found.values()}
    for layer, theirs in chosen.items():
        layer._check_active(theirs)
    for layer, theirs in chosen.items():
        layer.activate(*theirs)


def remove(model: nn.Module) -> list[str]:
    """Put the base layers back, in place: the same objects, with W, or with W' if merged. They train if they did before.

    What `inject` froze besides stays frozen; `helpers.finetune.unfreeze` is for that.

    Returns:
        The names of the layers.
    """
    found = _adapted(model)
    if "" in found:
        raise ValueError("the model must hold LoRA layers, got one that is itself a LoRA layer. Take its .base.")
    _must_be_untied(model, {name: layer for name, layer in found.items() if layer.merged})
    _put(model, {layer: layer.base for layer in found.values()})
    for layer in found.values():
        finetune.unfreeze(layer.base, layer.trained)
    return list(found)


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer, in place.

    Raises:
        ValueError: a layer is merged already, or its weight is another module's too; the model is as it was.
    """
    found = _adapted(model)
    _must_be(False, found)
    _must_be_untied(model, found)
    for layer in found.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Unmerge every LoRA layer, in place: every weight has the bits it had.

    Raises:
        ValueError: a layer is not merged; the model is as it was.
    """
    found = _adapted(model)
    _must_be(True, found)
    for layer in found.values():
        layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merged inside the `with`, unmerged afterwards, whatever happens inside."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


def untie(model: nn.Module, name: str) -> None:
    """Give the LoRA layer `name` a weight of its own, in place, where another module has the same Parameter.

    Raises:
        ValueError: not a LoRA layer, one that is merged, or one whose weight is its own already.
    """
    found = _adapted(model)
    if name not in found:
        raise ValueError(f"not a LoRA layer of {type(model).__name__}: {name!r}. Choose from {_some(found)}.")
    _must_be(False, {name: found[name]})
    if not _others(model, found[name]):
        raise ValueError(f"{name} must share its weight with another module, got a weight of its own. It needs no untying.")
    weight = found[name].base.weight
    found[name].base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


# --- what it takes, and whether it is enough ----------------------------------------------------------------------


def cost(layers: Iterable[nn.Module], rank: int, optimizer: str = "adamw") -> dict[str, int]:
    """What LoRA of one rank trains in place of the layers' weights, and the memory of training it.

    Args:
        layers: of the kinds that `Layer` supports, adapted or not; a weight that comes twice counts once.
        rank: of every adapter.
        optimizer: "sgd" keeps no state, "momentum" one number for each parameter, "adamw" two.

    Returns:
        {"full": numbers in the weights, "adapter": numbers in all A and B, "gradient_bytes", "optimizer_bytes": of the
        adapters, which have the dtypes of the weights}

    Raises:
        ValueError: a layer that is not supported, a rank above the smaller side of a weight, or another optimizer.
    """
    moments = {"sgd": 0, "momentum": 1, "adamw": 2}
    if optimizer not in moments:
        raise ValueError(f"optimizer must be one of {list(moments)}, got {expect.describe(optimizer)}.")
    bases = [layer.base if isinstance(layer, Layer) else layer for layer in layers]
    matrices = {id(base.weight): kind.matrix(base.weight) for base in bases if (kind := _kind(base))}
    total = {"full": 0, "adapter": 0, "gradient_bytes": 0, "optimizer_bytes": 0}
    for matrix in matrices.values():
        expect.whole_number("rank", rank, most=min(matrix.shape), advice=f"A weight is the matrix {tuple(matrix.shape)}.")
        numbers = rank * sum(matrix.shape)
        total["full"] += matrix.numel()
        total["adapter"] += numbers
        total["gradient_bytes"] += numbers * matrix.element_size()
        total["optimizer_bytes"] += moments[optimizer] * numbers * matrix.element_size()
    return total


def report(model: nn.Module, stages: Sequence[str] | None = None) -> finetune.Report:
    """`helpers.finetune.report`, in which a weight that is kept while its layer is merged does not count beside W'."""
    kept = {layer: layer._parameters.pop("original") for layer in layers(model).values() if layer.merged}
    try:
        return finetune.report(model, stages)
    finally:
        for layer, weight in kept.items():
            layer._parameters["original"] = weight


def rank_of_update(before: Tensor, after: Tensor, share: float = 0.9) -> int:
    """The fewest singular values of after - before whose squares sum to `share` of all their squares.

    Args:
        before, after: weights of one shape, (out, in) or (out, ...); finite.
        share: above 0, below 1.

    Returns:
        0 if nothing changed.
    """
    expect.tensor("before", before, ("out", "in", "..."))
    expect.tensor("after", after, tuple(before.shape))
    if not expect.positive("share", share) < 1:
        raise ValueError(f"share must be below 1, got {share}. 0.9 asks for nine tenths.")
    update = (after.detach().double() - before.detach().double()).flatten(1)
    energy = torch.linalg.svdvals(update).square()
    if energy.sum() == 0:
        return 0
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1


# --- inside -------------------------------------------------------------------------------------------------------


def _find(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that targets name, by the first of their names, in the model's order."""
    places = list(expect.module("model", model).named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in places if isinstance(module, Layer))
    places = [(name, module) for name, module in places if name and not name.startswith(inside)]
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not any(_ends(name, target) for name, _ in places):
            raise ValueError(f"not a module of {type(model).__name__}: {target!r}. Choose from {_close(target, places)}.")
    if not targets:
        raise ValueError(f"targets must name a module of {type(model).__name__}, got none. Choose from {_close('', places)}.")
    named = {module for name, module in places if any(_ends(name, target) for target in targets)}
    first = {module: name for name, module in reversed(places) if module in named}
    found = {name: module for name, module in places if first.get(module) == name}
    for outer in found:
        for inner in found:
            if inner.startswith(f"{outer}."):
                raise ValueError(f"targets must not lie in one another, got {outer!r} and {inner!r}. Name one of them.")
    return found


def _put(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put `new[module]` at every place of each module."""
    for parent in [module for module in model.modules() if not isinstance(module, Layer)]:
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _close(target: str, places: list[tuple[str, nn.Module]]) -> list[str]:
    """Ends of names that are spelt like `target`; if none is, the last components of modules with parameters of their own."""
    length = str(target).count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-length:]) for name, _ in places)
    last = dict.fromkeys(name.rpartition(".")[2] for name, module in places if module._parameters or isinstance(module, Layer))
    return difflib.get_close_matches(str(target), ends, n=5) or list(last)[:10]


def _kind(base: nn.Module) -> type[Layer]:
    """The kind of LoRA layer for a base.

    Raises:
        ValueError: there is none.
    """
    expect.module("base", base)
    kind = next((kind for kind in KINDS if isinstance(base, kind.base_type)), None)
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
    kinds = ", ".join(f"nn.{kind.base_type.__name__}" for kind in KINDS)
    raise ValueError(f"the base must be one of {kinds}, got {expect.describe(base)}{why}. Adapt other layers.")


def _check_adapter(layer: nn.Module, adapter: str, rank: int, alpha: float, options: dict) -> None:
    """Raise what adding the adapter would raise: one is made on the meta device, where tensors have shapes alone."""
    _check_name(adapter)
    if isinstance(layer, Layer):
        layer._check_new(adapter)
        layer = layer.base
    kind = _kind(layer)
    kind.start(kind.matrix(layer.weight.detach().to("meta")), rank, alpha, **options)


def _check_name(adapter: str) -> None:
    if not isinstance(adapter, str) or not adapter.isidentifier() or hasattr(nn.ModuleDict, adapter):
        raise ValueError(f"adapter must be a name of letters, digits and _, got {expect.describe(adapter)}. Take another.")


def _check_train(model: nn.Module, train: list[str], adapted: dict[str, nn.Module]) -> None:
    finetune.unfreeze(model, finetune.freeze(model, train))  # leaves every flag as it is, and raises if a name is wrong
    named = model.named_parameters(remove_duplicate=False)
    whole = {id(p) for name, p in named if any(f"{name}.".startswith(f"{part}.") for part in train)}
    for name, layer in adapted.items():
        base = layer.base if isinstance(layer, Layer) else layer
        if any(id(parameter) in whole for parameter in base.parameters()):
            raise ValueError(f"train must not hold what is adapted, got {train}, and {name} adapted. Choose one of the two.")


def _adapted(model: nn.Module) -> dict[str, Layer]:
    found = layers(expect.module("model", model))
    if not found:
        raise ValueError(f"{type(model).__name__} must have LoRA layers, got none. Call inject first.")
    return found


def _must_be(merged: bool, layers: dict[str, Layer]) -> None:
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if wrong and merged:
        raise ValueError(f"{_some(wrong)} must be merged before this. Call merge first.")
    if wrong:
        raise ValueError(f"{_some(wrong)} must not be merged before this. Call unmerge first.")


def _must_be_untied(model: nn.Module, layers: dict[str, Layer]) -> None:
    """Two modules with one weight would have two weights if one were merged, and so would a checkpoint."""
    for name, layer in layers.items():
        others = _others(model, layer)
        if others:
            way_out = f"Call untie(model, {name!r}) first."
            raise ValueError(f"{name} must have a weight of its own to be merged, got that of {_some(others)}. {way_out}")


def _others(model: nn.Module, layer: Layer) -> list[str]:
    """The names of the modules that hold the layer's own weight too."""
    weight = layer.original if layer.merged else layer.base.weight
    modules = [(name, module) for name, module in model.named_modules() if module is not layer and module is not layer.base]
    return [name for name, module in modules if any(parameter is weight for parameter in module._parameters.values())]


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


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
