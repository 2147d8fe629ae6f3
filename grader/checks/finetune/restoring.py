"""Exercise 4.6a: after a block of code the model and the optimizer are what they were before it."""

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.experiment import Exercise, Experiment, Fact, Trial, wrong_return
from grader.near import near, which
from helpers.finetune import put_back

exercise = Exercise(__name__, "4.6a", put_back, core=5)

AS_IT_WAS, AS_LEFT = "what it was before the block", "what it was at the end of the block"


class _Training(Experiment):
    """Draws a network, some of it in eval mode, and the gradients that its optimizer is stepped with."""

    def draw(self, trial: Trial) -> dict:
        first, second = with_statistics(nn.BatchNorm1d(4), trial), with_statistics(nn.BatchNorm1d(4), trial)
        model = nn.Sequential(nn.Linear(3, 4), first, nn.Tanh(), nn.Linear(4, 4), second, nn.Linear(4, 2))
        second.eval()
        gradients = [[0.5 + trial.normal(*p.shape).abs() for p in model.parameters()] for _ in range(4)]
        return {"model": model, "gradients": gradients}

    def train(self, model: nn.Module, optimizer: Optimizer, gradients: list[Tensor]) -> None:
        """What happens inside the block: everything changes."""
        model.train()
        model[4].running_mean.add_(1)
        model(torch.ones(5, 3, device=gradients[0].device))
        step(model.parameters(), optimizer, gradients)
        optimizer.zero_grad()


@exercise.experiment("values", 1)
class Values(_Training):
    points = 2

    def measure(self, subject, inputs):
        model = inputs["model"]
        model[0].bias.requires_grad_(False)
        optimizer = SGD([parameter for layer in (model[0], model[1], model[5]) for parameter in layer.parameters()], lr=0.1)
        with block(subject, model, optimizer):
            with torch.no_grad():
                for parameter in model.parameters():  # frozen ones, and those that the optimizer does not have, among them
                    parameter.add_(0.5)
            self.train(model, optimizer, inputs["gradients"][0])
            left = traces.of(model)
        return {"after": traces.of(model), "left": left}

    def facts(self, raw, inputs):
        before, after, left = traces.of(inputs["model"]), raw["after"], raw["left"]
        inside = [name for name in before["parameters"] if name[0] in "015" and name != "0.bias"]
        kinds = {
            "parameters that the optimizer trains": ("parameters", inside),
            "other parameters": ("parameters", before["parameters"].keys() - inside),
            "buffers": ("buffers", before["buffers"]),
        }
        return {
            f"each of the {words}": _which_all(
                after[kind],
                {AS_IT_WAS: {name: before[kind][name] for name in names}, AS_LEFT: {name: left[kind][name] for name in names}},
            )
            for words, (kind, names) in kinds.items()
        }


@exercise.experiment("modes", 2)
class Modes(_Training):
    def measure(self, subject, inputs):
        model = inputs["model"]
        optimizer = SGD(model.parameters(), lr=0.1)
        with block(subject, model, optimizer):
            self.train(model, optimizer, inputs["gradients"][0])
        after_training = traces.of(model)
        with block(subject, model, optimizer):
            model.eval()
        return {"trained": after_training, "evaluated": traces.of(model), "start": dict(after_training["modes"])}

    def facts(self, raw, inputs):
        trained = traces.changes(inputs["model"], raw["trained"], "modes")["modules switched to train mode"]
        again = [name for name, mode in raw["start"].items() if mode and not raw["evaluated"]["modes"][name]]
        return {"modules left in train mode that were in eval mode": trained, "modules left in eval mode": traces.some(again)}


@exercise.experiment("settings of the groups", 3)
class SettingsOfTheGroups(_Training):
    own: ClassVar = ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.3, "weight_decay": 0.0}, {"lr": 0.05, "weight_decay": 0.2})

    def measure(self, subject, inputs):
        model = inputs["model"]
        layers = model[0], model[3], model[5]
        groups = [{"params": layer.parameters()} | own for layer, own in zip(layers, self.own, strict=True)]
        optimizer = SGD(groups, momentum=0.9)
        with block(subject, model, optimizer):
            for group in optimizer.param_groups:
                group.update(lr=1.5, weight_decay=0.7)
        return {name: [float(group[name]) for group in optimizer.param_groups] for name in ("lr", "weight_decay")}

    def facts(self, raw, inputs):
        return {
            f"{name} of the groups": "as it was" if near(raw[name], [own[name] for own in self.own]) else "different"
            for name in ("lr", "weight_decay")
        }


@exercise.experiment("what the optimizer remembers", 4)
class WhatTheOptimizerRemembers(_Training):
    points = 2
    kinds: ClassVar[dict[str, Callable]] = {
        "Adam": lambda parameters: Adam(parameters, lr=0.1),
        "SGD with momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    }

    def measure(self, subject, inputs):
        raw = {}
        for kind, make in self.kinds.items():
            for used in (True, False):
                model = copy.deepcopy(inputs["model"])
                own = list(model.parameters())
                optimizer = make(own)
                self.use(own, optimizer, inputs["gradients"], used)
                with block(subject, model, optimizer):
                    self.train(model, optimizer, inputs["gradients"][2])
                raw[f"{kind}, {'in use' if used else 'new'}"] = self.next_step(own, optimizer, inputs["gradients"][3])
        return raw

    def facts(self, raw, inputs):
        facts: dict[str, Fact] = {}
        for name, moved in raw.items():
            kind, _, used = name.partition(", ")
            known = {}
            for way in ("as it would have been", "as if the block's had been made", "that of a new optimizer"):
                own = list(copy.deepcopy(inputs["model"]).parameters())
                optimizer = self.kinds[kind](own)
                if way != "that of a new optimizer":
                    self.use(own, optimizer, inputs["gradients"], used == "in use")
                if way == "as if the block's had been made":
                    step(own, optimizer, inputs["gradients"][2])
                known[way] = self.next_step(own, optimizer, inputs["gradients"][3])
            facts[f"the next step of {name}"] = which(moved, known)
        return facts

    def use(self, own: list[Tensor], optimizer: Optimizer, gradients: list[list[Tensor]], used: bool) -> None:
        for one in gradients[:2] if used else []:
            step(own, optimizer, one)
        optimizer.zero_grad()

    def next_step(self, own: list[Tensor], optimizer: Optimizer, gradients: list[Tensor]) -> Tensor:
        """By how much each parameter moves, with a learning rate of 1 whatever it was."""
        before = nn.utils.parameters_to_vector(own).detach().clone()
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        step(own, optimizer, gradients)
        return nn.utils.parameters_to_vector(own).detach() - before


@exercise.experiment("same parameters", 5)
class SameParameters(_Training):
    def measure(self, subject, inputs):
        model = inputs["model"]
        own = list(model.parameters())
        optimizer = SGD(own, lr=0.1)
        with block(subject, model, optimizer):
            self.train(model, optimizer, inputs["gradients"][0])
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {
            "model": traces.how_many(now is then for now, then in zip(model.parameters(), own, strict=True)),
            "optimizer": traces.how_many(any(now is then for now in held) for then in own),
        }

    def facts(self, raw, inputs):
        return {f"parameters that the {name} still holds": raw[name] for name in ("model", "optimizer")}


@exercise.experiment("after an exception", 6)
class AfterAnException(_Training):
    ends: ClassVar = {"an exception": ArithmeticError, "KeyboardInterrupt": KeyboardInterrupt}

    def measure(self, subject, inputs):
        raw = {}
        for name, error in self.ends.items():
            model = copy.deepcopy(inputs["model"])
            optimizer, caught = SGD(model.parameters(), lr=0.1), "nothing"
            try:
                with block(subject, model, optimizer):
                    self.train(model, optimizer, inputs["gradients"][0])
                    raise error("of the block")
            except error as exception:
                caught = "that exception" if type(exception) is error else "another one"
            ordinary = copy.deepcopy(inputs["model"])
            with block(subject, ordinary, optimizer := SGD(ordinary.parameters(), lr=0.1)):
                self.train(ordinary, optimizer, inputs["gradients"][0])
            raw[name] = {"caught": caught, "after": traces.of(model), "ordinary": traces.of(ordinary)}
        return raw

    def facts(self, raw, inputs):
        before, facts = traces.of(inputs["model"]), {}
        for name, seen in raw.items():
            # Whether parameters are put back at all is the question of another experiment.
            kept = {
                end: all(near(seen[end]["parameters"][key], value) for key, value in before["parameters"].items())
                for end in ("ordinary", "after")
            }
            facts[f"after {name}, what arrives outside"] = seen["caught"]
            facts[f"after {name}, parameters are put back"] = kept["after"] if kept["ordinary"] else None
        return facts


@exercise.experiment("gradients", 7)
class Gradients(_Training):
    def measure(self, subject, inputs):
        raw, (waiting, steps, *_) = {}, inputs["gradients"]
        for name in ("waiting", "none"):
            model = copy.deepcopy(inputs["model"])
            optimizer = SGD(model.parameters(), lr=0.1)
            for parameter, gradient in zip(model.parameters(), waiting, strict=True):
                parameter.grad = gradient.clone() if name == "waiting" else None
            with block(subject, model, optimizer):
                for parameter, gradient in zip(model.parameters(), steps, strict=True):  # as a backward pass does, in place
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
                optimizer.step()
            gradients = [parameter.grad for parameter in model.parameters()]
            raw[name] = [None if gradient is None else gradient.clone() for gradient in gradients]
        return raw

    def facts(self, raw, inputs):
        pairs = list(zip(raw["waiting"], inputs["gradients"][0], strict=True))
        gone = all(gradient is None or near(gradient, 0) for gradient, _ in pairs)
        wait = all(gradient is not None and near(gradient, was) for gradient, was in pairs)
        none = all(gradient is None for gradient in raw["none"])
        return {
            "gradients that were waiting": "are gone" if gone else "wait" if wait else "are others",
            "where there was none": "none" if none else "one",
        }


@exercise.experiment("buffers that are not saved", 8)
class BuffersThatAreNotSaved(_Training):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["model"][2].register_buffer("calls", trial.normal(3), persistent=False)
        return inputs

    def measure(self, subject, inputs):
        model = inputs["model"]
        optimizer = SGD(model.parameters(), lr=0.1)
        with block(subject, model, optimizer):
            model[2].calls.add_(1)
            model[1].running_mean.add_(1)
        return {"calls": model[2].calls.detach().clone(), "mean": model[1].running_mean.detach().clone()}

    def facts(self, raw, inputs):
        model = inputs["model"]
        # Whether buffers are put back at all is the question of another experiment.
        seen = "as it was" if near(raw["calls"], model[2].calls) else "changed"
        return {"a buffer with persistent=False": seen if near(raw["mean"], model[1].running_mean) else None}


def block(subject, model: nn.Module, optimizer: Optimizer):
    """What the subject gives, if a `with` statement takes it."""
    manager = subject(model, optimizer)
    if not all(hasattr(manager, method) for method in ("__enter__", "__exit__")):
        raise wrong_return("put_back must give what a `with` statement takes", manager)
    return manager


def step(parameters: Iterable[Tensor], optimizer: Optimizer, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def _which_all(after: dict[str, Tensor], known: dict[str, dict[str, Tensor]]) -> str:
    """The first of the known states that each of these tensors is in."""
    for name, state in known.items():
        if all(near(after[key].float(), value.float()) for key, value in state.items()):
            return name
    return "different"


KEPT = "parameters", "buffers", "modes", "gradients"


def _settings(optimizer: Optimizer) -> list[dict]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@contextmanager
def solution(
    model,
    optimizer,
    *,
    kinds=KEPT,  # of traces to put back
    settings=True,
    memory=lambda state: {parameter: copy.deepcopy(values) for parameter, values in state.items()},
    ends=BaseException,  # how a block may end to be put back, besides in order
    passed_on=True,
    finish=lambda model, optimizer: None,
):
    """A right solution, with options for what goes wrong below."""
    was = {kind: values for kind, values in traces.of(model).items() if kind in kinds}
    groups, remembered = _settings(optimizer), memory(optimizer.state)
    error = None
    try:
        yield
    except ends as caught:
        error = caught
    traces.put_back(model, was)
    if settings:
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    if remembered is not None:
        optimizer.state.clear()
        optimizer.state.update(remembered)
    finish(model, optimizer)
    if error is not None and passed_on:
        raise error


def _other_objects(model, optimizer):
    gradients = [parameter.grad for parameter in model.parameters()]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


exercise.misconceptions_of(
    solution,
    {
        "only the parameters put back": {"kinds": ("parameters", "modes", "gradients")},
        "model kept without a copy": {"kinds": ("modes", "gradients")},
        "modes forgotten": {"kinds": ("parameters", "buffers", "gradients")},
        "optimizer forgotten": {"settings": False, "memory": lambda state: None},
        "moments left": {"memory": lambda state: None},
        "learning rates left": {"settings": False},
        "everything forgotten": {"memory": lambda state: {}},
        "put back after success alone": {"ends": ()},
        "only after an Exception": {"ends": Exception},
        "exception swallowed": {"passed_on": False},
        "gradients left": {"kinds": ("parameters", "buffers", "modes")},
        "gradients dropped": {"finish": lambda model, optimizer: model.zero_grad()},
        "new Parameter objects": {"finish": _other_objects},
    },
)


@exercise.misconception("one mode for all")
def one_mode_for_all(model, optimizer):
    mode = model.training
    return solution(model, optimizer, kinds=("parameters", "buffers", "gradients"), finish=lambda *_: model.train(mode))


@exercise.misconception("moments kept without a copy")
def moments_kept_without_a_copy(model, optimizer):
    saved = optimizer.state_dict()
    return solution(model, optimizer, memory=lambda state: None, finish=lambda *_: optimizer.load_state_dict(saved))


@exercise.misconception("state dict alone")
@contextmanager
def state_dict_alone(model, optimizer):
    saved = copy.deepcopy(model.state_dict())
    with solution(model, optimizer, kinds=("modes", "gradients")):
        try:
            yield
        finally:
            model.load_state_dict(saved)
