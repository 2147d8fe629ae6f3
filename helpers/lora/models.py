"""LoRA in a whole model: layers replaced by their names, adapters switched, merged and taken out again."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from helpers import expect, finetune
from helpers.finetune import parts
from helpers.lora.layer import Layer, check_name, kind_of, listed, must_be_merged


def replace(model: nn.Module, targets: str | Sequence[str], make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put `make(layer)` in the place of every layer that a target names, in place.

    A layer that the model holds under several names is one layer: it is replaced once, at all its places, if a target
    names one of them. What is inside a LoRA layer is not looked at.

    Args:
        model: any model.
        targets: names, or ends of names, in whole components: "query" is the end of "layer.0.query", not of "subquery".
        make: called once for each layer.

    Returns:
        The names of the layers that were replaced, each the first of its names, in the order of `model.named_modules()`.

    Raises:
        ValueError: a target that names nothing, or two of which one is inside the other; the model is as it was.
    """
    chosen = _find(model, targets)
    _put(model, {layer: expect.module("what make gives", make(layer)) for layer in chosen.values()})
    return list(chosen)


def inject(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int = 8,
    alpha: float = 16,
    *,
    adapter: str = "default",
    train: str | Sequence[str] = (),
    **options,
) -> list[str]:
    """Put LoRA layers in the place of every layer that a target names, in place, and freeze everything else.

    A LoRA layer that is there already gets one more adapter. In the whole model, `adapter` is then the only active one.

    Args:
        targets: as for `replace`.
        rank, alpha, adapter, options: as for `Layer`.
        train: names of parts that train whole, such as a new head.

    Returns:
        The names of the layers, as `replace` gives them: worth an assertion.

    Raises:
        ValueError: as for `replace` and `Layer`, a layer that has this adapter or is merged, or a part in `train` that
            is not there or holds what is adapted. The model is as it was.
    """
    chosen = _find(model, targets)
    must_be_merged(False, layers(model))
    for name, layer in chosen.items():
        try:
            _check_adapter(layer, adapter, rank, alpha, options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    train = [train] if isinstance(train, str) else list(train)
    _check_train(model, train, layers(model) | chosen)
    new = {}
    for layer in chosen.values():
        if isinstance(layer, Layer):
            layer.add(adapter, rank, alpha, **options)
        else:
            new[layer] = kind_of(layer)(layer, rank, alpha, adapter=adapter, **options)
    _put(model, new)
    finetune.train_only(model, train)
    activate(model, adapter)
    return list(chosen)


def layers(model: nn.Module) -> dict[str, Layer]:
    """The LoRA layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters count and train, in place, in the layers that have them; without any, the bases alone.

    Raises:
        ValueError: no layer has an adapter of that name, a layer is merged, or DoRA is to be active beside another.
    """
    adapted = _adapted(model)
    there = list(dict.fromkeys(name for layer in adapted.values() for name in layer.adapters))
    for name in names:
        if name not in there:
            raise ValueError(f"not an adapter of {type(model).__name__}: {name!r}. Choose from {there}.")
    must_be_merged(False, adapted)
    chosen = {layer: [name for name in names if name in layer.adapters] for layer in adapted.values()}
    for layer, theirs in chosen.items():
        layer.check_active(theirs)
    for layer, theirs in chosen.items():
        layer.activate(*theirs)


def remove(model: nn.Module) -> list[str]:
    """Put the base layers back, in place: the same objects, with W, or with W' if merged. They train if they did before.

    What `inject` froze besides stays frozen; `helpers.finetune.unfreeze` is for that.

    Returns:
        The names of the layers.
    """
    adapted = _adapted(model)
    if "" in adapted:
        raise ValueError("the model must hold LoRA layers, got one that is itself a LoRA layer. Take its .base.")
    _must_be_untied(model, {name: layer for name, layer in adapted.items() if layer.merged})
    _put(model, {layer: layer.base for layer in adapted.values()})
    for layer in adapted.values():
        finetune.unfreeze(layer.base, layer.trained)
    return list(adapted)


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer, in place.

    Raises:
        ValueError: a layer is merged already, or its weight is another module's too; the model is as it was.
    """
    adapted = _adapted(model)
    must_be_merged(False, adapted)
    _must_be_untied(model, adapted)
    for layer in adapted.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Unmerge every LoRA layer, in place: every weight has the bits it had.

    Raises:
        ValueError: a layer is not merged; the model is as it was.
    """
    adapted = _adapted(model)
    must_be_merged(True, adapted)
    for layer in adapted.values():
        layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merged inside the `with`, unmerged afterwards, whatever happens inside."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


def untie(model: nn.Module, name: str) -> None:
    """Give the LoRA layer `name` a weight of its own, in place, where another module has the same Parameter.

    Raises:
        ValueError: not a LoRA layer, one that is merged, or one whose weight is its own already.
    """
    adapted = _adapted(model)
    if name not in adapted:
        raise ValueError(f"not a LoRA layer of {type(model).__name__}: {name!r}. Choose from {listed(adapted)}.")
    must_be_merged(False, {name: adapted[name]})
    if not _other_holders(model, adapted[name]):
        raise ValueError(f"{name} must share its weight with another module, got a weight of its own. It needs no untying.")
    weight = adapted[name].base.weight
    adapted[name].base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)


def _find(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules that targets name, by the first of their names, in the model's order."""
    places = list(expect.module("model", model).named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in places if isinstance(module, Layer))
    places = [(name, module) for name, module in places if name and not name.startswith(inside)]
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not any(_ends(name, target) for name, _ in places):
            raise ValueError(f"not a module of {type(model).__name__}: {target!r}. Choose from {_close(target, places)}.")
    if not targets:
        raise ValueError(f"targets must name a module of {type(model).__name__}, got none. Choose from {_close('', places)}.")
    named = {module for name, module in places if any(_ends(name, target) for target in targets)}
    first = {module: name for name, module in reversed(places) if module in named}
    chosen = {name: module for name, module in places if first.get(module) == name}
    for outer in chosen:
        for inner in chosen:
            if inner.startswith(f"{outer}."):
                raise ValueError(f"targets must not lie inside each other, got {outer!r} and {inner!r}. Name one of them.")
    return chosen


def _put(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put `new[module]` at every place of each module."""
    for parent in [module for module in model.modules() if not isinstance(module, Layer)]:
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _close(target: str, places: list[tuple[str, nn.Module]]) -> list[str]:
    """Ends of names that are spelt like `target`; if none is, the last components of modules with parameters of their own."""
    length = str(target).count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-length:]) for name, _ in places)
    last = dict.fromkeys(name.rpartition(".")[2] for name, module in places if module._parameters or isinstance(module, Layer))
    return difflib.get_close_matches(str(target), ends, n=5) or list(last)[:10]


def _check_adapter(layer: nn.Module, adapter: str, rank: int, alpha: float, options: dict) -> None:
    """Raise what adding the adapter would raise: one is made on the meta device, where tensors have shapes alone."""
    check_name(adapter)
    if isinstance(layer, Layer):
        layer.check_new(adapter)
        layer = layer.base
    kind = kind_of(layer)
    kind.start(kind.matrix(layer.weight.detach().to("meta")), rank, alpha, **options)


def _check_train(model: nn.Module, train: list[str], adapted: dict[str, nn.Module]) -> None:
    parts.chosen(model, train)  # raises if a name is wrong
    named = model.named_parameters(remove_duplicate=False)
    whole = {id(p) for name, p in named if any(f"{name}.".startswith(f"{part}.") for part in train)}
    for name, layer in adapted.items():
        base = layer.base if isinstance(layer, Layer) else layer
        if any(id(parameter) in whole for parameter in base.parameters()):
            raise ValueError(f"train must not hold what is adapted, got {train}, and {name} adapted. Choose one of the two.")


def _adapted(model: nn.Module) -> dict[str, Layer]:
    adapted = layers(expect.module("model", model))
    if not adapted:
        raise ValueError(f"{type(model).__name__} must have LoRA layers, got none. Call inject first.")
    return adapted


def _must_be_untied(model: nn.Module, layers: dict[str, Layer]) -> None:
    """Two modules with one weight would have two weights if one were merged, and so would a checkpoint."""
    for name, layer in layers.items():
        holders = _other_holders(model, layer)
        if holders:
            way_out = f"Call untie(model, {name!r}) first."
            raise ValueError(f"{name} must have a weight of its own to be merged, got that of {listed(holders)}. {way_out}")


def _other_holders(model: nn.Module, layer: Layer) -> list[str]:
    """The names of the modules that hold the layer's own weight too."""
    weight = layer.original if layer.merged else layer.base.weight
    modules = [(name, module) for name, module in model.named_modules() if module is not layer and module is not layer.base]
    return [name for name, module in modules if any(parameter is weight for parameter in module._parameters.values())]
