"""Freeze every BatchNorm of a model so that train() does not undo it, and undo it exactly."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.batchnorm.layer import MEANINGS, layers_of


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
        raise ValueError(f"what must be one of {list(MEANINGS)}, got {unknown[0]!r}. Leave it out to freeze all of it.")
    what = what or MEANINGS
    layers = layers_of(model)
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
            if isinstance(layer, Frozen):
                _put_back(layer, state, model)

    return undo


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze` exactly, in place: every BatchNorm is what it was before the first of any number of freezes.

    Works on copies and loaded pickles too, and does nothing to layers that are not frozen. A layer goes back to the mode
    that it had, unless `model` has changed between train and eval mode in the meantime; then it follows the model.

    Raises:
        ValueError: the model has no BatchNorm.
    """
    for layer in layers_of(model).values():
        if isinstance(layer, Frozen):
            _put_back(layer, layer._freeze.first, model)


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


class Frozen:
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
    return type(f"Frozen{base.__name__}", (Frozen, base), {"_base": base, "__module__": base.__module__})


def _make_frozen(make: Callable, *args) -> nn.Module:
    layer = make(*args)
    layer.__class__ = _frozen_class(type(layer))
    return layer


def _state(layer: _BatchNorm, model: nn.Module) -> _State:
    flags = {name: parameter.requires_grad for name, parameter in layer.named_parameters(recurse=False)}
    frozen = layer._freeze if isinstance(layer, Frozen) else None
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
