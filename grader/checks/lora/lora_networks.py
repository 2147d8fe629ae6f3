"""What exercise 6.4 is made of: networks with LoRA layers, and a right solution in pieces."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import combinations

import torch
from torch import nn

from grader.experiment import Trial, WrongReturn
from helpers import expect, lora

SCALING = 3  # alpha / rank: a delta that is scaled again is three times as large


def network(trial: Trial, width: int) -> nn.Module:
    """Three LoRA layers of one size, which lie deeper than its children, and a head without."""
    rank = trial.integer(2, 3)
    layers = nn.Sequential(*(lora_layer(trial, nn.Linear(width, width), rank) for _ in range(3)))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(width, 3)})


def language_model(trial: Trial, other: nn.Module, tied: bool = True) -> nn.Module:
    """In small. Its head, a LoRA layer, has a weight that equals that of another module, or the same one."""
    width = 6  # of everything, so that all LoRA layers have one shape
    layer = lora_layer(trial, nn.Linear(width, width), 2)
    head = nn.Linear(width, width)
    weight = getattr(other, "base", other).weight
    head.weight = weight if tied else nn.Parameter(weight.detach().clone())
    return nn.Sequential(nn.Embedding(7, width), other, layer, lora_layer(trial, head, 2))


def lora_layer(trial: Trial, base: nn.Linear, rank: int) -> lora.Linear:
    """A LoRA layer that has been trained: B is not zero."""
    layer = lora.Linear(base, rank, SCALING * rank)
    with torch.no_grad():
        layer.A.copy_(trial.normal(*layer.A.shape))
        layer.B.copy_(trial.normal(*layer.B.shape) / 2)
    return layer


def layers_of(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [layer.base.weight for layer in layers_of(model)]


def bits_of(model: nn.Module) -> list[list]:
    """The bits of each base weight, as bytes; values would call 0 and -0 equal."""
    return [weight.detach().contiguous().view(torch.uint8).tolist() for weight in weights_of(model)]


def manager_of(value: object) -> AbstractContextManager:
    if not (hasattr(type(value), "__enter__") and hasattr(type(value), "__exit__")):
        question = " Is it decorated with @contextmanager?" if isinstance(value, Iterator) else ""
        question = question or (" Is there a return, or a yield?" if value is None else "")
        raise WrongReturn(f"merged must return a context manager, got {expect.describe(value)}.{question}")
    return value


def some_layer(model: nn.Module, layers: list[lora.Linear]) -> None:
    if not layers:
        raise ValueError("there is no LoRA layer")


def none_merged(model: nn.Module, layers: list[lora.Linear]) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError("a layer is merged already")


def none_tied(model: nn.Module, layers: list[lora.Linear]) -> None:
    for layer in layers:
        users = [module for module in model.modules() if any(p is layer.base.weight for p in module._parameters.values())]
        if len(users) > 1:
            raise ValueError("a base weight is used by another module too")


def none_equal(model: nn.Module, layers: list[lora.Linear]) -> None:
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if any(torch.equal(*pair) for pair in combinations(parameters, 2)):
        raise ValueError("a base weight is used by another module too")


class Solution:
    """A right solution, in pieces that a misconception replaces."""

    checks = some_layer, none_merged, none_tied
    flag_inside, flag_afterwards = True, False

    def __init__(self, model):
        self.model, self.layers = model, layers_of(model)

    def __enter__(self):
        for check in self.checks:
            check(self.model, self.layers)
        for layer in self.layers:
            self.merge(layer)

    def __exit__(self, kind, error, trace):
        if self.undone_after(kind):
            for layer in self.layers:
                self.restore(layer)
                layer.merged = self.flag_afterwards

    def merge(self, layer):
        layer.old = layer.base.weight.detach().clone()
        self.add(layer.base.weight, self.update(layer))
        layer.merged = self.flag_inside

    def update(self, layer):
        return layer.delta()

    def add(self, weight, update):
        weight.data += update.detach()

    def undone_after(self, kind):
        """Whether the merge is undone if the block ends with an exception of that kind, which may be None."""
        return True

    def restore(self, layer):
        layer.base.weight.data = layer.old
