"""Exercise 6.1 in other styles."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from grader.checks.lora.adapters import Layer
from grader.checks.lora.layer import CHANGES


class TwoLinears(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.freeze(base)
        self.base, self.scaling = base, alpha / rank
        self.down = nn.Linear(base.in_features, rank, bias=False, **self.options(base.weight))
        self.up = nn.Linear(rank, base.out_features, bias=False, **self.options(base.weight))
        nn.init.zeros_(self.up.weight)

    def freeze(self, base):
        for parameter in base.parameters():
            parameter.requires_grad = False

    def options(self, weight):
        return {"device": weight.device, "dtype": weight.dtype}

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


class FactorInTheStart(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.B.data *= alpha / rank
        self.s.fill_(1)


class OnlyAlpha(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.s.fill_(alpha)


class Mean(Subscripts):
    def forward(self, x):
        terms = (x @ self.lora["A"]).unsqueeze(-1) * self.lora["B"]
        return F.linear(x, self.weight, self.bias) + terms.mean(-2)


class UpsideDown(TwoLinears):
    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) / self.scaling


class WeightOnly(TwoLinears):
    def freeze(self, base):
        base.weight.requires_grad = False


class Detached(OneWeight):
    def forward(self, x):
        weight = (self.B * self.s).detach() @ self.A.detach()
        return F.linear(x, self.lin.weight + weight, self.lin.bias)


class PlainLinears(TwoLinears):
    def options(self, weight):
        return {}


CORRECT = [TwoLinears, OneWeight, Subscripts, Parametrized, Hooked]
REWRITTEN = {
    "no scaling": FactorInTheStart,
    "alpha alone": OnlyAlpha,
    "1 / rank alone": Mean,
    "rank / alpha": UpsideDown,
    "base's bias trains": WeightOnly,
    "values instead of parameters": Detached,
    "float32 on the CPU": PlainLinears,
}
BROKEN = {}
COMBINED = [
    ({first, second}, type("Both", (Layer,), CHANGES[first] | CHANGES[second]))
    for first, second in (("both start at zero", "base under no_grad"), ("base copied", "base's bias trains"))
]
EQUIVALENT = {}
