"""Exercise 6.3 in other styles."""

import copy
import re
from collections import defaultdict
from functools import partial, reduce

from torch import nn

from grader.checks.lora.injection import (
    all_names,
    changed_before_the_error,
    first_names,
    for_every_match,
    one_for_each_name,
    one_target_after_another,
    solution,
)


def by_components(model, targets, make):
    wanted = {target: tuple(target.split(".")) for target in targets}
    paths = {tuple(name.split(".")): module for name, module in model.named_modules(remove_duplicate=False) if name}
    missing = [t for t, parts in wanted.items() if all(path[-len(parts) :] != parts for path in paths)]
    if missing:
        raise ValueError("nothing in the model is called " + ", ".join(missing))
    chosen = {id(module) for path, module in paths.items() for parts in wanted.values() if path[-len(parts) :] == parts}
    new, names = {}, []
    for path, module in paths.items():
        if id(module) not in chosen:
            continue
        if id(module) not in new:
            new[id(module)] = make(module)
            names.append(".".join(path))
        holder = reduce(getattr, path[:-1], model)
        holder.add_module(path[-1], new[id(module)])
    return names


def down_the_tree(model, targets, make):
    names, hits, unmatched = defaultdict(list), {}, set(targets)

    def look(parent, prefix):
        for key, child in parent._modules.items():
            name = prefix + key
            names[child].append(name)
            for target in targets:
                if name == target or name.endswith("." + target):
                    hits[child] = None
                    unmatched.discard(target)
            look(child, name + ".")

    def put(parent):
        for key, child in list(parent._modules.items()):
            if child in hits:
                parent._modules[key] = hits[child]
            else:
                put(child)

    look(model, "")
    if unmatched:
        raise ValueError(f"not there: {unmatched}")
    hits = {child: make(child) for child in names if child in hits}
    put(model)
    return [names[child][0] for child in hits]


def by_pattern(model, targets, make):
    patterns = [(target, re.compile(r"(?:.*\.)?" + re.escape(target))) for target in targets]
    every = list(model.named_modules(remove_duplicate=False))
    for target, pattern in patterns:
        if not any(map(pattern.fullmatch, (name for name, _ in every))):
            raise ValueError(target)
    layers = dict.fromkeys(module for name, module in every if any(pattern.fullmatch(name) for _, pattern in patterns))
    names = tuple(name for name, module in model.named_modules() if module in layers)
    for layer in layers:
        new = make(layer)
        for name, module in every:
            if module is layer:
                model.set_submodule(name, new)
    return names


def taken_back(model, targets, make):
    """Goes from target to target, and takes everything back if one of them finds nothing."""
    every = list(model.named_modules(remove_duplicate=False))[1:]
    new = {}
    for target in targets:
        layers = [layer for name, layer in every if f".{name}".endswith(f".{target}")]
        if not layers:
            for name, layer in every:
                model.set_submodule(name, layer)
            raise ValueError(f"unknown: {target}")
        for layer in layers:
            new[layer] = new[layer] if layer in new else make(layer)
            for name in [name for name, module in every if module is layer]:
                model.set_submodule(name, new[layer])
    first = {layer: name for name, layer in reversed(every)}
    return [name for name, layer in every if layer in new and name == first[layer]]


def over_parents(model, targets, make, before=".", must_be_there=True, everywhere=True):
    """Right as it is: a place is a parent and a key, and a target has a dot before it."""
    places = [
        (f".{path}.{key}", parent, key)
        for path, parent in model.named_modules(remove_duplicate=False)
        for key in parent._modules
    ]
    ends = [before + target for target in targets]
    for end in ends:
        if must_be_there and not any(name.endswith(end) for name, _, _ in places):
            raise ValueError(end)
    hits = [(parent, key) for name, parent, key in places if name.endswith(tuple(ends))]
    layers = {parent._modules[key] for parent, key in hits}
    names = [name for name, module in model.named_modules() if module in layers]
    if everywhere:
        new = {layer: make(layer) for layer in layers}
        for _, parent, key in places:
            parent._modules[key] = new.get(parent._modules[key], parent._modules[key])
    else:
        for parent, key in hits:
            parent._modules[key] = make(parent._modules[key])
    return names


def the_usual_recursion(model, targets, make):
    names = []

    def walk(parent, path):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and any(target in path + key for target in targets):
                setattr(parent, key, make(child))
                names.append(path + key)
            else:
                walk(child, path + key + ".")

    walk(model, "")
    return names


def _in_any_case(name, target):
    return f".{name}".lower().endswith(f".{target}".lower())


def _any_component(name, target):
    return set(target.split(".")) <= set(name.split("."))


def _leaves(model):
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if not module._modules]


def _with_a_weight(model):
    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, "weight")]


def in_eval_mode(model, targets, make):
    return solution(model.eval(), targets, make)


def frozen_besides(model, targets, make):
    names = solution(model, targets, make)
    model.requires_grad_(False)
    return names


def made_from_copies(model, targets, make):
    return solution(model, targets, lambda layer: make(copy.deepcopy(layer)))


def taken_out_first(model, targets, make):
    """What is put in stands last in the module that holds it."""

    def put(model, places, hits, make):
        new = {layer: make(layer) for layer in dict.fromkeys(hits.values())}
        for name, layer in places:
            if layer in new:
                parent, _, last = name.rpartition(".")
                del model.get_submodule(parent)._modules[last]
                model.get_submodule(parent).add_module(last, new[layer])

    return solution(model, targets, make, put=put)


def found_in_what_was_made(model, targets, make):
    """Right but for a second search, in what make has made."""
    new = []
    names = solution(model, targets, lambda layer: new.append(make(layer)) or new[-1])
    for layer in new:
        for key, child in layer._modules.items():
            if key in targets:
                layer._modules[key] = make(child)
    return names


def listed_once(model, targets, make):
    return list(dict.fromkeys(one_target_after_another(model, targets, make)))


def _with_the_error(kind, message):
    def broken(model, targets, make):
        try:
            return solution(model, targets, make)
        except ValueError as error:
            raise kind(message or str(error)) from None

    return broken


def told_afterwards(model, targets, make):
    names = solution(model, targets, make, refuse=lambda missing: False)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules(remove_duplicate=False)):
            raise ValueError(target)
    return names


def _second_name(model, hits, targets):
    last = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    return [last[module] for module in model.modules() if module in hits.values()]


CORRECT = [by_components, down_the_tree, by_pattern, taken_back, over_parents]
REWRITTEN = {
    "end of the letters": partial(over_parents, before=""),
    "a new layer for every name": partial(over_parents, everywhere=False),
    "nothing found, nothing said": partial(over_parents, must_be_there=False),
}
BROKEN = {
    1: [
        *(partial(solution, ends=ends) for ends in (_in_any_case, _any_component, str.endswith)),
        partial(solution, ends=lambda name, target: target in name),
        partial(solution, ends=lambda name, target: f".{target}." in f".{name}."),
    ],
    2: [
        *(partial(solution, search=search) for search in (_leaves, _with_a_weight)),
        partial(solution, kinds=(nn.Linear, nn.Conv2d, nn.Embedding)),
        *(in_eval_mode, frozen_besides, made_from_copies, taken_out_first),
    ],
    3: [listed_once, found_in_what_was_made],
    4: [
        partial(solution, listed=for_every_match),
        partial(solution, listed=lambda *parts: sorted(first_names(*parts))),
        partial(solution, listed=lambda *parts: first_names(*parts)[::-1]),
        partial(solution, listed=lambda model, hits, targets: targets),
        partial(solution, listed=lambda model, hits, targets: None),
    ],
    5: [
        *(partial(solution, refuse=refuse) for refuse in (all, lambda missing: False)),
        *(_with_the_error(KeyError, ""), _with_the_error(ValueError, "a target names nothing")),
        *(told_afterwards, changed_before_the_error),
    ],
    6: [
        partial(solution, search=lambda model: list(model.named_modules())[1:]),
        *(partial(solution, put=one_for_each_name), partial(over_parents, everywhere=False)),
        *(partial(solution, listed=listed) for listed in (all_names, _second_name)),
    ],
}
COMBINED = [
    (
        {"part of a name", "only nn.Linear", "a new layer for every name"}
        | {"nothing found, nothing said", "listed under all its names"},
        the_usual_recursion,
    ),
    ({"only nn.Linear", "listed under all its names"}, partial(solution, kinds=nn.Linear, listed=all_names)),
]

EQUIVALENT = {
    "… model.named_modules(remove_duplicate=False) if name} -> "
    "… model.named_modules(remove_duplicate=False)}": "the model itself has no name that a target could end in",
}
