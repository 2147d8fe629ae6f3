"""What exercise 6.6 is made of: models of which a part trains, and a right solution in pieces."""

import copy

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grader.experiment import Trial


class Adapted(nn.Module):
    """A frozen layer and an adapter, under the names of exercise 6.1."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, width))
        self.B = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class Network(nn.Module):
    """Frozen but for the adapters of its blocks and the head. Every number of it is random."""

    def __init__(self, width: int, ranks: list[int], bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(Adapted(width, rank) for rank in ranks)
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Shared(nn.Module):
    """A trained weight that two modules share, an adapter, and trained parameters of other dtypes."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.block = Adapted(width, rank)
        self.scale = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.bfloat16))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight


def sizes(trial: Trial) -> tuple[int, list[int]]:
    """The width of a network, and the rank of its adapters, once for each block."""
    return trial.integer(5, 8), [trial.integer(2, 4)] * 2


def another_copy(model: nn.Module) -> nn.Module:
    """Another copy of the same pre-trained model: what is frozen is equal, what trains has other numbers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model


class Solution:
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, path):
        self.path = path

    def save(self, model):
        draft = self.draft()
        self.write({name: self.written(parameter.detach()) for name, parameter in self.chosen(model).items()}, draft)
        draft.replace(self.path)

    def load(self, model):
        tensors = self.read()
        differing = self.surplus(model, tensors) | self.lacking(model, tensors) | self.misshapen(model, tensors)
        if differing:
            raise ValueError(f"file and model differ in {sorted(differing)}")
        self.put(model, tensors)

    def own(self, model):
        return dict(model.named_parameters())

    def chosen(self, model):
        return {name: parameter for name, parameter in self.own(model).items() if parameter.requires_grad}

    def draft(self):
        return self.path.with_name(self.path.name + ".part")

    def written(self, tensor):
        return tensor.contiguous()

    def write(self, tensors, path):
        save_file(tensors, path)

    def read(self):
        return load_file(self.path)

    def surplus(self, model, tensors):
        return tensors.keys() - self.own(model).keys()

    def lacking(self, model, tensors):
        return self.chosen(model).keys() - tensors.keys()

    def misshapen(self, model, tensors):
        return {name for name, parameter in self.own(model).items() if tensors.get(name, parameter).shape != parameter.shape}

    @torch.no_grad()
    def put(self, model, tensors):
        for name, parameter in self.own(model).items():
            if name in tensors:
                parameter.copy_(tensors[name])


def every_name(self, model):
    return dict(model.named_parameters(remove_duplicate=False))


def no_names(self, model, tensors):
    return set()


def cloned(self, tensor):
    return tensor.clone()
