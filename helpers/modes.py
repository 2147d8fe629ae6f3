"""Train and eval mode of a model: in eval mode for a while, then as it was.

A model has no single mode: each module has its own, `module.training`. `model.eval()` and `model.train()` set all of
them, so neither gives back the modes of a model that is partly in eval mode, as one with a frozen backbone is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from helpers import expect


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, every module of `model` is in eval mode; afterwards each has the mode it had before.

    Whatever happens inside: another `eval_mode`, an exception, Ctrl-C. Modes are set module by module, not by `train()`
    and `eval()`, to which some models give a meaning of their own.

    Args:
        model: any model, and in any modes: partly in train mode, with modules that are used in several places.
    """
    with kept_modes(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """After the `with`, every module of `model` has the mode it had before, whatever happens inside."""
    modes = {module: module.training for module in expect.module("model", model).modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
