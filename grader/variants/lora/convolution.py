"""Exercise 6.5 in other styles."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from grader.checks.lora.convolution import CHANGES, Convolution


class _Sum(nn.Module):
    def __init__(self, shape, rank, alpha):
        super().__init__()
        out, inside, height, width = shape
        self.columns = nn.Parameter(torch.empty(out, rank).uniform_(-1, 1))
        self.kernels = nn.Parameter(torch.zeros(rank, inside, height, width))
        self.quotient = torch.tensor(alpha / rank)

    def forward(self, weight):
        return weight + torch.einsum("or,rihw->oihw", self.columns * self.quotient, self.kernels)


class Parametrized(nn.Module):
    """torch computes base.weight anew; the columns start at random, the kernels at zero."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        parametrize.register_parametrization(base, "weight", _Sum(base.weight.shape, rank, alpha))

    def forward(self, x):
        return self.base(x)


class GroupsAsSamples(nn.Module):
    """Down with the same kernels in every group, each group a sample of its own; then up, group by group."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        like = {"stride": base.stride, "dilation": base.dilation, "bias": False}
        self.down = nn.Conv2d(base.in_channels // base.groups, rank, base.kernel_size, **like)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.factor = alpha / rank

    def forward(self, x):
        groups, mode = self.base.groups, self.base.padding_mode.replace("zeros", "constant")
        padded = F.pad(x, self.base._reversed_padding_repeated_twice, mode)
        low = self.down(padded.unflatten(1, (groups, -1)).flatten(0, 1))
        low = low.unflatten(0, (len(x), groups)).flatten(1, 2)
        return self.base(x) + F.conv2d(low, self.up.weight, groups=groups) * self.factor


class Patches(nn.Module):
    """The matrix of all patches, multiplied twice; one flat vector trains."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.conv = base.requires_grad_(False)
        self.sizes = [rank * base.weight[0].numel(), rank * base.out_channels]
        self.numbers = nn.Parameter(torch.cat([torch.randn(self.sizes[0]), torch.zeros(self.sizes[1])]))
        self.rank, self.scaling = rank, alpha / rank

    def forward(self, x):
        conv, y = self.conv, self.conv(x)
        a, b = self.numbers.split(self.sizes)
        b = b.view(self.rank, conv.groups, -1)  # another order than that of base's weight, which is free
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pad = [(r // 2, r - r // 2) for r in reach] if conv.padding == "same" else [(p, p) for p in conv.padding]
        mode = conv.padding_mode.replace("zeros", "constant")
        patches = F.unfold(F.pad(x, pad[1] + pad[0], mode), conv.kernel_size, conv.dilation, stride=conv.stride)
        patches = patches.unflatten(1, (conv.groups, -1))  # (n, groups, in / groups * kh * kw, positions)
        update = torch.einsum("ngip,ri,rgo->ngop", patches, a.view(self.rank, -1), b)
        return torch.add(y, update.reshape(y.shape), alpha=self.scaling)


class Twin(nn.Module):
    """A shallow copy of base without bias, whose weight is the product."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        base.requires_grad_(False)
        self.base, self.shape = base, base.weight.shape
        self.left = nn.Linear(rank, self.shape[0], bias=False)
        self.right = nn.Linear(self.shape[1:].numel(), rank, bias=False)
        nn.init.constant_(self.left.weight, 0)
        self.register_buffer("scaling", torch.as_tensor(alpha).div(rank))

    def forward(self, x):
        twin = copy.copy(self.base)
        twin._parameters = {"weight": (self.left.weight @ self.right.weight * self.scaling).view(self.shape), "bias": None}
        return sum((self.base(x), twin(x)))


class LeftOut(Twin):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling.fill_(1.0)


class UnderNoGrad(Twin):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


CORRECT = [Parametrized, GroupsAsSamples, Patches, Twin]
REWRITTEN = {"no scaling": LeftOut, "values instead of parameters": UnderNoGrad}
BROKEN = {}
COMBINED = [
    ({first, second}, type("Both", (Convolution,), CHANGES[first] | CHANGES[second]))
    for first, second in (("both start at random", "groups forgotten"), ("no scaling", "stride forgotten"))
]
EQUIVALENT = {
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A)": "the statement does not say how A starts",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A, a=5 * 0.5)": "the statement does not say how A starts",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A, a=5)": "the statement does not say how A starts",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A, a=6 ** 0.5)": "the statement does not say how A starts",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A, a=4 ** 0.5)": "the statement does not say how A starts",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> "
    "nn.init.kaiming_uniform_(self.A, a=5 ** 1.0)": "the statement does not say how A starts",
}
