"""Exercise 4.4: the linear probe becomes the head that fine-tuning starts from."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import drop_head, extract, linear_probe
from helpers.finetune import probe_head

exercise = Exercise(__name__, "4.4", probe_head)

PROBE = "the linear probe on the features"
OLD = "the head as it was"
OTHER = "another head"
NO_OPTIMUM = "no optimum, whatever the penalty"
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


class _Normalised(nn.Module):
    """Two BatchNorms whose stored statistics are far from those of the batches drawn here."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.bn1 = nn.BatchNorm1d(width)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc = _old_head(trial, width)
        for norm in (self.bn1, self.bn2):
            norm.running_mean.copy_(2 * trial.normal(width))
            norm.running_var.copy_(4.0 ** trial.normal(width))
            norm.num_batches_tracked.fill_(trial.integer(5, 50))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn2(self.bn1(x + self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


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


@exercise.experiment("linear probe")
class LinearProbe(Experiment):
    points = 3
    penalties = (0.1, 0.4)

    def draw(self, trial: Trial) -> dict:
        inputs, labels, width = _task(trial)
        model = _Plain(trial, width)
        return {"models": [model, copy.deepcopy(model)], "inputs": inputs, "labels": labels}

    def measure(self, subject, inputs):
        logits = []
        for model, penalty in zip(inputs["models"], self.penalties, strict=True):
            features = model.features(inputs["inputs"]).detach()
            subject(model, "fc", inputs["inputs"], inputs["labels"], penalty)
            logits.append(_gives(model, "fc", features))
        return {"logits": logits}

    def facts(self, raw, inputs):
        x, labels, model = inputs["inputs"], inputs["labels"], inputs["models"][0]
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
            return {
                "what the head computes": "no optimum, whatever the penalty",
                "what it computes with a larger penalty": None,
            }
        ignored = small != OLD and _equal(*map(_probabilities, raw["logits"]))
        return {"what the head computes": small, "what it computes with a larger penalty": "the same" if ignored else large}


@exercise.experiment("in eval mode")
class InEvalMode(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs, labels, width = _task(trial)
        return {"model": _Normalised(trial, width), "inputs": inputs, "labels": labels}

    def measure(self, subject, inputs):
        model = inputs["model"].eval()
        features = model.features(inputs["inputs"]).detach()
        subject(model.train(), "fc", inputs["inputs"], inputs["labels"], 0.1)
        return {"logits": _gives(model, "fc", features)}

    def facts(self, raw, inputs):
        return {"what the head computes": _probe_or_other(raw["logits"], inputs["model"].eval(), "fc", inputs)}


@exercise.experiment("head by name")
class HeadByName(Experiment):
    def draw(self, trial: Trial) -> dict:
        inputs, labels, width = _task(trial)
        return {"model": _Nested(trial, width), "inputs": inputs, "labels": labels}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["inputs"]
        features = model.features(x).detach()
        subject(model, "classifier.2", x, inputs["labels"], 0.1)
        return {"logits": _gives(model, "classifier.2", features), "features": model.features(x).detach()}

    def facts(self, raw, inputs):
        model = inputs["model"]
        kept = near(raw["features"], model.features(inputs["inputs"]))
        return {
            "what `classifier.2` computes": _probe_or_other(raw["logits"], model, "classifier.2", inputs),
            "the features that enter it": "as before" if kept else "different",
        }


@exercise.experiment("optimizer goes on")
class OptimizerGoesOn(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs, labels, width = _task(trial)
        return {"model": _Plain(trial, width), "inputs": inputs, "labels": labels, "step": 2 + trial.normal(width)}

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
        points = _points(inputs["inputs"])
        trained = not near(raw["new"], inputs["model"].fc(points))
        moved = raw["later"] - raw["new"]
        moves = {"weight": moved[1:] - moved[0], "bias": moved[0]}
        return {
            "the head": "new" if trained else "as it was",
            "the layer that was the head": "still is" if near(raw["layer"], raw["new"]) else "is the head no longer",
            "what a step of an optimizer built before moves in the head": " and ".join(
                name for name, by in moves.items() if not near(by, 0)
            )
            or "nothing",
        }


@exercise.experiment("everything else")
class EverythingElse(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs, labels, width = _task(trial)
        model = _Normalised(trial, width)
        model.bn1.eval()  # one BatchNorm is in eval mode, as a frozen one would be
        model.stem.requires_grad_(False)  # and one layer is frozen
        return {"model": model, "inputs": inputs, "labels": labels}

    def measure(self, subject, inputs):
        model = inputs["model"]
        subject(model, "fc", inputs["inputs"], inputs["labels"], 1.0)
        return {
            "head": _gives(model, "fc", _points(inputs["inputs"])),
            "state": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
            "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "modes": {name: module.training for name, module in model.named_modules()},
        }

    def facts(self, raw, inputs):
        before, after = inputs["model"], raw["state"]
        parameters, modules = dict(before.named_parameters()), dict(before.named_modules())
        others = {name: tensor for name, tensor in before.state_dict().items() if not name.startswith("fc.")}
        moved = {name for name, tensor in others.items() if name not in after or not torch.equal(after[name], tensor)}
        switched = {raw["modes"].get(name) for name, module in modules.items() if raw["modes"].get(name) != module.training}
        return {
            "the head": "as it was" if near(raw["head"], before.fc(_points(inputs["inputs"]))) else "new",
            "other parameters that moved": _some(moved & parameters.keys()),
            "buffers that moved": _some(moved - parameters.keys()),
            "parameters whose requires_grad changed": _some(
                [name for name, parameter in parameters.items() if raw["trainable"].get(name) != parameter.requires_grad]
            ),
            "modules switched to eval mode": _some(switched & {False}),
            "modules switched to train mode": _some(switched & {True}),
        }


@exercise.experiment("one output per class")
class OneOutputPerClass(Experiment):
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
        model, x = inputs["model"], inputs["inputs"]
        features = model.features(x).detach()
        subject(model, "fc", x, inputs["labels"], 0.1)
        return {"logits": _gives(model, "fc", features, outputs="outputs")}

    def facts(self, raw, inputs):
        classes, outputs = inputs["model"].fc.out_features, raw["logits"].shape[1]
        if outputs != classes:
            seen = "one per class seen in the labels"
            return {"outputs": seen if outputs == classes - 1 else "another number", "the class without examples": None}
        last = _probabilities(raw["logits"])[:, -1].max()  # the penalty leaves some probability, the old bias nearly all
        return {"outputs": "one per class", "the class without examples": "ruled out" if last < 0.05 else "not ruled out"}


def _old_head(trial: Trial, width: int) -> nn.Linear:
    """A head whose weights and bias are both far from any probe's."""
    head = nn.Linear(width, width)
    with torch.no_grad():
        head.weight.copy_(trial.normal(width, width))
        head.bias.copy_((3.0 * (torch.arange(width) % 2))[trial.permutation(width)])
    return head


def _task(trial: Trial) -> tuple[Tensor, Tensor, int]:
    """Inputs (n, width) of `width` overlapping classes, their labels, and the width."""
    width = trial.integer(4, 5)
    labels = (torch.arange(6 * width) % width)[trial.permutation(6 * width)]
    return 1.5 * torch.eye(width)[labels] + trial.normal(6 * width, width), labels, width


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


def _probe_or_other(logits: Tensor, model: nn.Module, name: str, inputs: dict) -> str:
    """Whether these are the logits of the probe with penalty 0.1, of the head of `model`, which is as drawn, or others."""
    features = model.features(inputs["inputs"]).detach()
    old = model.get_submodule(name)(features).detach()
    return _which(logits, [(PROBE, _probe(features, inputs["labels"], 0.1)(features)), (OLD, old)]) or OTHER


def _which(logits: Tensor, known: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of the known that gives the same probabilities."""
    given = _probabilities(logits)
    return next((name for name, other in known if _equal(given, _probabilities(other))), None)


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


def _probabilities(logits: Tensor) -> Tensor:
    """What logits mean: a number added to all of a row, which a free bias may do, changes nothing."""
    return logits.detach().double().softmax(1)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() < EXACT)


def _some(found: Iterable) -> str:
    return "some" if found else "none"


def _put(model: nn.Module, head: str, probe: nn.Linear) -> None:
    """Copy a probe into the head, as one should."""
    model.get_submodule(head).load_state_dict(probe.state_dict())


def _features(model: nn.Module, head: str, inputs: Tensor) -> Tensor:
    return extract(drop_head(model, head), inputs)


def _classes(model: nn.Module, head: str) -> int:
    return model.get_submodule(head).out_features


@exercise.misconception("features in train mode")
def features_in_train_mode(model, head, inputs, labels, penalty):
    with torch.no_grad():
        features = drop_head(model, head)(inputs)
    _put(model, head, linear_probe(features, labels, _classes(model, head), penalty))


@exercise.misconception("the model itself run in train mode")
def the_model_itself_run_in_train_mode(model, head, inputs, labels, penalty):
    caught = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda layer, entered: caught.append(entered[0]))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    _put(model, head, linear_probe(caught[0], labels, _classes(model, head), penalty))


@exercise.misconception("bias forgotten")
def bias_forgotten(model, head, inputs, labels, penalty):
    probe = linear_probe(_features(model, head, inputs), labels, _classes(model, head), penalty)
    with torch.no_grad():
        model.get_submodule(head).weight.copy_(probe.weight)


@exercise.misconception("layer replaced")
def layer_replaced(model, head, inputs, labels, penalty):
    probe = linear_probe(_features(model, head, inputs), labels, _classes(model, head), penalty)
    model.set_submodule(head, probe)


@exercise.misconception("parameters replaced")
def parameters_replaced(model, head, inputs, labels, penalty):
    probe = linear_probe(_features(model, head, inputs), labels, _classes(model, head), penalty)
    layer = model.get_submodule(head)
    layer.weight, layer.bias = probe.weight, probe.bias


@exercise.misconception("probe on the logits")
def probe_on_the_logits(model, head, inputs, labels, penalty):
    _put(model, head, linear_probe(extract(model, inputs), labels, _classes(model, head), penalty))


@exercise.misconception("probe on the inputs")
def probe_on_the_inputs(model, head, inputs, labels, penalty):
    _put(model, head, linear_probe(inputs.flatten(1), labels, _classes(model, head), penalty))


@exercise.misconception("nothing copied")
def nothing_copied(model, head, inputs, labels, penalty):
    layer = model.get_submodule(head)
    layer = linear_probe(_features(model, head, inputs), labels, layer.out_features, penalty)


@exercise.misconception("classes counted from the labels")
def classes_counted_from_the_labels(model, head, inputs, labels, penalty):
    probe, layer = linear_probe(_features(model, head, inputs), labels, None, penalty), model.get_submodule(head)
    layer.weight.data, layer.bias.data = probe.weight.data, probe.bias.data


@exercise.misconception("backbone left frozen")
def backbone_left_frozen(model, head, inputs, labels, penalty):
    model.requires_grad_(False)
    probe_head(model, head, inputs, labels, penalty)
    model.get_submodule(head).requires_grad_(True)


@exercise.misconception("left in eval mode")
def left_in_eval_mode(model, head, inputs, labels, penalty):
    model.eval()
    probe_head(model, head, inputs, labels, penalty)


@exercise.misconception("not at the optimum")
def not_at_the_optimum(model, head, inputs, labels, penalty):
    features, layer = _features(model, head, inputs), model.get_submodule(head)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        loss = F.cross_entropy(layer(features), labels) + penalty / 2 * layer.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@exercise.misconception("penalty ignored")
def penalty_ignored(model, head, inputs, labels, penalty):
    _put(model, head, linear_probe(_features(model, head, inputs), labels, _classes(model, head)))


@exercise.misconception("always fc")
def always_fc(model, head, inputs, labels, penalty):
    probe_head(model, "fc", inputs, labels, penalty)
