"""The BatchNorms of a network, and torch's classes of them, for exercises 5.4 and 5.6."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
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
