"""BatchNorm statistics: what recomputing them costs beside the forward passes that it cannot do without."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.timing import Comparison
from helpers.backbones import glyphnet
from helpers.data import digits
from helpers.timing import timed

Data = tuple[nn.Module, list[Tensor]]  # a model, and the batches it is run on


def _resnet18() -> Data:
    from torchvision.models import resnet18

    return resnet18(weights=None), list(torch.randn(48, 3, 96, 96).split(16))


def _glyphnet() -> Data:
    return glyphnet(), list(digits("test").inputs.split(256))


def _forward(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """What torch itself does to running statistics: forward in train mode."""
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def _fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    model.train()
    update_bn_stats(model, batches, num_iters=len(batches))


def _ours(passes: str) -> Callable[[nn.Module, list[Tensor]], None]:
    from helpers.batchnorm import recompute_statistics

    return lambda model, batches: recompute_statistics(model, batches, passes=passes)


def _build(data: Callable[[], Data], passes: str, peer: Callable[[nn.Module, list[Tensor]], None]):
    def build():
        torch.manual_seed(0)
        model, batches = data()
        twin, recompute = copy.deepcopy(model), _ours(passes)
        return timed(lambda: recompute(model, batches)), timed(lambda: peer(twin, batches))

    return build


ONE, SEQUENTIAL = "`recompute_statistics`", '`recompute_statistics`, passes="sequential"'
FORWARD, FVCORE = "forward in train mode", "`update_bn_stats` of fvcore"
COMPARISONS = []
for name, data in (("resnet18", _resnet18), ("glyphnet", _glyphnet)):
    COMPARISONS += [
        Comparison(f"{name}, one pass", ONE, FORWARD, _build(data, "one", _forward), 11, target=1.05),
        Comparison(f"{name}, one pass, fvcore", ONE, FVCORE, _build(data, "one", _fvcore), 11),
        Comparison(f"{name}, layer after layer", SEQUENTIAL, FORWARD, _build(data, "sequential", _forward), 3),
    ]
