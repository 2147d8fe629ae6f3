"""The BatchNorms of a network, torch's classes of them, and what gradients reach, for exercises 5.4 and 5.6."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_CLASSES = nn.Module, _NormBase, _BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm of a model once, the model itself included."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def classes_put_back() -> Iterator[None]:
    """Afterwards torch's own classes are as they were: a subject that patches one would change every later model."""
    before = [dict(vars(kind)) for kind in _CLASSES]
    try:
        yield
    finally:
        for kind, attributes in zip(_CLASSES, before, strict=True):
            for name, value in dict(vars(kind)).items():
                if name not in attributes:
                    delattr(kind, name)
                elif value is not attributes[name]:
                    setattr(kind, name, attributes[name])


class Branches(nn.ModuleDict):
    """Layers side by side: each maps its own input to its own output."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: branch(inputs[name]) for name, branch in self.items()}


def backward(output: Tensor) -> None:
    if output.requires_grad:
        # Weighted, because the plain sum of a normalised batch is constant.
        weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
        (output.square() * weights).sum().backward()


def arrives(parameter: nn.Parameter) -> bool:
    """Whether it got any gradient: what keeps one away leaves None or exact zeros, no rounding."""
    return parameter.grad is not None and bool(parameter.grad.any())
