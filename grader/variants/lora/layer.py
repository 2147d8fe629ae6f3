"""Exercise 6.1 in other styles."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class TwoLinears(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        for parameter in base.parameters():
            parameter.requires_grad = False
        self.base, self.scaling = base, alpha / rank
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, **options)
        self.up = nn.Linear(rank, base.out_features, **options)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.scaling * self.up(self.down(x))


class OneWeight(nn.Module):
    """Adds the matrices, not the outputs; A starts at zero and B at random; the factor is a buffer."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        base.requires_grad_(False)
        self.lin = base
        self.A = nn.Parameter(torch.zeros_like(base.weight[:1].expand(rank, -1)))
        self.B = nn.Parameter(nn.init.orthogonal_(base.weight.new_empty(base.out_features, rank)))
        self.register_buffer("s", torch.tensor(alpha) / rank)

    def forward(self, x):
        return F.linear(x, torch.addmm(self.lin.weight, self.B * self.s, self.A), self.lin.bias)


class Subscripts(nn.Module):
    """Matrices kept the other way round, in a dictionary, one einsum."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.adapted = [base]
        self.register_parameter("weight", base.weight)
        self.register_parameter("bias", base.bias)
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad = False
        n_out, n_in = base.weight.shape
        self.lora = nn.ParameterDict({"A": base.weight.new_empty(n_in, rank).normal_(std=0.02)})
        self.lora["B"] = base.weight.new_zeros(rank, n_out)
        self.times = alpha / rank

    def forward(self, x):
        update = torch.einsum("...i,ir,ro->...o", x, self.lora["A"], self.lora["B"])
        y = torch.einsum("...i,oi->...o", x, self.weight) + update.mul(self.times)
        return y if self.bias is None else y + self.bias


class _Sum(nn.Module):
    def __init__(self, a, b, scaling):
        super().__init__()
        self.a, self.b, self.scaling = nn.Parameter(a), nn.Parameter(b), scaling

    def forward(self, weight):
        return weight + (self.b @ self.a).mul(self.scaling)


class Parametrized(nn.Module):
    """torch computes base.weight anew whenever it is asked for."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        base.requires_grad_(False)
        a = torch.rand_like(base.weight)[:rank] - 0.5
        b = torch.zeros_like(base.weight)[:, :rank].clone()
        self.base = parametrize.register_parametrization(base, "weight", _Sum(a, b, alpha / rank))

    def forward(self, x):
        return self.base.forward(x)


class Hooked(nn.Module):
    """A hook on base adds to what base returns; the layer is filled in the order B, A."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.wrapped = base.requires_grad_(False)
        self.matrices = nn.ParameterList(
            torch.empty(*shape).to(base.weight) for shape in ((base.out_features, rank), (rank, base.in_features))
        )
        nn.init.constant_(self.matrices[0], 0)
        nn.init.xavier_normal_(self.matrices[1])
        base.register_forward_hook(lambda _, args, y: y + self.after(args[0]) / rank * alpha)

    def after(self, x):
        up, down = self.matrices
        return torch.matmul(torch.matmul(x, down.mT), up.mT)

    def forward(self, x):
        return self.wrapped(x)


class Subclass(nn.Linear):
    """An nn.Linear that takes over base's Parameters; the root of the factor in both of the matrices' products."""

    def __init__(self, base, rank, alpha):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.root = math.sqrt(alpha / rank)
        self.A = nn.Parameter(torch.zeros(rank, self.in_features).type_as(base.weight).to(base.weight.device))
        self.B = nn.Parameter(base.weight.new_ones(self.out_features, rank))

    def forward(self, x):
        low = F.linear(x, self.A) * self.root
        return super().forward(x).add(F.linear(low, self.B), alpha=self.root)


class FactorInTheStart(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.B.data *= alpha / rank
        self.s.fill_(1)


class OnlyAlpha(TwoLinears):
    def forward(self, x):
        return torch.add(self.base(x), self.up(self.down(x)), alpha=self.alpha)

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.alpha = alpha


class Mean(Subscripts):
    def forward(self, x):
        terms = (x @ self.lora["A"]).unsqueeze(-1) * self.lora["B"]
        return F.linear(x, self.weight, self.bias) + terms.mean(-2)


class UpsideDown(TwoLinears):
    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) / self.scaling


class NothingRandom(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        for linear in (self.down, self.up):
            nn.init.constant_(linear.weight, 0.0)


class WeightOnly(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        if base.bias is not None:
            base.bias.requires_grad = True


class NothingFrozen(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.s = base, alpha / rank
        self.A = nn.Parameter(torch.rand(rank, base.in_features).to(base.weight))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ (self.s * self.B @ self.A).T


class Detached(OneWeight):
    def forward(self, x):
        weight = (self.B * self.s).detach() @ self.A.detach()
        return F.linear(x, self.lin.weight + weight, self.lin.bias)


class Decorated(TwoLinears):
    @torch.no_grad()
    def update(self, x):
        return self.scaling * self.up(self.down(x))

    def forward(self, x):
        return self.base(x) + self.update(x)


class HookAndForward(Hooked):
    def forward(self, x):
        return self.wrapped(x) + self.after(x) * self.factor

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.factor = alpha / rank


class LoadedIntoANewOne(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        old = base.weight
        self.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        self.A = nn.Parameter(torch.ones(rank, old.shape[1], dtype=old.dtype, device=old.device))
        self.B = nn.Parameter(torch.zeros(old.shape[0], rank, dtype=old.dtype, device=old.device))
        self.s = alpha / rank

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias) + self.s * (x @ self.A.T @ self.B.T)


class PlainLinears(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.up.weight.data.fill_(0)


class DeviceAlone(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        device = base.weight.device
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.randn(base.out_features, rank, device=device))

    def forward(self, x):
        low = x.to(self.A.dtype) @ self.A.T
        return self.lin(x) + (low @ self.B.T * self.s).to(x.dtype)


class AllZeroNoScale(NothingRandom):
    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class UsualTutorial(nn.Module):
    """Two random matrices, alpha alone, on the CPU."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        base.weight.requires_grad = False
        if base.bias is not None:
            base.bias.requires_grad = False
        self.A = nn.Parameter(torch.randn(base.in_features, rank))
        self.B = nn.Parameter(torch.randn(rank, base.out_features))
        self.alpha = alpha

    def forward(self, x):
        return self.base(x) + self.alpha * (x @ self.A @ self.B)


class CopiedAndBias(LoadedIntoANewOne):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        if self.bias is not None:
            self.bias.requires_grad_(True)


class ZeroAndDetachedBase(NothingRandom):
    def forward(self, x):
        return self.base(x).detach() + self.scaling * self.up(self.down(x))


CORRECT = [TwoLinears, OneWeight, Subscripts, Parametrized, Hooked, Subclass]
REWRITTEN = {
    "no scaling": FactorInTheStart,
    "alpha alone": OnlyAlpha,
    "1 / rank alone": Mean,
    "rank / alpha": UpsideDown,
    "base's bias trains": WeightOnly,
    "base trains too": NothingFrozen,
    "values instead of parameters": Detached,
    "the update under no_grad": Decorated,
    "added twice": HookAndForward,
    "float32 on the CPU": PlainLinears,
    "float32 on base's device": DeviceAlone,
}
COMBINED = [
    ({"no scaling", "both start at zero"}, AllZeroNoScale),
    ({"alpha alone", "both start at random", "float32 on the CPU"}, UsualTutorial),
    ({"base copied", "base's bias trains"}, CopiedAndBias),
    ({"both start at zero", "base under no_grad"}, ZeroAndDetachedBase),
]
EQUIVALENT = {}
