"""Exercise 2.1: take off a head and keep the model."""

import copy
import gc
from contextlib import contextmanager, suppress
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.features import left_behind
from grader.checks.networks import named, with_statistics
from grader.experiment import Exercise, Experiment, Trial, expect_tensor, wrong_return
from grader.near import near, which
from helpers.features import drop_head

exercise = Exercise(__name__, "2.1", drop_head, core=5)


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
    """A network that defines its head between two other layers, whose names contain the head's.

    All layers are square, so any order of them runs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_head = nn.Linear(width, width)
        self.head = nn.Linear(width, width)
        self.head_mix = nn.Linear(width, width)
        self.act = nn.Tanh()

    def before_the_head(self, x: Tensor) -> Tensor:
        return self.act(self.head_mix(self.act(self.pre_head(x))))

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


@exercise.experiment("steps of forward", 1)
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


@exercise.experiment("nested head", 2)
class NestedHead(Experiment):
    """A head inside another module, and one inside two; "deep" hides two more layers behind a name of three parts."""

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(7, 9)
        features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        classifier = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        flat = named(features=features, classifier=classifier).eval()
        deep = named(features=copy.deepcopy(features), classifier=nn.Sequential(nn.Linear(6, 6), nn.ReLU(), classifier)).eval()
        return {"flat": flat, "deep": copy.deepcopy(deep), "images": 3 * trial.normal(7, 1, 8, 8)}

    def measure(self, subject, inputs):
        heads = {"flat": "classifier.2", "deep": "classifier.2.2"}
        return {name: _features(_backbone(subject, inputs[name], head), inputs["images"]) for name, head in heads.items()}

    def facts(self, raw, inputs):
        flat, deep = inputs["flat"], inputs["deep"]
        with torch.no_grad():
            pooled, hidden = flat.features(inputs["images"]), deep.features(inputs["images"])
            known = {
                "what enters `classifier.2`": flat.classifier[:2](pooled),
                "what `classifier.2` gives": flat(inputs["images"]),
                "what enters all of `classifier`": pooled,
            }
            known_deep = {
                "what enters `classifier.2.2`": deep.classifier[2][:2](deep.classifier[:2](hidden)),
                "what `classifier.2.2` gives": deep(inputs["images"]),
                "what enters all of `classifier`": hidden,
                "what enters all of `classifier.2`": deep.classifier[:2](hidden),
            }
        return {
            "the features before `classifier.2`": which(raw["flat"], known),
            "the features before `classifier.2.2`": which(raw["deep"], known_deep),
        }


@exercise.experiment("head by name", 2)
class HeadByName(_KnownFeatures):
    head = "head"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width).eval(), "images": 2 * trial.normal(7, width)}

    def known(self, model, images):
        first = model.pre_head(images)
        return {
            "what enters `head`": model.before_the_head(images),
            "what `head` gives": model(images),
            "what `head` gives without the layer defined last": model.head(torch.tanh(torch.tanh(first))),
            "what the layer defined before `head` gives": first,
            "what enters the layer defined last": model.act(first),
            "what enters `pre_head`": images,
            "what the children give, one after the other": model.head_mix(model.head(first)),
        }


@exercise.experiment("every call", 3)
class EveryCall(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        return {"model": _OutOfOrder(width).eval(), "batches": [2 * trial.normal(6, width), 2 * trial.normal(6, width)]}

    def measure(self, subject, inputs):
        backbone = _backbone(subject, inputs["model"], "head")
        first, second = inputs["batches"]
        calls = {"first": first, "second": second, "again": first}
        raw = {name: _features(backbone, images).clone() for name, images in calls.items()}
        raw["larger"] = _features(backbone, torch.cat([second, first]), rows="n")
        return raw | {"single": _features(backbone, second[:1], rows="n")}

    def facts(self, raw, inputs):
        first, second = raw["first"], raw["second"]
        known = {"its row in the batch": second[:1], "those of the first batch": first}
        return {
            "features of a second batch": which(second, {"those of the first batch": first}, "its own"),
            "features of the first batch, computed again": "the same" if near(raw["again"], first) else "different",
            "features of a larger batch": which(raw["larger"], {"its own": torch.cat([second, first])}),
            "features of a single image": which(raw["single"], known),
        }


@exercise.experiment("model keeps its head", 4)
class ModelKeepsItsHead(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _Convolutional(trial).eval(), "images": trial.normal(7, 1, 8, 8)}

    def measure(self, subject, inputs):
        model, images = inputs["model"], inputs["images"]
        fc = model.fc
        backbone = _backbone(subject, model, "fc")
        before = _features(model, images).clone()
        _features(backbone, images)
        return {"before": before, "after": _features(model, images), "its own": model.get_submodule("fc") is fc}

    def facts(self, raw, inputs):
        model, images = inputs["model"], inputs["images"]
        with torch.no_grad():
            known = {"its logits": model(images), "what enters its head": F.relu(model.before_the_last_relu(images))}
        return {
            "what the model gives once drop_head has returned": which(raw["before"], known),
            "what the model gives once features were computed": which(raw["after"], known),
            "the layer called `fc` afterwards": "its own" if raw["its own"] else "another",
        }


@exercise.experiment("model can go on training", 5)
class ModelCanGoOnTraining(Experiment):
    """One model in train mode, as every new one is, of which a part is frozen; and one in eval mode.

    None has modules in both modes: torchvision's `create_feature_extractor` does not put those back.
    """

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        models = {"in train mode": _OutOfOrder(width), "in eval mode": _OutOfOrder(width).eval()}
        models["in train mode"].head_mix.requires_grad_(False)
        return {"models": models, "images": trial.normal(4, width)}

    def measure(self, subject, inputs):
        for model in inputs["models"].values():
            _features(_backbone(subject, model, "head"), inputs["images"])
        return {name: traces.of(model) for name, model in inputs["models"].items()}

    def facts(self, raw, inputs):
        changed = {kind: self.changed(inputs["models"], raw, kind) for kind in ("modes", "flags")}
        return {
            "models whose modes changed": changed["modes"],
            "models whose requires_grad changed": changed["flags"],
        }

    def changed(self, models: dict[str, nn.Module], raw: dict, kind: str) -> list[str]:
        """Of the head itself another experiment says what became of it."""
        names = {key: traces.changed(model, raw[key], kind) for key, model in models.items()}
        return [key for key, changed in names.items() if any(f"{name}.".partition(".")[0] != "head" for name in changed)]


@exercise.experiment("nothing left in the model", 6)
class NothingLeftInTheModel(Experiment):
    """After two calls and one that raises; one head's name has a dot."""

    between = "what is left in the model between calls"
    after = "what a call that raised leaves besides"
    logits = "the model's logits after a call that raised"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 8)
        nested = named(body=_OutOfOrder(width), tail=named(mix=nn.Linear(width, width), head=nn.Linear(width, 3)))
        return {"models": {"head": _OutOfOrder(width).eval(), "tail.head": nested.eval()}, "images": 2 * trial.normal(4, width)}

    def measure(self, subject, inputs):
        left, logits = {}, {}
        for name, model in inputs["models"].items():
            before = left_behind.attributes(model)
            backbone = _backbone(subject, model, name)
            for images in (inputs["images"], inputs["images"][:2]):
                _features(backbone, images, rows="n")
            logits[name] = [_features(model, inputs["images"]).clone()]
            left[name] = [left_behind.what_is_new(before, left_behind.attributes(model))]
            with suppress(Exception):
                backbone(inputs["images"][:, :-1])  # too narrow for the model
            logits[name].append(_logits_after_all(model, inputs["images"]))
            left[name].append(left_behind.what_is_new(before, left_behind.attributes(model)))
        return {"left": left, "logits": logits}

    def facts(self, raw, inputs):
        own, left = [], []
        for name, model in inputs["models"].items():
            with torch.no_grad():
                wanted = model(inputs["images"])
            own.append([near(logits, wanted) for logits in raw["logits"][name]])
            left.append(raw["left"][name])
        if not all(at_rest for at_rest, _ in own):  # without a head, it is no wonder if something else is there
            return dict.fromkeys((self.between, self.after, self.logits))
        between, after = (sorted(set(words) - {"nothing"}) for words in zip(*left, strict=True))
        return {
            self.between: between,
            self.after: [word for word in after if word not in between],
            self.logits: "its own" if all(after for _, after in own) else "different",
        }


@exercise.experiment("batches do not pile up", 7)
class BatchesDoNotPileUp(Experiment):
    """Counts the tensors that a batch has left behind, by its number of rows, which no other tensor has."""

    on_fake_gpu = False
    rows = (1013, 1019, 1021, 1031)

    def draw(self, trial: Trial) -> dict:
        return {"model": _OutOfOrder(5).eval(), "batches": [trial.normal(rows, 5) for rows in self.rows]}

    def measure(self, subject, inputs):
        backbone = _backbone(subject, inputs["model"], "head")
        gc.freeze()  # what is there already does not count, and costs no time
        try:
            own = []
            for batch in inputs["batches"]:
                own.append(len(_features(backbone, batch, rows="n")) == len(batch))
                _features(inputs["model"], batch[:7])  # its owner uses it, too
            gc.collect()
            tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.ndim]
            return {"own": own, "left": [any(len(tensor) == rows for tensor in tensors) for rows in self.rows]}
        finally:
            gc.unfreeze()

    def facts(self, raw, inputs):
        fact = "batches still in memory after four"
        if not all(raw["own"]):
            return {fact: None}
        return {fact: "at most the last" if sum(raw["left"]) <= 1 else "earlier ones"}


def _logits_after_all(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits; none if it raises, as one does whose hook ends every forward."""
    with suppress(Exception):
        return _features(model, images)
    return images.new_zeros(0)


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


def _name_of_the_last(model):
    return [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


exercise.misconceptions_of(
    solution,
    {
        "head removed in place": {"copied": lambda model: model},
        "whole classifier removed": {"place": lambda model, name: ("", name.split(".")[0])},
        "dotted name as one attribute": {"place": lambda model, name: ("", name)},
        "always fc": {"place": lambda model, name: ("", "fc")},
        "last layer by order of definition": {"place": lambda model, name: _name_of_the_last(model).rpartition(".")[::2]},
        "model put into eval mode": {"copied": lambda model: copy.deepcopy(model.eval())},
        "model frozen": {"copied": lambda model: copy.deepcopy(model.requires_grad_(False))},
    },
)


@exercise.misconception("children without the last")
def children_without_the_last(model, name):
    return nn.Sequential(*list(model.children())[:-1])


@contextmanager
def hook_at(module, hook):
    """A hook that goes whatever happens."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hook_while_all_goes_well(module, hook):
    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def hooked(model, name, layer=nn.Module.get_submodule, catch=lambda entered, left: entered[0], at=hook_at):
    """A right solution, a hook at the head that catches what enters it, in pieces that a misconception replaces."""

    def features(images):
        caught = []
        with at(layer(model, name), lambda module, entered, left: caught.append(catch(entered, left))):
            model(images)
        return caught[0]

    return features


def _layer_before(model, name):
    names = list(dict(model.named_modules()))
    return model.get_submodule(names[names.index(name) - 1])


exercise.misconceptions_of(
    hooked,
    {
        "output of the head": {"catch": lambda entered, left: left},
        "output of the layer before": {"layer": _layer_before, "catch": lambda entered, left: left},
        "hook at the layer defined last": {"layer": lambda model, name: model.get_submodule(_name_of_the_last(model))},
        "hook removed only if all goes well": {"at": hook_while_all_goes_well},
    },
)


@exercise.misconception("head put back only if all goes well")
def head_put_back_only_if_all_goes_well(model, name):
    place, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]

    def features(images):
        head = getattr(place, attribute)
        setattr(place, attribute, nn.Identity())
        found = model(images)
        setattr(place, attribute, head)
        return found

    return features


def in_one_list(model, name, place):
    """All that is ever caught goes into a list, and what is returned has its place there."""
    caught = []

    def features(images):
        with hook_at(model.get_submodule(name), lambda module, entered, left: caught.append(entered[0].detach())):
            model(images)
        return caught[place]

    return features


exercise.misconceptions_of(in_one_list, {"first batch kept": {"place": 0}, "batches pile up": {"place": -1}})


@exercise.misconception("hook left behind")
def hook_left_behind(model, name):
    caught = {}
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: caught.update(features=args[0]))

    def features(images):
        model(images)
        return caught.pop("features")

    return features
