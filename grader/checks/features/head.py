"""Exercise 2.1: take off a head and keep the model."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, expect_tensor, wrong_return
from grader.near import near
from helpers.features import drop_head

exercise = Exercise(__name__, "2.1", drop_head)


class _Convolutional(nn.Module):
    """A network whose forward does more than its children: two ReLUs are functions, the second right before the head."""

    def __init__(self, trial: Trial, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.copy_(trial.normal(6))
        self.norm.running_var.copy_(0.5 + trial.normal(6).square())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(6, width, bias=False)
        half = trial.normal(width // 2, 6)
        self.hidden.weight.data.copy_(torch.cat([half, -half]))  # so that the ReLU after it always has something to do
        self.fc = nn.Linear(width, classes)

    def before_the_last_relu(self, images: Tensor) -> Tensor:
        return self.hidden(self.flatten(self.pool(F.relu(self.norm(self.conv(images))))))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.before_the_last_relu(images)))


class _Nested(nn.Module):
    """A network whose head is the last of three layers of its classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


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


@exercise.experiment("steps of forward")
class StepsOfForward(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        model = _Convolutional(trial, width=2 * trial.integer(3, 4), classes=3).eval()
        return {"model": model, "images": trial.normal(7, 1, 8, 8)}

    def measure(self, subject, inputs):
        return {"features": _features(_backbone(subject, inputs["model"], "fc"), inputs["images"])}

    def facts(self, raw, inputs):
        model, images = inputs["model"], inputs["images"]
        with torch.no_grad():
            known = {
                "what enters `fc`": F.relu(model.before_the_last_relu(images)),
                "what `fc` gives": model(images),
                "what the layer before `fc` gives": model.before_the_last_relu(images),
                "what the children give, one after the other": nn.Sequential(*list(model.children())[:-1])(images),
            }
        return {"the features": _which(raw["features"], known)}


@exercise.experiment("nested head")
class NestedHead(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": _Nested(width=trial.integer(7, 9), classes=3).eval(), "images": 3 * trial.normal(7, 1, 8, 8)}

    def measure(self, subject, inputs):
        return {"features": _features(_backbone(subject, inputs["model"], "classifier.2"), inputs["images"])}

    def facts(self, raw, inputs):
        model, images = inputs["model"], inputs["images"]
        with torch.no_grad():
            pooled = model.features(images)
            known = {
                "what enters `classifier.2`": model.classifier[:2](pooled),
                "what `classifier.2` gives": model(images),
                "what enters all of `classifier`": pooled,
            }
        return {"the features": _which(raw["features"], known)}


@exercise.experiment("head by name")
class HeadByName(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width).eval(), "images": 2 * trial.normal(7, width)}

    def measure(self, subject, inputs):
        return {"features": _features(_backbone(subject, inputs["model"], "head"), inputs["images"])}

    def facts(self, raw, inputs):
        model, x = inputs["model"], inputs["images"]
        with torch.no_grad():
            first = model.first(x)
            known = {
                "what enters `head`": model.before_the_head(x),
                "what `head` gives": model(x),
                "what `head` gives without the layer defined last": model.head(torch.tanh(torch.tanh(first))),
                "what the layer defined before `head` gives": first,
                "what the children give, one after the other": model.head(first),
            }
        return {"the features": _which(raw["features"], known)}


@exercise.experiment("model keeps its head")
class ModelKeepsItsHead(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _Convolutional(trial, width=6, classes=3).eval(), "images": trial.normal(7, 1, 8, 8)}

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
            "what the model gives once drop_head has returned": _which(raw["before"], known),
            "what the model gives once features were computed": _which(raw["after"], known),
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
            "modes": [module.training for module in model.modules()],
            "trainable": [parameter.requires_grad for parameter in model.parameters()],
        }

    def facts(self, raw, inputs):
        return {
            "modules of the model in train mode": "all" if all(raw["modes"]) else "not all",
            "parameters of the model with requires_grad": "all" if all(raw["trainable"]) else "not all",
        }


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
        return raw | {"one": _features(backbone, second[:1], rows="n")}

    def facts(self, raw, inputs):
        first, second = raw["first"], raw["second"]
        return {
            "features of a second batch": "those of the first batch" if near(second, first) else "its own",
            "features of the first batch, computed again": "the same" if near(raw["again"], first) else "different",
            "features of a single image": _which(
                raw["one"], {"its row in the batch": second[:1], "those of the first batch": first}
            ),
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


def _which(features: Tensor, known: dict[str, Tensor]) -> str:
    """The first of the known results that the features are equal to."""
    return next((name for name, tensor in known.items() if near(features, tensor)), "something else")


def _without(model: nn.Module, name: str) -> nn.Module:
    """Put nn.Identity in the place of a layer of `model`, which may be nested."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return model


@exercise.misconception("children without the last")
def children_without_the_last(model, name):
    return nn.Sequential(*list(model.children())[:-1])


@exercise.misconception("head removed in place")
def head_removed_in_place(model, name):
    return _without(model, name)


@exercise.misconception("output of the head")
def output_of_the_head(model, name):
    def logits(images):
        caught = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, entered, left: caught.append(left))
        model(images)
        handle.remove()
        return caught[0]

    return logits


@exercise.misconception("output of the layer before")
def output_of_the_layer_before(model, name):
    names = list(dict(model.named_modules()))
    before = model.get_submodule(names[names.index(name) - 1])

    def features(images):
        caught = []
        handle = before.register_forward_hook(lambda module, entered, left: caught.append(left))
        model(images)
        handle.remove()
        return caught[0]

    return features


@exercise.misconception("whole classifier removed")
def whole_classifier_removed(model, name):
    return _without(copy.deepcopy(model), name.split(".")[0])


@exercise.misconception("dotted name as one attribute")
def dotted_name_as_one_attribute(model, name):
    backbone = copy.deepcopy(model)
    setattr(backbone, name, nn.Identity())
    return backbone


@exercise.misconception("always fc")
def always_fc(model, name):
    backbone = copy.deepcopy(model)
    backbone.fc = nn.Identity()
    return backbone


@exercise.misconception("last layer by order of definition")
def last_layer_by_order_of_definition(model, name):
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    return _without(copy.deepcopy(model), linear[-1])


@exercise.misconception("first batch kept")
def first_batch_kept(model, name):
    caught = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, entered: caught.append(entered[0]))

    def features(images):
        model(images)
        return caught[0]

    return features


@exercise.misconception("model put into eval mode")
def model_put_into_eval_mode(model, name):
    model.eval()
    return _without(copy.deepcopy(model), name)
