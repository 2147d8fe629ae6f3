"""Exercise 4.4: the linear probe becomes the head that fine-tuning starts from."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import drop_head, eval_mode, extract, linear_probe
from helpers.finetune import probe_head

exercise = Exercise(__name__, "4.4", probe_head)

PROBE = "the linear probe on the features"
OLD = "the head as it was"
OTHER = "another head"
EXACT = 0.01  # a probability may differ by that much from the probe's; the statement says so


class _Plain(nn.Module):
    """Computes the same in both modes. All layers here are square, so that a probe on anything has the head's shape."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.fc = _old_head(trial, width)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, 1) - 2 * self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class _Normalised(_Plain):
    """Two BatchNorms whose stored statistics are far from those of the batches drawn here."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__(trial, width)
        self.bn1 = with_statistics(nn.BatchNorm1d(width), trial)
        self.bn2 = with_statistics(nn.BatchNorm1d(width), trial)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn2(self.bn1(x + self.hidden(x))))


class _Nested(nn.Module):
    """The head is the last of three layers of its classifier; a layer before them is called `fc`, and is defined last."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), _old_head(trial, width))
        self.fc = nn.Linear(width, width)

    def features(self, x: Tensor) -> Tensor:
        return self.classifier[:2](2 * x + self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[2](self.features(x))


def _old_head(trial: Trial, width: int) -> nn.Linear:
    """A head whose weights and bias are both far from any probe's."""
    head = nn.Linear(width, width)
    with torch.no_grad():
        head.weight.copy_(trial.normal(width, width))
        head.bias.copy_((3.0 * (torch.arange(width) % 2))[trial.permutation(width)])
    return head


class _Probing(Experiment):
    """Draws a network, and inputs of as many overlapping classes as it is wide."""

    network = _Plain
    head = "fc"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        labels = (torch.arange(6 * width) % width)[trial.permutation(6 * width)]
        inputs = 1.5 * torch.eye(width)[labels] + trial.normal(6 * width, width)
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


@exercise.experiment("linear probe")
class LinearProbe(_Probing):
    points = 3
    penalties = (0.1, 0.4)

    def measure(self, subject, inputs):
        return {"logits": [self.train(subject, copy.deepcopy(inputs), penalty) for penalty in self.penalties]}

    def facts(self, raw, inputs):
        x, labels, model = inputs["inputs"], inputs["labels"], inputs["model"]
        features, logits, bias = (tensor.detach() for tensor in (model.features(x), model(x), model.fc.bias))

        def known(penalty):
            probe = _probe(features, labels, penalty)
            yield PROBE, probe(features)
            yield OLD, logits
            yield "the probe's weights beside the old bias", F.linear(features, probe.weight, bias)
            yield "a probe on what the head gave", _probe(logits, labels, penalty)(features)
            yield "a probe on the inputs", _probe(x, labels, penalty)(features)

        small, large = (
            _which(given, known(penalty)) or ("the optimum for another penalty" if _rests(given, features, labels) else OTHER)
            for given, penalty in zip(raw["logits"], self.penalties, strict=True)
        )
        if small == OTHER:
            small, large = "no optimum, whatever the penalty", None
        elif small != OLD and _equal(*raw["logits"]):
            large = "the same"
        return {"what the head computes": small, "what it computes with a larger penalty": large}


@exercise.experiment("in eval mode")
class InEvalMode(_Probing):
    points = 2
    network = _Normalised

    def measure(self, subject, inputs):
        return {"logits": self.train(subject, inputs)}

    def facts(self, raw, inputs):
        return {"what the head computes": self.judge(raw["logits"], inputs)}


@exercise.experiment("head by name")
class HeadByName(_Probing):
    network = _Nested
    head = "classifier.2"

    def measure(self, subject, inputs):
        logits = self.train(subject, inputs)
        return {"logits": logits, "features": inputs["model"].features(inputs["inputs"]).detach()}

    def facts(self, raw, inputs):
        kept = near(raw["features"], inputs["model"].features(inputs["inputs"]))
        return {
            "what `classifier.2` computes": self.judge(raw["logits"], inputs),
            "the features that enter it": "as before" if kept else "different",
        }


@exercise.experiment("optimizer goes on")
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


@exercise.experiment("everything else")
class EverythingElse(_Probing):
    points = 2
    network = _Normalised

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


@exercise.experiment("one output per class")
class OneOutputPerClass(_Probing):
    def draw(self, trial: Trial) -> dict:
        classes = 6
        model = _Plain(trial, classes)
        with torch.no_grad():
            model.fc.bias[-1] = 9.0  # before it is trained, the head finds the last class the likeliest
            # All features are exactly 1, so what is left to learn is how frequent each class is. That takes 30 iterations;
            # to rule a class out on any features can take L-BFGS a thousand.
            model.hidden.bias.fill_(-20.0)
        return {"model": model, "inputs": trial.normal(10, classes), "labels": torch.arange(10) % (classes - 1)}

    def measure(self, subject, inputs):
        return {"logits": self.train(subject, inputs, outputs="outputs")}

    def facts(self, raw, inputs):
        classes, outputs = inputs["model"].fc.out_features, raw["logits"].shape[1]
        if outputs != classes:
            present = "one per class seen in the labels"
            return {"outputs": present if outputs == classes - 1 else "another number", "the class without examples": None}
        last = _probabilities(raw["logits"])[:, -1].max()  # the penalty leaves some probability, the old bias nearly all
        return {"outputs": "one per class", "the class without examples": "ruled out" if last < 0.05 else "not ruled out"}


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
    return linear_probe(features, labels, features.shape[1], penalty).requires_grad_(False)


def _which(logits: Tensor, known: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of the known that gives the same probabilities."""
    return next((name for name, value in known if _equal(logits, value)), None)


def _equal(logits: Tensor, known: Tensor) -> bool:
    difference = _probabilities(logits) - _probabilities(known)
    return bool(difference.abs().max() < EXACT)


def _probabilities(logits: Tensor) -> Tensor:
    """What logits mean: a number added to all of a row, which a free bias may do, changes nothing."""
    return logits.detach().double().softmax(1)


def _rests(logits: Tensor, features: Tensor, labels: Tensor) -> bool:
    """Whether the gradient of cross-entropy + c / 2 * |W|^2 vanishes for some c: one that pulls W towards zero is left."""
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    weight = torch.linalg.lstsq(x, logits.double()).solution
    weight = weight - weight.mean(1, keepdim=True)
    truth = F.one_hot(labels, logits.shape[1]).double()
    down, start = (x.T @ (truth - p) / len(x) for p in (_probabilities(logits), _probabilities(torch.zeros_like(logits))))
    pull = (down[:-1] * weight[:-1]).sum() / weight[:-1].square().sum().clamp_min(1e-30)
    down[:-1] -= pull * weight[:-1]
    return bool(down.norm() < 0.05 * start.norm())  # "at rest": a twentieth of the slope that training started from


def _features(model: nn.Module, head: str, inputs: Tensor) -> Tensor:
    return extract(drop_head(model, head), inputs)


def _put(model: nn.Module, head: str, probe: nn.Linear) -> None:
    layer = model.get_submodule(head)
    layer.weight.data, layer.bias.data = probe.weight.data, probe.bias.data


def solution(model, head, inputs, labels, penalty, *, features=_features, probe=linear_probe, put=_put):
    """A right solution, in pieces that a misconception replaces."""
    classes = model.get_submodule(head).out_features
    put(model, head, probe(features(model, head, inputs), labels, classes, penalty))


def _caught_in_train_mode(model, head, inputs):
    caught = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda layer, entered: caught.append(entered[0]))
    model(inputs)
    hook.remove()
    return caught[0]


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
        "classes counted from the labels": {"probe": lambda x, y, classes, penalty: linear_probe(x, y, None, penalty)},
        "left in eval mode": {"features": lambda model, head, inputs: _features(model.eval(), head, inputs)},
        "penalty ignored": {"probe": lambda x, y, classes, penalty: linear_probe(x, y, classes)},
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


@exercise.misconception("backbone left frozen")
def backbone_left_frozen(model, head, *rest):
    model.requires_grad_(False)
    probe_head(model, head, *rest)
    model.get_submodule(head).requires_grad_(True)


@exercise.misconception("always fc")
def always_fc(model, head, *rest):
    probe_head(model, "fc", *rest)
