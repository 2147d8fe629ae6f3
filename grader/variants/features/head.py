"""Exercise 2.1 in other styles."""

import copy
import operator
from functools import partial, reduce
from unittest.mock import patch

from torch import nn

from grader.checks.features.head import head_put_back_only_if_all_goes_well, solution


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


def by_execution(model, name, images, wanted):
    """What the modules without children that run before the head are, in their order, and what each of them gives."""
    ran, handles = [], []
    for key, module in model.named_modules():
        if key == name or not list(module.children()):
            handles.append(module.register_forward_hook(lambda module, args, output: ran.append((module, output))))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    head = model.get_submodule(name)
    before = ran[: [module for module, _ in ran].index(head)]
    return [step[wanted] for step in before]


def output_of_what_runs_before(model, name):
    return lambda images: by_execution(model, name, images, 1)[-1]


def modules_in_the_order_they_run(model, name):
    def features(images):
        for module in by_execution(model, name, images, 0):
            images = module(images)
        return images

    return features


def one_dot(model, name):
    clone = copy.deepcopy(model)
    parent, dot, attribute = name.partition(".")
    setattr(clone.get_submodule(parent) if dot else clone, attribute or parent, nn.Identity())
    return clone


def all_that_end_so(model, name):
    clone = copy.deepcopy(model)
    for key, module in list(clone.named_modules()):
        if key.endswith(name) and isinstance(module, nn.Linear):
            parent, _, attribute = key.rpartition(".")
            setattr(clone.get_submodule(parent), attribute, nn.Identity())
    return clone


def first_features_kept(model, name):
    backbone, kept = head_that_passes_on(model, name), {}

    def features(images):
        if "features" not in kept:
            kept["features"] = backbone(images)
        return kept["features"]

    return features


def without_axes_of_one(model, name):
    backbone = head_that_passes_on(model, name)
    return lambda images: backbone(images).squeeze(0)


def without_a_head_until_used(model, name):
    """In place, and put back after the first call."""
    parent, _, attribute = name.rpartition(".")
    place, head = model.get_submodule(parent), model.get_submodule(name)
    setattr(place, attribute, nn.Identity().train(model.training))

    def features(images):
        setattr(place, attribute, nn.Identity().train(model.training))
        try:
            return model(images)
        finally:
            setattr(place, attribute, head)

    return features


def scaled_head(model, name):
    """What enters the head is found by a head that passes on, written into the model's own."""
    backbone = head_that_passes_on(model, name)
    model.get_submodule(name).weight.data *= 2
    return backbone


def frozen_in_place(model, name):
    return UpToTheHead(model.requires_grad_(False), name)


def for_evaluation(model, name):
    return UpToTheHead(model.eval(), name)


def head_copied_back(model, name):
    """What stands there afterwards computes the same, and is another layer."""
    parent, _, attribute = name.rpartition(".")
    place = model.get_submodule(parent)

    def features(images):
        head = copy.deepcopy(getattr(place, attribute))
        setattr(place, attribute, nn.Identity())
        try:
            return model(images)
        finally:
            setattr(place, attribute, head)

    return features


def removed_if_all_goes_well(model, name):
    def features(images):
        kept = {}
        handle = model.get_submodule(name).register_forward_pre_hook(lambda head, args: kept.update(found=args[0]))
        model(images)
        handle.remove()
        return kept["found"]

    return features


def at_the_last_layer(model, name):
    *_, last = (module for module in model.modules() if hasattr(module, "in_features"))

    def features(images):
        entered = []
        handle = last.register_forward_pre_hook(lambda *given: entered.extend(given[1]))
        try:
            model(images)
        finally:
            handle.remove()
        return entered.pop()

    return features


def stopped_by_a_hook(model, name):
    """Only what the hook raises is caught, so an error before it leaves the hook there."""

    def stop(head, args):
        raise _Stop(args[0])

    def features(images):
        handle = model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            model(images)
        except _Stop as stopped:
            handle.remove()
            return stopped.args[0]

    return features


def attribute_on_the_head(model, name):
    def keep(head, args):
        head.entered = args[0].detach()

    model.get_submodule(name).register_forward_pre_hook(keep)
    return lambda images: (model(images), model.get_submodule(name).entered)[1]


class EveryBatchKept(UpToTheHead):
    """A table of all that was asked, for those who ask twice."""

    def __init__(self, model, name):
        super().__init__(model, name)
        self.kept = {}

    def forward(self, images):
        return self.kept.setdefault(images, super().forward(images))


CORRECT = [by_torchvision, put_back_afterwards, UpToTheHead, head_that_passes_on]
REWRITTEN = {
    "whole classifier removed": classifier_that_passes_on,
    "always fc": wrapped_after_fc,
    "hook at the layer defined last": at_the_last_layer,
    "hook left behind": attribute_on_the_head,
    "batches pile up": EveryBatchKept,
}
BROKEN = {
    1: [output_of_what_runs_before, modules_in_the_order_they_run],
    2: [one_dot, all_that_end_so],
    3: [first_features_kept, without_axes_of_one],
    4: [without_a_head_until_used, scaled_head, head_copied_back],
    5: [frozen_in_place, for_evaluation],
    6: [removed_if_all_goes_well, head_put_back_only_if_all_goes_well, stopped_by_a_hook, attribute_on_the_head],
    7: [EveryBatchKept],
}
COMBINED = [
    ({"head removed in place", "model put into eval mode"}, partial(solution, copied=nn.Module.eval)),
    ({"head removed in place", "always fc"}, partial(solution, copied=lambda model: model, place=lambda *_: ("", "fc"))),
]

EQUIVALENT = {
    "… args: caught.append(args[0])) -> … args: caught.append(args[-1]))": "a head is called with one argument",
    "return caught[0] -> return caught[-1]": "the head is called once in a forward",
}
