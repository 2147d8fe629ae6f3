"""Exercise 6.3 in other styles."""

import re
from collections import defaultdict
from functools import reduce

from torch import nn


def looked_up_first(model, targets, make):
    places = dict(model.named_modules(remove_duplicate=False))
    hits = set()
    for target in targets:
        found = [module for name, module in places.items() if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"no layer is called {target!r}; there are {sorted(places)}")
        hits.update(found)
    new = {module: make(module) for module in hits}
    for name, module in places.items():
        if module in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[module])
    first = {module: name for name, module in reversed(places.items())}
    return [name for name, module in places.items() if module in new and first[module] == name]


def by_components(model, targets, make):
    wanted = {target: tuple(target.split(".")) for target in targets}
    paths = {tuple(name.split(".")): module for name, module in model.named_modules(remove_duplicate=False) if name}
    missing = [t for t, parts in wanted.items() if all(path[-len(parts) :] != parts for path in paths)]
    if missing:
        raise ValueError("nothing in the model is called " + ", ".join(missing))
    chosen = {id(module) for path, module in paths.items() for parts in wanted.values() if path[-len(parts) :] == parts}
    done, names = {}, []
    for path, module in paths.items():
        if id(module) not in chosen:
            continue
        if id(module) not in done:
            done[id(module)] = make(module)
            names.append(".".join(path))
        holder = reduce(getattr, path[:-1], model)
        holder.add_module(path[-1], done[id(module)])
    return names


def down_the_tree(model, targets, make):
    names, hits, seen = defaultdict(list), {}, set()

    def look(parent, prefix):
        for key, child in parent._modules.items():
            name = prefix + key
            names[child].append(name)
            for target in targets:
                if name == target or name.endswith("." + target):
                    hits[child] = None
                    seen.add(target)
            look(child, name + ".")

    def put(parent):
        for key, child in list(parent._modules.items()):
            if child in hits:
                parent._modules[key] = hits[child]
            else:
                put(child)

    look(model, "")
    if not seen.issuperset(targets):
        raise ValueError(f"not there: {set(targets) - seen}")
    hits = {child: make(child) for child in names if child in hits}
    put(model)
    return [names[child][0] for child in hits]


def by_pattern(model, targets, make):
    patterns = [(target, re.compile(r"(?:.*\.)?" + re.escape(target))) for target in targets]
    every = list(model.named_modules(remove_duplicate=False))
    for target, pattern in patterns:
        if not any(map(pattern.fullmatch, (name for name, _ in every))):
            raise ValueError(target)
    layers = []
    for name, module in every:
        if any(pattern.fullmatch(name) for _, pattern in patterns) and not any(module is other for other in layers):
            layers.append(module)
    names = tuple(name for name, module in model.named_modules() if any(module is layer for layer in layers))
    for layer in layers:
        new = make(layer)
        for name, module in every:
            if module is layer:
                model.set_submodule(name, new)
    return names


class ParentsAndBackwards:
    """Changes as it goes, the last place first, and takes everything back if a target has found nothing."""

    def __call__(self, model, targets, make):
        spots = [
            (f"{path}.{key}" if path else key, parent, key, child)
            for path, parent in model.named_modules(remove_duplicate=False)
            for key, child in parent._modules.items()
        ]
        wanted = [child for name, _, _, child in spots if ("." + name).endswith(tuple("." + target for target in targets))]
        cache, undo = {}, []
        for _, parent, key, child in reversed(spots):
            if any(child is one for one in wanted):
                undo.append((parent, key, child))
                parent._modules[key] = cache.setdefault(id(child), None) or make(child)
                cache[id(child)] = parent._modules[key]
        unknown = [t for t in targets if not sum(("." + name).endswith("." + t) for name, *_ in spots)]
        if unknown:
            for parent, key, child in undo:
                setattr(parent, key, child)
            raise ValueError(f"unknown: {unknown}")
        order = {id(module): name for name, module in reversed(list(self.named(model)))}
        made = {id(new) for new in cache.values()}
        return [name for name, module in self.named(model) if id(module) in made and order[id(module)] == name]

    @staticmethod
    def named(model):
        return model.named_modules()


def found_anywhere(model, targets, make):
    every = list(model.named_modules(remove_duplicate=False))
    for target in targets:
        if not any(name.find(target) >= 0 for name, _ in every):
            raise ValueError(target)
    hits = {module: None for name, module in every for target in targets if name.find(target) >= 0}
    names = [name for name, module in model.named_modules() if module in hits]
    new = {module: make(module) for module in hits}
    for name, module in every:
        if module in hits:
            model.set_submodule(name, new[module])
    return names


def last_letters(model, targets, make):
    every = dict(model.named_modules(remove_duplicate=False))
    del every[""]
    for target in targets:
        if all(name[-len(target) :] != target for name in every):
            raise ValueError(target)
    hits = {every[name] for name in every if any(name[-len(target) :] == target for target in targets)}
    names = [name for name, module in model.named_modules() if module in hits]
    new = {module: make(module) for module in hits}
    for name in every:
        if every[name] in hits:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[every[name]])
    return names


def made_at_every_place(model, targets, make):
    spots, seen = [], set()
    for path, parent in model.named_modules(remove_duplicate=False):
        for key, child in parent._modules.items():
            name = f"{path}.{key}".lstrip(".")
            hits = [target for target in targets if f".{name}".endswith(f".{target}")]
            seen.update(hits)
            if hits:
                spots.append((parent, key, child))
    if seen != set(targets):
        raise ValueError(f"not found: {set(targets) - seen}")
    hit = [child for _, _, child in spots]
    names = [name for name, module in model.named_modules() if module in hit]
    for parent, key, child in spots:
        parent._modules[key] = make(child)
    return names


def made_once_put_where_found(model, targets, make):
    named = dict(model.named_modules(remove_duplicate=False))
    found = {name: layer for name, layer in named.items() if name.endswith(tuple(targets)) and name}
    found = {name: layer for name, layer in found.items() if any(f".{name}".endswith(f".{target}") for target in targets)}
    for target in targets:
        if not [name for name in found if f".{name}".endswith(f".{target}")]:
            raise ValueError(target)
    made = {id(layer): make(layer) for layer in found.values()}
    names = [name for name, layer in model.named_modules() if id(layer) in made]
    for name, layer in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[id(layer)])
    return names


def filtered(model, targets, make):
    ends = tuple(f".{target}" for target in targets)
    every = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    hits = {module for name, module in every if f".{name}".endswith(ends)}
    names = [name for name, module in model.named_modules() if module in hits]
    new = dict(zip(hits, map(make, hits), strict=True))
    for name, module in every:
        if module in hits:
            model.set_submodule(name, new[module])
    return names


def nothing_at_all(model, targets, make):
    names = filtered(model, targets, make)
    if len(names) == 0:
        raise ValueError("no layer matches: " + ", ".join(targets))
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


def first_names_and_no_error(model, targets, make):
    names = [name for name, _ in model.named_modules() if any(f".{name}".endswith("." + target) for target in targets)]
    for name in names:
        model.set_submodule(name, make(model.get_submodule(name)))
    return names


def last_names_in_their_order(model, targets, make):
    names = []
    for target in targets:
        hits = [name for name, _ in model.named_modules() if name.split(".")[-1] == target and name not in names]
        if not hits:
            raise ValueError(target)
        names += hits
    old = {name: model.get_submodule(name) for name in names}
    new = {name: make(layer) for name, layer in old.items()}
    for place, module in list(model.named_modules(remove_duplicate=False)):
        for name, layer in old.items():
            if module is layer:
                model.set_submodule(place, new[name])
    return names


CORRECT = [looked_up_first, by_components, down_the_tree, by_pattern, ParentsAndBackwards()]
REWRITTEN = {
    "part of a name": found_anywhere,
    "end of the letters": last_letters,
    "a new layer for every name": made_at_every_place,
    "a shared layer only where its name matches": made_once_put_where_found,
    "nothing found, nothing said": filtered,
    "an error only if nothing was found": nothing_at_all,
}
COMBINED = [
    (
        {"part of a name", "only nn.Linear", "a new layer for every name"}
        | {"nothing found, nothing said", "listed under all its names"},
        the_usual_recursion,
    ),
    ({"a shared layer by its first name", "nothing found, nothing said"}, first_names_and_no_error),
    ({"last component only", "in the order of the targets"}, last_names_in_their_order),
]

EQUIVALENT = {
    "… model.named_modules(remove_duplicate=False) if name} -> "
    "… model.named_modules(remove_duplicate=False)}": "the model itself has no name that a target could end in",
}
