"""Exercise 6.3: put something else in the place of the layers that are named."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import ClassVar

from torch import nn

from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Trial, expect_names
from helpers.lora import replace

exercise = Exercise(__name__, "6.3", replace)


class _Made(nn.Module):
    """What `make` makes here: it holds the layer that it replaces as `base`, as a LoRA layer does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base = layer


class _Replacing(Experiment):
    """Replaces layers in several models, each with targets of its own."""

    listed = False  # whether to look at the list that is returned: a missing return costs no more than it should
    beside: ClassVar[dict[str, str]] = {}  # a model's key -> the fact beside which it is shown that it was refused

    def measure(self, subject, inputs):
        return {key: _replaced(subject, inputs[key], targets, self.listed) for key, targets in inputs["targets"].items()}

    def notes(self, raw, inputs):
        return {fact: raw[key]["refused"] for key, fact in self.beside.items() if raw[key]["refused"]}


@exercise.experiment("whole components")
class WholeComponents(_Replacing):
    points = 3
    beside: ClassVar = {
        "one": "target `query`: layers of that name",
        "two": "target `0.query`: the layer `encoder.0.query`",
        "whole": "target `encoder.10.query`: that layer",
    }

    def draw(self, trial: Trial) -> dict:
        names = {
            "one": ("encoder.0.query", "encoder.10.query", "decoder.query"),
            "goes on": ("encoder.0.query_norm", "encoder.10.query_key"),
            "letters": ("encoder.0.subquery", "decoder.pre_query"),
            "two": ("encoder.0.query",),
            "ten": ("encoder.10.query",),
            "no dot": ("encoder.0_query",),
        }
        targets = {"one": ["query"], "two": ["0.query"], "whole": ["encoder.10.query"]}
        every = sorted({name for group in names.values() for name in group})
        models = {key: _tree({every[k]: nn.Linear(2, 2) for k in trial.permutation(len(every))}) for key in targets}
        return {"targets": targets, "names": names, **models}

    def facts(self, raw, inputs):
        names = inputs["names"]
        one, two, whole = (raw[key]["places"] for key in ("one", "two", "whole"))
        return {
            "target `query`: layers of that name": _how(one, names["one"]),
            "target `query`: names that go on after it, as `query_norm`": _how(one, names["goes on"]),
            "target `query`: names that end in the same letters, as `subquery`": _how(one, names["letters"]),
            "target `0.query`: the layer `encoder.0.query`": _how(two, names["two"]),
            "target `0.query`: the layer `encoder.10.query`": _how(two, names["ten"]),
            "target `0.query`: the layer `encoder.0_query`": _how(two, names["no dot"]),
            "target `encoder.10.query`: that layer": _how(whole, inputs["targets"]["whole"]),
        }


@exercise.experiment("any layer anywhere")
class AnyLayerAnywhere(_Replacing):
    points = 2
    beside: ClassVar = {"top": "a layer of the model itself", "deep": "layers inside other modules"}

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
        def settings() -> list:
            return [(module.training, [p.requires_grad for p in module.parameters()]) for _, module in before]

        model = inputs["model"]
        before = _every(model)
        settings_before = settings()
        raw = {
            "top": _replaced(subject, model, inputs["top"] + inputs["kinds"]),
            "deep": _replaced(subject, model, inputs["deep"]),
        }
        places = _places(model, before)
        order = [name for name in dict(_every(model)) if name in places]
        return raw | {
            "places": places,
            "order": "as it was" if order == list(places) else "another",
            "settings": "as they were" if settings() == settings_before else "different",
        }

    def facts(self, raw, inputs):
        deep = [name.replace("layer.3", "encoder.layer.3") for name in inputs["deep"]]
        rest = raw["places"].keys() - {*inputs["top"], *deep, *inputs["kinds"]}
        return {
            "a layer of the model itself": _how(raw["places"], inputs["top"]),
            "a convolution and an embedding": _how(raw["places"], inputs["kinds"]),
            "layers inside other modules": _how(raw["places"], deep),
            "all other modules": _how(raw["places"], rest),
            "the order of the modules": raw["order"],
            "`requires_grad` of the parameters, and modes": raw["settings"],
        }


@exercise.experiment("once")
class Once(_Replacing):
    points = 2
    listed = True

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
            "targets `query` and `attention.query`: times it is listed": both["names"].count(name),
            "targets `query` and `base`: the layer `attention.query`": inner["places"][name],
            "targets `query` and `base`: the model's own `base`": inner["places"]["tail.base"],
        }


@exercise.experiment("shared layer")
class SharedLayer(_Replacing):
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

        return {fact: new(key) for key, fact in self.beside.items()}


@exercise.experiment("nothing of that name")
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


@exercise.experiment("the list returned")
class TheListReturned(_Replacing):
    listed = True

    def draw(self, trial: Trial) -> dict:
        one, two, three = _words(trial, 3)
        names = [f"{place}.{word}" for place in ("first", "second") for word in (one, two, three)]
        several = _tree({name: nn.Linear(2, 2) for name in names})
        shared = _tree(dict.fromkeys([f"first.{one}", f"second.{one}"], nn.Linear(2, 2)))
        targets = {"several": [three, f"first.{two}", one], "shared": [one]}
        return {"targets": targets, "several": several, "shared": shared, "names of one": [f"first.{one}", f"second.{one}"]}

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
    words = "query", "key", "value", "dense", "gate"
    return [words[k] for k in trial.permutation(len(words))[:n]]


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


def _every(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules but the model itself, each under all its names."""
    return list(model.named_modules(remove_duplicate=False))[1:]


def _replaced(subject, model: nn.Module, targets: list[str], listed: bool = False) -> dict:
    """What stands in every place afterwards, and the list if it is looked at; a ValueError leaves all as it is."""
    before, names, refused = _every(model), [], ""
    try:
        returned = subject(model, targets, _Made)
    except ValueError as error:
        refused = f"it raised ValueError: {error}"
    else:
        names = expect_names(returned, "replace must return a list of names") if listed else []
    return {"places": _places(model, before), "refused": refused, "names": names}


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
    return "replaced twice, one in the other" if isinstance(now.base, _Made) else "made from another object"


def _how(places: dict[str, str], names: Iterable[str]) -> str:
    hows = {places[name] for name in names}
    return hows.pop() if len(hows) == 1 else "some replaced, some not" if hows <= {"replaced", "untouched"} else "different"


def _ends(name, target):
    return name == target or name.endswith("." + target)


def everywhere(model, places, hits, make):
    new = {layer: make(layer) for layer in set(hits.values())}
    for name, layer in places:
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
        "end of the letters": {"ends": str.endswith},
        "a dot that stands for any sign": {"ends": lambda name, target: re.search(rf"(^|\.){target}$", name)},
        "last component only": {"ends": lambda name, target: name.rpartition(".")[2] == target},
        "whole names only": {"ends": str.__eq__},
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
