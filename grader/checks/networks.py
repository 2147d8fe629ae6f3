"""What the checks of several topics draw their networks with."""

from collections import OrderedDict

import torch
from torch import nn

from grader.experiment import Trial


def with_statistics(norm: nn.Module, trial: Trial) -> nn.Module:
    """Give a BatchNorm statistics, a count, a weight and a bias that are not those of a fresh layer, in place."""
    channels = norm.num_features
    norm.running_mean.copy_(trial.normal(channels))
    norm.running_var.copy_(0.5 + trial.normal(channels).square())
    norm.num_batches_tracked.fill_(trial.integer(5, 50))
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(1 + trial.normal(channels).abs())
            norm.bias.copy_(trial.normal(channels))
    return norm


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, each under its name."""
    return nn.Sequential(OrderedDict(modules))


def linear(width: int, layers: int = 1) -> nn.Sequential:
    """Square linear layers, "0", "1" and so on."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def tied(words: int, width: int) -> nn.Module:
    """The parts of a small language model: the weight of its head is that of the embedding of its words."""
    embed = nn.ModuleDict({"words": nn.Embedding(words, width), "places": nn.Embedding(8, width)})
    model = named(embed=embed, body=nn.Linear(width, width), head=nn.Linear(width, words))
    model.head.weight = embed["words"].weight
    return model
