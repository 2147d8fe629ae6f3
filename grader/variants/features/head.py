"""Exercise 2.1 in other styles."""

import copy
import operator
from functools import partial, reduce
from unittest.mock import patch

from torch import nn

from grader.checks.features.head import solution


def by_torchvision(model, name):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    _, nodes = get_graph_node_names(model, suppress_diff_warning=True)
    before = nodes[nodes.index(name) - 1]
    extractor = create_feature_extractor(model, [before], suppress_diff_warning=True)
    return lambda images: extractor(images)[before]


def put_back_afterwards(model, name):
    *path, last = name.split(".")

    def features(images):
        with patch.dict(reduce(getattr, path, model)._modules, {last: nn.Identity()}):
            return model(images)

    return features


class _Stop(Exception):
    """Of forward: at the head."""


class UpToTheHead(nn.Module):
    """A module around the model; what enters the head leaves it in an exception."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.head = model, operator.attrgetter(name)(model)

    def stop(self, head, args):
        raise _Stop(args[0].detach())

    def forward(self, images):
        handle = self.head.register_forward_pre_hook(self.stop)
        try:
            self.model(images)
        except _Stop as stop:
            return stop.args[0]
        finally:
            handle.remove()


def head_that_passes_on(model, name):
    head = model.get_submodule(name)
    memo = {id(head): nn.Sequential()}  # the copy gets this in the head's place
    return copy.deepcopy(model, memo).requires_grad_(False)


def classifier_that_passes_on(model, name):
    return head_that_passes_on(model, name.split(".")[0])


def wrapped_after_fc(model, name):
    clone = copy.deepcopy(model)
    clone.add_module("fc", nn.Sequential())
    return nn.Sequential(clone, nn.Flatten())


CORRECT = [by_torchvision, put_back_afterwards, UpToTheHead, head_that_passes_on]
REWRITTEN = {"whole classifier removed": classifier_that_passes_on, "always fc": wrapped_after_fc}
BROKEN = {}
COMBINED = [
    ({"head removed in place", "model put into eval mode"}, partial(solution, copied=nn.Module.eval)),
    ({"head removed in place", "always fc"}, partial(solution, copied=lambda model: model, place=lambda *_: ("", "fc"))),
]

EQUIVALENT = {
    "… args: caught.append(args[0])) -> … args: caught.append(args[-1]))": "a head is called with one argument",
    "try: ⏎ model(images) ⏎ finally: -> model(images)": "a forward that raises is out of scope",
    "return caught[0] -> return caught[-1]": "the head is called once in a forward",
}
