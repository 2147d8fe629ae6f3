"""Exercise 6.3: put something else in the place of the layers that are named."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from helpers import expect
from helpers.lora import replace

exercise = Exercise(__name__, "6.3", replace)

WORDS = "query", "key", "value", "dense", "gate"

Named = list[tuple[str, nn.Module]]


class _Made(nn.Module):
    """What `make` makes here: it holds the layer that it replaces as `base`, as a LoRA layer does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


@exercise.experiment("whole components")
class WholeComponents(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        names = {
            "one": ("encoder.0.query", "encoder.10.query", "decoder.query"),
            "goes on": ("encoder.0.query_norm", "encoder.10.query_key"),
            "letters": ("encoder.0.subquery", "decoder.pre_query"),
            "two": ("encoder.0.query",),
            "ten": ("encoder.10.query",),
            "no dot": ("encoder.0_query",),
        }
        targets = {"one": "query", "two": "0.query", "whole": "encoder.10.query"}
        every = sorted({name for group in names.values() for name in group})
        models = {key: _tree({every[k]: nn.Linear(2, 2) for k in trial.permutation(len(every))}) for key in targets}
        return {"targets": targets, "names": names, **models}

    def measure(self, subject, inputs):
        raw = {key: _places(subject, inputs[key], [target]) for key, target in inputs["targets"].items()}
        return {what: {key: how[what] for key, how in raw.items()} for what in ("places", "refused")}

    def facts(self, raw, inputs):
        names, raw = inputs["names"], raw["places"]
        whole = [inputs["targets"]["whole"]]
        return {
            "target `query`: layers of that name": _how(raw["one"], names["one"]),
            "target `query`: names that go on after it, as `query_norm`": _how(raw["one"], names["goes on"]),
            "target `query`: names that end in the same letters, as `subquery`": _how(raw["one"], names["letters"]),
            "target `0.query`: the layer `encoder.0.query`": _how(raw["two"], names["two"]),
            "target `0.query`: the layer `encoder.10.query`": _how(raw["two"], names["ten"]),
            "target `0.query`: the layer `encoder.0_query`": _how(raw["two"], names["no dot"]),
            "target `encoder.10.query`: that layer": _how(raw["whole"], whole),
        }

    def notes(self, raw, inputs):
        return _refused(
            {
                "target `query`: layers of that name": raw["refused"]["one"],
                "target `0.query`: the layer `encoder.0.query`": raw["refused"]["two"],
                "target `encoder.10.query`: that layer": raw["refused"]["whole"],
            }
        )


@exercise.experiment("any layer anywhere")
class AnyLayerAnywhere(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(2, 4)
        size = width, width
        model = nn.Module()
        model.stem = nn.Linear(*size)
        model.blocks = nn.Sequential(nn.Linear(*size), nn.ReLU(), nn.Linear(*size), nn.Dropout())
        model.conv = nn.Conv2d(1, width, 3)
        model.experts = nn.ModuleList([nn.Linear(*size), nn.Linear(*size)])
        model.tokens = nn.Embedding(7, width)
        model.heads = nn.ModuleDict({"letters": nn.Linear(*size), "digits": nn.Linear(*size)})
        model.encoder = _tree({"layer.3.dense": nn.Linear(*size), "layer.3.norm": nn.LayerNorm(width)})
        model.fc = nn.Linear(*size)
        model.experts[0].requires_grad_(False)  # flags and modes that are not those of a new model
        model.blocks.eval()
        deep = [f"blocks.{2 * trial.integer(0, 1)}", f"experts.{trial.integer(0, 1)}", "heads.letters", "layer.3.dense"]
        return {"model": model, "top": ["stem"], "kinds": ["conv", "tokens"], "deep": deep}

    def measure(self, subject, inputs):
        model = inputs["model"]
        before = _every(model)
        settings = _settings(before)
        refused = [_places(subject, model, t)["refused"] for t in (inputs["top"] + inputs["kinds"], inputs["deep"])]
        places = {name: _place(model, name, module) for name, module in before}
        after = [name for name in dict.fromkeys(name for name, _ in _every(model)) if name in places]
        return {
            "places": places,
            "refused": refused,
            "order": "as it was" if after == list(places) else "another",
            "settings": "as they were" if _settings(before) == settings else "different",
        }

    def facts(self, raw, inputs):
        deep = [name.replace("layer.3", "encoder.layer.3") for name in inputs["deep"]]
        others = raw["places"].keys() - {*inputs["top"], *deep, *inputs["kinds"]}
        return {
            "a layer of the model itself": _how(raw["places"], inputs["top"]),
            "a convolution and an embedding": _how(raw["places"], inputs["kinds"]),
            "layers inside other modules": _how(raw["places"], deep),
            "all other modules": _how(raw["places"], others),
            "the order of the modules": raw["order"],
            "`requires_grad` of the parameters, and modes": raw["settings"],
        }

    def notes(self, raw, inputs):
        first, second = raw["refused"]
        return _refused({"a layer of the model itself": first, "layers inside other modules": second})


@exercise.experiment("once")
class Once(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        both = ["query", "attention.query"]
        if trial.integer(0, 1):
            both.reverse()
        names = "attention.query", "tail.base"
        models = {key: _tree({names[k]: nn.Linear(2, 2) for k in trial.permutation(2)}) for key in ("both", "inner")}
        return {"targets": {"both": both, "inner": ["query", "base"]}, "name": names[0], **models}

    def measure(self, subject, inputs):
        found = {key: _places(subject, inputs[key], targets, listed=True) for key, targets in inputs["targets"].items()}
        return {"places": {key: how["places"] for key, how in found.items()}, "names": found["both"]["names"]}

    def facts(self, raw, inputs):
        name, places = inputs["name"], raw["places"]
        return {
            "targets `query` and `attention.query`: that layer": places["both"][name],
            "targets `query` and `attention.query`: times it is listed": raw["names"].count(name),
            "targets `query` and `base`: the layer `attention.query`": places["inner"][name],
            "targets `query` and `base`: the model's own `base`": places["inner"]["tail.base"],
        }


@exercise.experiment("shared layer")
class SharedLayer(Experiment):
    def draw(self, trial: Trial) -> dict:
        (word,) = _words(trial, 1)
        names = {"both": [f"encoder.{word}", f"decoder.{word}"]}
        names["second"] = [*names["both"], "decoder.again"]  # two of these in the same module
        models = {}
        for key in names:
            shared = nn.Linear(2, 2)
            models[key] = _tree({"norm": nn.LayerNorm(2), **dict.fromkeys(names[key], shared)})
        return {"names": names, "targets": {"both": [word], "second": [f"decoder.{word}"]}, **models}

    def measure(self, subject, inputs):
        raw = {}
        for key, targets in inputs["targets"].items():
            raw[key] = _places(subject, inputs[key], targets)
            there = dict(_every(inputs[key]))
            raw[key]["layers"] = len({id(there.get(name)) for name in inputs["names"][key]})
        return raw

    def facts(self, raw, inputs):
        def new(key: str) -> str:
            how = _how(raw[key]["places"], inputs["names"][key])
            return how if how != "replaced" else "one new layer" if raw[key]["layers"] == 1 else "several new layers"

        return {
            "a target names it under both its names: at its places": new("both"),
            "a target names it under the second of three names: at its places": new("second"),
        }

    def notes(self, raw, inputs):
        return _refused(
            {
                "a target names it under both its names: at its places": raw["both"]["refused"],
                "a target names it under the second of three names: at its places": raw["second"]["refused"],
            }
        )


@exercise.experiment("nothing of that name")
class NothingOfThatName(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        one, two, three = _words(trial, 3)
        targets = {"some": [one, two[::-1]], "none": [three[::-1]]}
        return {"targets": targets} | {key: _tree({word: nn.Linear(2, 2) for word in (one, two, three)}) for key in targets}

    def measure(self, subject, inputs):
        return {key: _raised(subject, inputs[key], targets) for key, targets in inputs["targets"].items()}

    def facts(self, raw, inputs):
        some, refused = raw["some"], raw["some"]["came"] != "nothing"
        return {
            "one of two targets names nothing: raised": some["came"],
            "one of two targets names nothing: the message": some["message"] if some["came"] == "ValueError" else None,
            "one of two targets names nothing: layers": _how(some["places"], some["places"]) if refused else None,
            "the only target names nothing: raised": raw["none"]["came"],
        }


@exercise.experiment("the list returned")
class TheListReturned(Experiment):
    def draw(self, trial: Trial) -> dict:
        one, two, three = _words(trial, 3)
        names = [f"{place}.{word}" for place in ("first", "second") for word in (one, two, three)]
        several = _tree({name: nn.Linear(2, 2) for name in names})
        shared = _tree(dict.fromkeys([f"first.{one}", f"second.{one}"], nn.Linear(2, 2)))
        targets = {"several": [three, f"first.{two}", one], "shared": [one]}
        return {"targets": targets, "several": several, "shared": shared, "names of one": [f"first.{one}", f"second.{one}"]}

    def measure(self, subject, inputs):
        return {key: _places(subject, inputs[key], targets, listed=True) for key, targets in inputs["targets"].items()}

    def facts(self, raw, inputs):
        names = raw["several"]["names"]
        wanted = [name for name, how in raw["several"]["places"].items() if how not in ("untouched", "gone")]
        order = "in their order" if names == wanted else "in another order"
        if sorted(names) != sorted(wanted):
            order = "and others, or not all of them" if {*wanted} & {*names} else "the list has other names"
        first, second = inputs["names of one"]
        shared = {(): "none", (first,): "the first", (second,): "the second", (first, second): "both"}
        return {
            "names of the layers that were replaced": order if names else "the list is empty",
            "a layer with two names: the names listed": shared.get(tuple(raw["shared"]["names"]), "different"),
        }


def _words(trial: Trial, n: int) -> list[str]:
    return [WORDS[k] for k in trial.permutation(len(WORDS))[:n]]


def _tree(layers: dict[str, nn.Module]) -> nn.Module:
    """Modules inside modules, so that each layer has its name."""
    root = nn.Module()
    for name, layer in layers.items():
        place = root
        *path, last = name.split(".")
        for step in path:
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place._modules[step]
        place.add_module(last, layer)
    return root


def _every(model: nn.Module) -> Named:
    """All modules but the model itself, each under all its names."""
    return list(model.named_modules(remove_duplicate=False))[1:]


def _settings(modules: Named) -> list:
    return [(module.training, [p.requires_grad for p in module.parameters()]) for _, module in modules]


def _places(subject, model: nn.Module, targets: list[str], listed: bool = False) -> dict:
    """What stands in every place afterwards; a ValueError, that a target names nothing, leaves all as it is.

    The list that was returned is looked at only if `listed`, so that a missing return costs no more than it should.
    """
    before, returned, refused = _every(model), None, ""
    try:
        returned = subject(model, targets, _Made)
    except ValueError as error:
        refused = f"it raised ValueError: {error}"
    places = {name: _place(model, name, module) for name, module in before}
    return {"places": places, "refused": refused, "names": _names(returned) if listed and not refused else []}


def _refused(messages: dict[str, str]) -> dict[str, str]:
    return {fact: message for fact, message in messages.items() if message}


def _raised(subject, model: nn.Module, targets: list[str]) -> dict:
    before, came, message = _every(model), "nothing", None
    try:
        subject(model, targets, _Made)
    except NotImplementedError:
        raise  # the stub's
    except Exception as error:
        came = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        message = "says which" if targets[-1] in str(error) else "does not say which"
    places = {name: _place(model, name, module) for name, module in before}
    return {"came": came, "message": message, "places": places}


def _place(model: nn.Module, name: str, was: nn.Module) -> str:
    try:
        now = model.get_submodule(name)
    except AttributeError:  # what is inside a replaced container
        return "gone"
    if now is was:
        return "untouched"
    if not isinstance(now, _Made):
        return "something that make did not make"
    if now.base is was:
        return "replaced"
    return "replaced twice, one in the other" if isinstance(now.base, _Made) else "made from another object"


def _how(places: dict[str, str], names: Iterable[str]) -> str:
    hows = {places[name] for name in names}
    return hows.pop() if len(hows) == 1 else "some replaced, some not" if hows <= {"replaced", "untouched"} else "different"


def _names(value: object) -> list[str]:
    if isinstance(value, str | set | frozenset | Tensor) or not isinstance(value, Iterable):
        raise wrong_return("replace must return a list of names", value)
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise WrongReturn(f"replace must return a list of names, got a list with {expect.describe(name)}.")
    return names


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _found(model: nn.Module, targets: list[str], ends: Callable[[str, str], bool] = _ends) -> dict[str, nn.Module]:
    """Every layer that is named, under its first name; a ValueError if a target names none."""
    every = _every(model)
    for target in targets:
        if not any(ends(name, target) for name, _ in every):
            raise ValueError(f"nothing is called {target}")
    hits = {id(module) for name, module in every if any(ends(name, target) for target in targets)}
    return {name: module for name, module in model.named_modules() if id(module) in hits}


def _put(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """`new` at every place of `layer`."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is layer:
                module._modules[key] = new


def _put_all(model: nn.Module, found: dict[str, nn.Module], make: Callable) -> list[str]:
    for layer in found.values():
        _put(model, layer, make(layer))
    return list(found)


@exercise.misconception("part of a name")
def part_of_a_name(model, targets, make):
    return _put_all(model, _found(model, targets, lambda name, target: target in name), make)


@exercise.misconception("end of the letters")
def end_of_the_letters(model, targets, make):
    return _put_all(model, _found(model, targets, str.endswith), make)


@exercise.misconception("a dot that stands for any sign")
def a_dot_that_stands_for_any_sign(model, targets, make):
    return _put_all(model, _found(model, targets, lambda name, target: re.search(rf"(^|\.){target}$", name)), make)


@exercise.misconception("last component only")
def last_component_only(model, targets, make):
    return _put_all(model, _found(model, targets, lambda name, target: name.rpartition(".")[2] == target), make)


@exercise.misconception("whole names only")
def whole_names_only(model, targets, make):
    return _put_all(model, _found(model, targets, str.__eq__), make)


@exercise.misconception("direct children only")
def direct_children_only(model, targets, make):
    for target in targets:
        if target not in model._modules:
            raise ValueError(f"nothing is called {target}")
    names = [name for name in model._modules if name in targets]
    for name in names:
        model._modules[name] = make(model._modules[name])
    return names


@exercise.misconception("an attribute with dots")
def an_attribute_with_dots(model, targets, make):
    found = _found(model, targets)
    for name, layer in found.items():
        setattr(model, name, make(layer))
    return list(found)


@exercise.misconception("only nn.Linear")
def only_linear(model, targets, make):
    return _put_all(
        model, {name: layer for name, layer in _found(model, targets).items() if isinstance(layer, nn.Linear)}, make
    )


@exercise.misconception("one target after another")
def one_target_after_another(model, targets, make):
    _found(model, targets)
    names = []
    for target in targets:
        names += _put_all(model, _found(model, [target]), make)
    order = [name for name, _ in model.named_modules()]
    return sorted(names, key=order.index)


@exercise.misconception("listed for every match")
def listed_for_every_match(model, targets, make):
    found = _found(model, targets)
    _put_all(model, found, make)
    return [name for name in found for target in targets if _ends(name, target)] or list(found)


@exercise.misconception("in the order of the targets")
def in_the_order_of_the_targets(model, targets, make):
    names = _put_all(model, _found(model, targets), make)
    return sorted(names, key=lambda name: [_ends(name, target) for target in targets], reverse=True)


@exercise.misconception("a shared layer by its first name")
def a_shared_layer_by_its_first_name(model, targets, make):
    first = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(_ends(name, target) for name in first):
            raise ValueError(f"nothing is called {target}")
    names = [name for name in first if any(_ends(name, target) for target in targets)]
    for name in names:
        model.set_submodule(name, make(model.get_submodule(name)))
    return names


@exercise.misconception("a new layer for every name")
def a_new_layer_for_every_name(model, targets, make):
    found = _found(model, targets)
    names = [name for name, _ in _every(model) if any(_ends(name, target) for target in targets)]
    for name, new in [(name, make(model.get_submodule(name))) for name in names]:
        model.set_submodule(name, new)
    return list(found)


@exercise.misconception("a shared layer only where its name matches")
def a_shared_layer_only_where_its_name_matches(model, targets, make):
    found = _found(model, targets)
    new = {layer: make(layer) for layer in found.values()}
    for name, layer in _every(model):
        if any(_ends(name, target) for target in targets):
            model.set_submodule(name, new[layer])
    return list(found)


@exercise.misconception("listed under all its names")
def listed_under_all_its_names(model, targets, make):
    layers = list(_found(model, targets).values())
    names = [name for name, module in _every(model) if module in layers]
    for layer in layers:
        _put(model, layer, make(layer))
    return names


@exercise.misconception("nothing found, nothing said")
def nothing_found_nothing_said(model, targets, make):
    known = [target for target in targets if any(_ends(name, target) for name, _ in _every(model))]
    return _put_all(model, _found(model, known), make)


@exercise.misconception("an error only if nothing was found")
def an_error_only_if_nothing_was_found(model, targets, make):
    known = [target for target in targets if any(_ends(name, target) for name, _ in _every(model))]
    if not known:
        raise ValueError(f"none of {targets} is in the model")
    return _put_all(model, _found(model, known), make)


@exercise.misconception("changed before the error")
def changed_before_the_error(model, targets, make):
    every, done = _every(model), []
    for target in targets:
        layers = [layer for name, layer in every if _ends(name, target)]
        if not layers:
            raise ValueError(f"nothing is called {target}")
        for layer in layers:
            if layer not in done:
                _put(model, layer, make(layer))
                done.append(layer)
    first = {layer: name for name, layer in reversed(every)}
    return [name for name, layer in every if layer in done and first[layer] == name]
