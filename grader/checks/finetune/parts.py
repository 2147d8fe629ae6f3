"""Small networks whose parts have names, for the exercises that choose among parts."""

from collections import OrderedDict

from torch import nn


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def linear(width: int, layers: int = 1) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def tied(words: int, width: int) -> nn.Module:
    """The parts of a small language model: the weight of its head is that of the embedding of its words."""
    embed = nn.ModuleDict({"words": nn.Embedding(words, width), "places": nn.Embedding(8, width)})
    model = named(embed=embed, body=nn.Linear(width, width), head=nn.Linear(width, words))
    model.head.weight = embed["words"].weight
    return model
