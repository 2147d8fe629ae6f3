"""Exercise 4.4: the linear probe becomes the head that fine-tuning starts from."""

import copy
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.finetune.heads import Dropping, Nested, Normalised, Plain, probe_once
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import drop_head, extract
from helpers.finetune import probe_head
from helpers.modes import eval_mode

exercise = Exercise(__name__, "4.4", probe_head, core=5)

PROBE = "the linear probe on the features"
OLD = "the head as it was"
OTHER = "another head"
EXACT = 0.01  # a probability may differ by that much from the probe's; the statement says so


class _Probing(Experiment):
    """Draws a network, and inputs of as many overlapping classes as it is wide, some much more frequent than others."""

    network = Plain
    head = "fc"
    counts: ClassVar = {4: torch.tensor([4, 10, 20, 36]), 5: torch.tensor([3, 7, 12, 18, 30])}  # of each class

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        # 70 of them, however many classes: more than the first batch of 64 that some take for all.
        labels = torch.arange(width).repeat_interleave(self.counts[width])
        labels = labels[trial.permutation(len(labels))]
        inputs = 1.5 * torch.eye(width)[labels] + trial.normal(len(labels), width)
        return {"model": self.network(trial, width), "inputs": inputs, "labels": labels}

    def train(self, subject, inputs: dict, penalty: float = 0.1, outputs: int | str | None = None) -> Tensor:
        """What the head gives afterwards for the features that the model computed before, in eval mode."""
        model = inputs["model"]
        with eval_mode(model):
            features = model.features(inputs["inputs"]).detach()
        subject(model, self.head, inputs["inputs"], inputs["labels"], penalty)
        return _gives(model, self.head, features, outputs)

    def judge(self, logits: Tensor, inputs: dict) -> str:
        """Whether these are the logits of the probe with a penalty of 0.1, or of the head as it was drawn."""
        model = inputs["model"].eval()
        features = model.features(inputs["inputs"]).detach()
        old = model.get_submodule(self.head)(features)
        return _which(logits, [(PROBE, _probe(features, inputs["labels"], 0.1)(features)), (OLD, old)]) or OTHER


@exercise.experiment("linear probe", 1)
class LinearProbe(_Probing):
    points = 3
    penalties = (0.1, 0.4)

    def measure(self, subject, inputs):
        logits = [self.train(subject, copy.deepcopy(inputs), penalty) for penalty in self.penalties[::-1]][::-1]
        # Whoever stops early ends elsewhere when it starts from where it ended; whoever solves another task does not.
        return {"logits": logits, "again": [self.train(subject, inputs, self.penalties[0]) for _ in range(2)]}

    def facts(self, raw, inputs):
        x, labels, model = inputs["inputs"], inputs["labels"], inputs["model"]
        features, logits = model.features(x).detach(), model(x).detach()
        changed = (features - features.mean(0)) / features.std(0, correction=0), F.normalize(features, dim=1)
        half = (len(labels) + 1) // 2

        def known(given, penalty):
            probe = _probe(features, labels, penalty)
            weighted = F.linear(features, probe.weight)
            beside = _centred(given) - _centred(weighted)
            yield PROBE, probe(features)
            yield OLD, logits
            yield "the probe's weights beside another bias", weighted + beside.mean(0)
            yield "a probe on what the head gave", _probe(logits, labels, penalty)(features)
            yield "a probe on the inputs", _probe(x, labels, penalty)(features)
            for table in changed:
                yield "a probe on features that were normalised", _probe(table, labels, penalty)(features)
            yield "a probe on the output of the layers before the head", _probe(model.hidden(x), labels, penalty)(features)
            yield "a probe on the first half of the examples", _probe(features[:half], labels[:half], penalty)(features)

        small, large = (
            _which(given, known(given, penalty)) or _optimum(given, features, labels)
            for given, penalty in zip(raw["logits"], self.penalties, strict=True)
        )
        if small == OTHER:
            goes_on = not _equal(raw["again"][1], raw["again"][0])
            small, large = "what it computes depends on where it started" if goes_on else OTHER, None
        elif small != OLD and _equal(*raw["logits"]):
            large = "the same"
        return {"what the head computes": small, "what it computes with a larger penalty": large}


class _BesideAPlainOne(_Probing):
    """A network beside a plain one: if its head does not become the probe, there is nothing to see in the other."""

    def draw(self, trial: Trial) -> dict:
        return {"plain": _Probing.draw(_Probing(), trial)} | super().draw(trial)

    def measure(self, subject, inputs):
        return {"plain": _Probing.train(_Probing(), subject, inputs["plain"]), "logits": self.train(subject, inputs)}

    def facts(self, raw, inputs):
        facts = self.seen(raw, inputs)
        return facts if _Probing().judge(raw["plain"], inputs["plain"]) == PROBE else dict.fromkeys(facts)

    def seen(self, raw: dict, inputs: dict) -> dict:
        raise NotImplementedError


@exercise.experiment("in eval mode", 2)
class InEvalMode(_BesideAPlainOne):
    points = 2
    network = Normalised

    def draw(self, trial):
        inputs = super().draw(trial)
        return inputs | {"dropping": Dropping(trial, inputs["inputs"].shape[1])}

    def measure(self, subject, inputs):
        other = inputs | {"model": inputs["dropping"]}
        return super().measure(subject, inputs) | {"dropping": self.train(subject, other)}

    def seen(self, raw, inputs):
        return {
            "what the head computes, after BatchNorm": self.judge(raw["logits"], inputs),
            "what the head computes, after dropout": self.judge(raw["dropping"], inputs | {"model": inputs["dropping"]}),
        }


@exercise.experiment("head by name", 3)
class HeadByName(_BesideAPlainOne):
    network = Nested
    head = "classifier.2"

    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        return raw | {"features": inputs["model"].features(inputs["inputs"]).detach()}

    def seen(self, raw, inputs):
        kept = near(raw["features"], inputs["model"].features(inputs["inputs"]))
        return {
            "what `classifier.2` computes": self.judge(raw["logits"], inputs),
            "the features that enter it": "as before" if kept else "different",
        }


@exercise.experiment("optimizer goes on", 4)
class OptimizerGoesOn(_Probing):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"step": 2 + trial.normal(inputs["inputs"].shape[1])}

    def measure(self, subject, inputs):
        model, points = inputs["model"], _points(inputs["inputs"])
        optimizer, layer = torch.optim.SGD(model.parameters(), lr=0.1), model.fc
        subject(model, "fc", inputs["inputs"], inputs["labels"], 1.0)
        raw = {"new": _gives(model, "fc", points), "layer": layer(points).detach()}
        optimizer.zero_grad()
        loss = model(inputs["inputs"] + 1) @ inputs["step"]  # any loss will do; this one has a gradient everywhere
        if loss.requires_grad:
            loss.sum().backward()
            optimizer.step()
        return raw | {"later": _gives(model, "fc", points)}

    def facts(self, raw, inputs):
        kept = near(raw["new"], inputs["model"].fc(_points(inputs["inputs"])))
        steps = raw["later"] - raw["new"]
        moved = [name for name, by in {"weight": steps[1:] - steps[0], "bias": steps[0]}.items() if not near(by, 0)]
        return {
            "the head": "as it was" if kept else "new",
            "the layer that was the head": "still is" if near(raw["layer"], raw["new"]) else "is the head no longer",
            "what a step of an optimizer built before moves in the head": " and ".join(moved) or "nothing",
        }


@exercise.experiment("everything else", 5)
class EverythingElse(_Probing):
    points = 2
    network = Normalised

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["model"].bn1.eval()  # one BatchNorm is in eval mode, as a frozen one would be
        inputs["model"].hidden.requires_grad_(False)  # and one layer is frozen
        return inputs

    def measure(self, subject, inputs):
        model = inputs["model"]
        subject(model, "fc", inputs["inputs"], inputs["labels"], 1.0)
        return {"head": _gives(model, "fc", _points(inputs["inputs"])), "traces": traces.of(model)}

    def facts(self, raw, inputs):
        before, after = inputs["model"], raw["traces"]
        return {
            "the head": "as it was" if near(raw["head"], before.fc(_points(inputs["inputs"]))) else "new",
            "other parameters that moved": traces.some(traces.changed(before, after, "parameters", but="fc.")),
        } | traces.changes(before, after, "buffers", "flags", "modes")


@exercise.experiment("one output per class", 6)
class OneOutputPerClass(_BesideAPlainOne):
    def draw(self, trial: Trial) -> dict:
        classes = 6
        model = Plain(trial, classes)
        with torch.no_grad():
            model.fc.bias[-1] = 9.0  # before it is trained, the head finds the last class the likeliest
            # All features are exactly 1, so what is left to learn is how frequent each class is. That takes 30 iterations;
            # to rule a class out on any features can take L-BFGS a thousand.
            model.hidden.bias.fill_(-20.0)
        rare = {"model": model, "inputs": trial.normal(10, classes), "labels": torch.arange(10) % (classes - 1)}
        return super().draw(trial) | rare

    def train(self, subject, inputs, penalty=0.1, outputs="outputs"):
        return super().train(subject, inputs, penalty, outputs)

    def seen(self, raw, inputs):
        classes, outputs = inputs["model"].fc.out_features, raw["logits"].shape[1]
        if outputs != classes:
            present = "one per class seen in the labels"
            return {"outputs": present if outputs == classes - 1 else "another number", "the class without examples": None}
        last = _probabilities(raw["logits"])[:, -1].max()  # the penalty leaves some probability, the old bias nearly all
        return {"outputs": "one per class", "the class without examples": "ruled out" if last < 0.05 else "not ruled out"}


@exercise.experiment("no hook stays", 7)
class NoHookStays(_Probing):
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"

    def measure(self, subject, inputs):
        model = inputs["model"]
        subject(model, "fc", inputs["inputs"], inputs["labels"], 1.0)
        left = [kind for module in model.modules() for kind in self.kinds if getattr(module, kind)]
        return {"left": left + [name for name, module in model.named_modules() if "forward" in vars(module)]}

    def facts(self, raw, inputs):
        return {"hooks, or a changed forward, left in the model": traces.some(raw["left"])}


def _points(inputs: Tensor) -> Tensor:
    """Where an affine layer shows its bias, then its bias and each column of its weight."""
    return F.pad(torch.eye(inputs.shape[1], device=inputs.device), (0, 0, 1, 0))


def _gives(model: nn.Module, name: str, features: Tensor, outputs: int | str | None = None) -> Tensor:
    """What the layer that the model now has under that name gives for these features."""
    layer = dict(model.named_modules()).get(name)
    if layer is None:
        raise WrongReturn(f"the model must keep a layer called {name!r}, and now has none. Change that layer in place.")
    with torch.no_grad():
        logits = layer(features)
    return expect_tensor(logits, (len(features), outputs or features.shape[1]), "the head's output").detach().clone()


def _probe(features: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    return probe_once(features, labels, features.shape[1], penalty).requires_grad_(False)


def _which(logits: Tensor, known: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of the known that gives the same probabilities."""
    return next((name for name, value in known if _equal(logits, value)), None)


def _equal(logits: Tensor, known: Tensor) -> bool:
    difference = _probabilities(logits) - _probabilities(known)
    return bool(difference.abs().max() < EXACT)


def _probabilities(logits: Tensor) -> Tensor:
    """What logits mean: a number added to all of a row, which a free bias may do, changes nothing."""
    return logits.detach().double().softmax(1)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def _optimum(logits: Tensor, features: Tensor, labels: Tensor) -> str:
    """The objective whose gradient vanishes: cross-entropy + c / 2 * |W|^2 for some c, perhaps with the bias in it."""
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    weight = torch.linalg.lstsq(x, logits.double()).solution
    weight = weight - weight.mean(1, keepdim=True)
    truth = F.one_hot(labels, logits.shape[1]).double()
    down, start = (x.T @ (truth - p) / len(x) for p in (_probabilities(logits), _probabilities(torch.zeros_like(logits))))
    left = {}
    for name, rows in (("the optimum for another penalty", slice(-1)), ("an optimum with the bias penalised", slice(None))):
        pulled = torch.zeros_like(weight)
        pulled[rows] = weight[rows]
        pull = (down * pulled).sum() / pulled.square().sum().clamp_min(1e-30)
        left[name] = (down - pull * pulled).norm() / start.norm()
    nearest = min(left, key=left.get)
    return nearest if left[nearest] < 0.05 else OTHER  # "at rest": a twentieth of the slope that training started from


def _features(model: nn.Module, head: str, inputs: Tensor) -> Tensor:
    return extract(drop_head(model, head), inputs)


def _put(model: nn.Module, head: str, probe: nn.Linear) -> None:
    layer = model.get_submodule(head)
    layer.weight.data, layer.bias.data = probe.weight.data, probe.bias.data


def solution(model, head, inputs, labels, penalty, *, features=_features, probe=probe_once, put=_put):
    """A right solution, in pieces that a misconception replaces."""
    classes = model.get_submodule(head).out_features
    put(model, head, probe(features(model, head, inputs), labels, classes, penalty))


def _caught_in_train_mode(model, head, inputs):
    caught = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda layer, entered: caught.append(entered[0]))
    model(inputs)
    hook.remove()
    return caught[0]


def _with_batchnorm_alone_in_eval_mode(model, head, inputs):
    backbone = drop_head(model, head).train()
    for module in backbone.modules():
        module.training = not isinstance(module, nn.BatchNorm1d)
    return backbone(inputs).detach()


def _left_hooked(model, head, inputs):
    caught = []
    model.get_submodule(head).register_forward_pre_hook(lambda layer, entered: caught.append(entered[0].detach()))
    with eval_mode(model):
        model(inputs)
    return caught[0]


def _standardised(features, *rest):
    return probe_once((features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6), *rest)


def _one_after_another(model, head, inputs):
    layers = [module for name, module in model.named_children() if head.partition(".")[0] != name]
    return extract(nn.Sequential(*layers), inputs)


def _on_the_first_half(features, labels, *rest):
    half = (len(labels) + 1) // 2
    return probe_once(features[:half], labels[:half], *rest)


def _weight_alone(model, head, probe):
    model.get_submodule(head).weight.data = probe.weight.data


def _new_parameters(model, head, probe):
    layer = model.get_submodule(head)
    layer.weight, layer.bias = probe.weight, probe.bias


exercise.misconceptions_of(
    solution,
    {
        "features in train mode": {"features": lambda model, head, inputs: drop_head(model, head)(inputs)},
        "the model itself run in train mode": {"features": _caught_in_train_mode},
        "bias forgotten": {"put": _weight_alone},
        "layer replaced": {"put": nn.Module.set_submodule},
        "parameters replaced": {"put": _new_parameters},
        "probe on the logits": {"features": lambda model, head, inputs: extract(model, inputs)},
        "probe on the inputs": {"features": lambda model, head, inputs: inputs},
        "nothing copied": {"put": lambda model, head, probe: None},
        "classes counted from the labels": {"probe": lambda x, y, classes, penalty: probe_once(x, y, None, penalty)},
        "left in eval mode": {"features": lambda model, head, inputs: _features(model.eval(), head, inputs)},
        "only BatchNorm in eval mode": {"features": _with_batchnorm_alone_in_eval_mode},
        "hook left behind": {"features": _left_hooked},
        "features normalised first": {"probe": _standardised},
        "penalty on another scale": {"probe": lambda x, y, classes, penalty: probe_once(x, y, classes, penalty / len(x))},
        "layers before the head, one after another": {"features": _one_after_another},
        "half of the examples": {"probe": _on_the_first_half},
        "penalty ignored": {"probe": lambda x, y, classes, penalty: probe_once(x, y, classes)},
    },
)


@exercise.misconception("not at the optimum")
def not_at_the_optimum(model, head, inputs, labels, penalty):
    features, layer = _features(model, head, inputs), model.get_submodule(head)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):  # from the old head, which is far from any probe
        loss = F.cross_entropy(layer(features), labels) + penalty / 2 * layer.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@exercise.misconception("bias penalised too")
def bias_penalised_too(model, head, inputs, labels, penalty):
    features, layer = _features(model, head, inputs), model.get_submodule(head)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=penalty)
    for _ in range(400):
        gradients = torch.autograd.grad(F.cross_entropy(layer(features), labels), list(layer.parameters()))
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


@exercise.misconception("backbone left frozen")
def backbone_left_frozen(model, head, *rest):
    model.requires_grad_(False)
    probe_head(model, head, *rest)
    model.get_submodule(head).requires_grad_(True)


@exercise.misconception("always fc")
def always_fc(model, head, *rest):
    probe_head(model, "fc", *rest)
