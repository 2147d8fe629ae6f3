"""Exercise 4.3: unfreeze parameters in the middle of training, in the optimizer that is there."""

from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from grader.checks import traces
from grader.experiment import Exercise, Experiment, Trial
from grader.near import near, which
from helpers.finetune import unfreeze_into

exercise = Exercise(__name__, "4.3", unfreeze_into)

# Every parameter here is a single number. On larger ones `parameter in list` raises, because a list compares values; on
# these it answers, and an experiment can show what it answers.

NEW, DEFAULT, FIRST, SECOND = 0.02, 0.08, 0.04, 0.16  # learning rates: each another multiple of NEW


class _Layers(Experiment):
    """Draws a layer of each name, and the slopes of a loss along its weight and along its bias."""

    names: tuple[str, ...]

    def draw(self, trial: Trial) -> dict[str, Any]:
        return {name: _layer(trial) for name in self.names} | {"slopes": 1 + trial.normal(2).abs()}


@exercise.experiment("new ones train")
class NewOnesTrain(_Layers):
    points = 2
    names = "head", "block"

    def measure(self, subject, inputs):
        head, block = inputs["head"], inputs["block"].requires_grad_(False)
        group = {"params": list(head.parameters()), "lr": FIRST, "momentum": 0.5}
        optimizer = SGD([group], lr=DEFAULT, momentum=0.9)
        new = list(block.parameters())
        values = [_values(new)]
        returned = subject(optimizer, list(new), NEW)
        for _ in range(2):
            _step(optimizer, _slopes(new, inputs["slopes"]) | _slopes(head.parameters(), inputs["slopes"]))
            values.append(_values(new))
        another = isinstance(returned, Optimizer) and returned is not optimizer
        return {"another": another, "moves": _moves(optimizer, new, values[0]), "values": values}

    def facts(self, raw, inputs):
        start, first, second = raw["values"]
        once = _times(start - first, NEW * inputs["slopes"])
        twice = _times(first - second, start - first) if once else None
        return {
            "the optimizer afterwards": "another one came back" if raw["another"] else "the one given",
            "unfrozen parameters, after a step": _fate(raw["moves"]),
            "their first step, in units of lr x gradient": once,
            "their second step with the same gradient, in units of the first": twice,
        }


@exercise.experiment("any iterable")
class AnyIterable(_Layers):
    points = 2
    names = "head", "block", "tied"

    def measure(self, subject, inputs):
        head, block, tied = inputs["head"], inputs["block"].requires_grad_(False), inputs["tied"].requires_grad_(False)
        raw = {}
        for name, parameters in (("block", block.parameters()), ("tied", [tied.weight, tied.bias, tied.weight])):
            layer = inputs[name]
            optimizer = SGD([{"params": list(head.parameters()), "lr": SECOND}], lr=DEFAULT, momentum=0.9)
            before = _values(layer.parameters())
            subject(optimizer, parameters, NEW)
            _step(optimizer, _slopes(layer.parameters(), inputs["slopes"]) | _slopes(head.parameters(), inputs["slopes"]))
            moves = _moves(optimizer, list(layer.parameters()), before)
            raw[name] = {"values": [before, _values(layer.parameters())], "moves": moves}
        return raw

    def facts(self, raw, inputs):
        before, after = raw["tied"]["values"]
        step = _times((before - after)[:1], NEW * inputs["slopes"][:1])
        return {
            "parameters out of a generator": _fate(raw["block"]["moves"]),
            "step of one that comes twice, in units of lr x gradient": step,
        }


@exercise.experiment("old ones go on")
class OldOnesGoOn(Experiment):
    points = 2
    kinds = ("SGD with momentum", "AdamW")
    changes: ClassVar[dict[str, dict]] = {
        "as if nothing had happened": {},
        "as if the optimizer were new": {"forget": True},
        "with the learning rate of the new ones": {"lr": NEW},
        "as if the optimizer were new, with the learning rate of the new ones": {"forget": True, "lr": NEW},
        "not at all": {"lr": 0.0},
    }

    def draw(self, trial: Trial) -> dict:
        # Steep at first, then flat: whoever remembers the steep part makes other steps than whoever does not.
        slopes = torch.cat([8 + trial.normal(3, 4).abs(), 1 + 0.3 * trial.normal(3, 4).abs()])
        layers = {kind: nn.ModuleList([_layer(trial), _layer(trial), _layer(trial)]) for kind in self.kinds}
        return {"layers": layers, "slopes": slopes}

    def measure(self, subject, inputs):
        slopes, raw = inputs["slopes"], {}
        for kind, (head, middle, block) in inputs["layers"].items():
            block.requires_grad_(False)
            old, new = [*head.parameters(), *middle.parameters()], list(block.parameters())
            optimizer = self.optimizer(kind, old)
            for row in slopes[:3]:
                _step(optimizer, _slopes(old, row))
            _backward(_slopes(old, slopes[3]))  # a gradient is waiting, as in the middle of accumulating several batches
            before = _values(new)
            subject(optimizer, [*middle.parameters(), *new], NEW)
            waiting = [0.0 if parameter.grad is None else parameter.grad.item() for parameter in old]
            for row in slopes[4:]:
                _step(optimizer, _slopes(old, row) | _slopes(new, row[:2]))
            raw[kind] = {"old": _values(old), "new": _moves(optimizer, new, before), "waiting": waiting}
        return raw

    def facts(self, raw, inputs):
        slopes, facts = inputs["slopes"], {}
        for kind in self.kinds:
            head, middle, _ = inputs["layers"][kind]
            start = _values([*head.parameters(), *middle.parameters()])
            known = {name: self.control(kind, start, slopes, **changes) for name, changes in self.changes.items()}
            facts[f"{kind}: what trained before moves"] = which(raw[kind]["old"], known, "in some other way")
            facts[f"{kind}: new ones, given together with old ones"] = _fate(raw[kind]["new"])
        kept = all(near(raw[kind]["waiting"], slopes[3]) for kind in self.kinds)
        return facts | {"gradients that were waiting for the next step": "kept" if kept else "lost"}

    @staticmethod
    def optimizer(kind: str, old: list[Tensor]) -> Optimizer:
        groups = [{"params": old[:2], "lr": FIRST}, {"params": old[2:], "lr": SECOND}]
        return AdamW(groups, lr=DEFAULT) if kind == "AdamW" else SGD(groups, lr=DEFAULT, momentum=0.9)

    def control(self, kind: str, start: Tensor, slopes: Tensor, forget: bool = False, lr: float | None = None) -> Tensor:
        """Where the old parameters end without any unfreezing, with one thing changed where it would have happened."""
        old = [nn.Parameter(value.clone()) for value in start]
        optimizer = self.optimizer(kind, old)
        for row in slopes[:3]:
            _step(optimizer, _slopes(old, row))
        if forget:
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        for row in slopes[4:]:
            _step(optimizer, _slopes(old, row))
        return _values(old)


@exercise.experiment("already in the optimizer")
class AlreadyInTheOptimizer(_Layers):
    points = 2
    names = "head", "tail", "block"

    def measure(self, subject, inputs):
        head, tail, block = (inputs[name] for name in ("head", "tail", "block"))
        tail.requires_grad_(False)  # in the optimizer from the start, and frozen
        block.requires_grad_(False)
        groups = [{"params": list(head.parameters()), "lr": FIRST}, {"params": list(tail.parameters()), "lr": SECOND}]
        optimizer = SGD(groups, lr=DEFAULT, momentum=0.9)
        given = [*tail.parameters(), *block.parameters()]
        everything = [*head.parameters(), *given]
        before = _values(everything)
        subject(optimizer, list(given), NEW)
        groups = len(optimizer.param_groups)
        subject(optimizer, list(given), NEW)
        added = len(optimizer.param_groups) - groups
        _step(optimizer, _slopes(everything, inputs["slopes"].repeat(3)))
        moves = _moves(optimizer, list(block.parameters()), before[4:])
        return {"values": [before, _values(everything)], "added": added, "moves": moves}

    def facts(self, raw, inputs):
        before, after = raw["values"]
        lr = torch.tensor([FIRST, FIRST, SECOND, SECOND, NEW, NEW])
        steps = (before - after).flatten() / (lr * inputs["slopes"].repeat(3))
        return {
            "new ones, given together with frozen ones it had": _fate(raw["moves"]),
            "step of the new ones, in units of lr x gradient": _times(steps[4:], torch.ones(2)),
            "step of the frozen ones it had, in units of their own group's": _times(steps[2:4], torch.ones(2)),
            "step of all others, in units of their own group's": _times(steps[:2], torch.ones(2)),
            "groups that a second call with the same parameters adds": raw["added"],
        }


@exercise.experiment("equal values")
class EqualValues(Experiment):
    def draw(self, trial: Trial) -> dict:
        # Three fresh BatchNorms: all their weights are one, all their biases zero.
        return {"norms": nn.ModuleList(nn.BatchNorm1d(1) for _ in range(3)), "slopes": 1 + trial.normal(2).abs()}

    def measure(self, subject, inputs):
        first, *others = inputs["norms"]
        new = [parameter.requires_grad_(False) for norm in others for parameter in norm.parameters()]
        optimizer = SGD(first.parameters(), lr=DEFAULT, momentum=0.9)
        before = _values(new)
        subject(optimizer, list(new), NEW)
        slopes = inputs["slopes"]
        _step(optimizer, _slopes(first.parameters(), slopes) | _slopes(new, slopes.repeat(2)))
        return {"moves": _moves(optimizer, new, before)}

    def facts(self, raw, inputs):
        return {"parameters of two new BatchNorms beside an old one": _fate(raw["moves"])}


def _layer(trial: Trial) -> nn.Linear:
    """A weight and a bias, one number each, both of them random and not small."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1 + trial.normal(1, 1).abs().view_as(parameter))
    return layer


def _slopes(parameters, slopes: Tensor) -> dict[Tensor, Tensor]:
    return dict(zip(parameters, slopes, strict=True))


def _backward(slopes: dict[Tensor, Tensor]) -> None:
    """Gradients of a loss that is linear in each parameter: the slope, wherever the parameter stands."""
    terms = [slope * parameter.sum() for parameter, slope in slopes.items() if parameter.requires_grad]
    for parameter in slopes:
        parameter.grad = None
    if terms:
        torch.stack(terms).sum().backward()


def _step(optimizer: Optimizer, slopes: dict[Tensor, Tensor]) -> None:
    with torch.enable_grad():
        _backward(slopes)
    optimizer.step()


def _values(parameters) -> Tensor:
    return torch.stack([parameter.detach().clone().flatten() for parameter in parameters])  # (number of parameters, 1)


def _moves(optimizer: Optimizer, parameters: list[Tensor], before: Tensor) -> dict:
    """What `_fate` is told from: how far the parameters have moved since `before`, and what they need to move."""
    there = set(map(id, _all_in(optimizer)))
    return {
        "distances": (_values(parameters) - before).flatten(),
        "trainable": [parameter.requires_grad for parameter in parameters],
        "there": [id(parameter) in there for parameter in parameters],
    }


def _fate(moves: dict) -> str:
    """Whether the parameters have moved, and if not, what is missing."""
    moved = traces.how_many(not near(distance, 0, scale=NEW) for distance in moves["distances"])
    if moved != "none":
        return f"{moved} of them move"
    trainable, there = traces.how_many(moves["trainable"]), traces.how_many(moves["there"])
    return f"none moves ({trainable} trainable, {there} in the optimizer)"


def _times(steps: Tensor, unit: Tensor) -> float | None:
    """How many units each of the steps is; None if that is not one number for all of them."""
    times = steps.flatten() / unit.flatten()
    number = times.mean().item()
    return round(number, 3) if near(times, number) else None  # three digits to show


def _all_in(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _not_yet_in(optimizer: Optimizer, parameters) -> list[Tensor]:
    known = set(_all_in(optimizer))  # which asks for hashes, and a tensor's is its identity
    return [parameter for parameter in parameters if parameter not in known]


def _add(optimizer: Optimizer, new: list[Tensor], lr: float) -> None:
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


def _unfreeze_into(
    *arguments,
    listed=list,
    unfrozen=lambda optimizer, parameters: parameters,  # those to make trainable
    unique=dict.fromkeys,
    new=_not_yet_in,
    add=_add,
):
    """A right solution, in pieces that a misconception replaces."""
    optimizer, parameters, lr = arguments
    parameters = listed(parameters)
    for parameter in unfrozen(optimizer, parameters):
        parameter.requires_grad_(True)
    add(optimizer, new(optimizer, unique(parameters)), lr)


def _different_values(optimizer, parameters):
    known, new = _all_in(optimizer), []
    for parameter in parameters:
        if not any(torch.equal(parameter, value) for value in known + new):
            new.append(parameter)
    return new


def _add_unless_refused(optimizer, new, lr):
    with suppress(ValueError):
        _add(optimizer, new, lr)


exercise.misconceptions_of(
    _unfreeze_into,
    {
        "the optimizer never hears of it": {"add": lambda optimizer, new, lr: None},
        "in the optimizer, still frozen": {"unfrozen": lambda optimizer, parameters: []},
        "compared by value": {"new": _different_values},
        "generator read twice": {"listed": lambda parameters: parameters},
        "torch's refusal swallowed": {"new": lambda optimizer, parameters: list(parameters), "add": _add_unless_refused},
        "the optimizer's default learning rate": {
            "add": lambda optimizer, new, lr: _add(optimizer, new, optimizer.defaults["lr"]),
        },
        "only the new ones made trainable": {"unfrozen": _not_yet_in},
        "in the group twice": {"unique": list},
        "an empty group": {"add": lambda optimizer, new, lr: optimizer.add_param_group({"params": new, "lr": lr})},
    },
)


@exercise.misconception("a new optimizer")
def a_new_optimizer(optimizer, parameters, lr):
    everything = [*_all_in(optimizer), *parameters]
    for parameter in everything:
        parameter.requires_grad_(True)
    return type(optimizer)(dict.fromkeys(everything), lr=lr)


@exercise.misconception("one learning rate for all groups")
def one_learning_rate_for_all_groups(optimizer, parameters, lr):
    _unfreeze_into(optimizer, parameters, lr)
    for group in optimizer.param_groups:
        group["lr"] = lr


@exercise.misconception("moments cleared")
def moments_cleared(optimizer, parameters, lr):
    _unfreeze_into(optimizer, parameters, lr)
    optimizer.state.clear()
