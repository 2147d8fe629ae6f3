"""Exercise 6.4 in other styles."""

from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from grader.checks.lora.merging import Solution
from helpers import lora


@contextmanager
def another_parameter_inside(model):
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    if not layers or any(layer.merged or owners[id(layer.base.weight)] > 1 for layer in layers):
        raise ValueError("cannot be merged")
    originals = {layer: layer.base.weight for layer in layers}
    try:
        for layer, weight in originals.items():
            layer.base.weight = nn.Parameter((weight + layer.delta()).detach().type_as(weight), requires_grad=False)
            layer.merged = True
        yield model
    finally:
        for layer, weight in originals.items():
            layer.base.weight = weight
            layer.merged = False


class AManager:
    """A class with the two methods, which copies values into the Parameter that is there."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        every_name = dict(self.model.named_parameters(remove_duplicate=False))
        first_name = dict(self.model.named_parameters())
        tied = {id(parameter) for name, parameter in every_name.items() if name not in first_name}
        layers = list(filter(lambda module: hasattr(module, "merged"), self.model.modules()))
        if len(layers) == 0:
            raise ValueError("no LoRA layers here")
        for layer in layers:
            if layer.merged:
                raise ValueError("merged already, and merged twice the update counts twice")
            if id(layer.base.weight) in tied:
                raise ValueError("tied")
        self.old_weights = []
        with torch.no_grad():
            for layer in layers:
                self.old_weights.append((layer, layer.base.weight.clone()))
                layer.base.weight.add_(layer.delta())
                layer.merged = True

    def __exit__(self, kind, error, trace):
        while self.old_weights:
            layer, weight = self.old_weights.pop()
            with torch.no_grad():
                layer.base.weight.copy_(weight)
            layer.merged = False


@contextmanager
@torch.no_grad()
def a_stack_of_callbacks(model):
    """Tied weights have one address; what undoes the merge of a layer is written down before it is merged."""
    layers = [module for module in model.modules() if type(module) is lora.Linear]
    addresses = [p.data_ptr() for module in model.modules() for p in module.parameters(recurse=False)]
    if not layers or sum(layer.merged or addresses.count(layer.base.weight.data_ptr()) != 1 for layer in layers):
        raise ValueError("nothing to merge, merged already, or tied")

    def undo(layer, weight):
        layer.base.weight.set_(weight)
        layer.merged = False

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(undo, layer, layer.base.weight.detach().clone())
            layer.base.weight += layer.delta()
            layer.merged = True
        yield


@contextmanager
def undone_by_itself_if_refused(model):
    """Merges as it goes; if a layer then turns out to be unfit, what was done is undone."""
    originals = {}
    try:
        for layer in model.modules():
            if not isinstance(layer, lora.Linear):
                continue
            if layer.merged:
                raise ValueError("one is merged")
            for module in model.modules():
                if module is not layer.base and getattr(module, "weight", None) is layer.base.weight:
                    raise ValueError("one is tied")
            originals[layer] = layer.base.weight.data
            layer.base.weight.data = torch.add(originals[layer], layer.delta().detach()).to(originals[layer])
            layer.merged = True
        if len(originals) < 1:
            raise ValueError("none")
        yield
    finally:
        for layer, weight in originals.items():
            layer.base.weight.data, layer.merged = weight, False


@contextmanager
def interrupts_not_caught(model):
    lora.merge(model)
    try:
        yield
    except Exception:
        lora.unmerge(model)
        raise
    lora.unmerge(model)


@contextmanager
def unmerged_into_new_parameters(model):
    lora.merge(model)
    try:
        yield
    finally:
        lora.unmerge(model)
        for layer in lora.layers(model).values():
            layer.base.weight = nn.Parameter(layer.base.weight.detach().clone())


@contextmanager
def the_usual_pair(model):
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    for layer in layers:
        layer.base.weight.data += layer.delta().data
        layer.merged = True
    yield
    for layer in layers:
        layer.base.weight.data -= layer.delta().data
        layer.merged = False


class ScaledAndLeftAfterAnError(Solution):
    def update(self, layer):
        return layer.scaling * layer.delta()

    def undone_after(self, kind):
        return kind is None


CORRECT = [another_parameter_inside, AManager, a_stack_of_callbacks, undone_by_itself_if_refused]
REWRITTEN = {
    "only errors caught": interrupts_not_caught,
    "a new Parameter afterwards": unmerged_into_new_parameters,
}
BROKEN = {}
COMBINED = [
    (
        {"delta subtracted again", "not undone after an error", "merged twice"}
        | {"tied weight merged", "nothing merged, nothing said"},
        the_usual_pair,
    ),
    ({"scaled again", "not undone after an error"}, ScaledAndLeftAfterAnError),
]

EQUIVALENT = {
    "raise ValueError('the model has no LoRA layer') -> raise ValueError()": "no message is asked for",
    "raise ValueError('a layer is merged already: its update would count twice') -> "
    "raise ValueError()": "no message is asked for",
    "raise ValueError('a base weight belongs to another module too: merging would change that one') -> "
    "raise ValueError()": "no message is asked for",
    "weights = [layer.base.weight.detach().clone() for layer in layers] -> "
    "weights = [layer.base.weight.clone() for layer in layers]": "a frozen weight has no graph",
    "with torch.no_grad(): -> (2)": "writing into a frozen weight records nothing",
}
