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


class RootOfTheRank(Twin):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling.mul_(rank**0.5)


class PaddedByHand(Twin):
    """Pads by itself where base does so by a word."""

    def forward(self, x):
        if self.base.padding != "same":
            return super().forward(x)
        sides = [k // 2 for k in reversed(self.base.kernel_size) for _ in "-+"]
        update = (self.left.weight @ self.right.weight * self.scaling).view(self.shape)
        padded = F.pad(x, sides, mode=self.base.padding_mode.replace("zeros", "constant"))
        return self.base(x) + F.conv2d(padded, update, dilation=self.base.dilation, groups=self.base.groups)


class Thawed(Twin):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.requires_grad_(True)


class UnderNoGrad(Twin):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def _changed(name, **attributes):
    """The right solution with other pieces."""
    return type(name, (Convolution,), attributes)


def _misconceived(*keys):
    return [_changed(key, **CHANGES[key]) for key in keys]


def _mode(layer):
    return layer.base.padding_mode.replace("zeros", "constant")


class WholeNumberOfTimes(Convolution):
    def scale(self, rank, alpha):
        return alpha // rank


class EachRowsKernelTurned(Convolution):
    """B A once more by itself: no product of that rank."""

    def delta(self):
        return super().delta() + super().delta() ** 3


class BiasAddedTwice(Convolution):
    def constant(self):
        return self.base.bias


class EqualRows(Convolution):
    def trained(self, tensor):
        return nn.Parameter(tensor[:1].expand_as(tensor).clone())


class OnlyOneTrains(Convolution):
    def trained(self, tensor):
        return nn.Parameter(tensor, requires_grad=bool(tensor.any()))


class WeightTrains(Convolution):
    def frozen(self):
        return [] if self.base.bias is None else [self.base.bias]


class OutputsShift(Convolution):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.shift = nn.Parameter(torch.zeros(base.out_channels, 1, 1))

    def update(self, x):
        return super().update(x) + self.shift


class NeedsABias(Convolution):
    def constant(self):
        return 0 * self.base.bias


class SquareKernels(Convolution):
    def delta(self):
        size = self.base.kernel_size[0]
        return self.scaling * (self.B @ self.A).view(self.base.out_channels, -1, size, size)


class FirstOfTwo(Convolution):
    def arguments(self):
        return super().arguments() | {"stride": self.base.stride[0], "dilation": self.base.dilation[0]}


class HalfTheReach(Convolution):
    """For an odd kernel right, with dilation too."""

    def padded(self, x):
        if self.base.padding != "same":
            return super().padded(x)
        high, wide = (d * (k // 2) for d, k in zip(self.base.dilation, self.base.kernel_size, strict=True))
        return F.pad(x, (wide, wide, high, high), _mode(self)), 0


class EveryModeCircular(Convolution):
    def padded(self, x):
        if self.base.padding_mode == "zeros":
            return super().padded(x)
        return F.pad(x, self.base._reversed_padding_repeated_twice, "circular"), 0


class ModesPadAlike(Convolution):
    """As much above as beside the image."""

    def padded(self, x):
        if self.base.padding_mode == "zeros":
            return super().padded(x)
        return F.pad(x, self.base._reversed_padding_repeated_twice[-2:] * 2, _mode(self)), 0


class ModesWithoutDilation(Convolution):
    """Right with zeros, and if padding is given in numbers."""

    def padded(self, x):
        if self.base.padding_mode == "zeros" or self.base.padding != "same":
            return super().padded(x)
        high, wide = (k // 2 for k in self.base.kernel_size)
        return F.pad(x, (wide, wide, high, high), _mode(self)), 0


class UnscaledGroups(Convolution):
    def delta(self):
        return super().delta() / (self.scaling if self.base.groups > 1 else 1)


class ChannelByChannel(Convolution):
    """Knows one group, and as many as there are channels."""

    def padded(self, x):
        if self.base.groups not in (1, self.base.in_channels):
            raise ValueError("groups must be 1 or in_channels")
        return super().padded(x)


class RankOfEachGroup(nn.Module):
    """Two convolutions with base's groups, of which each gets a part of the rank, at least one."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        groups = base.groups
        inside = -(-rank // groups) * groups
        names = "kernel_size", "stride", "padding", "dilation", "padding_mode"
        arguments = {name: getattr(base, name) for name in names}
        self.down = nn.Conv2d(base.in_channels, inside, groups=groups, bias=False, **arguments)
        self.up = nn.Conv2d(inside, base.out_channels, 1, groups=groups, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scaling * self.up(self.down(x))


CORRECT = [Parametrized, GroupsAsSamples, Patches, Twin]
REWRITTEN = {
    "base trains too": Thawed,
    "rsLoRA's factor": RootOfTheRank,
    "half a kernel for 'same'": PaddedByHand,
    "no scaling": LeftOut,
    "values instead of parameters": UnderNoGrad,
}
BROKEN = {
    1: [
        *_misconceived("no scaling", "alpha alone", "rsLoRA's factor", "flattened in another order"),
        *(WholeNumberOfTimes, EachRowsKernelTurned),
    ],
    2: [
        EqualRows,
        *_misconceived("both start at zero", "both start at random", "starts at one number", "values instead of parameters"),
    ],
    3: [WeightTrains, *_misconceived("base's bias trains", "base trains too", "biases in the adapter"), OutputsShift],
    4: [NeedsABias, SquareKernels, FirstOfTwo, *_misconceived("stride forgotten", "dilation forgotten")],
    5: [HalfTheReach, *_misconceived("half a kernel for 'same'", "padding always a pair of numbers")],
    6: [EveryModeCircular, ModesPadAlike, ModesWithoutDilation, *_misconceived("padding_mode forgotten")],
    7: [UnscaledGroups, ChannelByChannel, RankOfEachGroup, *_misconceived("groups forgotten", "an error with groups")],
}
COMBINED = [
    ({first, second}, type("Both", (Convolution,), CHANGES[first] | CHANGES[second]))
    for first, second in (("both start at random", "groups forgotten"), ("no scaling", "stride forgotten"))
]
EQUIVALENT = {
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A)": "any random start will do",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A, a=5 * 0.5)": "any random start will do",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A, a=5)": "any random start will do",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A, a=6 ** 0.5)": "any random start will do",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A, a=4 ** 0.5)": "any random start will do",
    "nn.init.kaiming_uniform_(self.A, a=5 ** 0.5) -> nn.init.kaiming_uniform_(self.A, a=5 ** 1.0)": "any random start will do",
}
