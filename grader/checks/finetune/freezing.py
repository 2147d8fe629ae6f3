"""Exercise 4.1: exactly these parts train, all else is frozen."""

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import nn

from grader.checks import traces
from grader.checks.networks import linear, named, tied, with_statistics
from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Trial, expect_names
from helpers.backbones import BasicBlock
from helpers.finetune import train_only

exercise = Exercise(__name__, "4.1", train_only, core=3)

TRAINS = "trainable"


def _residual_network(trial: Trial) -> nn.Sequential:
    """Names as in a ResNet, one BatchNorm called `downsample.1`."""
    width = trial.integer(2, 4)
    model = named(
        conv1=nn.Conv2d(1, width, 3, bias=False),
        bn1=nn.BatchNorm2d(width),
        layer1=nn.Sequential(BasicBlock(width, width, stride=1)),
        layer2=nn.Sequential(BasicBlock(width, 2 * width, stride=2)),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(2 * width, 3),
    )
    for name in _norms(model):
        with_statistics(model.get_submodule(name), trial)
    model.scale = nn.Parameter(torch.tensor(2.0))  # in no module but the model itself
    return model


def _plain_network(trial: Trial) -> nn.Sequential:
    """Four layers without normalisation."""
    width = trial.integer(2, 5)
    return named(**{name: nn.Linear(width, width) for name in ("stem", "layer1", "layer2", "fc")})


def _deep_network(trial: Trial) -> nn.Sequential:
    """Twelve blocks, two more of the same names inside `decoder`, and whatever else a name could be taken for."""
    width = trial.integer(2, 5)
    blocks, decoder = linear(width, 12), named(blocks=linear(width, 2), fc=nn.Linear(width, 3))
    blocks[1] = BasicBlock(width, 2 * width, stride=2)  # a module with modules inside
    model = named(embed=nn.Linear(width, width), blocks=blocks, blocks_1=nn.Linear(width, width), decoder=decoder)
    model.fc = nn.Linear(width, 3)
    model.fc.bias_scale = nn.Parameter(torch.ones(3))
    return model


class _Asked(Experiment):
    """Draws a model and asks for parts of it by name."""

    def measure(self, subject, inputs):
        for names in inputs["names"]:
            subject(inputs["model"], list(names))
        return _left(inputs["model"])


@exercise.experiment("the head alone", 1)
class TheHeadAlone(_Asked):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _residual_network(trial), "names": [["fc"]]}

    def facts(self, raw, inputs):
        norms = _norms(inputs["model"])
        return {
            "parameters of `fc`": _asked(raw, "fc"),
            "parameters of convolutions": _others(raw, "fc", "scale", *norms),
            "a parameter of the model itself": _part(raw, "scale"),
            "parameters of BatchNorm": "frozen" if _part(raw, *norms) == "frozen" else "not all frozen",
        }


@exercise.experiment("whatever was before", 1)
class WhateverWasBefore(_Asked):
    points = 2

    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial).requires_grad_(False)
        model.fc.requires_grad_(True)
        model.stem.bias.requires_grad_(True)  # so a module is frozen in part
        return {"model": model, "names": [[f"layer{trial.integer(1, 2)}"]]}

    def facts(self, raw, inputs):
        ((part,),) = inputs["names"]
        return {
            "frozen before, asked for": _asked(raw, part),
            "trainable before, not asked for": _part(raw, "fc", "stem.bias"),
            "frozen before, not asked for": _others(raw, part, "fc", "stem.bias"),
        }


@exercise.experiment("one call after another", 1)
class OneCallAfterAnother(_Asked):
    def draw(self, trial: Trial) -> dict:
        return {"model": _plain_network(trial), "names": [["layer1", "fc.bias"], ["layer2.weight", "stem"]]}

    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        subject(inputs["model"], [])
        return raw | {"nothing": _left(inputs["model"])}

    def facts(self, raw, inputs):
        return {
            "asked for last": _part(raw, "layer2.weight", "stem"),
            "asked for before that": _part(raw, "layer1", "fc.bias"),
            "never asked for": _part(raw, "layer2.bias", "fc.weight"),
            "all of them, once nothing is asked for": _others(raw["nothing"]),
        }


@exercise.experiment("whole names", 2)
class WholeNames(_Asked):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _deep_network(trial), "names": [["fc.bias", "blocks.1"]]}

    def facts(self, raw, inputs):
        return {
            "parameters of `blocks.1`": _asked(raw, "blocks.1"),
            "`fc.bias`": _part(raw, "fc.bias"),
            "parameters of `blocks.10`": _part(raw, "blocks.10"),
            "parameters of `decoder.blocks.1`": _part(raw, "decoder.blocks.1"),
            "all others": _others(raw, "fc.bias", "blocks.1", "blocks.10", "decoder.blocks.1"),
        }


@exercise.experiment("names returned", 3)
class NamesReturned(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _residual_network(trial)
        model.layer1.append(model.layer1[0].conv1)  # so a parameter has two names, and is to be returned once
        return {"model": model, "names": ["fc.bias", "layer1.0", "layer1", "bn1.weight", "fc.bias"]}

    def measure(self, subject, inputs):
        names = expect_names(subject(inputs["model"], list(inputs["names"])), "train_only must return a list of names")
        return _left(inputs["model"]) | {"names": names}

    def facts(self, raw, inputs):
        flags, names = raw["traces"]["flags"], [name for name, _ in inputs["model"].named_parameters()]
        aliases = flags.keys() - names
        trainable = [name for name in names if flags[name]]
        asked = [name for name in names if _in(name, *inputs["names"])]
        if raw["names"] in (trainable, asked):
            return {"the names returned": "those of the trainable parameters, in their order"}
        if trainable != asked:
            return {"the names returned": None}  # whatever they are, the parameters that train are not the right ones
        returned = "different ones"
        if aliases & set(raw["names"]) and set(raw["names"]) - aliases == set(asked):
            returned = "those of the trainable parameters, one under each of its names"
        if set(raw["names"]) == set(asked):
            order = "in another order" if len(raw["names"]) == len(asked) else "some more than once"
            returned = f"those of the trainable parameters, {order}"
        return {"the names returned": "those that were asked for" if raw["names"] == inputs["names"] else returned}


@exercise.experiment("shared weight", 4)
class SharedWeight(Experiment):
    asked = ("embed", "head", "other", "body")

    def draw(self, trial: Trial) -> dict:
        words, width = trial.integer(6, 9), trial.integer(3, 5)
        models = {}
        for name in self.asked:
            models[name] = tied(words, width)
            models[name].other = nn.Linear(width, words)
            models[name].other.weight = models[name].head.weight  # so three modules share it
        return {"models": models}

    def measure(self, subject, inputs):
        raw = {}
        for name, model in inputs["models"].items():
            subject(model, [name])
            raw[name] = _left(model)
        return raw

    def facts(self, raw, inputs):
        shared = ("embed.words.weight", "head.weight", "other.weight")
        beside = [self.exactly(raw[name]["traces"]["flags"], name, shared) for name in self.asked]
        return {
            "what makes the weight of `embed`, `head` and `other` train": [
                n for n in self.asked if _part(raw[n], *shared) == TRAINS
            ],
            "parameters beside it": "those that were asked for" if all(beside) else "different ones",
        }

    def exactly(self, flags: dict[str, bool], asked: str, shared: tuple[str, ...]) -> bool:
        return all(trainable == _in(name, asked) for name, trainable in flags.items() if name not in shared)


@exercise.experiment("only flags change", 6)
class OnlyFlagsChange(_Asked):
    def draw(self, trial: Trial) -> dict:
        model = _residual_network(trial)
        model.bn1.eval()  # as one that was frozen before
        return {"model": model, "names": [["fc"]]}

    def facts(self, raw, inputs):
        after = raw["traces"]
        changes = traces.changes(inputs["model"], after, "parameters", "buffers", "modes")
        frozen = not all(after["flags"].values())
        return changes if frozen or set(changes.values()) != {"none"} else dict.fromkeys(changes)


@exercise.experiment("unknown name", 5)
class UnknownName(Experiment):
    def draw(self, trial: Trial) -> dict:
        models, unknown = [], ([f"layer{trial.integer(3, 9)}"], ["layer"], ["fc.weights"], ["bias"], ["layer1.fc"])
        for _ in unknown:
            models.append(_plain_network(trial))
            models[-1].fc.requires_grad_(False)
        return {"models": models, "names": [["fc", *names] if k % 2 else [*names, "fc"] for k, names in enumerate(unknown)]}

    def measure(self, subject, inputs):
        results = []
        for model, names in zip(inputs["models"], inputs["names"], strict=True):
            came, _ = raised(lambda model=model, names=names: subject(model, names))
            results.append(_left(model) | {"came": came})
        return {"results": results}

    def facts(self, raw, inputs):
        came = next((result["came"] for result in raw["results"] if result["came"] != "ValueError"), "ValueError")
        before_and_after = zip(inputs["models"], raw["results"], strict=True)
        changed = traces.some(
            name for model, result in before_and_after for name in traces.changed(model, result["traces"], "flags")
        )
        return {"what was raised": came, "flags that changed": None if came == "nothing" else changed}


def _left(model: nn.Module) -> dict:
    """What became of a model, and whether one of its modules was given the attribute of a parameter."""
    attribute = any(vars(module).get("requires_grad") is True for module in model.modules())
    return {"traces": traces.of(model), "attribute": attribute}


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def _in(name: str, *parts: str) -> bool:
    """Whether a parameter is one of these parts or inside one of them, by its name."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def _part(raw: dict, *parts: str) -> str:
    return _how(trainable for name, trainable in raw["traces"]["flags"].items() if _in(name, *parts))


def _others(raw: dict, *parts: str) -> str:
    return _how(trainable for name, trainable in raw["traces"]["flags"].items() if not _in(name, *parts))


def _asked(raw: dict, part: str) -> str:
    how = _part(raw, part)
    return "frozen; a module was given an attribute `requires_grad`" if how == "frozen" and raw["attribute"] else how


def _how(flags: Iterable[bool]) -> str:
    return {"all": TRAINS, "some": "some are trainable", "none": "frozen"}[traces.how_many(flags)]


def _check(model: nn.Module, names: list[str]) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := set(names) - known:
        raise ValueError(f"not in the model: {unknown}")


def solution(model, names, *, check=_check, inside=_in, every_name=True, flag=lambda before, asked: asked):
    """A right solution, in pieces that a misconception replaces."""
    check(model, names)
    every = model.named_parameters(remove_duplicate=not every_name)
    chosen = {parameter for name, parameter in every if inside(name, *names)}
    for parameter in model.parameters():
        parameter.requires_grad = flag(parameter.requires_grad, parameter in chosen)
    return [name for name, parameter in model.named_parameters() if parameter in chosen]


exercise.misconceptions_of(
    solution,
    {
        "beginning of a name": {"inside": lambda name, *names: name.startswith(names)},
        "part of a name": {"inside": lambda name, *names: any(part in name for part in names)},
        "only freezing": {"flag": lambda before, asked: before and asked},
        "only unfreezing": {"flag": lambda before, asked: before or asked},
        "no flag set": {"flag": lambda before, asked: before},
        "everything frozen": {"flag": lambda before, asked: False},
        "unknown name ignored": {"check": lambda model, names: None},
        "shared weight by its first name": {"every_name": False},
    },
)


@exercise.misconception("attribute of a module")
def attribute_of_a_module(model, names):
    _check(model, names)
    model.requires_grad_(False)
    for name in names:
        attrgetter(name)(model).requires_grad = True
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@exercise.misconception("normalisation left trainable")
def normalisation_left_trainable(model, names):
    chosen = solution(model, names)
    for name in _norms(model):
        model.get_submodule(name).requires_grad_(True)
    return chosen


@exercise.misconception("shared weight by its last name")
def shared_weight_by_its_last_name(model, names):
    _check(model, names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad = _in(name, *names)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@exercise.misconception("own parameters alone")
def own_parameters_alone(model, names):
    _check(model, names)
    chosen = {parameter for name in names for parameter in _own(model, name)}
    for parameter in model.parameters():
        parameter.requires_grad = parameter in chosen
    return [name for name, parameter in model.named_parameters() if parameter in chosen]


def _own(model: nn.Module, name: str) -> list[nn.Parameter]:
    part = attrgetter(name)(model)
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters(recurse=False))


@exercise.misconception("last children")
def last_children(model, names):
    _check(model, names)
    return solution(model, [name for name, _ in model.named_children()][-len(names) :])


@exercise.misconception("eval mode too")
def eval_mode_too(model, names):
    return solution(model.eval(), names)


@exercise.misconception("changed before the error")
def changed_before_the_error(model, names):
    model.requires_grad_(False)
    return solution(model, names)
