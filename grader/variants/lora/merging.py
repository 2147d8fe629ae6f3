"""Exercise 6.4 in other styles."""

from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from helpers import lora


def _lora_layers(model):
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


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
        self.kept = []
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        once = [name for name, _ in self.model.named_parameters()]
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        tied = {id(weights[name]) for name in names if name not in once}
        found = list(filter(lambda module: hasattr(module, "merged"), self.model.modules()))
        if len(found) == 0:
            raise ValueError("no LoRA layers here")
        for layer in found:
            if layer.merged:
                raise ValueError("merged already, and merged twice the update counts twice")
            if id(layer.base.weight) in tied:
                raise ValueError("tied")
        with torch.no_grad():
            for layer in found:
                self.kept.append((layer, layer.base.weight.clone()))
                layer.base.weight.add_(layer.delta())
                layer.merged = True

    def __exit__(self, kind, error, trace):
        while self.kept:
            layer, weight = self.kept.pop()
            with torch.no_grad():
                layer.base.weight.copy_(weight)
            layer.merged = False


@contextmanager
@torch.no_grad()
def a_stack_of_callbacks(model):
    pointers = [p.data_ptr() for p in model.parameters() if p is not None]
    uses = [p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False)]
    assert set(pointers) <= set(uses)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and "lora" in type(module).__module__
    }
    if found == {}:
        raise ValueError("nothing to merge")
    if (
        sum(layer.merged for layer in found.values())
        or max(map(uses.count, (layer.base.weight.data_ptr() for layer in found.values()))) != 1
    ):
        raise ValueError(f"merged already or tied: look at {list(found)}")

    def back(layer, bits):
        layer.base.weight.set_(bits)
        layer.merged = False

    with ExitStack() as stack:
        for layer in found.values():
            stack.callback(back, layer, layer.base.weight.detach().clone())
            layer.base.weight += layer.delta()
            layer.merged = True
        yield


def the_helpers_own_methods(model):
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("there are no LoRA layers in this model")
    for layer in layers:
        if layer.merged:
            raise ValueError("twice")
        for module in model.modules():
            if module is not layer.base and any(p is layer.base.weight for _, p in module.named_parameters(recurse=False)):
                raise ValueError("tied to " + type(module).__name__)

    @contextmanager
    def block():
        for layer in layers:
            layer.merge()
        try:
            yield layers
        finally:
            for layer in reversed(layers):
                layer.unmerge()

    return block()


@contextmanager
def undone_by_itself_if_refused(model):
    """Merges as it goes; if a layer then turns out to be unfit, what was done is undone."""
    done = {}
    try:
        for module in model.modules():
            if not isinstance(module, lora.Linear):
                continue
            if module.merged:
                raise ValueError("one is merged")
            for other in model.modules():
                if other is not module.base and getattr(other, "weight", None) is module.base.weight:
                    raise ValueError("one is tied")
            done[module] = module.base.weight.data
            module.base.weight.data = torch.add(done[module], module.delta().detach()).to(done[module])
            module.merged = True
        if len(done) < 1:
            raise ValueError("none")
        yield
    finally:
        for module, data in done.items():
            module.base.weight.data, module.merged = data, False


def _fit(model):
    """The LoRA layers of a model that can be merged."""
    layers = _lora_layers(model)
    if not layers or any(layer.merged for layer in layers):
        raise ValueError("none, or merged already")
    holders = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    if any(holders.count(id(layer.base.weight)) > 1 for layer in layers):
        raise ValueError("tied")
    return layers


class OnlyIfItWentWell:
    def __init__(self, model):
        self.layers = _fit(model)

    def __enter__(self):
        self.old = [layer.base.weight.data.clone() for layer in self.layers]
        for layer in self.layers:
            layer.base.weight.data.add_(layer.delta().data)
            layer.merged = True

    def __exit__(self, kind, error, trace):
        if error is None:
            for layer, old in zip(self.layers, self.old, strict=True):
                layer.base.weight.data.copy_(old)
                layer.merged = False


class ErrorsButNotInterrupts:
    def __init__(self, model):
        self.layers = _fit(model)

    def __enter__(self):
        self.old = [layer.base.weight.data.clone() for layer in self.layers]
        for layer in self.layers:
            layer.base.weight.data.add_(layer.delta().data)
            layer.merged = True

    def __exit__(self, kind, error, trace):
        if kind is None or issubclass(kind, Exception):
            for layer, old in zip(self.layers, self.old, strict=True):
                layer.base.weight.data.copy_(old)
                layer.merged = False


@contextmanager
def new_ones_both_ways(model):
    old = {layer: layer.base.weight.detach() for layer in _fit(model)}
    for layer, weight in old.items():
        layer.base.weight = nn.Parameter((weight + layer.delta().detach()).to(weight.dtype))
        layer.merged = True
    try:
        yield
    finally:
        for layer, weight in old.items():
            setattr(layer.base, "weight", nn.Parameter(weight.clone()))  # noqa: B010
            layer.merged = False


@contextmanager
def in_place_and_in_the_graph(model):
    old = {layer: layer.base.weight.detach().clone() for layer in _fit(model)}
    for layer in old:
        torch.Tensor.add_(layer.base.weight, layer.delta())
        layer.merged = True
    try:
        yield
    finally:
        for layer, weight in old.items():
            layer.base.weight.copy_(weight)
            layer.merged = False


@contextmanager
def the_usual_pair(model):
    layers = _lora_layers(model)
    for layer in layers:
        layer.base.weight.data += layer.delta().data
        layer.merged = True
    yield
    for layer in layers:
        layer.base.weight.data -= layer.delta().data
        layer.merged = False


@contextmanager
def scaled_and_left_after_an_error(model):
    layers = _fit(model)
    old = [layer.base.weight.data.clone() for layer in layers]
    for layer in layers:
        layer.base.weight.data += layer.scaling * layer.delta().data
        layer.merged = True
    yield
    for layer, weight in zip(layers, old, strict=True):
        layer.base.weight.data.copy_(weight)
        layer.merged = False


@contextmanager
def no_grad_around_a_subtraction(model):
    layers = _fit(model)
    with torch.no_grad():
        for layer in layers:
            layer.base.weight += layer.delta()
            layer.merged = True
        try:
            yield
        finally:
            for layer in layers:
                layer.base.weight -= layer.delta()
                layer.merged = False


CORRECT = [another_parameter_inside, AManager, a_stack_of_callbacks, the_helpers_own_methods, undone_by_itself_if_refused]
REWRITTEN = {
    "not undone after an error": OnlyIfItWentWell,
    "only errors caught": ErrorsButNotInterrupts,
    "a new Parameter afterwards": new_ones_both_ways,
    "the addition recorded": in_place_and_in_the_graph,
}
COMBINED = [
    (
        {"delta subtracted again", "not undone after an error", "merged twice"}
        | {"tied weight merged", "nothing merged, nothing said"},
        the_usual_pair,
    ),
    ({"scaled again", "not undone after an error"}, scaled_and_left_after_an_error),
    ({"delta subtracted again", "no gradients in the block"}, no_grad_around_a_subtraction),
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
