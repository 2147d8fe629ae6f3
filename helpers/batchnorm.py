"""BatchNorm of a pre-trained network: what it stores, what can be frozen in it, and how to measure its statistics anew.

    y = weight * (x - mean) / sqrt(var + eps) + bias            per channel, over all other dimensions of x

In train mode mean and var are the batch's, and the running buffers move towards them; in eval mode they are the
buffers. So "frozen" has four meanings, and a layer can be frozen in one without the others:

    "affine"          weight and bias get no gradient                                       requires_grad_(False)
    "statistics"      running_mean, running_var and num_batches_tracked do not move         track_running_stats = False
    "normalisation"   the stored statistics normalise, in train mode too                    eval mode that lasts
    all of it         nothing moves, and train mode computes what eval mode computes

The third implies the second. The first two together were `trainable = False` in Keras before TensorFlow 2: nothing
moved, and the batch still normalised.

Sources: Ioffe & Szegedy 2015, section 3.1; Li et al. 2016, "Revisiting Batch Normalization For Practical Domain
Adaptation" (AdaBN); Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3 (statistics over all batches);
Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from helpers import expect

MEANINGS = ("affine", "statistics", "normalisation")


def batch_norm(x: Tensor, layer: _BatchNorm) -> Tensor:
    """What `layer(x)` computes, in plain arithmetic: any mode, and its buffers move as torch moves them.

    Train mode divides by the biased variance of the batch and moves running_var towards the unbiased one:

        running = (1 - momentum) * running + momentum * batch        momentum None: 1 / num_batches_tracked

    Args:
        x: (n, channels, ...).
        layer: any BatchNorm. In train mode its buffers move, in place, if it tracks statistics.

    Raises:
        ValueError: the batch has to normalise, and gives one value per channel.
    """
    expect.tensor("x", x, ("n", layer.num_features, "..."))
    others = [0, *range(2, x.ndim)]
    mean, var = layer.running_mean, layer.running_var
    if layer.training or mean is None:
        n = x.numel() // x.shape[1]
        if n < 2:
            raise ValueError(f"x must give at least 2 values per channel, got shape {tuple(x.shape)}. Use a larger batch.")
        mean, var = x.mean(others), x.var(others, correction=0)
        if layer.training and layer.track_running_stats:
            layer.num_batches_tracked += 1
            rate = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
            for running, now in ((layer.running_mean, mean), (layer.running_var, var * n / (n - 1))):
                running.copy_((1 - rate) * running + rate * now.detach())
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + layer.eps)
    if layer.weight is not None:
        y = y * layer.weight.view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


def moved(model: nn.Module, action: Callable[[], object]) -> list[str]:
    """Call `action()` and name the parameters and buffers of `model` whose values it changed.

    In the order of named_parameters, then named_buffers, which includes buffers that a state dict leaves out. What two
    modules share is named once. NaN equals NaN. A tensor that came, went, or has another shape or dtype counts.
    """
    before = {name: None if is_lazy(tensor) else tensor.detach().clone() for name, tensor in _tensors(model)}
    action()
    after = {name: None if is_lazy(tensor) else tensor.detach() for name, tensor in _tensors(model)}
    names = [*after, *(name for name in before if name not in after)]
    return [name for name in names if name not in before or name not in after or not _same(before[name], after[name])]


def what_is_frozen(layer: nn.Module, x: Tensor) -> dict[str, bool]:
    """Which meanings of "frozen" hold for `layer`, found by experiment: train mode, one forward and one backward pass.

    How the layer was frozen makes no difference. Afterwards it is as it was: values, gradients, flags and modes. The
    statistics are running_mean and running_var: with a momentum of 0 they stand still, though the counter counts on.

    Args:
        layer: a BatchNorm, or what has its `running_mean` and `running_var`. One without parameters counts as frozen in
            "affine"; one that stores no statistics as frozen in "statistics" and as not frozen in "normalisation".
        x: (n, channels, ...), at least 2 values per channel, with other statistics than the stored ones.

    Returns:
        {"affine": bool, "statistics": bool, "normalisation": bool}.

    Raises:
        TypeError: `layer` is no normalisation with running statistics.
        ValueError: the stored statistics are those of x within 1%, so the output would not show which are used.
    """
    if not hasattr(expect.module("layer", layer), "running_mean"):
        raise TypeError(f"layer must be a BatchNorm, got {expect.describe(layer)}. Pass one of the model's layers.")
    _check_initialised({"layer": layer})
    stores = layer.running_mean is not None
    channels = len(layer.running_mean) if stores else layer.num_features
    x = expect.tensor("x", x, ("n", channels, "...")).detach()
    if x.numel() < 2 * channels:
        raise ValueError(f"x must give at least 2 values per channel, got shape {tuple(x.shape)}. Use a larger batch.")
    if stores:
        pool = _Pool("x")
        pool.add(x)
        found = _compare(layer, pool)
        if found.mean_shift < 0.01 and found.std_ratio < 1.01:
            raise ValueError(
                "x must have other statistics than those stored, got the same within 1%, so the output would not show "
                "which of them normalise. Shift it: x + 1."
            )
    with _restored(layer), torch.no_grad():
        if getattr(layer, "weight", None) is not None:
            layer.weight.data.fill_(1)  # a weight of 0, with which some residual branches start, would hide everything
        before = {name: getattr(layer, name).clone() for name in ("running_mean", "running_var") if stores}
        wanted = layer.eval()(x)
        layer.train()
        with torch.enable_grad():
            got = layer(x.clone().requires_grad_())
            parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            scales = torch.linspace(1, 2, got.numel(), dtype=got.dtype, device=got.device).view_as(got)
            loss = (got.square() * scales).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else []
        return {
            "affine": all(gradient is None or not gradient.any() for gradient in gradients),
            "statistics": all(_same(tensor, getattr(layer, name)) for name, tensor in before.items()),
            "normalisation": stores and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5),
        }


def freeze(model: nn.Module, *what: str) -> Callable[[], None]:
    """Freeze every BatchNorm of `model`, in place, so that `model.train()` does not undo it.

    A frozen layer gets a subclass of its own class: `print(model)` shows it, `isinstance` still holds, and copies,
    pickles and state dicts are as before. "normalisation" makes `layer.training` False whatever is asked for.
    torch.compile, torch.export and torch.fx take such a layer, torch.jit.script does not. `convert_sync_batchnorm` puts
    a plain new layer in its place: convert first, then freeze.
    Nothing else is touched: values, `momentum` and other norms stay. To freeze more of a frozen layer adds to it.

    Args:
        model: any model with BatchNorm, or a BatchNorm itself.
        what: "affine", "statistics", "normalisation"; none of them means all three.

    Returns:
        undo, a function: the layers become what they were before this call (those still frozen). See `unfreeze`.

    Raises:
        ValueError: another word; no BatchNorm; or "normalisation" for a layer that stores no statistics.
            Then nothing has changed.
    """
    unknown = [word for word in what if word not in MEANINGS]
    if unknown:
        raise ValueError(f"what must be of {list(MEANINGS)}, got {unknown[0]!r}. Leave it out to freeze all of it.")
    what = what or MEANINGS
    layers = _layers(model)
    homeless = [name for name, layer in layers.items() if layer.running_mean is None]
    if homeless and "normalisation" in what:
        raise ValueError(
            f"normalisation needs stored statistics, got none in {homeless[0] or 'the model'}: track_running_stats=False. "
            'Freeze "affine" alone.'
        )
    states = {layer: _state(layer, model) for layer in layers.values()}  # all of them first: layers may share parameters
    for layer, state in states.items():
        so_far, first = state.freeze or ((), state)
        if not state.freeze:
            layer.__class__ = _frozen_class(type(layer))
        layer._freeze = _Freeze(tuple(word for word in MEANINGS if word in (*so_far, *what)), first)
        if "affine" in what:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        if "statistics" in what:
            layer.track_running_stats = False

    def undo() -> None:
        for layer, state in states.items():
            if isinstance(layer, _Frozen):
                _put_back(layer, state, model)

    return undo


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze` exactly, in place: every BatchNorm is what it was before the first of any number of freezes.

    Works on copies and loaded pickles too, and does nothing to layers that are not frozen. A layer goes back to the mode
    that it had, unless `model` has changed between train and eval mode in the meantime; then it follows the model.

    Raises:
        ValueError: the model has no BatchNorm.
    """
    for layer in _layers(model).values():
        if isinstance(layer, _Frozen):
            _put_back(layer, layer._freeze.first, model)


def pooled_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over all batches together, read once.

    Two sets of counts n, means m and sums of squared deviations s make one (Chan et al. 1979), here in float64:

        m = m1 + (m2 - m1) * n2 / n        s = s1 + s2 + (m2 - m1) ** 2 * n1 * n2 / n        n = n1 + n2

    Args:
        batches: tensors (n_i, channels, ...), n_i >= 1, of any sizes.

    Returns:
        mean, (channels,), and the unbiased variance s / (n - 1), (channels,), as running_var keeps it.

    Raises:
        ValueError: there are no batches, or less than 2 values per channel in all of them.
    """
    pool = _Pool("batches")
    channels: int | str = "channels"
    for batch in _checked(batches):
        channels = expect.tensor("each batch", batch, ("n", channels, "...")).shape[1]
        pool.add(batch)
    dtype = batch.dtype if batch.dtype in (torch.float32, torch.float64) else torch.float32
    mean, var = pool.statistics()
    return mean.to(dtype), var.to(dtype)


def recompute_statistics(model: nn.Module, batches: Iterable, passes: str = "one") -> None:
    """Replace the running statistics of every BatchNorm by those of `batches`, in place.

    Each layer pools the counts, means and variances of all inputs that it sees, as `pooled_statistics` does.

    passes="one": one pass over the data, at about the cost of a forward pass. The BatchNorms, frozen or not, normalise
        with their batch, so what deeper layers see depends on how the data are cut into batches.
    passes="sequential": layer after layer, in the order in which they run, those before it already with their new
        statistics, in eval mode. The cut makes no difference. It costs a forward pass up to the layer for each layer.

    How much the cut matters: glyphnet, its 797 training digits in random order, std of the last BatchNorm of the main
    path (`layer4.0.bn2`) after "one" against after "sequential", factor off (root mean square over channels):

        batches of            2     8     32     128    all       sorted by class, 80
        factor off            1.16  1.03  1.007  1.002  1.0002    1.12

    The first layer has no such error. A linear probe on the features came to 98.8 or 98.9% on the 800 test digits
    after every one of these, and to 98.3% before. With all in one batch what is left is that a batch is divided by its
    biased variance, and running_var is the unbiased one.

    All other modules work as in eval mode, so dropout is off. Modes, momenta and what is frozen stay as they are;
    `num_batches_tracked` becomes the number of times that the layer was called. A layer called several times pools
    all its calls; with "sequential" each of them sees the statistics of those before it. A layer that no batch reaches,
    or that stores no statistics, stays as it is; one that stores none normalises with the batch in every mode, so behind
    it the cut matters in "sequential" too. New values are written at the end: an error leaves the model as it was.

    Args:
        model: any model; called as `model(batch)`.
        batches: inputs as the model takes them, on its device. "one" reads them once. "sequential" reads them again for each
            layer: a list or a DataLoader; its order may change, its inputs may not.
        passes: "one" or "sequential".

    Raises:
        ValueError: no batches; batches of one value per channel ("one"); an iterator ("sequential"); no BatchNorm, none
            that stores statistics; statistics that are not finite.
    """
    if passes not in ("one", "sequential"):
        raise ValueError(f"passes must be 'one' or 'sequential', got {expect.describe(passes)}.")
    pools = _pools(model)
    with _measuring(model, pools), torch.no_grad():
        (_measure_together if passes == "one" else _measure_in_order)(model, pools, batches)
        found = {layer: pool.statistics() for layer, pool in pools.items() if pool.calls}
    if not found:
        raise ValueError("batches must reach a BatchNorm, got none that did. Call the model that runs them.")
    with torch.no_grad():
        for layer, statistics in found.items():
            _store(layer, *statistics, pools[layer].calls)


def adabn(model: nn.Module, batches: Iterable, passes: str = "sequential") -> nn.Module:
    """A copy of `model` whose BatchNorms hold the statistics of the target: inputs without labels (Li et al. 2016).

    The paper takes mean and variance of each neuron over all images of the target. With "sequential", the default, that
    is exactly what each layer then finds in its input, see `drift`; `recompute_statistics` says what "one" gives.
    """
    adapted = copy.deepcopy(expect.module("model", model))
    recompute_statistics(adapted, batches, passes)
    return adapted


class Drift(NamedTuple):
    """How far a layer's input is from its stored statistics; 0 and 1 when it is not."""

    name: str  # of the layer, as named_modules spells it
    mean_shift: float  # root mean square over channels of (mean - stored mean) / stored std
    std_ratio: float  # exp of the root mean square over channels of log(std / stored std), at least 1


def drift(model: nn.Module, batches: Iterable) -> list[Drift]:
    """For each BatchNorm, in the order of `named_modules`: how far the statistics of `batches` are from the stored ones.

    The network runs in eval mode, as it is used: a layer's input has passed the stored statistics of those before it.
    Inputs are pooled as in `pooled_statistics`, and stored std = sqrt(running_var + eps), what the layer divides by.
    Layers without stored statistics, or that no batch reaches, are left out. The model stays as it was.

    Raises:
        ValueError: no batches, or no BatchNorm with stored statistics.
    """
    pools = _pools(model)
    with _measuring(model, pools), torch.no_grad(), _hooks(pools, lambda layer, x: pools[layer].add(x)):
        for batch in _checked(batches):
            model(batch)
    return [_compare(layer, pool) for layer, pool in pools.items() if pool.calls]


class _State(NamedTuple):
    """What `freeze` changes of a layer, as it was at some time."""

    requires_grad: dict[str, bool]
    tracks: bool
    model_training: bool
    freeze: "_Freeze | None"


class _Freeze(NamedTuple):
    """What is frozen of a layer, and how it was before the first freeze."""

    what: tuple[str, ...]
    first: _State


class _Frozen:
    """What `freeze` puts before a BatchNorm's own class; the layer's `_freeze` says what holds."""

    _base: type
    _freeze: _Freeze

    @property
    def training(self) -> bool:
        # In this order: torch.compile of torch 2.11 takes the second for this property, and would call it for ever.
        return "normalisation" not in self._freeze.what and self.__dict__["training"]

    @training.setter
    def training(self, mode: bool) -> None:
        if "normalisation" not in self._freeze.what:
            self.__dict__["training"] = mode

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen={'+'.join(self._freeze.what)}"

    def __reduce_ex__(self, protocol):
        """Copies and pickles: made as the layer's own class makes them, then frozen, because no module holds this class."""
        make, args, *rest = super().__reduce_ex__(protocol)
        args = tuple(self._base if arg is type(self) else arg for arg in args)
        return _make_frozen, (make, *args), *rest


@functools.cache
def _frozen_class(base: type) -> type:
    return type(f"Frozen{base.__name__}", (_Frozen, base), {"_base": base, "__module__": base.__module__})


def _make_frozen(make: Callable, *args) -> nn.Module:
    layer = make(*args)
    layer.__class__ = _frozen_class(type(layer))
    return layer


def _state(layer: _BatchNorm, model: nn.Module) -> _State:
    flags = {name: parameter.requires_grad for name, parameter in layer.named_parameters(recurse=False)}
    frozen = layer._freeze if isinstance(layer, _Frozen) else None
    return _State(flags, layer.track_running_stats, model.training, frozen)


def _put_back(layer: _BatchNorm, state: _State, model: nn.Module) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    layer.track_running_stats = state.tracks
    released = "normalisation" in layer._freeze.what and not (state.freeze and "normalisation" in state.freeze.what)
    if released and model is not layer and model.training != state.model_training:
        layer.__dict__["training"] = model.training
    if state.freeze:
        layer._freeze = state.freeze
    else:
        layer.__class__ = layer._base
        del layer._freeze


@dataclass
class _Pool:
    """Count, mean and sum of squared deviations of all values that a layer has seen, per channel, in float64."""

    name: str
    calls: int = 0
    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in all values of x, (n, channels, ...)."""
        n = x.numel() // x.shape[1]
        var, mean = torch.var_mean(_wide(x), [0, *range(2, x.ndim)], correction=0)
        self.merge(n, torch.stack([mean, var * (n / max(n - 1, 1))]))

    def merge(self, count: int, statistics: Tensor) -> None:
        """Take in `count` values by their mean and unbiased variance, (2, channels); that of one value counts as 0."""
        self.calls += 1
        self.waiting.append((count, statistics))
        if len(self.waiting) == 64:  # many at a time: the arithmetic of one merge takes as long as a small BatchNorm
            self._settle()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of everything taken in, (channels,) each."""
        self._settle()
        where = self.name or "the model"
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 values per channel, got {self.count} at {where}. Give more inputs.")
        var = self.squares / (self.count - 1)
        if not (self.mean.isfinite().all() and var.isfinite().all()):
            raise ValueError(f"statistics must be finite, got NaN or infinity at {where}. Look for it in the inputs first.")
        return self.mean, var

    def _settle(self) -> None:
        if not self.waiting:
            return
        counts, statistics = zip(*self.waiting, strict=True)
        self.waiting.clear()
        means, variances = _wide(torch.stack(statistics)).unbind(1)
        n = torch.tensor(counts, dtype=means.dtype, device=means.device)[:, None]
        total = self.count + sum(counts)
        mean = self.mean + ((means - self.mean) * n).sum(0) / total
        within, between = (variances * (n - 1)).sum(0), ((means - mean) ** 2 * n).sum(0)
        self.squares = self.squares + (self.mean - mean) ** 2 * self.count + within + between
        self.mean, self.count = mean, total


def _measure_together(model: nn.Module, pools: dict[_BatchNorm, _Pool], batches: Iterable) -> None:
    """All layers in one pass, each normalising with its batch; the statistics that it computes for that are read off."""
    latest = {}  # mean and unbiased variance of the layer's last batch, (2, channels): a momentum of 1 keeps nothing else
    for layer in pools:
        layer.training, layer.track_running_stats, layer.momentum = True, True, 1.0
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
        if layer.running_mean.dtype in (torch.float32, torch.float64):  # others would round the statistics too much
            latest[layer] = layer.running_mean.new_zeros(2, layer.num_features)
            layer.running_mean, layer.running_var = latest[layer]

    def before(layer: _BatchNorm, x: Tensor) -> None:
        if x.numel() < 2 * x.shape[1]:
            raise ValueError(
                f"each batch must give at least 2 values per channel, got shape {tuple(x.shape)} at "
                f'{pools[layer].name or "the model"}. Use larger batches, or passes="sequential".'
            )
        if layer not in latest:
            pools[layer].add(x)

    def after(layer: _BatchNorm, x: Tensor) -> None:
        if layer in latest:
            pools[layer].merge(x.numel() // x.shape[1], latest[layer].clone())

    with _hooks(pools, before, after):
        for batch in _checked(batches):
            model(batch)
    for layer, pool in pools.items():
        if layer.num_batches_tracked is not None and layer.num_batches_tracked != pool.calls:
            raise ValueError(
                f"{pool.name or 'the model'} must normalise with its batch while it is measured, got a layer that something "
                'keeps in eval mode. Take that away, or use passes="sequential".'
            )


def _measure_in_order(model: nn.Module, pools: dict[_BatchNorm, _Pool], batches: Iterable) -> None:
    """One call of a layer after the other, in the order of execution; those before it normalise with what they measured."""
    if isinstance(batches, Iterator):
        raise ValueError(
            'batches must be readable once for each layer with passes="sequential", '
            f"got {expect.describe(batches)}. Pass a list or a DataLoader."
        )
    calls = target = 0  # calls of layers in this forward pass so far, and before the one that is measured
    found: _BatchNorm | None = None
    order = 'layers must run in the same order for every batch, got {} in place of {}. Use passes="one".'

    def measure(layer: _BatchNorm, x: Tensor) -> None:
        nonlocal calls, found
        calls += 1
        if calls <= target:
            return
        if found not in (None, layer):
            raise ValueError(order.format(pools[layer].name, pools[found].name))
        found = layer
        pools[layer].add(x)
        raise _Reached

    with _hooks(pools, measure):
        while True:
            found = None
            for batch in _checked(batches):
                calls = 0
                try:
                    model(batch)
                except _Reached:
                    continue
                if found is None:
                    return  # every call is measured
                raise ValueError(order.format("nothing", pools[found].name))
            _store(found, *pools[found].statistics(), pools[found].calls)
            target += 1


class _Reached(BaseException):
    """Ends a forward pass at the layer that is measured; no `except Exception` of a model catches it."""


@contextmanager
def _measuring(model: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside the `with`: eval mode, nothing frozen, copies for buffers. Then everything is as before, whatever happens."""
    kept = {layer: (type(layer), layer.track_running_stats, layer.momentum, dict(layer._buffers)) for layer in layers}
    for layer, (kind, _, _, buffers) in kept.items():
        layer.__class__ = kind._base if issubclass(kind, _Frozen) else kind
        layer._buffers.update({name: buffer if buffer is None else buffer.clone() for name, buffer in buffers.items()})
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False  # not `model.eval()`, to which some models give a meaning of their own
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, (kind, tracks, momentum, buffers) in kept.items():
            layer.track_running_stats, layer.momentum = tracks, momentum
            layer._buffers.update(buffers)
            layer.__class__ = kind


@contextmanager
def _restored(layer: nn.Module) -> Iterator[None]:
    """After the `with`, every value, flag and mode of `layer` is as before, whatever happens."""
    modes = [(module.__dict__, module.__dict__.get("training")) for module in layer.modules()]
    tensors = [(tensor, tensor.detach().clone(), tensor.requires_grad) for _, tensor in _tensors(layer)]
    buffers = [(module._buffers, dict(module._buffers)) for module in layer.modules()]
    try:
        yield
    finally:
        for attributes, mode in modes:
            attributes["training"] = mode  # past a property, as `freeze` makes one
        for own, kept in buffers:
            own.update(kept)
        for tensor, value, flag in tensors:
            tensor.data.copy_(value)
            tensor.requires_grad_(flag)


@contextmanager
def _hooks(layers: Iterable[_BatchNorm], before: Callable, after: Callable | None = None) -> Iterator[None]:
    """Inside the `with`, each layer's forward calls `before(layer, input)`, and `after(layer, input)` when it is done."""

    def pre_hook(layer: _BatchNorm, args: tuple, kwargs: dict) -> None:
        before(layer, *args, *kwargs.values())

    def hook(layer: _BatchNorm, args: tuple, kwargs: dict, output: Tensor) -> None:
        after(layer, *args, *kwargs.values())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
            if after:
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _checked(batches: Iterable) -> Iterator:
    """The batches, or an error that says what is wrong with them."""
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches must be a list or another iterable of batches, got {expect.describe(batches)}. "
            "Cut it: batches.split(128)."
        )
    empty = True
    for batch in batches:
        empty = False
        if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            inputs, labels = batch
            if labels.ndim == 1 < inputs.ndim and len(labels) == len(inputs):
                raise ValueError(
                    "each batch must be what the model takes, got inputs with labels. "
                    "Leave the labels out: [inputs for inputs, labels in batches]."
                )
        yield batch
    if empty:
        raise ValueError("batches must hold at least one, got none. An iterator can be read once.")


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm of `model` once, by its name; "" is the model itself."""
    named = expect.module("model", model).named_modules()
    layers = {name: module for name, module in named if isinstance(module, _BatchNorm)}
    if not layers:
        raise ValueError(
            f"model must have a BatchNorm, got {expect.describe(model)} without one. Leave other norms as they are."
        )
    _check_initialised(layers)
    return layers


def _check_initialised(layers: dict[str, nn.Module]) -> None:
    lazy = [name for name, layer in layers.items() if any(is_lazy(tensor) for _, tensor in _tensors(layer))]
    if lazy:
        raise ValueError(
            f"BatchNorms must know their channels, got a lazy one that does not: {lazy[0] or 'the model'}. "
            "Run a batch through the model first."
        )


def _pools(model: nn.Module) -> dict[_BatchNorm, _Pool]:
    """An empty pool for each BatchNorm that stores statistics, whether or not it updates them."""
    layers = _layers(model)
    pools = {layer: _Pool(name) for name, layer in layers.items() if layer.running_mean is not None}
    if not pools:
        raise ValueError(
            f"a BatchNorm must store statistics, got {expect.describe(model)} where all have track_running_stats=False. "
            "There is nothing to do: they normalise with the batch in every mode."
        )
    return pools


def _store(layer: _BatchNorm, mean: Tensor, var: Tensor, calls: int) -> None:
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(calls)


def _compare(layer: nn.Module, pool: _Pool) -> Drift:
    mean, var = pool.statistics()
    stored = _wide(layer.running_var) + layer.eps
    shifts = (mean - _wide(layer.running_mean)) / stored.sqrt()
    ratios = ((var + layer.eps) / stored).log() / 2
    return Drift(pool.name, shifts.square().mean().sqrt().item(), ratios.square().mean().sqrt().exp().item())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal in shape, dtype and values; NaN equals NaN."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    return bool(((one == other) | ((one != one) & (other != other))).all())  # only NaN is not itself


def _wide(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()
