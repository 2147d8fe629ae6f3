"""Exercise 4.1: exactly these parts train, all else is frozen."""

from collections.abc import Iterable
from operator import attrgetter

from torch import nn

from grader.checks import traces
from grader.checks.networks import linear, named, tied, with_statistics
from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Trial, expect_names
from helpers.backbones import BasicBlock
from helpers.finetune import train_only

exercise = Exercise(__name__, "4.1", train_only)


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
    return model


def _plain_network(trial: Trial) -> nn.Sequential:
    """Four layers without normalisation."""
    width = trial.integer(2, 5)
    return named(**{name: nn.Linear(width, width) for name in ("stem", "layer1", "layer2", "fc")})


def _deep_network(trial: Trial) -> nn.Sequential:
    """Eleven blocks, and two more of the same names inside `decoder`."""
    width = trial.integer(2, 5)
    decoder = named(blocks=linear(width, 2))
    return named(embed=nn.Linear(width, width), blocks=linear(width, 11), decoder=decoder, fc=nn.Linear(width, 3))


class _Asked(Experiment):
    """Draws a model and asks for parts of it by name."""

    def measure(self, subject, inputs):
        subject(inputs["model"], list(inputs["names"]))
        return _left(inputs["model"])


@exercise.experiment("the head alone")
class TheHeadAlone(_Asked):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _residual_network(trial), "names": ["fc"]}

    def facts(self, raw, inputs):
        norms = _norms(inputs["model"])
        return {
            "parameters of `fc`": _asked(raw, "fc"),
            "parameters of convolutions": _others(raw, "fc", *norms),
            "parameters of BatchNorm": "frozen" if _part(raw, *norms) == "frozen" else "not all frozen",
        }


@exercise.experiment("whatever was before")
class WhateverWasBefore(_Asked):
    points = 2

    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial).requires_grad_(False)
        model.fc.requires_grad_(True)
        return {"model": model, "names": [f"layer{trial.integer(1, 2)}"]}

    def facts(self, raw, inputs):
        (part,) = inputs["names"]
        return {
            "frozen before, asked for": _asked(raw, part),
            "trainable before, not asked for": _part(raw, "fc"),
            "frozen before, not asked for": _others(raw, part, "fc"),
        }


@exercise.experiment("whole names")
class WholeNames(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _deep_network(trial)}

    def measure(self, subject, inputs):
        names = expect_names(subject(inputs["model"], ["fc.bias", "blocks.1"]), "train_only must return a list of names")
        return _left(inputs["model"]) | {"names": names}

    def facts(self, raw, inputs):
        flags = raw["traces"]["flags"]
        returned = None  # whatever it is, the parameters that train are not the right ones
        if flags == {name: _in(name, "fc.bias", "blocks.1") for name in flags}:
            returned = "different"
            wanted = [name for name, _ in inputs["model"].named_parameters() if flags[name]]
            if sorted(raw["names"]) == sorted(wanted):
                order = "in their order" if raw["names"] == wanted else "in another order"
                returned = f"those of the trainable parameters, {order}"
        return {
            "parameters of `blocks.1`": _asked(raw, "blocks.1"),
            "`fc.bias`": _part(raw, "fc.bias"),
            "parameters of `blocks.10`": _part(raw, "blocks.10"),
            "parameters of `decoder.blocks.1`": _part(raw, "decoder.blocks.1"),
            "all others": _others(raw, "fc.bias", "blocks.1", "blocks.10", "decoder.blocks.1"),
            "the names returned": returned,
        }


@exercise.experiment("shared weight")
class SharedWeight(_Asked):
    def draw(self, trial: Trial) -> dict:
        return {"model": tied(trial.integer(6, 9), trial.integer(3, 5)), "names": ["head"]}

    def facts(self, raw, inputs):
        return {
            "the weight that `embed` and `head` share": _part(raw, "embed.words.weight", "head.weight"),
            "`head.bias`": _part(raw, "head.bias"),
            "parameters of `body`": _part(raw, "body"),
        }


@exercise.experiment("only flags change")
class OnlyFlagsChange(_Asked):
    def draw(self, trial: Trial) -> dict:
        model = _residual_network(trial)
        model.bn1.eval()  # as one that was frozen before
        return {"model": model, "names": ["fc"]}

    def facts(self, raw, inputs):
        after = raw["traces"]
        frozen = traces.some(name for name, trainable in after["flags"].items() if not trainable)
        return {"parameters that are frozen now": frozen} | traces.changes(
            inputs["model"], after, "parameters", "buffers", "modes"
        )


@exercise.experiment("unknown name")
class UnknownName(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial)
        model.fc.requires_grad_(False)
        return {"model": model, "names": ["fc", f"layer{trial.integer(3, 9)}"]}

    def measure(self, subject, inputs):
        came, _ = raised(lambda: subject(inputs["model"], inputs["names"]))
        return _left(inputs["model"]) | {"came": came}

    def facts(self, raw, inputs):
        changed = traces.some(traces.changed(inputs["model"], raw["traces"], "flags"))
        return {"what was raised": raw["came"], "flags that changed": None if raw["came"] == "nothing" else changed}


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
    return {"all": "trainable", "some": "some are trainable", "none": "frozen"}[traces.how_many(flags)]


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
    return names


@exercise.misconception("normalisation left trainable")
def normalisation_left_trainable(model, names):
    chosen = solution(model, names)
    for name in _norms(model):
        model.get_submodule(name).requires_grad_(True)
    return chosen


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
