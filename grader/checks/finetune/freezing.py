"""Exercise 4.1: exactly these parts train, all else is frozen."""

from collections import OrderedDict
from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from helpers import expect
from helpers.backbones import BasicBlock
from helpers.finetune import train_only

exercise = Exercise(__name__, "4.1", train_only)


def _residual_network(trial: Trial) -> nn.Sequential:
    """Names as in a ResNet, one BatchNorm called `downsample.1`; statistics that are not those of fresh layers."""
    width = trial.integer(2, 4)
    layers = {
        "conv1": nn.Conv2d(1, width, 3, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "layer1": nn.Sequential(BasicBlock(width, width, stride=1)),
        "layer2": nn.Sequential(BasicBlock(width, 2 * width, stride=2)),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(2 * width, 3),
    }
    model = nn.Sequential(OrderedDict(layers))
    for norm in _norms(model).values():
        norm.running_mean.copy_(trial.normal(norm.num_features))
        norm.running_var.copy_(0.5 + trial.normal(norm.num_features).square())
    return model


def _plain_network(trial: Trial) -> nn.Sequential:
    """Four layers without normalisation."""
    width = trial.integer(2, 5)
    names = "stem", "layer1", "layer2", "fc"
    return nn.Sequential(OrderedDict((name, nn.Linear(width, width)) for name in names))


def _deep_network(trial: Trial) -> nn.Sequential:
    """Eleven blocks, and two more of the same names inside `decoder`."""
    width = trial.integer(2, 5)
    parts = {
        "embed": nn.Linear(width, width),
        "blocks": nn.Sequential(*(nn.Linear(width, width) for _ in range(11))),
        "decoder": nn.Sequential(OrderedDict(blocks=nn.Sequential(*(nn.Linear(width, width) for _ in range(2))))),
        "fc": nn.Linear(width, 3),
    }
    return nn.Sequential(OrderedDict(parts))


class _Tied(nn.Module):
    """A language model in small: its head and its embedding share one weight."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (n, words of a text) -> the same and a logit for each known word
        return self.head(torch.tanh(self.body(self.embed(tokens))))


@exercise.experiment("the head alone")
class TheHeadAlone(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _residual_network(trial)}

    def measure(self, subject, inputs):
        subject(inputs["model"], ["fc"])
        return _flags(inputs["model"])

    def facts(self, raw, inputs):
        norms = tuple(_norms(inputs["model"]))
        return {
            "parameters of `fc`": _asked(raw, "fc"),
            "parameters of convolutions": _others(raw, "fc", *norms),
            "parameters of BatchNorm": "frozen" if _part(raw, *norms) == "frozen" else "not all frozen",
        }


@exercise.experiment("whatever was before")
class WhateverWasBefore(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial).requires_grad_(False)
        model.fc.requires_grad_(True)
        return {"model": model, "part": f"layer{trial.integer(1, 2)}"}

    def measure(self, subject, inputs):
        subject(inputs["model"], [inputs["part"]])
        return _flags(inputs["model"])

    def facts(self, raw, inputs):
        part = inputs["part"]
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
        model = inputs["model"]
        names = _names(subject(model, ["fc.bias", "blocks.1"]))
        return _flags(model) | {"names": names, "order": [name for name, _ in model.named_parameters()]}

    def facts(self, raw, inputs):
        returned = None  # whatever it is, the parameters that train are not the right ones
        if raw["trainable"] == {name: _in(name, "fc.bias", "blocks.1") for name in raw["trainable"]}:
            returned = "different"
            wanted = [name for name in raw["order"] if raw["trainable"][name]]
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
class SharedWeight(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": _Tied(trial.integer(6, 9), trial.integer(3, 5))}

    def measure(self, subject, inputs):
        subject(inputs["model"], ["head"])
        return _flags(inputs["model"])

    def facts(self, raw, inputs):
        return {
            "the weight that `embed` and `head` share": _part(raw, "embed.weight", "head.weight"),
            "`head.bias`": _part(raw, "head.bias"),
            "parameters of `body`": _part(raw, "body"),
        }


@exercise.experiment("only flags change")
class OnlyFlagsChange(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _residual_network(trial)
        model.bn1.eval()  # as one that was frozen before
        return {"model": model}

    def measure(self, subject, inputs):
        model = inputs["model"]
        subject(model, ["fc"])
        return _flags(model) | {
            "state": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            "modes": {name: module.training for name, module in model.named_modules()},
        }

    def facts(self, raw, inputs):
        before = inputs["model"]
        parameters = dict(before.named_parameters())
        moved = {name for name, tensor in before.state_dict().items() if not _same(raw["state"].get(name), tensor)}
        changes = {(module.training, raw["modes"].get(name)) for name, module in before.named_modules()}
        return {
            "parameters that are frozen now": "none" if all(raw["trainable"].values()) else "some",
            "parameters whose values changed": "some" if moved & parameters.keys() else "none",
            "buffers that moved": "some" if moved - parameters.keys() else "none",
            "modules switched to eval mode": "some" if (True, False) in changes else "none",
            "modules switched to train mode": "some" if (False, True) in changes else "none",
        }


@exercise.experiment("unknown name")
class UnknownName(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _plain_network(trial)
        model.fc.requires_grad_(False)
        return {"model": model, "names": ["fc", f"layer{trial.integer(3, 9)}"]}

    def measure(self, subject, inputs):
        came = "nothing"
        try:
            subject(inputs["model"], inputs["names"])
        except NotImplementedError:
            raise  # the stub's
        except Exception as error:
            came = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        return _flags(inputs["model"]) | {"came": came}

    def facts(self, raw, inputs):
        before = _flags(inputs["model"])["trainable"]
        changed = "some" if raw["trainable"] != before else "none"
        return {"what was raised": raw["came"], "flags that changed": None if raw["came"] == "nothing" else changed}


def _flags(model: nn.Module) -> dict:
    """Which parameters are trainable, by each of their names; and whether a module was given the attribute of a parameter."""
    return {
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)},
        "attribute": any(vars(module).get("requires_grad") is True for module in model.modules()),
    }


def _names(value: object) -> list[str]:
    if isinstance(value, str | set | frozenset | Tensor) or not isinstance(value, Iterable):
        raise wrong_return("train_only must return a list of names", value)
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise WrongReturn(f"train_only must return a list of names, got a list with {expect.describe(name)}.")
    return names


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def _in(name: str, *parts: str) -> bool:
    """Whether a parameter is one of these parts or inside one of them, by its name."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def _part(raw: dict, *parts: str) -> str:
    return _how({flag for name, flag in raw["trainable"].items() if _in(name, *parts)})


def _others(raw: dict, *parts: str) -> str:
    return _how({flag for name, flag in raw["trainable"].items() if not _in(name, *parts)})


def _asked(raw: dict, part: str) -> str:
    how = _part(raw, part)
    return "frozen; a module was given an attribute `requires_grad`" if how == "frozen" and raw["attribute"] else how


def _how(flags: set[bool]) -> str:
    return "some are trainable" if len(flags) > 1 else "trainable" if True in flags else "frozen"


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _known(model: nn.Module, names: list[str]) -> dict:
    """All modules and parameters by name, once it is certain that `names` are among them."""
    things = dict(model.named_modules()) | dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in things]
    if unknown:
        raise ValueError(f"not in the model: {unknown}")
    return things


def _chosen(model: nn.Module, names: list[str]) -> set[nn.Parameter]:
    """The parameters in those parts."""
    chosen = set()
    for name, thing in _known(model, names).items():
        if name in names:
            chosen.update([thing] if isinstance(thing, nn.Parameter) else thing.parameters())
    return chosen


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@exercise.misconception("attribute of a module")
def attribute_of_a_module(model, names):
    _known(model, names)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in names:
        attrgetter(name)(model).requires_grad = True
    return _trainable(model)


@exercise.misconception("beginning of a name")
def beginning_of_a_name(model, names):
    _known(model, names)
    every = list(model.named_parameters(remove_duplicate=False))
    chosen = {parameter for name, parameter in every if name.startswith(tuple(names))}
    for _, parameter in every:
        parameter.requires_grad = parameter in chosen
    return _trainable(model)


@exercise.misconception("part of a name")
def part_of_a_name(model, names):
    _known(model, names)
    every = list(model.named_parameters(remove_duplicate=False))
    chosen = {parameter for name, parameter in every if any(part in name for part in names)}
    for _, parameter in every:
        parameter.requires_grad = parameter in chosen
    return _trainable(model)


@exercise.misconception("only freezing")
def only_freezing(model, names):
    chosen = _chosen(model, names)
    for parameter in model.parameters():
        if parameter not in chosen:
            parameter.requires_grad_(False)
    return _trainable(model)


@exercise.misconception("only unfreezing")
def only_unfreezing(model, names):
    for parameter in _chosen(model, names):
        parameter.requires_grad_(True)
    return _trainable(model)


@exercise.misconception("no flag set")
def no_flag_set(model, names):
    chosen = _chosen(model, names)
    return [name for name, parameter in model.named_parameters() if parameter in chosen]


@exercise.misconception("everything frozen")
def everything_frozen(model, names):
    for parameter in _chosen(model, names):
        parameter.requires_grad = True
    model.requires_grad_(False)
    return _trainable(model)


@exercise.misconception("normalisation left trainable")
def normalisation_left_trainable(model, names):
    chosen = _chosen(model, names)
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = parameter in chosen
    return _trainable(model)


@exercise.misconception("last children")
def last_children(model, names):
    _known(model, names)
    model.requires_grad_(False)
    for child in list(model.children())[-len(names) :]:
        child.requires_grad_(True)
    return _trainable(model)


@exercise.misconception("eval mode too")
def eval_mode_too(model, names):
    chosen = _chosen(model.eval(), names)
    for parameter in model.parameters():
        parameter.requires_grad = parameter in chosen
    return _trainable(model)


@exercise.misconception("unknown name ignored")
def unknown_name_ignored(model, names):
    things = _known(model, [])
    chosen = _chosen(model, [name for name in names if name in things])
    for parameter in model.parameters():
        parameter.requires_grad = parameter in chosen
    return _trainable(model)


@exercise.misconception("changed before the error")
def changed_before_the_error(model, names):
    model.requires_grad_(False)
    for name in names:
        _known(model, [name])[name].requires_grad_(True)
    return _trainable(model)


@exercise.misconception("shared weight by its first name")
def shared_weight_by_its_first_name(model, names):
    _known(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _in(name, *names)
    return _trainable(model)
