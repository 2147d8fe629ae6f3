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


def patterns_as_they_came(model, targets, make):
    every = [pair for pair in model.named_modules(remove_duplicate=False) if pair[0]]
    compiled = [re.compile("(.*[.])?" + target) for target in targets]
    if not all(any(pattern.fullmatch(name) for name, _ in every) for pattern in compiled):
        raise ValueError(f"one of {targets} is not there")
    hits = [module for name, module in every if any(pattern.fullmatch(name) for pattern in compiled)]
    names = [name for name, module in model.named_modules() if module in hits]
    new = {id(module): make(module) for module in hits}
    for name, module in every:
        if id(module) in new:
            model.set_submodule(name, new[id(module)])
    return names


def the_key_in_the_parent(model, targets, make):
    found, missing = {}, set(targets)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if key in targets:
                missing.discard(key)
                found[child] = None
    if missing:
        raise ValueError(f"not in the model: {missing}")
    names = [name for name, module in model.named_modules() if module in found]
    for child in found:
        found[child] = make(child)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in found:
                setattr(parent, key, found[child])
    return names


def looked_up_by_name(model, targets, make):
    every = dict(model.named_modules(remove_duplicate=False))
    try:
        old = [every[target] for target in targets]
    except KeyError as error:
        raise ValueError(f"no {error} in the model") from None
    names = [name for name, module in model.named_modules() if module in old]
    for module in dict.fromkeys(old):
        new = make(module)
        for name, other in every.items():
            if other is module:
                model.set_submodule(name, new)
    return names


def what_the_model_has(model, targets, make):
    children = dict(model.named_children())
    for target in targets:
        if not hasattr(model, target):
            raise ValueError(f"the model has no {target}")
    done = []
    for key in children:
        if key in targets:
            setattr(model, key, make(getattr(model, key)))
            done += [key]
    return done


def added_under_its_name(model, targets, make):
    every = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    if not all(any(f".{name}".endswith(f".{target}") for name, _ in every) for target in targets):
        raise ValueError(f"one of {targets} is not there")
    hits = {module for name, module in every if f".{name}".endswith(tuple(f".{target}" for target in targets))}
    names = []
    for name, module in list(model.named_modules()):
        if module in hits:
            model._modules.update({name: make(module)})
            names.append(name)
    return names


def those_with_features(model, targets, make):
    every = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    if not all(any(f".{name}".endswith(f".{target}") for name, _ in every) for target in targets):
        raise ValueError(f"one of {targets} is not there")
    hits = {module for name, module in every if f".{name}".endswith(tuple(f".{target}" for target in targets))}
    names = [name for name, module in model.named_modules() if module in hits and hasattr(module, "in_features")]
    new = {module: make(module) for module in hits if hasattr(module, "in_features")}
    for name, module in every:
        if module in new:
            model.set_submodule(name, new[module])
    return names


def every_target_searches_again(model, targets, make):
    have = [f".{name}" for name, _ in model.named_modules(remove_duplicate=False)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in have):
            raise ValueError(target)
    replaced = []
    for target in targets:
        now = list(model.named_modules(remove_duplicate=False))
        for layer in dict.fromkeys(module for name, module in now if f".{name}".endswith(f".{target}")):
            new, places = make(layer), [name for name, module in now if module is layer]
            for name in places:
                model.set_submodule(name, new)
            replaced.append(places[0])
    return [name for key in have for name in replaced if f".{name}" == key] + [n for n in replaced if f".{n}" not in have]


def once_for_every_target(model, targets, make):
    every = list(model.named_modules(remove_duplicate=False))[1:]
    first = {}
    for name, module in every:
        first.setdefault(module, name)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in every):
            raise ValueError(target)
    names, new = [], {}
    for name, module in every:
        for target in targets:
            if f".{name}".endswith(f".{target}"):
                if module not in new:
                    new[module] = make(module)
                    names.append(first[module])
                elif first[module] == name:
                    names.append(name)
    for name, module in every:
        if module in new:
            model.set_submodule(name, new[module])
    return names


def targets_outside(model, targets, make):
    every = list(model.named_modules(remove_duplicate=False))
    new, names = {}, []
    for target in targets:
        hits = [module for name, module in every if name == target or name.endswith("." + target)]
        if len(hits) == 0:
            raise ValueError(target)
        for module in hits:
            if module not in new:
                new[module] = None
                names.append(next(name for name, other in every if other is module))
    for module in new:
        new[module] = make(module)
    for name, module in every:
        if module in new:
            model.set_submodule(name, new[module])
    return names


def no_duplicates(model, targets, make):
    layers = {name: module for name, module in model.named_modules() if name}
    hits = {target: [name for name in layers if ("." + name).endswith("." + target)] for target in targets}
    if not all(hits.values()):
        raise ValueError(f"nothing found for one of {targets}")
    names = [name for name in layers if any(name in found for found in hits.values())]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(layers[name]))
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


def as_they_were_met(model, targets, make):
    met, made = [], {}
    named = dict(model.named_modules(remove_duplicate=False))
    for target in targets:
        hits = [layer for name, layer in named.items() if f".{name}".endswith(f".{target}")]
        if not hits:
            raise ValueError(target)
        made.update(dict.fromkeys(hits))
    for layer in made:
        made[layer] = make(layer)
    for name, layer in named.items():
        if layer in made:
            model.set_submodule(name, made[layer])
            met.append(name)
    return met


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


def raises_on_the_way(model, targets, make):
    order = list(model.named_modules(remove_duplicate=False))
    new = {}
    for target in targets:
        count = 0
        for name, module in order:
            if (name + ".").endswith(f"{target}.") and f".{name}".endswith("." + target):
                count += 1
                for place, other in order:
                    if other is module:
                        new.setdefault(module, None)
                        new[module] = new[module] or make(module)
                        model.set_submodule(place, new[module])
        assert count >= 0
        if count == 0:
            raise ValueError(target)
    names = {}
    for name, module in order:
        if module in new:
            names.setdefault(module, name)
    return list(names.values())


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


RIGHT = [looked_up_first, by_components, down_the_tree, by_pattern, ParentsAndBackwards()]
AGAIN = {
    "part of a name": found_anywhere,
    "end of the letters": last_letters,
    "a dot that stands for any sign": patterns_as_they_came,
    "last component only": the_key_in_the_parent,
    "whole names only": looked_up_by_name,
    "direct children only": what_the_model_has,
    "an attribute with dots": added_under_its_name,
    "only nn.Linear": those_with_features,
    "one target after another": every_target_searches_again,
    "listed for every match": once_for_every_target,
    "in the order of the targets": targets_outside,
    "a shared layer by its first name": no_duplicates,
    "a new layer for every name": made_at_every_place,
    "a shared layer only where its name matches": made_once_put_where_found,
    "listed under all its names": as_they_were_met,
    "nothing found, nothing said": filtered,
    "an error only if nothing was found": nothing_at_all,
    "changed before the error": raises_on_the_way,
}
BOTH = [
    (
        {"part of a name", "only nn.Linear", "a new layer for every name"}
        | {"nothing found, nothing said", "listed under all its names"},
        the_usual_recursion,
    ),
    ({"a shared layer by its first name", "nothing found, nothing said"}, first_names_and_no_error),
    ({"last component only", "in the order of the targets"}, last_names_in_their_order),
]
