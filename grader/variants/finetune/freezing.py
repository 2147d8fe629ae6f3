"""Exercise 4.1 in other styles."""

import copy
import re

from torch import nn


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
    anywhere = re.compile("|".join(map(re.escape, names)) or "nothing is called so")
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


def by_storage(model, names):
    """Tensors that lie at one address are one parameter, whatever they are called."""
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}
    wanted = set()
    for name in names:
        found = {place for key, place in places.items() if f"{key}.".startswith(f"{name}.")}
        if not found:
            raise ValueError(f"nothing is called {name}")
        wanted |= found
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.data_ptr() in wanted)
    return sorted({name for name, p in model.named_parameters() if p.requires_grad}, key=list(places).index)


def child_by_child(model, names):
    by_identity(copy.deepcopy(model), names)  # raises where a name is unknown
    for top, child in model.named_children():
        for name, parameter in child.named_parameters(prefix=top, remove_duplicate=False):
            parameter.requires_grad = any(f"{name}.".startswith(f"{part}.") for part in names) or shared(
                model, parameter, names
            )
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def shared(model, parameter, names):
    keys = [key for key, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    return any(f"{key}.".startswith(f"{part}.") for part in names for key in keys)


def switches_off_the_rest(model, names):
    wanted = by_identity(copy.deepcopy(model), names)
    for name, parameter in model.named_parameters():
        if name not in wanted:
            parameter.requires_grad_(False)
    return wanted


def all_but_norms(model, names):
    trainable = by_identity(model, names)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.requires_grad_(True)
    return trainable


def dots_that_match_anything(model, names):
    by_identity(copy.deepcopy(model), names)
    wanted = re.compile("|".join(rf"{name}(\.|$)" for name in names) or "nothing is called so")
    keep = {parameter for key, parameter in model.named_parameters(remove_duplicate=False) if wanted.match(key)}
    for parameter in model.parameters():
        parameter.requires_grad = parameter in keep
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def one_level_down(model, names):
    by_identity(copy.deepcopy(model), names)
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            model.get_parameter(name).requires_grad = True
            continue
        for module in (modules[name], *modules[name].children()):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def by_its_ending(model, names):
    by_identity(copy.deepcopy(model), names)
    keep = {
        parameter
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if any(key.endswith(name) or f"{key}.".startswith(f"{name}.") for name in names)
    }
    for parameter in model.parameters():
        parameter.requires_grad = parameter in keep
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def names_as_given(model, names):
    by_identity(model, names)
    return names


def name_after_name(model, names):
    trainable = by_identity(model, names)
    return [key for name in names for key in trainable if f"{key}.".startswith(f"{name}.")]


def from_a_to_z(model, names):
    return sorted(by_identity(model, names))


def under_all_of_its_names(model, names):
    by_identity(model, names)
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad]


def nothing_asked_for_nothing_done(model, names):
    if not names:
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return by_identity(model, names)


def in_all_of_its_modules(model, names):
    """A shared weight trains only if each of the modules that have it is named."""
    by_identity(copy.deepcopy(model), names)
    inside = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        inside.setdefault(parameter, []).append(any(f"{key}.".startswith(f"{name}.") for name in names))
    for parameter, asked in inside.items():
        parameter.requires_grad = all(asked)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def last_name_last_word(model, names):
    by_identity(model, names)
    for name in dict(model.named_parameters(remove_duplicate=False)):
        model.get_parameter(name).requires_grad_(any(f"{name}.".startswith(f"{part}.") for part in names))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def whatever_error_comes(model, names):
    parts = dict(model.named_modules()) | dict(model.named_parameters(remove_duplicate=False))
    return by_identity(model, [name for name in names if parts[name] is not None])


def if_nothing_is_found(model, names):
    known = [name for name in names if name in dict(model.named_modules()) or name in dict(model.named_parameters())]
    if names and not known:
        raise ValueError("none of the names is there")
    return by_identity(model, known)


def beginnings_are_known(model, names):
    keys = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if not all(any(key.startswith(name) for key in keys) for name in names):
        raise ValueError("unknown")
    return by_identity(model, [name for name in names if any(f"{key}.".startswith(f"{name}.") for key in keys)])


def froze_before_it_looked(model, names):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return by_identity(model, names)


def frozen_norms_in_eval_mode(model, names):
    trainable = by_identity(model, names)
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    return trainable


def fresh_head(model, names):
    trainable = by_identity(model, names)
    for name in names:
        part = dict(model.named_modules()).get(name)
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return trainable


def train_mode(model, names):
    model.train()
    return by_identity(model, names)


CORRECT = [by_identity, down_the_tree, PutBackIfNotFound(), by_every_name_it_has, by_storage]
REWRITTEN = {
    "part of a name": found_anywhere,
    "no flag set": on_a_copy,
    "shared weight by its last name": last_name_last_word,
}
BROKEN = {
    1: [child_by_child, switches_off_the_rest, all_but_norms, nothing_asked_for_nothing_done],
    2: [dots_that_match_anything, one_level_down, by_its_ending],
    3: [names_as_given, name_after_name, from_a_to_z, under_all_of_its_names],
    4: [in_all_of_its_modules, last_name_last_word],
    5: [whatever_error_comes, if_nothing_is_found, beginnings_are_known, froze_before_it_looked],
    6: [frozen_norms_in_eval_mode, fresh_head, train_mode],
}
COMBINED = [
    ({"beginning of a name", "shared weight by its first name", "unknown name ignored"}, the_usual_loop),
    ({"only unfreezing", "unknown name ignored"}, unfreezing_without_a_check),
]

EQUIVALENT = {
    "raise ValueError(f'not in the model: {unknown}') -> raise ValueError()": "no message is asked for",
}
