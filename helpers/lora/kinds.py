"""LoRA beyond nn.Linear: convolutions, embeddings, and DoRA.

Sources: the authors' loralib; Liu et al. 2024 (DoRA).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.lora.layer import Adapter, Layer


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


class DoRA(Adapter, option="dora"):
    """W' = magnitude * (W + scaling * B A) / |W + scaling * B A|, where |.| is the norm of each row of the matrix (out, in).

    magnitude (out,) starts at |W| and trains too. The norm counts as a constant in the gradient.

    Source: Liu et al. 2024, sections 4.1 and 4.3.
    """

    alone = True

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
