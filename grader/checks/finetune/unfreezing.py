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

exercise = Exercise(__name__, "4.3", unfreeze_into, core=4)

# Every parameter here is a single number. On larger ones `parameter in list` raises, because a list compares values; on
# these it answers, and an experiment can show what it answers.

NEW, DEFAULT, FIRST, SECOND, THIRD = 0.02, 0.08, 0.04, 0.16, 0.32  # learning rates: each another multiple of NEW


class _Layers(Experiment):
    """Draws a layer of each name, and the slopes of a loss along its weight and along its bias."""

    names: tuple[str, ...]

    def draw(self, trial: Trial) -> dict[str, Any]:
        return {name: _layer(trial) for name in self.names} | {"slopes": 1 + trial.normal(2).abs()}


@exercise.experiment("new ones train", 1, 2)
class NewOnesTrain(_Layers):
    points = 2
    names = "head", "block", "loose", "neck", "tail"

    def measure(self, subject, inputs):
        head, block, loose = inputs["head"], inputs["block"].requires_grad_(False), inputs["loose"]
        # One group has the learning rate of the new ones already, and not the optimizer's default momentum.
        rates = ((head, FIRST), (inputs["neck"], NEW), (inputs["tail"], THIRD))
        groups = [{"params": list(layer.parameters()), "lr": lr, "momentum": 0.5} for layer, lr in rates]
        optimizer = SGD(groups, lr=DEFAULT, momentum=0.9)
        new = [*block.parameters(), *loose.parameters()]  # frozen ones, and some that train and were in no optimizer
        values = [_values(new)]
        returned = subject(optimizer, list(new), NEW)
        for _ in range(2):
            _step(optimizer, _slopes(new, inputs["slopes"].repeat(2)) | _slopes(head.parameters(), inputs["slopes"]))
            values.append(_values(new))
        another = isinstance(returned, Optimizer) and returned is not optimizer
        moves = {"block": _moves(optimizer, new[:2], values[0][:2]), "loose": _moves(optimizer, new[2:], values[0][2:])}
        return {"another": another, "moves": moves, "values": values}

    def facts(self, raw, inputs):
        start, first, second = (values[:2] for values in raw["values"])
        once = _times(start - first, NEW * inputs["slopes"])
        twice = _times(first - second, start - first) if once else None
        return {
            "the optimizer afterwards": "another one came back" if raw["another"] else "the one given",
            "unfrozen parameters, after a step": _fate(raw["moves"]["block"]),
            "trainable ones that it did not have, after a step": _fate(raw["moves"]["loose"]),
            "their first step, in units of lr x gradient": once,
            "their second step with the same gradient, in units of the first": twice,
        }


class _WithHead(_Layers):
    """A head trains, and a second layer joins in some way."""

    names = "head", "block"

    def given(self, layer: nn.Linear):
        raise NotImplementedError

    def measure(self, subject, inputs):
        head, block = inputs["head"], inputs["block"].requires_grad_(False)
        optimizer = SGD([{"params": list(head.parameters()), "lr": SECOND}], lr=DEFAULT, momentum=0.9)
        before = _values(block.parameters())
        subject(optimizer, self.given(block), NEW)
        _step(optimizer, _slopes(block.parameters(), inputs["slopes"]) | _slopes(head.parameters(), inputs["slopes"]))
        moves = _moves(optimizer, list(block.parameters()), before)
        return {"values": [before, _values(block.parameters())], "moves": moves}


@exercise.experiment("any iterable", 1, 2)
class AnyIterable(_WithHead):
    def given(self, layer):
        return layer.parameters()

    def facts(self, raw, inputs):
        return {"parameters out of a generator": _fate(raw["moves"])}


@exercise.experiment("one that comes twice", 5)
class OneThatComesTwice(_WithHead):
    def given(self, layer):
        return [layer.weight, layer.bias, layer.weight]

    def facts(self, raw, inputs):
        before, after = raw["values"]
        twice, once = (after - before).flatten() / inputs["slopes"]
        # Whether they train at all, and at what rate, is the question of other experiments.
        steps = None if near(once, 0, scale=NEW) else _times(twice, once)
        return {"step of one that comes twice, in units of one that comes once": steps}


@exercise.experiment("old ones go on", 3, 4)
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
            subject(optimizer, [*middle.parameters(), *new], NEW)
            waiting = [0.0 if parameter.grad is None else parameter.grad.item() for parameter in old]
            for row in slopes[4:]:
                _step(optimizer, _slopes(old, row) | _slopes(new, row[:2]))
            raw[kind] = {"old": _values(old), "waiting": waiting, "default": optimizer.defaults["lr"]}
        return raw

    def facts(self, raw, inputs):
        slopes, facts = inputs["slopes"], {}
        for kind in self.kinds:
            head, middle, _ = inputs["layers"][kind]
            start = _values([*head.parameters(), *middle.parameters()])
            known = {name: self.control(kind, start, slopes, **changes) for name, changes in self.changes.items()}
            facts[f"{kind}: what trained before moves"] = which(raw[kind]["old"], known, "in some other way")
        kept = all(near(raw[kind]["waiting"], slopes[3]) for kind in self.kinds)
        defaults = all(near(raw[kind]["default"], DEFAULT) for kind in self.kinds)
        return facts | {
            "gradients that were waiting for the next step": "kept" if kept else "lost",
            "the optimizer's default learning rate": "as it was" if defaults else "changed",
        }

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


class _ThreeGroups(_Layers):
    names = "head", "tail", "neck", "block"

    def optimizer(self, inputs) -> Optimizer:
        head, tail, neck, block = (inputs[name] for name in self.names)
        tail.requires_grad_(False)  # in the optimizer from the start, and frozen
        block.requires_grad_(False)  # not in it
        rates = ((head, FIRST), (tail, SECOND), (neck, THIRD))
        groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in rates]
        return SGD(groups, lr=DEFAULT, momentum=0.9)


@exercise.experiment("already in the optimizer", 1, 2, 3)
class AlreadyInTheOptimizer(_ThreeGroups):
    points = 2

    def measure(self, subject, inputs):
        optimizer = self.optimizer(inputs)
        head, tail, neck, block = (list(inputs[name].parameters()) for name in self.names)
        everything = [*head, *tail, *neck, *block]
        before = _values(everything)
        subject(optimizer, [*tail, block[0], neck[1], head[0], block[1]], NEW)
        _step(optimizer, _slopes(everything, inputs["slopes"].repeat(4)))
        return {"values": [before, _values(everything)], "moves": _moves(optimizer, block, before[6:])}

    def facts(self, raw, inputs):
        before, after = raw["values"]
        lr = torch.tensor([FIRST, FIRST, SECOND, SECOND, THIRD, THIRD, NEW, NEW])
        steps = (before - after).flatten() / (lr * inputs["slopes"].repeat(4))
        return {
            "new ones, given together with some that it had": _fate(raw["moves"]),
            "step of the new ones, in units of lr x gradient": _times(steps[6:], torch.ones(2)),
            "step of the frozen ones it had, in units of their own group's": _times(steps[2:4], torch.ones(2)),
            "steps of the others it had, in units of their own groups'": [round(float(s), 2) for s in steps[[0, 1, 4, 5]]],
        }


@exercise.experiment("nothing new", 6)
class NothingNew(_ThreeGroups):
    def measure(self, subject, inputs):
        optimizer = self.optimizer(inputs)
        counts = [len(optimizer.param_groups)]
        for given in ([*inputs["tail"].parameters(), inputs["head"].bias], []):
            subject(optimizer, list(given), NEW)
            counts.append(len(optimizer.param_groups))
        return {"counts": counts}

    def facts(self, raw, inputs):
        start, known, none = raw["counts"]
        return {
            "groups added for parameters that it had": known - start,
            "groups added for no parameters at all": none - known,
        }


@exercise.experiment("equal values", 5)
class EqualValues(Experiment):
    def draw(self, trial: Trial) -> dict:
        # Fresh BatchNorms: all their weights are one, all their biases zero.
        return {"norms": nn.ModuleList(nn.BatchNorm1d(1) for _ in range(3)), "other": _layer(trial)}

    def measure(self, subject, inputs):
        first, *others = inputs["norms"]
        equal = [parameter for norm in others for parameter in norm.parameters()]
        different = list(inputs["other"].parameters())
        optimizer = SGD(first.parameters(), lr=DEFAULT, momentum=0.9)
        subject(optimizer, [parameter.requires_grad_(False) for parameter in equal + different], NEW)
        there = set(map(id, _all_in(optimizer)))
        return {name: [id(p) in there for p in new] for name, new in (("equal", equal), ("different", different))}

    def facts(self, raw, inputs):
        joined = traces.how_many(raw["equal"]) if all(raw["different"]) else None
        return {"parameters of two new BatchNorms that join an old one": joined}


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


def _extend_the_first_group(optimizer, new, lr):
    optimizer.param_groups[0]["params"].extend(new)


def _add_with_the_settings_of_the_last(optimizer, new, lr):
    if new:
        optimizer.add_param_group(optimizer.param_groups[-1] | {"params": new, "lr": lr})


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
        "put into the first group": {"add": _extend_the_first_group},
        "settings of another group": {"add": _add_with_the_settings_of_the_last},
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


@exercise.misconception("only frozen ones join")
def only_frozen_ones_join(optimizer, parameters, lr):
    _unfreeze_into(optimizer, [parameter for parameter in parameters if not parameter.requires_grad], lr)


@exercise.misconception("moments cleared")
def moments_cleared(optimizer, parameters, lr):
    _unfreeze_into(optimizer, parameters, lr)
    optimizer.state.clear()
