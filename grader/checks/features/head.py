"""Exercise 2.1: take off a head and keep the model."""

import copy
from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.networks import with_statistics
from grader.checks.traces import how_many
from grader.experiment import Exercise, Experiment, Trial, expect_tensor, wrong_return
from grader.near import near, which
from helpers.features import drop_head

exercise = Exercise(__name__, "2.1", drop_head)


class _Convolutional(nn.Module):
    """A network whose forward does more than its children: two ReLUs are functions, the second right before the head."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        half = trial.normal(trial.integer(3, 4), 6)
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3), with_statistics(nn.BatchNorm2d(6), trial))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Linear(6, 2 * len(half), bias=False)
        self.hidden.weight.data.copy_(torch.cat([half, -half]))  # so that the ReLU after it always has something to do
        self.fc = nn.Linear(2 * len(half), 3)

    def before_the_last_relu(self, images: Tensor) -> Tensor:
        return self.hidden(self.pool(F.relu(self.stem(images))))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.before_the_last_relu(images)))


class _OutOfOrder(nn.Module):
    """A network that defines its head before another layer; all layers are square, so any order of them runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.head = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def before_the_head(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.before_the_head(x))


class _KnownFeatures(Experiment):
    """Compares the features with what `known(model, images)` has."""

    head: ClassVar[str]

    def measure(self, subject, inputs):
        return {"features": _features(_backbone(subject, inputs["model"], self.head), inputs["images"])}

    def facts(self, raw, inputs):
        with torch.no_grad():
            return {"the features": which(raw["features"], self.known(inputs["model"], inputs["images"]))}


@exercise.experiment("steps of forward")
class StepsOfForward(_KnownFeatures):
    points = 2
    head = "fc"

    def draw(self, trial: Trial) -> dict:
        return {"model": _Convolutional(trial).eval(), "images": trial.normal(7, 1, 8, 8)}

    def known(self, model, images):
        return {
            "what enters `fc`": F.relu(model.before_the_last_relu(images)),
            "what `fc` gives": model(images),
            "what the layer before `fc` gives": model.before_the_last_relu(images),
            "what the children give, one after the other": nn.Sequential(*list(model.children())[:-1])(images),
        }


@exercise.experiment("nested head")
class NestedHead(_KnownFeatures):
    head = "classifier.2"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(7, 9)
        features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        classifier = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        model = nn.Sequential(OrderedDict(features=features, classifier=classifier))
        return {"model": model.eval(), "images": 3 * trial.normal(7, 1, 8, 8)}

    def known(self, model, images):
        pooled = model.features(images)
        return {
            "what enters `classifier.2`": model.classifier[:2](pooled),
            "what `classifier.2` gives": model(images),
            "what enters all of `classifier`": pooled,
        }


@exercise.experiment("head by name")
class HeadByName(_KnownFeatures):
    head = "head"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width).eval(), "images": 2 * trial.normal(7, width)}

    def known(self, model, images):
        first = model.first(images)
        return {
            "what enters `head`": model.before_the_head(images),
            "what `head` gives": model(images),
            "what `head` gives without the layer defined last": model.head(torch.tanh(torch.tanh(first))),
            "what the layer defined before `head` gives": first,
            "what the children give, one after the other": model.head(first),
        }


@exercise.experiment("model keeps its head")
class ModelKeepsItsHead(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _Convolutional(trial).eval(), "images": trial.normal(7, 1, 8, 8)}

    def measure(self, subject, inputs):
        model, images = inputs["model"], inputs["images"]
        backbone = _backbone(subject, model, "fc")
        before = _features(model, images).clone()
        _features(backbone, images)
        return {"before": before, "after": _features(model, images)}

    def facts(self, raw, inputs):
        model, images = inputs["model"], inputs["images"]
        with torch.no_grad():
            known = {"its logits": model(images), "what enters its head": F.relu(model.before_the_last_relu(images))}
        return {
            "what the model gives once drop_head has returned": which(raw["before"], known),
            "what the model gives once features were computed": which(raw["after"], known),
        }


@exercise.experiment("model can go on training")
class ModelCanGoOnTraining(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width), "images": trial.normal(4, width)}  # in train mode, as every new model

    def measure(self, subject, inputs):
        model = inputs["model"]
        _features(_backbone(subject, model, "head"), inputs["images"])
        return {
            "modules of the model in train mode": how_many(module.training for module in model.modules()),
            "parameters of the model with requires_grad": how_many(p.requires_grad for p in model.parameters()),
        }

    def facts(self, raw, inputs):
        return raw


@exercise.experiment("every call")
class EveryCall(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width).eval(), "batches": [2 * trial.normal(6, width), 2 * trial.normal(6, width)]}

    def measure(self, subject, inputs):
        backbone = _backbone(subject, inputs["model"], "head")
        first, second = inputs["batches"]
        calls = {"first": first, "second": second, "again": first}
        raw = {name: _features(backbone, images).clone() for name, images in calls.items()}
        return raw | {"single": _features(backbone, second[:1], rows="n")}

    def facts(self, raw, inputs):
        first, second = raw["first"], raw["second"]
        known = {"its row in the batch": second[:1], "those of the first batch": first}
        return {
            "features of a second batch": "those of the first batch" if near(second, first) else "its own",
            "features of the first batch, computed again": "the same" if near(raw["again"], first) else "different",
            "features of a single image": which(raw["single"], known),
        }


def _backbone(subject, model: nn.Module, name: str):
    backbone = subject(model, name)
    if not callable(backbone):
        raise wrong_return("drop_head must return a module or a function", backbone)
    return backbone


def _features(backbone, images: Tensor, rows: int | str | None = None) -> Tensor:
    with torch.no_grad():
        features = backbone(images)
    return expect_tensor(features, (rows or len(images), "in_features"), "the features").detach()


def solution(model, name, copied=copy.deepcopy, place=lambda model, name: name.rpartition(".")[::2]):
    """A right solution, nn.Identity in the head's place in a copy of the model, in pieces that a misconception replaces."""
    parent, attribute = place(model, name)
    backbone = copied(model)
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return backbone


def _last_linear(model, name):
    *_, last = (key for key, module in model.named_modules() if isinstance(module, nn.Linear))
    return last.rpartition(".")[::2]


exercise.misconceptions_of(
    solution,
    {
        "head removed in place": {"copied": lambda model: model},
        "whole classifier removed": {"place": lambda model, name: ("", name.split(".")[0])},
        "dotted name as one attribute": {"place": lambda model, name: ("", name)},
        "always fc": {"place": lambda model, name: ("", "fc")},
        "last layer by order of definition": {"place": _last_linear},
        "model put into eval mode": {"copied": lambda model: copy.deepcopy(model.eval())},
    },
)


@exercise.misconception("children without the last")
def children_without_the_last(model, name):
    return nn.Sequential(*list(model.children())[:-1])


def hooked(model, name, layer=nn.Module.get_submodule, catch=lambda entered, left: entered[0], call=-1):
    """A right solution, a hook at the head that catches what enters it, in pieces that a misconception replaces."""
    caught = []
    layer(model, name).register_forward_hook(lambda module, entered, left: caught.append(catch(entered, left)))

    def features(images):
        model(images)
        return caught[call]

    return features


def _layer_before(model, name):
    names = list(dict(model.named_modules()))
    return model.get_submodule(names[names.index(name) - 1])


exercise.misconceptions_of(
    hooked,
    {
        "output of the head": {"catch": lambda entered, left: left},
        "output of the layer before": {"layer": _layer_before, "catch": lambda entered, left: left},
        "first batch kept": {"call": 0},
    },
)
