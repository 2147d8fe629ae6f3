"""Exercise 4.1 in other styles."""

import copy
import re


def by_identity(model, names):
    wanted = []
    for name in names:
        try:
            wanted += model.get_submodule(name).parameters()
        except AttributeError:
            try:
                wanted.append(model.get_parameter(name))
            except AttributeError as error:
                raise ValueError(f"no {name!r} in the model") from error
    ids = list(map(id, wanted))
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = id(parameter) in ids
        if parameter.requires_grad:
            trainable.append(name)
    return trainable


def down_the_tree(model, names):
    known, chosen = set(), []

    def walk(module, path, inside):
        for name, parameter in module._parameters.items():
            if parameter is not None and (inside or path + name in names):
                known.add(path + name)
                chosen.append(parameter)
        for name, child in module._modules.items():
            here = path + name
            if here in names:
                known.add(here)
            walk(child, here + ".", inside or here in names)

    walk(model, "", False)
    if not known.issuperset(names):
        raise ValueError("there is no such part")
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad = True
    return list(filter(lambda name: model.get_parameter(name).requires_grad, (name for name, _ in model.named_parameters())))


class PutBackIfNotFound:
    """Changes first, and takes everything back when a name turns out to be missing."""

    def __call__(self, model, names):
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        try:
            for name in names:
                thing = model
                for step in name.split("."):
                    thing = getattr(thing, step)
                thing.requires_grad_(True)
        except AttributeError:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
            raise ValueError(f"unknown: {name}") from None
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}.keys()


def by_every_name_it_has(model, names):
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        aliases.setdefault(parameter, set()).update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    if not set(names) <= set().union(*aliases.values()):
        raise ValueError("every name must be that of a module or parameter")
    for parameter, known_as in aliases.items():
        parameter.requires_grad = not known_as.isdisjoint(names)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def found_anywhere(model, names):
    by_identity(model, names)  # raises where a name is unknown
    anywhere = re.compile("|".join(map(re.escape, names)))
    on = {id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False) if anywhere.search(key)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in on)
    return [name for name, parameter in model.named_parameters() if id(parameter) in on]


def on_a_copy(model, names):
    return by_identity(copy.deepcopy(model), names)


def the_usual_loop(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(names))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def unfreezing_without_a_check(model, names):
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(name == part or name.startswith(f"{part}.") for part in names):
            parameter.requires_grad = True
    return names


CORRECT = [by_identity, down_the_tree, PutBackIfNotFound(), by_every_name_it_has]
REWRITTEN = {
    "part of a name": found_anywhere,
    "no flag set": on_a_copy,
}
BROKEN = {}
COMBINED = [
    ({"beginning of a name", "shared weight by its first name", "unknown name ignored"}, the_usual_loop),
    ({"only unfreezing", "unknown name ignored"}, unfreezing_without_a_check),
]

EQUIVALENT = {
    "raise ValueError(f'not in the model: {unknown}') -> raise ValueError()": "no message is asked for",
}
