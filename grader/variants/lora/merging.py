"""Exercise 6.4 in other styles."""

from collections import Counter
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from grader.checks.lora.lora_networks import Solution, none_equal, none_merged, none_tied, some_layer
from grader.checks.lora.merging import (
    ANewParameterAfterwards,
    OldWeightNotCopied,
    OnlyErrorsCaught,
    RefusalThatUnmerges,
    added_in_float32,
    no_gradients_in_the_block,
)
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


def _changed(name, **attributes):
    """The right solution with other attributes."""
    return type(name, (Solution,), attributes)


class HalfOfIt(Solution):
    def update(self, layer):
        return layer.delta() / 2


class TheFirstLayers(Solution):
    """Leaves out the last, where there are several."""

    def merge(self, layer):
        layer.old = layer.base.weight.data
        if layer is self.layers[0] or layer is not self.layers[-1]:
            super().merge(layer)


class EveryPlace(Solution):
    """Merges a layer once for each of its places."""

    def __init__(self, model):
        super().__init__(model)
        modules = model.named_modules(remove_duplicate=False)
        self.layers = [module for _, module in modules if isinstance(module, lora.Linear)]


class WhatTrains(Solution):
    def __init__(self, model):
        super().__init__(model)
        self.layers = [layer for layer in self.layers if layer.A.requires_grad] or self.layers


class InsideOtherModules(Solution):
    """Looks into the model, and so never at the model itself."""

    def __init__(self, model):
        super().__init__(model)
        self.layers = [layer for layer in self.layers if layer is not model]


class FlagsOfTheModel(Solution):
    def merge(self, layer):
        super().merge(layer)
        layer.merged = self.model.merged = layer is self.layers[0]


class NothingInTheFlag(Solution):
    flag_afterwards = None


class TheSumRounded(Solution):
    """Keeps the delta that was really added, and takes that away again."""

    def merge(self, layer):
        before = layer.base.weight.detach().clone()
        super().merge(layer)
        layer.old = layer.base.weight.detach() - (layer.base.weight.detach() - before)


class NextToOldBits(Solution):
    def restore(self, layer):
        whole_numbers = {2: torch.int16, 4: torch.int32}[layer.old.element_size()]
        layer.base.weight.data = (layer.old.view(whole_numbers) + 1).view(layer.old.dtype)


class AnotherErrorComesOut(Solution):
    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if kind is not None and issubclass(kind, Exception):
            raise RuntimeError("the block failed") from error


class SwallowsErrors(Solution):
    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        return kind is not None and issubclass(kind, Exception)


class NotAfterErrors(Solution):
    def undone_after(self, kind):
        return kind is None or not issubclass(kind, Exception)


def none_of(picked):
    """A check that looks at some of the flags, or raises something else."""

    def check(model, layers):
        if picked([layer.merged for layer in layers]):
            raise ValueError("merged already")

    return check


class PassesThrough(Solution):
    """A block inside a block does nothing, and nobody is told."""

    def __enter__(self):
        if any(layer.merged for layer in self.layers):
            self.layers = []
            return
        super().__enter__()


class ANewParameterInside(Solution):
    """Frozen, but another object, and it stays."""

    def restore(self, layer):
        layer.base.weight = nn.Parameter(layer.old, requires_grad=False)


class Trainable(Solution):
    def restore(self, layer):
        super().restore(layer)
        layer.base.weight.requires_grad_(True)


class InterruptSwallowed(Solution):
    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        return kind is not None and not issubclass(kind, Exception)


class EvalMode(Solution):
    def __enter__(self):
        super().__enter__()
        self.model.eval()


class AdaptersFrozen(Solution):
    def merge(self, layer):
        super().merge(layer)
        layer.requires_grad_(False)


class AdaptersSetToZero(Solution):
    def merge(self, layer):
        super().merge(layer)
        layer.kept = layer.B.detach().clone()
        layer.B.data.zero_()

    def restore(self, layer):
        super().restore(layer)
        layer.B.data.copy_(layer.kept)


class GradientsDropped(Solution):
    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        self.model.zero_grad()


@contextmanager
def always_recorded(model):
    with torch.enable_grad(), Solution(model):
        yield


def an_assertion(model, layers):
    assert layers, "no LoRA layer"


def none_of_embeddings(model, layers):
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if any(layer.base.weight is weight for layer in layers for weight in weights):
        raise ValueError("tied to the embedding")


def none_of_each_other(model, layers):
    if len({id(layer.base.weight) for layer in layers}) < len(layers):
        raise ValueError("two layers have one weight")


def nothing_tied(model, layers):
    if len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        raise ValueError("something is tied")


CORRECT = [another_parameter_inside, AManager, a_stack_of_callbacks, undone_by_itself_if_refused]
REWRITTEN = {
    "only errors caught": interrupts_not_caught,
    "a new Parameter afterwards": unmerged_into_new_parameters,
}
BROKEN = {
    1: [
        HalfOfIt,
        TheFirstLayers,
        InsideOtherModules,
        EveryPlace,
        WhatTrains,
        FlagsOfTheModel,
        _changed("FlagNeverSet", flag_inside=False),
    ],
    2: [
        *(NothingInTheFlag, TheSumRounded, NextToOldBits, OldWeightNotCopied),
        _changed("Subtracted", restore=lambda self, layer: layer.base.weight.data.sub_(layer.delta().detach())),
        _changed("FlagLeftSet", flag_afterwards=True),
        _changed("NeverUndone", undone_after=lambda self, kind: False),
    ],
    3: [AnotherErrorComesOut, SwallowsErrors, NotAfterErrors],
    4: [
        *(
            _changed("FlagsOfSome", checks=(some_layer, none_of(picked), none_tied))
            for picked in (all, lambda flags: flags[0], lambda flags: flags[-1], lambda flags: False)
        ),
        *(PassesThrough, RefusalThatUnmerges),
    ],
    5: [ANewParameterAfterwards, ANewParameterInside, Trainable, _changed("InFloat32", add=added_in_float32)],
    6: [OnlyErrorsCaught, InterruptSwallowed, interrupts_not_caught],
    7: [EvalMode, GradientsDropped, AdaptersFrozen, AdaptersSetToZero, no_gradients_in_the_block, always_recorded],
    8: [
        _changed("AnAssertion", checks=(an_assertion, none_merged, none_tied)),
        _changed("Silent", checks=(none_merged, none_tied)),
    ],
    9: [
        _changed("Ties", checks=(some_layer, none_merged, *checks))
        for checks in ((), (none_of_embeddings,), (none_of_each_other,), (nothing_tied,), (none_equal, none_tied))
    ],
}
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
