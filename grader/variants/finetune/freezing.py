"""Exercise 4.1 in other styles."""

import re
from contextlib import suppress
from itertools import chain


def looked_up_then_switched(model, names):
    things = {**dict(model.named_modules()), **dict(model.named_parameters(remove_duplicate=False))}
    missing = set(names) - things.keys()
    if missing:
        raise ValueError(f"the model has no {missing}")
    model.requires_grad_(False)
    for name in names:
        things[name].requires_grad_()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


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


def by_pattern(model, names):
    patterns = [re.compile(re.escape(name) + r"(\..*)?") for name in names]
    every = list(model.named_parameters(remove_duplicate=False))
    for pattern, name in zip(patterns, names, strict=True):
        if not any(pattern.fullmatch(path) for path, _ in every):
            raise ValueError(name)
    hits = {parameter for path, parameter in every if any(pattern.fullmatch(path) for pattern in patterns)}
    for _, parameter in every:
        parameter.requires_grad_(parameter in hits)
    return tuple(path for path, parameter in model.named_parameters() if parameter in hits)


def down_the_tree(model, names):
    found, chosen = set(), []

    def walk(module, path, inside):
        for name, parameter in module._parameters.items():
            if parameter is not None and (inside or path + name in names):
                found.add(path + name)
                chosen.append(parameter)
        for name, child in module._modules.items():
            here = path + name
            if here in names:
                found.add(here)
            walk(child, here + ".", inside or here in names)

    walk(model, "", False)
    if not found.issuperset(names):
        raise ValueError("there is no such part")
    for parameter in chain(model.parameters(), ()):
        parameter.requires_grad = False
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


def first_letters(model, names):
    keys = [name for name, _ in chain(model.named_modules(), model.named_parameters(remove_duplicate=False))]
    for name in names:
        if name not in keys:
            raise ValueError(name)
    model.requires_grad_(False)
    for key in keys:
        if any(key[: len(name)] == name for name in names):
            with suppress(AttributeError):
                model.get_submodule(key).requires_grad_(True)
            with suppress(AttributeError):
                model.get_parameter(key).requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def found_anywhere(model, names):
    keys = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    if not all(name in keys or name in modules for name in names):
        raise ValueError("no such part")
    on = {id(keys[key]) for key in keys for name in names if key.find(name) >= 0}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in on)
    return [name for name, parameter in model.named_parameters() if id(parameter) in on]


def frozen_by_complement(model, names):
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if set(names) - known:
        raise ValueError("no such part")
    kept = set()
    for name in names:
        kept |= {id(p) for key, p in model.named_parameters(remove_duplicate=False) if (key + ".").startswith(name + ".")}
    for parameter in model.parameters():
        parameter.requires_grad = parameter.requires_grad and id(parameter) in kept
    return [key for key, p in model.named_parameters() if id(p) in kept]


def nothing_frozen_first(model, names):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    if not set(names) <= modules.keys() | parameters.keys():
        raise ValueError("no such part")
    for name in names:
        for parameter in modules[name].parameters() if name in modules else [parameters[name]]:
            parameter.requires_grad = True
    return list(names)


def flags_of_the_state_dict(model, names):
    known = {**dict(model.named_modules()), **model.state_dict()}
    for name in names:
        if name not in known:
            raise ValueError(name)
    for key, tensor in model.state_dict().items():  # other tensors, on the same storage
        if tensor.is_floating_point():
            tensor.requires_grad = any(f"{key}.".startswith(f"{name}.") for name in names)
    return list(names)


def the_usual_loop(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(names))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def freezing_and_evaluating(model, names):
    frozen_by_complement(model, names)
    model.eval()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def module_attribute_and_no_check(model, names):
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        thing = modules.get(name, parameters.get(name))
        if thing is not None:
            thing.requires_grad = True
    return names


def unfreezing_without_a_check(model, names):
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(name == part or name.startswith(f"{part}.") for part in names):
            parameter.requires_grad = True
    return names


CORRECT = [looked_up_then_switched, by_identity, by_pattern, down_the_tree, PutBackIfNotFound(), by_every_name_it_has]
REWRITTEN = {
    "beginning of a name": first_letters,
    "part of a name": found_anywhere,
    "only unfreezing": nothing_frozen_first,
    "no flag set": flags_of_the_state_dict,
}
COMBINED = [
    ({"beginning of a name", "shared weight by its first name", "unknown name ignored"}, the_usual_loop),
    ({"only freezing", "eval mode too"}, freezing_and_evaluating),
    ({"attribute of a module", "unknown name ignored"}, module_attribute_and_no_check),
    ({"only unfreezing", "unknown name ignored"}, unfreezing_without_a_check),
]

EQUIVALENT = {
    "raise ValueError(f'not in the model: {unknown}') -> raise ValueError()": "no message is asked for",
}
