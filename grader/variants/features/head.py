"""Exercise 2.1 in other styles."""

import copy
import operator
from functools import reduce

from torch import fx, nn


def with_a_pre_hook(model, name):
    head = model.get_submodule(name)

    def features(images):
        entered = {}
        handle = head.register_forward_pre_hook(lambda module, args: entered.update(x=args[0]))
        try:
            model(images)
        finally:
            handle.remove()
        return entered["x"]

    return features


def by_torchvision(model, name):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    _, nodes = get_graph_node_names(model, suppress_diff_warning=True)
    before = nodes[nodes.index(name) - 1]
    extractor = create_feature_extractor(model, [before], suppress_diff_warning=True)
    return lambda images: extractor(images)[before]


def by_cutting_the_graph(model, name):
    cut = fx.symbolic_trace(model)
    for node in cut.graph.nodes:
        if node.op == "call_module" and node.target == name:
            node.replace_all_uses_with(node.args[0])
            cut.graph.erase_node(node)
    cut.recompile()
    return cut


def put_back_afterwards(model, name):
    *path, last = name.split(".")
    parent = reduce(getattr, path, model)

    def features(images):
        head = getattr(parent, last)
        parent._modules[last] = nn.Identity()
        try:
            return model(images)
        finally:
            parent._modules[last] = head

    return features


class _Stop(Exception):
    pass


class UpToTheHead(nn.Module):
    """A module around the model; a hook that stays stops forward at the head, but only inside this module's calls."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.running, self.features = model, False, None
        operator.attrgetter(name)(model).register_forward_hook(self.catch)

    def catch(self, head, args, logits):
        if self.running:
            self.features = args[0].detach()
            raise _Stop

    def forward(self, images):
        self.running = True
        try:
            self.model(images)
        except _Stop:
            return self.features
        finally:
            self.running = False


def head_that_passes_on(model, name):
    head = model.get_submodule(name)
    memo = {id(head): nn.Sequential()}  # the copy gets this in the head's place
    return copy.deepcopy(model, memo).requires_grad_(False)


def what_the_model_gives(model, name):
    clone = copy.deepcopy(model)
    return lambda images: clone(images).detach()


def classifier_made_empty(model, name):
    clone = copy.deepcopy(model)
    top, *_ = name.partition(".")
    clone._modules[top] = nn.Sequential()
    return clone


def wrapped_after_fc(model, name):
    clone = copy.deepcopy(model)
    clone.add_module("fc", nn.Sequential())
    return nn.Sequential(clone, nn.Flatten())


def in_place_and_eval(model, name):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model.eval()


def whole_classifier_of_a_model_in_eval_mode(model, name):
    clone = copy.deepcopy(model.eval())
    clone._modules[name.split(".")[0]] = nn.Identity()
    return clone


def fc_in_place(model, name):
    model.fc = nn.Identity()
    return model


def last_layer_in_place(model, name):
    *_, last = (key for key, module in model.named_modules() if isinstance(module, nn.Linear))
    parent, _, attribute = last.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return model


CORRECT = [with_a_pre_hook, by_torchvision, by_cutting_the_graph, put_back_afterwards, UpToTheHead, head_that_passes_on]
REWRITTEN = {
    "output of the head": what_the_model_gives,
    "whole classifier removed": classifier_made_empty,
    "always fc": wrapped_after_fc,
}
COMBINED = [
    ({"head removed in place", "model put into eval mode"}, in_place_and_eval),
    ({"whole classifier removed", "model put into eval mode"}, whole_classifier_of_a_model_in_eval_mode),
    ({"head removed in place", "always fc"}, fc_in_place),
    ({"head removed in place", "last layer by order of definition"}, last_layer_in_place),
]

EQUIVALENT = {
    "… args: caught.append(args[0])) -> … args: caught.append(args[-1]))": "a head is called with one argument",
    "try: ⏎ model(images) ⏎ finally: -> model(images)": "a forward that raises is out of scope",
    "return caught[0] -> return caught[-1]": "the head is called once in a forward",
}
