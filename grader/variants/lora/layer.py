"""Exercise 6.1 in other styles."""

from types import SimpleNamespace

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
        self.B = nn.Parameter(nn.init.kaiming_uniform_(base.weight.new_empty(base.out_features, rank), a=5**0.5))
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
        self.lora = nn.ParameterDict({"A": base.weight.new_empty(n_in, rank).uniform_(-(n_in**-0.5), n_in**-0.5)})
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
        a = (2 * torch.rand_like(base.weight[0].expand(rank, -1)) - 1) / base.in_features**0.5
        b = torch.zeros_like(base.weight[:, 0]).unsqueeze(1).repeat(1, rank)
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
        nn.Linear.reset_parameters(SimpleNamespace(weight=self.matrices[1], bias=None))
        base.register_forward_hook(lambda _, args, y: y + self.after(args[0]) / rank * alpha)

    def after(self, x):
        up, down = self.matrices
        return torch.matmul(torch.matmul(x, down.mT), up.mT)

    def forward(self, x):
        return self.wrapped(x)


class FactorInTheStart(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.A.data *= alpha / rank
        self.s.fill_(1)


class OnlyAlpha(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.s.fill_(alpha)


class ByTheSquareRoot(OneWeight):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.s *= rank**0.5


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


class MergedInEvalMode(TwoLinears):
    """As in loralib: eval() adds the update to the weight, train() takes it out again."""

    def train(self, mode=True):
        change = (self.up.weight @ self.down.weight).detach() * self.scaling
        if self.training and not mode:
            self.base.weight.data += change
        elif mode and not self.training:
            self.base.weight.data -= change
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) if self.training else self.base(x)


class NumbersOfBase(TwoLinears):
    """A new nn.Linear that holds what base held when the layer was made."""

    def __init__(self, base, rank, alpha):
        own = nn.Linear(base.in_features, base.out_features, base.bias is not None, **self.options(base.weight))
        own.load_state_dict(base.state_dict())
        super().__init__(own, rank, alpha)


class NewBias(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.bias = nn.Parameter(base.weight.new_zeros(base.out_features))

    def forward(self, x):
        return super().forward(x) + self.bias


class ScaleTrains(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = nn.Parameter(base.weight.new_tensor(alpha / rank))


class WholeNumbers(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha // rank


class RankTwoAtLeast(TwoLinears):
    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha / max(rank, 2)


class OffInEvalMode(TwoLinears):
    def forward(self, x):
        return super().forward(x) if self.training else self.base(x)


class NothingUntilTrained(TwoLinears):
    """B is zero: so is the update, and its forward is skipped."""

    def forward(self, x):
        return super().forward(x) if self.up.weight.any() else self.base(x)


class OutputsCorrected(TwoLinears):
    """Both at random; what they add at first is subtracted again, as a bias is, from every output alike."""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.up.reset_parameters()
        self.register_buffer("first", self.up(self.down(torch.ones_like(base.weight[0]))).detach())

    def forward(self, x):
        return super().forward(x) - self.scaling * self.first


class InputDetached(TwoLinears):
    def forward(self, x):
        return self.base(x) + self.scaling * self.up(self.down(x.detach()))


class FixedProjection(TwoLinears):
    """A asks for a gradient and gets none."""

    def forward(self, x):
        return self.base(x) + self.scaling * self.up(F.linear(x, self.down.weight.detach()))


class TwoDimensions(TwoLinears):
    def forward(self, x):
        return self.base(x) + self.scaling * torch.mm(torch.mm(x, self.down.weight.t()), self.up.weight.t())


class AlwaysABatch(TwoLinears):
    def forward(self, x):
        return super().forward(x.unsqueeze(0) if x.dim() == 1 else x)


class FlattenedBatch(TwoLinears):
    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1]))


class StartsOtherwise(TwoLinears):
    def start(self, weight):
        return nn.init.xavier_uniform_(weight)

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.start(self.down.weight)


class StartsAsForReLU(StartsOtherwise):
    def start(self, weight):
        return nn.init.kaiming_uniform_(weight)


class StartsPositive(StartsOtherwise):
    def start(self, weight):
        weight.data = torch.rand(weight.shape).to(weight)


class StartsSmall(StartsOtherwise):
    def start(self, weight):
        return nn.init.normal_(weight, std=1e-3)


class StartsByTheRank(StartsOtherwise):
    """As the weight of an nn.Linear from rank to in_features."""

    def start(self, weight):
        weight.data = nn.init.kaiming_uniform_(weight.detach().T.contiguous(), a=5**0.5).T.contiguous()


class StartsAsOnes(StartsOtherwise):
    def start(self, weight):
        return nn.init.ones_(weight)


class HalfPrecisionForgotten(TwoLinears):
    def options(self, weight):
        return {"device": weight.device, "dtype": torch.float32}


class CastBackInForward(TwoLinears):
    """float32 for A and B, whatever base is, as mixed precision has it."""

    def options(self, weight):
        return {"device": weight.device, "dtype": torch.float32}

    def forward(self, x):
        update = self.up(self.down(x.to(self.down.weight.dtype)))
        return self.base(x) + self.scaling * update.to(x.dtype)


CORRECT = [TwoLinears, OneWeight, Subscripts, Parametrized, Hooked]
REWRITTEN = {
    "no scaling": FactorInTheStart,
    "alpha alone": OnlyAlpha,
    "1 / rank alone": Mean,
    "rank / alpha": UpsideDown,
    "base's bias trains": WeightOnly,
    "values instead of parameters": Detached,
    "float32 on the CPU": PlainLinears,
    "rsLoRA's factor": ByTheSquareRoot,
    "normal numbers": StartsSmall,
    "never negative": StartsPositive,
    "starts as a constant": StartsAsOnes,
}
BROKEN = {
    1: [OnlyAlpha, WholeNumbers, RankTwoAtLeast, OffInEvalMode, UpsideDown],
    2: [
        OutputsCorrected,
        NothingUntilTrained,
        *(type("Wrong", (Layer,), CHANGES[f"both start at {how}"]) for how in ("zero", "random")),
    ],
    3: [WeightOnly, NewBias, ScaleTrains],
    4: [InputDetached, FixedProjection, type("Wrong", (Layer,), CHANGES["base under no_grad"])],
    5: [TwoDimensions, AlwaysABatch, FlattenedBatch],
    6: [MergedInEvalMode, NumbersOfBase],
    7: [HalfPrecisionForgotten, CastBackInForward, PlainLinears],
    8: [StartsOtherwise, StartsAsForReLU, StartsByTheRank, StartsPositive, StartsSmall, StartsAsOnes],
}
COMBINED = [
    ({first, second}, type("Both", (Layer,), CHANGES[first] | CHANGES[second]))
    for first, second in (("both start at zero", "base under no_grad"), ("base copied", "base's bias trains"))
]
EQUIVALENT = {}
