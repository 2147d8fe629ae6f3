"""Exercise 6.5 in other styles."""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize


class OtherWeight(nn.Module):
    """base itself, run with another weight."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        for parameter in base.parameters():
            parameter.requires_grad = False
        rows, columns = base.weight.flatten(1).shape
        self.A = nn.Parameter(torch.randn(rank, columns) * 0.1)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x):
        weight = self.base.weight + self.scaling * (self.B @ self.A).reshape(self.base.weight.shape)
        return functional_call(self.base, {"weight": weight}, (x,))


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
        self.options = {"stride": base.stride, "dilation": base.dilation, "bias": False}
        self.down = nn.Conv2d(base.in_channels // base.groups, rank, base.kernel_size, **self.options)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.factor = alpha / rank

    def pad(self, x):
        modes = {"zeros": "constant"}
        return F.pad(x, self.base._reversed_padding_repeated_twice, modes.get(self.base.padding_mode, self.base.padding_mode))

    def forward(self, x):
        groups = self.base.groups
        low = self.down(self.pad(x).unflatten(1, (groups, -1)).flatten(0, 1))
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


class OnlyAlpha(GroupsAsSamples):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.factor = float(alpha)


class AllZero(GroupsAsSamples):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        for conv in (self.up, self.down):
            nn.init.constant_(conv.weight, 0)


class UnderNoGrad(Twin):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class TwoKernels(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        like = {name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        self.A = nn.Conv2d(base.in_channels, rank, bias=False, **like)
        self.B = nn.Conv2d(rank, base.out_channels, 3, padding="same", bias=False)
        nn.init.zeros_(self.B.weight)
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scaling * self.B(self.A(x))


class AllChannels(TwoKernels):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.B.weight.data.zero_()


class NeitherDilationNorMode(GroupsAsSamples):
    """Kernel size, stride and padding are copied, and that is all."""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        inside = base.in_channels // base.groups
        self.down = nn.Conv2d(inside, rank, base.kernel_size, base.stride, base.padding, bias=False)

    def pad(self, x):
        return x


class NoStrideNoScale(OtherWeight):
    def forward(self, x):
        base, weight = self.base, (self.B @ self.A).view_as(self.base.weight)
        if base.padding_mode == "zeros":
            return base(x) + F.conv2d(x, weight, padding=base.padding, dilation=base.dilation, groups=base.groups)
        return base(x) + base._conv_forward(x, weight, None)


class RandomAndUngrouped(AllChannels):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.B.reset_parameters()


CORRECT = [OtherWeight, Parametrized, GroupsAsSamples, Patches, Twin]
REWRITTEN = {
    "no scaling": LeftOut,
    "alpha alone": OnlyAlpha,
    "both start at zero": AllZero,
    "values instead of parameters": UnderNoGrad,
}
COMBINED = [
    ({"dilation forgotten", "padding_mode forgotten"}, NeitherDilationNorMode),
    ({"no scaling", "stride forgotten"}, NoStrideNoScale),
    ({"both start at random", "groups forgotten"}, RandomAndUngrouped),
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
