"""Exercise 4.3: unfreeze parameters in the middle of training, in the optimizer that is there."""

from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from grader.experiment import Exercise, Experiment, Trial, misconception
from grader.near import near
from helpers.finetune import unfreeze_into

# Every parameter here is a single number. On larger ones `parameter in list` raises, because a list compares values; on
# these it answers, and an experiment can show what it answers.

NEW, DEFAULT, FIRST, SECOND = 0.02, 0.08, 0.04, 0.16  # learning rates: each another multiple of NEW


class NewOnesTrain(Experiment):
    """What was unfrozen trains, with the learning rate given and otherwise with the optimizer's defaults."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"head": _layer(trial), "block": _layer(trial), "slopes": 1 + trial.normal(2).abs()}

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
        return {"another": another, "seen": _seen(optimizer, new, values[0]), "values": values}

    def facts(self, raw, inputs):
        start, first, second = raw["values"]
        once = _times(start - first, NEW * inputs["slopes"])
        twice = _times(first - second, start - first) if once else None
        return {
            "the optimizer afterwards": "another one came back" if raw["another"] else "the one given",
            "unfrozen parameters, after a step": _fate(raw["seen"]),
            "their first step, in units of lr x gradient": once,
            "their second step with the same gradient, in units of the first": twice,
        }


class AnyIterable(Experiment):
    """The parameters may come out of a generator, and one that comes twice trains once."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        layers = {name: _layer(trial) for name in ("head", "block", "tied")}
        return layers | {"slopes": 1 + trial.normal(2).abs()}

    def measure(self, subject, inputs):
        head, block, tied = inputs["head"], inputs["block"].requires_grad_(False), inputs["tied"].requires_grad_(False)
        raw = {}
        for name, parameters in (("block", block.parameters()), ("tied", [tied.weight, tied.bias, tied.weight])):
            layer = inputs[name]
            optimizer = SGD([{"params": list(head.parameters()), "lr": SECOND}], lr=DEFAULT, momentum=0.9)
            before = _values(layer.parameters())
            subject(optimizer, parameters, NEW)
            _step(optimizer, _slopes(layer.parameters(), inputs["slopes"]) | _slopes(head.parameters(), inputs["slopes"]))
            seen = _seen(optimizer, list(layer.parameters()), before)
            raw[name] = {"values": [before, _values(layer.parameters())], "seen": seen}
        return raw

    def facts(self, raw, inputs):
        before, after = raw["tied"]["values"]
        step = _times((before - after)[:1], NEW * inputs["slopes"][:1])
        return {
            "parameters out of a generator": _fate(raw["block"]["seen"]),
            "step of one that comes twice, in units of lr x gradient": step,
        }


class OldOnesGoOn(Experiment):
    """What trained before goes on as if nothing had happened: learning rates, momentum, Adam's moments."""

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
            raw[kind] = {"old": _values(old), "new": _seen(optimizer, new, before), "waiting": waiting}
        return raw

    def facts(self, raw, inputs):
        slopes, facts = inputs["slopes"], {}
        for kind in self.kinds:
            head, middle, _ = inputs["layers"][kind]
            start = _values([*head.parameters(), *middle.parameters()])
            close = (
                name
                for name, changes in self.changes.items()
                if near(raw[kind]["old"], self.control(kind, start, slopes, **changes))
            )
            facts[f"{kind}: what trained before moves"] = next(close, "in some other way")
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


class AlreadyInTheOptimizer(Experiment):
    """What the optimizer has already is unfrozen where it is, and a call with nothing new adds no group."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        layers = {name: _layer(trial) for name in ("head", "tail", "block")}
        return layers | {"slopes": 1 + trial.normal(2).abs()}

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
        seen = _seen(optimizer, list(block.parameters()), before[4:])
        return {"values": [before, _values(everything)], "added": added, "seen": seen}

    def facts(self, raw, inputs):
        before, after = raw["values"]
        lr = torch.tensor([FIRST, FIRST, SECOND, SECOND, NEW, NEW])
        steps = (before - after).flatten() / (lr * inputs["slopes"].repeat(3))
        return {
            "new ones, given together with frozen ones it had": _fate(raw["seen"]),
            "step of the new ones, in units of lr x gradient": _times(steps[4:], torch.ones(2)),
            "step of the frozen ones it had, in units of their own group's": _times(steps[2:4], torch.ones(2)),
            "step of all others, in units of their own group's": _times(steps[:2], torch.ones(2)),
            "groups that a second call with the same parameters adds": raw["added"],
        }


class EqualValues(Experiment):
    """A parameter is new if it is another parameter, even if its value equals that of one already there."""

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
        return {"seen": _seen(optimizer, new, before)}

    def facts(self, raw, inputs):
        return {"parameters of two new BatchNorms beside an old one": _fate(raw["seen"])}


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


def _seen(optimizer: Optimizer, parameters: list[Tensor], before: Tensor) -> dict:
    """What `_fate` is told from: how far the parameters have moved since `before`, and what they need to move."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {
        "moves": (_values(parameters) - before).flatten(),
        "trainable": [parameter.requires_grad for parameter in parameters],
        "there": [id(parameter) in held for parameter in parameters],
    }


def _fate(seen: dict) -> str:
    """Whether the parameters have moved, and if not, what is missing."""
    moved = [not near(move, 0, scale=NEW) for move in seen["moves"]]
    if any(moved):
        return "all of them move" if all(moved) else "some of them move"
    return f"none moves ({_how_many(seen['trainable'])} trainable, {_how_many(seen['there'])} in the optimizer)"


def _how_many(which: list[bool]) -> str:
    return "all" if all(which) else "some" if any(which) else "none"


def _times(steps: Tensor, unit: Tensor) -> float | None:
    """How many units each of the steps is; None if that is not one number for all of them."""
    times = steps.flatten() / unit.flatten()
    number = times.mean().item()
    return round(number, 3) if near(times, number) else None  # three digits to show


def _not_yet_in(optimizer: Optimizer, parameters) -> list[Tensor]:
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in dict.fromkeys(parameters) if id(parameter) not in known]


def _add(optimizer: Optimizer, new: list[Tensor], lr: float) -> None:
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


@misconception(
    "a new optimizer",
    hint="The optimizer you were given does not have them; another one does. What did the old one know about each parameter, "
    "and who else holds it?",
    source="seen in public teaching code: optimizer = Adam(model.parameters(), ...) again after each unfreezing",
)
def a_new_optimizer(optimizer, parameters, lr):
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    everything += _not_yet_in(optimizer, parameters := list(parameters))
    for parameter in parameters:
        parameter.requires_grad_(True)
    return type(optimizer)(everything, lr=lr)


@misconception(
    "the optimizer never hears of it",
    hint="They get gradients now, and do not move. Which parameters does an optimizer step over, and since when?",
    source="a line of reasoning: requires_grad = True between epochs, and an optimizer built from what was trainable then",
)
def the_optimizer_never_hears_of_it(optimizer, parameters, lr):
    for parameter in parameters:
        parameter.requires_grad_(True)


@misconception(
    "in the optimizer, still frozen",
    hint="The optimizer has them, and yet they stay where they are. What does it find in `.grad` of a frozen parameter?",
    source="a line of reasoning: whoever tells the optimizer to train a parameter has said enough",
)
def in_the_optimizer_still_frozen(optimizer, parameters, lr):
    _add(optimizer, _not_yet_in(optimizer, parameters), lr)


@misconception(
    "compared by value",
    hint="The weights of a fresh BatchNorm are ones, and so are those of the next. When are two parameters the same one?",
    source="BaseFinetuning of Lightning: any(torch.equal(p, param) ...); `p in list` raises where they have several numbers",
)
def compared_by_value(optimizer, parameters, lr):
    known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    new = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        if not any(torch.equal(parameter, other) for other in known + new):
            new.append(parameter)
    _add(optimizer, new, lr)


@misconception(
    "generator read twice",
    hint="A list works, `module.parameters()` does not. How many times can you go through it?",
    source="a line of reasoning: one loop for the flags and one for the group, over something that one loop uses up",
)
def generator_read_twice(optimizer, parameters, lr):
    for parameter in parameters:
        parameter.requires_grad_(True)
    _add(optimizer, _not_yet_in(optimizer, parameters), lr)


@misconception(
    "torch's refusal swallowed",
    hint="As soon as one of them is in the optimizer already, the new ones do not train either. What did torch say about "
    "them, and who heard it?",
    source="a line of reasoning: add_param_group raises on a parameter that it has, so the call gets a try around it",
)
def refusal_swallowed(optimizer, parameters, lr):
    everything = list(dict.fromkeys(parameters))
    for parameter in everything:
        parameter.requires_grad_(True)
    with suppress(ValueError):
        _add(optimizer, everything, lr)


@misconception(
    "one learning rate for all groups",
    hint="The new ones have their learning rate, and so has the rest now. How large were the steps of the others before?",
    source="seen in public teaching code: for group in optimizer.param_groups: group['lr'] = lr",
)
def one_learning_rate_for_all_groups(optimizer, parameters, lr):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    _add(optimizer, _not_yet_in(optimizer, parameters), lr)
    for group in optimizer.param_groups:
        group["lr"] = lr


@misconception(
    "moments cleared",
    hint="The next steps of what trained before are those of a fresh optimizer. What had momentum and Adam gathered?",
    source="seen in public code: optimizer.state = defaultdict(dict) where parameters are added",
)
def moments_cleared(optimizer, parameters, lr):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    _add(optimizer, _not_yet_in(optimizer, parameters), lr)
    optimizer.state.clear()


@misconception(
    "the optimizer's default learning rate",
    hint="They train, but not with the learning rate you were given. Which one does a group get that names none?",
    source="seen in public teaching code: optimizer.add_param_group({'params': ...}) and nothing else",
)
def default_learning_rate(optimizer, parameters, lr):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    new = _not_yet_in(optimizer, parameters)
    if new:
        optimizer.add_param_group({"params": new})


@misconception(
    "only the new ones made trainable",
    hint="One layer was in the optimizer from the start, frozen, and it still is. Who has to be trainable when you are done?",
    source="a line of reasoning: what the optimizer has already needs nothing",
)
def only_the_new_ones_made_trainable(optimizer, parameters, lr):
    new = _not_yet_in(optimizer, parameters)
    for parameter in new:
        parameter.requires_grad_(True)
    _add(optimizer, new, lr)


@misconception(
    "in the group twice",
    hint="The same weight came twice, and its step is twice as long. What do you know about a parameter once it has come?",
    source="pytorch/pytorch issue 40967: duplicate parameters in one group, which torch only warns of",
)
def in_the_group_twice(optimizer, parameters, lr):
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    _add(optimizer, [parameter for parameter in parameters if parameter not in known], lr)


@misconception(
    "an empty group",
    hint="Print the groups after a call that brings nothing new. What will a schedule, or a saved state, make of the last one?",
    source="a line of reasoning: add_param_group takes an empty list as well, and does not complain",
)
def an_empty_group(optimizer, parameters, lr):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": _not_yet_in(optimizer, parameters), "lr": lr})


EXERCISE = Exercise(
    number="4.3",
    name="unfreeze_into",
    reference=unfreeze_into,
    experiments=(NewOnesTrain(), AnyIterable(), OldOnesGoOn(), AlreadyInTheOptimizer(), EqualValues()),
    misconceptions=(
        *(a_new_optimizer, the_optimizer_never_hears_of_it, in_the_optimizer_still_frozen, compared_by_value),
        *(generator_read_twice, refusal_swallowed, one_learning_rate_for_all_groups, moments_cleared),
        *(default_learning_rate, only_the_new_ones_made_trainable, in_the_group_twice, an_empty_group),
    ),
    hints=(
        "A parameter trains if two parties agree. Who gives it a gradient, and who takes the step?",
        "Before and after your function, look at `optimizer.param_groups`: how many groups, which parameters, which `lr`. "
        "Then call it again with the same parameters, with a generator, and with one parameter twice.",
        "Read the iterable once; make each parameter trainable; keep those whose identity (`id`, or a set of them) is neither "
        "in a group nor among the ones you keep; give these, if there are any, to `add_param_group` with their `lr`.",
    ),
)
