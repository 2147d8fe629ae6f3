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

from helpers.lora.costs import cost, rank_of_update, report
from helpers.lora.kinds import Conv1d, Conv2d, Conv3d, DoRA, Embedding
from helpers.lora.layer import Adapter, Layer, Linear
from helpers.lora.models import activate, inject, layers, merge, merged, remove, replace, unmerge, untie

__all__ = [
    "Adapter",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DoRA",
    "Embedding",
    "Layer",
    "Linear",
    "activate",
    "cost",
    "inject",
    "layers",
    "merge",
    "merged",
    "rank_of_update",
    "remove",
    "replace",
    "report",
    "unmerge",
    "untie",
]
