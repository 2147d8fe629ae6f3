"""Exercise 6.3: put something else in the place of the layers that are named."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, ClassVar

from torch import nn

from grader.checks import traces
from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_names
from helpers.lora import replace

exercise = Exercise(__name__, "6.3", replace, core=5)

FROM_ANOTHER = "made from another object"


class _Made(nn.Module):
    """What `make` makes here: it holds the layer that it replaces as `base`, as a LoRA layer does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base = layer


class _Replacing(Experiment):
    """Replaces layers in several models, each with targets of its own."""

    # A missing return costs no more than it should, nor does a layer that is made from a copy:
    listed: ClassVar[bool | None] = False  # whether to look at the list that is returned; None is "if it is one"
    exact = False  # whether `make` must get the layer itself
    beside: ClassVar[dict[str, str]] = {}  # a model's key -> the fact beside which it is shown that it was refused

    def measure(self, subject, inputs):
        return {
            key: _replaced(subject, inputs[key], targets, self.listed, self.exact) for key, targets in inputs["targets"].items()
        }

    def notes(self, raw, inputs):
        return {fact: raw[key]["refused"] for key, fact in self.beside.items() if raw[key]["refused"]}


@exercise.experiment("whole components", 1)
class WholeComponents(_Replacing):
    points = 3
    listed = None
    beside: ClassVar = {
        "one": "target `query`: layers of that name",
        "two": "target `0.query`: the layer `encoder.0.query`",
        "whole": "target `encoder.10.query`: that layer",
        "number": "target `layer.1`: the layer `encoder.layer.1`",
    }

    def draw(self, trial: Trial) -> dict:
        names = {
            "one": ("encoder.0.query", "encoder.10.query", "decoder.query", "query"),
            "goes on": ("encoder.0.query_norm", "encoder.10.query_key"),
            "letters": ("encoder.0.subquery", "decoder.pre_query"),
            "capitals": ("decoder.Query",),
            "two": ("encoder.0.query",),
            "ten": ("encoder.10.query",),
            "no dot": ("encoder.0_query",),
            "first": ("encoder.layer.1",),
            "tenth": ("encoder.layer.10", "encoder.layer.11"),
        }
        targets = {"one": ["query"], "two": ["0.query"], "whole": ["encoder.10.query"], "number": ["layer.1"]}
        every = sorted({name for group in names.values() for name in group})
        models = {key: _tree({every[k]: nn.Linear(2, 2) for k in trial.permutation(len(every))}) for key in targets}
        inside = {f"{place}.{word}": nn.Linear(2, 2) for place in ("attention", "last.attention") for word in _words(trial, 2)}
        return {"targets": targets | {"inside": ["attention"]}, "names": names, **models, "inside": _tree(inside)}

    def measure(self, subject, inputs):
        holders = [inputs["inside"].get_submodule(name) for name in ("attention", "last.attention")]
        inside = [(holder, _every(holder)) for holder in holders]
        return super().measure(subject, inputs) | {"layers": [_places(*pair) for pair in inside]}

    def facts(self, raw, inputs):
        names = inputs["names"]
        one, two, whole, number = (raw[key]["places"] for key in ("one", "two", "whole", "number"))
        layers = {f"{k}.{name}": how for k, places in enumerate(raw["layers"]) for name, how in places.items()}
        listed = [name for name in raw["inside"]["names"] or [] if "attention." in name]
        return {
            "target `query`: layers of that name": _how(one, names["one"]),
            "target `query`: names that go on after it, as `query_norm`": _how(one, names["goes on"]),
            "target `query`: names that end in the same letters, as `subquery`": _how(one, names["letters"]),
            "target `query`: the layer `decoder.Query`": _how(one, names["capitals"]),
            "target `0.query`: the layer `encoder.0.query`": _how(two, names["two"]),
            "target `0.query`: the layer `encoder.10.query`": _how(two, names["ten"]),
            "target `0.query`: the layer `encoder.0_query`": _how(two, names["no dot"]),
            "target `encoder.10.query`: that layer": _how(whole, inputs["targets"]["whole"]),
            "target `layer.1`: the layer `encoder.layer.1`": _how(number, names["first"]),
            "target `layer.1`: the layers `encoder.layer.10` and `11`": _how(number, names["tenth"]),
            "target `attention`: layers inside that module": _how(layers, layers),
            "target `attention`: layers inside that module that are listed": traces.some(listed),
        }


@exercise.experiment("any layer anywhere", 2)
class AnyLayerAnywhere(_Replacing):
    points = 2
    exact = True
    beside: ClassVar = {"top": "a layer of the model itself", "deep": "layers inside other modules"}

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(2, 4)
        size = width, width
        model = nn.Module()
        model.stem = nn.Linear(*size)
        model.blocks = nn.Sequential(nn.Linear(*size), nn.ReLU(), nn.Linear(*size), nn.Dropout())
        model.act = nn.GELU()
        model.mixer = nn.Sequential(nn.Linear(*size))
        model.conv = nn.Conv2d(1, width, 3)
        model.experts = nn.ModuleList([nn.Linear(*size), nn.Linear(*size)])
        model.tokens = nn.Embedding(7, width)
        model.heads = nn.ModuleDict({"letters": nn.Linear(*size), "digits": nn.Linear(*size)})
        model.encoder = _tree({"layer.3.dense": nn.Linear(*size), "layer.3.norm": nn.LayerNorm(width)})
        model.fc = nn.Linear(*size)
        model.experts[0].requires_grad_(False)  # flags and modes that are not those of a new model
        model.blocks.eval()
        deep = [f"blocks.{2 * trial.integer(0, 1)}", f"experts.{trial.integer(0, 1)}", "heads.letters", "layer.3.dense"]
        return {
            "model": model,
            "top": ["stem"],
            "kinds": ["conv", "tokens"],
            "bare": ["act"],
            "holder": ["mixer"],
            "deep": deep,
        }

    def measure(self, subject, inputs):
        def settings() -> list:
            return [(module.training, [p.requires_grad for p in module.parameters()]) for _, module in before]

        model = inputs["model"]
        before = _every(model)
        settings_before = settings()
        calls = {
            "top": inputs["top"] + inputs["kinds"],
            "bare": inputs["bare"],
            "holder": inputs["holder"],
            "deep": inputs["deep"],
        }
        raw = {key: _replaced(subject, model, targets, exact=True) for key, targets in calls.items()}
        places = _places(model, before)
        order, was = [name for name in dict(_every(model)) if name in places], [n for n in places if places[n] != "gone"]
        return raw | {
            "places": places,
            "order": "as it was" if order == was else "another",
            "settings": "as they were" if settings() == settings_before else "different",
        }

    def facts(self, raw, inputs):
        deep = [name.replace("layer.3", "encoder.layer.3") for name in inputs["deep"]]
        rest = raw["places"].keys() - {*inputs["top"], *deep, *inputs["kinds"], "act", "mixer", "mixer.0"}
        return {
            "a layer of the model itself": _how(raw["places"], inputs["top"]),
            "a convolution and an embedding": _how(raw["places"], inputs["kinds"]),
            "a layer without parameters": _how(raw["places"], inputs["bare"]),
            "a module with others inside": _how(raw["places"], inputs["holder"]),
            "layers inside other modules": _how(raw["places"], deep),
            "all other modules": _how(raw["places"], rest),
            "the order of the modules": raw["order"],
            "`requires_grad` of the parameters, and modes": raw["settings"],
        }


@exercise.experiment("once", 3)
class Once(_Replacing):
    points = 2

    def draw(self, trial: Trial) -> dict:
        both = ["query", "attention.query"]
        if trial.integer(0, 1):
            both.reverse()
        names = "attention.query", "tail.base"
        models = {key: _tree({names[k]: nn.Linear(2, 2) for k in trial.permutation(2)}) for key in ("both", "inner")}
        return {"targets": {"both": both, "inner": ["query", "base"]}, "name": names[0], **models}

    def facts(self, raw, inputs):
        name, both, inner = inputs["name"], raw["both"], raw["inner"]
        return {
            "targets `query` and `attention.query`: that layer": both["places"][name],
            "targets `query` and `base`: the layer `attention.query`": inner["places"][name],
            "targets `query` and `base`: the model's own `base`": inner["places"]["tail.base"],
        }


@exercise.experiment("the list returned", 4)
class TheListReturned(_Replacing):
    listed = True

    def draw(self, trial: Trial) -> dict:
        one, two, three = _words(trial, 3)
        # Neither the alphabet nor the targets have the model's order.
        several = _tree({f"{place}.{word}": nn.Linear(2, 2) for place in ("second", "first") for word in (one, two, three)})
        targets = {"several": [three, f"first.{two}", one], "both": [two, f"first.{two}"]}
        return {"targets": targets, "several": several, "both": _tree({f"first.{two}": nn.Linear(2, 2)})}

    def facts(self, raw, inputs):
        names = raw["several"]["names"]
        wanted = [name for name, how in raw["several"]["places"].items() if how not in ("untouched", "gone")]
        by_target = [name for target in inputs["targets"]["several"] for name in wanted if _ends(name, target)]
        orders = {"their own": wanted, "that of the targets": by_target, "that of the alphabet": sorted(wanted)}
        order = next((order for order, known in orders.items() if names == known), "another")
        if sorted(names) != sorted(wanted):
            order = "the list has others, or not all of them" if {*wanted} & {*names} else "the list has other names"
        return {
            "names of the layers that were replaced, their order": order if names else "the list is empty",
            "a layer that two targets name: times it is listed": len(raw["both"]["names"]),
        }


@exercise.experiment("nothing of that name", 5)
class NothingOfThatName(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        one, two, three = _words(trial, 3)
        targets = {"some": [one, two[::-1]], "none": [three[::-1]]}
        return {"targets": targets} | {key: _tree({word: nn.Linear(2, 2) for word in (one, two, three)}) for key in targets}

    def measure(self, subject, inputs):
        raw = {}
        for key, targets in inputs["targets"].items():
            model = inputs[key]
            before = _every(model)
            error, message = raised(lambda: subject(model, targets, _Made))  # noqa: B023
            raw[key] = {"error": error, "says which": targets[-1] in message, "places": _places(model, before)}
        return raw

    def facts(self, raw, inputs):
        error, places = raw["some"]["error"], raw["some"]["places"]
        message = "says which" if raw["some"]["says which"] else "does not say which"
        return {
            "one of two targets names nothing: raised": error,
            "one of two targets names nothing: the message": message if error == "ValueError" else None,
            "one of two targets names nothing: layers": _how(places, places) if error != "nothing" else None,
            "the only target names nothing: raised": raw["none"]["error"],
        }


@exercise.experiment("shared layer", 6)
class SharedLayer(_Replacing):
    points = 2
    listed = None
    beside: ClassVar = {
        "both": "a target names it under both its names: at its places",
        "second": "a target names it under the second of three names: at its places",
    }

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
        raw = super().measure(subject, inputs)
        for key, names in inputs["names"].items():
            modules = dict(_every(inputs[key]))
            raw[key]["layers"] = len({id(modules.get(name)) for name in names})
        return raw

    def facts(self, raw, inputs):
        def new(key: str) -> str:
            how = _how(raw[key]["places"], inputs["names"][key])
            return how if how != "replaced" else "one new layer" if raw[key]["layers"] == 1 else "several new layers"

        first, second = inputs["names"]["both"]
        lists = {(): "none", (first,): "the first", (second,): "the second", (first, second): "both"}
        names = raw["both"]["names"]
        known = names is not None and {*names} <= {first, second}  # a list of other things is wrong for any layer
        listed = lists.get(tuple(names), "one of them twice") if known else None
        return {fact: new(key) for key, fact in self.beside.items()} | {"the names of it that are listed": listed}


def _words(trial: Trial, n: int) -> list[str]:
    words = "query", "key", "value", "dense", "gate"
    return [words[k] for k in trial.permutation(len(words))[:n]]


class _Holder(nn.Module):
    """Takes numbers for names, as nn.Sequential does."""

    __getitem__ = lambda self, number: self._modules[str(number)]  # noqa: E731
    __setitem__ = lambda self, number, module: self._modules.update({str(number): module})  # noqa: E731


def _tree(layers: dict[str, nn.Module]) -> nn.Module:
    """Modules inside modules, so that each layer has its name."""
    root = _Holder()
    for name, layer in layers.items():
        place = root
        *path, last = name.split(".")
        for step in path:
            if step not in place._modules:
                place.add_module(step, _Holder())
            place = place._modules[step]
        place.add_module(last, layer)
    return root


def _every(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules but the model itself, each under all its names."""
    return list(model.named_modules(remove_duplicate=False))[1:]


def _replaced(
    subject, model: nn.Module, targets: list[str], listed: bool | None = False, exact: bool = False
) -> dict[str, Any]:
    """What stands in every place afterwards, and the list if it is looked at; a ValueError leaves all as it is."""
    before, names, refused = _every(model), [], ""
    try:
        returned = subject(model, targets, _Made)
    except ValueError as error:
        refused = f"it raised ValueError: {error}"
    else:
        try:
            names = expect_names(returned, "replace must return a list of names") if listed is not False else []
        except WrongReturn:
            if listed:
                raise
            names = None
    places = _places(model, before)
    if not exact:
        places = {name: "replaced" if how == FROM_ANOTHER else how for name, how in places.items()}
    return {"places": places, "refused": refused, "names": names}


def _places(model: nn.Module, before: list[tuple[str, nn.Module]]) -> dict[str, str]:
    return {name: _place(model, name, module) for name, module in before}


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
    return "replaced twice, one in the other" if isinstance(now.base, _Made) else FROM_ANOTHER


def _how(places: dict[str, str], names: Iterable[str]) -> str:
    hows = {places[name] for name in names}
    return hows.pop() if len(hows) == 1 else "some replaced, some not" if hows <= {"replaced", "untouched"} else "different"


def _ends(name, target):
    return name == target or name.endswith("." + target)


def everywhere(model, places, hits, make):
    new = {layer: make(layer) for layer in set(hits.values())}
    for name, layer in reversed(list(places)):  # what is inside another one first
        if layer in new:
            model.set_submodule(name, new[layer])


def first_names(model, hits, targets):
    return [name for name, module in model.named_modules() if module in hits.values()]


def solution(model, targets, make, search=_every, ends=_ends, kinds=nn.Module, refuse=any, put=everywhere, listed=first_names):
    """A right solution, in pieces that a misconception replaces."""
    places = search(model)
    hits = {name: layer for name, layer in places if any(ends(name, target) for target in targets)}
    missing = [target for target in targets if not any(ends(name, target) for name in hits)]
    if refuse(target in missing for target in targets):
        raise ValueError(f"nothing is called {missing}")
    hits = {name: layer for name, layer in hits.items() if isinstance(layer, kinds)}
    names = listed(model, hits, targets)
    put(model, places, hits, make)
    return names


def as_attributes(model, places, hits, make):
    for name, layer in hits.items():
        setattr(model, name, make(layer))


def one_for_each_name(model, places, hits, make):
    for name, layer in hits.items():
        model.set_submodule(name, make(layer))


def for_every_match(model, hits, targets):
    return [name for name in first_names(model, hits, targets) for target in targets if _ends(name, target)]


def in_the_order_of_the_targets(model, hits, targets):
    names = first_names(model, hits, targets)
    return sorted(names, key=lambda name: [_ends(name, target) for target in targets], reverse=True)


def all_names(model, hits, targets):
    return [name for name, module in _every(model) if module in hits.values()]


exercise.misconceptions_of(
    solution,
    {
        "part of a name": {"ends": lambda name, target: target in name},
        "anywhere in a name": {"ends": lambda name, target: f".{target}." in f".{name}."},
        "end of the letters": {"ends": str.endswith},
        "a dot that stands for any sign": {"ends": lambda name, target: re.search(rf"(^|\.){target}$", name)},
        "last component only": {"ends": lambda name, target: name.rpartition(".")[2] == target},
        "whole names only": {"ends": str.__eq__},
        "never a whole name": {"ends": lambda name, target: name.endswith("." + target)},
        "direct children only": {"search": lambda model: list(model.named_children())},
        "an attribute with dots": {"put": as_attributes},
        "only nn.Linear": {"kinds": nn.Linear},
        "listed for every match": {"listed": for_every_match},
        "in the order of the targets": {"listed": in_the_order_of_the_targets},
        "a shared layer by its first name": {"search": lambda model: list(model.named_modules())[1:]},
        "a new layer for every name": {"put": one_for_each_name},
        "a shared layer only where its name matches": {
            "put": lambda model, places, hits, make: everywhere(model, hits.items(), hits, make)
        },
        "listed under all its names": {"listed": all_names},
        "nothing found, nothing said": {"refuse": lambda missing: False},
        "an error only if nothing was found": {"refuse": all},
    },
)


@exercise.misconception("one target after another")
def one_target_after_another(model, targets, make):
    solution(model, targets, lambda layer: layer)  # raises if a target names nothing, and changes nothing
    names = [name for target in targets for name in solution(model, [target], make)]
    return sorted(names, key=list(dict(model.named_modules())).index)


@exercise.misconception("changed before the error")
def changed_before_the_error(model, targets, make):
    known = list(takewhile(lambda target: any(_ends(name, target) for name, _ in _every(model)), targets))
    names = solution(model, known, make)
    if known != targets:
        raise ValueError(f"nothing is called {targets[len(known)]}")
    return names
