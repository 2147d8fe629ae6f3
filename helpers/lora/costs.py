"""What LoRA takes, and whether its rank is enough."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from helpers import expect, finetune
from helpers.lora.layer import Layer, kind_of
from helpers.lora.models import layers


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
    kinds = [kind_of(base) for base in bases]
    matrices = {id(base.weight): kind.matrix(base.weight) for base, kind in zip(bases, kinds, strict=True)}
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
