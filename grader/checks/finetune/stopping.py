"""Exercise 4.5: stop when validation no longer improves, and put the best state back."""

import copy
import math

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn
from grader.near import near
from helpers import expect
from helpers.finetune import EarlyStopping

exercise = Exercise(__name__, "4.5", EarlyStopping)

NAN = None  # how a draw spells it: a NaN in the inputs would not equal itself when they are compared afterwards

State = dict[str, Tensor]


@exercise.experiment("stops after patience")
class StopsAfterPatience(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(2, 4)
        fall = [-1 - k for k in range(2 * patience + 3)]
        rise = list(range(patience + 2))
        # Each new best comes in the last moment; what lies between falls, so that no score is above the one before.
        late = [rank for best in range(4) for rank in (100 * best, *(100 * best - k for k in range(1, patience)))]
        zigzag = [9, *([1, 2] * (patience + 2))]
        return {
            "patience": patience,
            "falling": _scores(trial, rise + fall, above=-3.0),  # all of them negative, as minus a loss is
            "late": _scores(trial, late + [rank - 10 for rank in fall]),
            "zigzag": _scores(trial, zigzag),
            "last best": [len(rise) - 1, 3 * patience, 0],
        }

    def measure(self, subject, inputs):
        patience, stops = inputs["patience"], []
        for name in ("falling", "late", "zigzag"):
            stopper = _stopper(subject, _model(), patience)
            stops.append(_stop(stopper, inputs[name]))
        return {"stops": stops}

    def facts(self, raw, inputs):
        falling, late, zigzag = (
            _waited(stop, best, inputs["patience"]) for stop, best in zip(raw["stops"], inputs["last best"], strict=True)
        )
        return {
            "negative scores that rise, then fall: it stops": falling,
            "a new best just in time, three times, then none: it stops": late,
            "up and down below the best: it stops": zigzag,
        }


@exercise.experiment("ties")
class Ties(Experiment):
    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(2, 4)
        fall = [90 - k for k in range(2 * patience + 2)]
        equal, lower = [0, 100, 99, *([100] * len(fall))], [0, 100, 99, *fall]
        scores = _scores(trial, equal + lower)
        return {"patience": patience, "scores": scores[: len(equal)], "control": scores[len(equal) :]}

    def measure(self, subject, inputs):
        return _two_stops(subject, inputs)

    def facts(self, raw, inputs):
        return {"where scores equal the best, it stops": _moment(raw, 1, "scores below the best")}


@exercise.experiment("nan first")
class NanFirst(Experiment):
    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, *range(2, patience + 4), *([1] * (2 * patience + 2))])
        return {"patience": patience, "scores": [NAN, *scores[1:]], "control": scores}

    def measure(self, subject, inputs):
        return _two_stops(subject, inputs)

    def facts(self, raw, inputs):
        return {"NaN, then rising, then low scores: it stops": _moment(raw, inputs["patience"] + 2, "a low first score")}


@exercise.experiment("nan later")
class NanLater(Experiment):
    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, 100, *range(50, 45 - 2 * patience, -1)])
        return {"patience": patience, "scores": [*scores[:2], NAN, *scores[3:]], "control": scores}

    def measure(self, subject, inputs):
        return _two_stops(subject, inputs)

    def facts(self, raw, inputs):
        return {"the best, then NaN, then falling scores: it stops": _moment(raw, 1, "a lower score in place of NaN")}


@exercise.experiment("restores the best")
class RestoresTheBest(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        scores = _scores(trial, [2, 1, 4, 0, 3])  # first, last, lowest and best are four different ones
        return {"model": _model(), "scores": scores, "states": _states(trial, len(scores) + 1)}

    def measure(self, subject, inputs):
        model, states = inputs["model"], inputs["states"]
        stopper = _stopper(subject, model, 10)
        for state, score in zip(states, inputs["scores"], strict=False):
            _move(model, state)
            _say(stopper, score)
        _move(model, states[-1])  # training goes on, until somebody asks
        stopper.restore()
        return {"state": _state(model)}

    def facts(self, raw, inputs):
        states = inputs["states"]
        known = {
            "the best score": states[2],
            "the first score": states[0],
            "the last score": states[4],
            "the lowest score": states[3],
            "the moment restore was called": states[5],
            "the moment EarlyStopping was made": _state(inputs["model"]),
        }
        return {
            "parameters after restore": _which(raw["state"], known, _parameters(inputs["model"])),
            "buffers after restore": _which(raw["state"], known, [name for name, _ in inputs["model"].named_buffers()]),
        }


@exercise.experiment("goes on training")
class GoesOnTraining(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _model(), "scores": _scores(trial, [0, 2, 1]), "states": _states(trial, 4)}

    def measure(self, subject, inputs):
        model, states = inputs["model"], inputs["states"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        stopper = _stopper(subject, model, 10)
        for state, score in zip(states, inputs["scores"], strict=False):
            _move(model, state)
            _say(stopper, score)
        _move(model, states[-1])
        stopper.restore()
        restored = _state(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer.zero_grad()
        if trainable:
            torch.stack([parameter.sum() for parameter in trainable]).sum().backward()
        optimizer.step()
        trained = _state(model)
        stopper.restore()
        return {"restored": restored, "trained": trained, "again": _state(model)}

    def facts(self, raw, inputs):
        states = inputs["states"]
        scored = {"the best score": states[1], "the last score": states[2], "the first score": states[0]}
        known = scored | {"the moment restore was called": states[3]}
        names = _parameters(inputs["model"])
        moved = [not torch.equal(raw["restored"][name], raw["trained"][name]) for name in names]
        again = scored | {"the moment restore was called": raw["trained"]}
        return {
            "parameters after restore": _which(raw["restored"], known, names),
            "a step of the optimizer built before trains the model": "yes" if all(moved) else "no",
            "parameters after that step and another restore": _which(raw["again"], again, names),
        }


def _scores(trial: Trial, ranks: list[int], above: float = 0.0) -> list[float]:
    """Numbers between `above` and `above` + 1 in the order of the ranks; equal ranks give equal numbers."""
    distinct = sorted(set(ranks))
    gaps = 0.5 + torch.rand(len(distinct), generator=trial.generator, dtype=torch.float64)
    values = above + gaps.cumsum(0) / (gaps.sum() + 1)
    return [values[distinct.index(rank)].item() for rank in ranks]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def _states(trial: Trial, count: int) -> list[State]:
    """That many states of a `_model`, no number of which occurs twice."""
    tensors = _state(_model())
    return [
        {
            name: trial.normal(*tensor.shape) if tensor.is_floating_point() else torch.tensor(10 + number)
            for name, tensor in tensors.items()
        }
        for number in range(count)
    ]


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _move(model: nn.Module, state: State) -> None:
    """Give the model's own tensors other values, in place, as an optimizer and BatchNorm do."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _which(state: State, known: dict[str, State], names: list[str]) -> str:
    """The first of the known states that these tensors of `state` are from."""
    same = (label for label, other in known.items() if all(name in state and near(state[name], other[name]) for name in names))
    return f"those of {found}" if (found := next(same, None)) else "different"


def _stopper(subject, model: nn.Module, patience: int):
    stopper = subject(model, patience)
    missing = [name for name in ("step", "restore") if not callable(getattr(stopper, name, None))]
    if missing:
        raise WrongReturn(
            f"EarlyStopping must have methods step and restore, got {expect.describe(stopper)} without {' and '.join(missing)}."
        )
    return stopper


def _say(stopper, score: float | None) -> bool:
    """Tell it a score; whether it says stop."""
    stop = stopper.step(math.nan if score is NAN else score)
    if stop is None:
        raise WrongReturn("step must return True or False, got None. Is there a return?")
    return bool(stop)


def _stop(stopper, scores: list[float | None]) -> int | None:
    """The position of the score after which it says stop."""
    return next((position for position, score in enumerate(scores) if _say(stopper, score)), None)


def _waited(stop: int | None, best: int, patience: int) -> str:
    """How many scores after the last best it stops, in words that hold for every patience."""
    if stop is None:
        return "never"
    if stop < best:
        return "before the best score has come"
    extra = stop - best - patience
    return "patience scores after the best" + (f" {'plus' if extra > 0 else 'minus'} {abs(extra)}" if extra else "")


def _two_stops(subject, inputs: dict) -> dict:
    """When it stops for the scores in question, and when for ordinary ones: whatever else it does is in both."""
    stops = (_stop(_stopper(subject, _model(), inputs["patience"]), inputs[name]) for name in ("scores", "control"))
    return dict(zip(("stop", "control"), stops, strict=True))


def _moment(raw: dict, best: int, control: str) -> str:
    """When it stops, beside when it stops for the control, whose best score is at position `best`."""
    if raw["control"] is None:
        return f"never, and never with {control} either"
    if raw["control"] == 0:
        return f"at the very first score, and with {control} as well"
    if raw["control"] <= best:
        return f"too early with {control} as well"
    if raw["stop"] is None:
        return "never"
    word = "when" if raw["stop"] == raw["control"] else "later than" if raw["stop"] > raw["control"] else "earlier than"
    return f"{word} it does with {control}"


class _Stopping:
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, model, patience):
        self.model, self.patience = model, patience
        self.best, self.bad, self.kept = -math.inf, 0, None

    def step(self, score):
        if self.better(score):
            self.best, self.bad, self.kept = score, 0, self.keep()
        else:
            self.bad += 1
        return self.bad >= self.patience

    def better(self, score):
        return score > self.best

    def keep(self):
        return copy.deepcopy(self.model.state_dict())

    def restore(self):
        self.model.load_state_dict(self.kept)


@exercise.misconception("restore changes nothing")
class RestoreChangesNothing(_Stopping):
    def keep(self):
        return self.model.state_dict()


@exercise.misconception("the last state kept")
class TheLastStateKept(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.kept = self.keep()
        return stop


@exercise.misconception("buffers forgotten")
class BuffersForgotten(_Stopping):
    def keep(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def restore(self):
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.kept, strict=True):
                parameter.copy_(value)


@exercise.misconception("one score too many")
class OneScoreTooMany(_Stopping):
    def step(self, score):
        super().step(score)
        return self.bad > self.patience


@exercise.misconception("bad scores added up")
class BadScoresAddedUp(_Stopping):
    def step(self, score):
        bad = self.bad
        super().step(score)
        self.bad = bad + (self.bad > 0)
        return self.bad >= self.patience


@exercise.misconception("a tie taken as better")
class ATieTakenAsBetter(_Stopping):
    def better(self, score):
        return score >= self.best


@exercise.misconception("lower taken as better")
class LowerTakenAsBetter(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = math.inf

    def better(self, score):
        return score < self.best


@exercise.misconception("the first score is the best, even NaN")
class TheFirstScoreIsTheBest(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = None

    def better(self, score):
        return self.best is None or score > self.best


@exercise.misconception("whatever is not worse is better")
class WhateverIsNotWorseIsBetter(_Stopping):
    def step(self, score):
        if score <= self.best:
            self.bad += 1
        else:
            self.best, self.bad, self.kept = score, 0, self.keep()
        return self.bad >= self.patience


@exercise.misconception("new Parameter objects")
class NewParameterObjects(_Stopping):
    def restore(self):
        self.model.load_state_dict(copy.deepcopy(self.kept), assign=True)


@exercise.misconception("compared with the previous score")
class ComparedWithThePreviousScore(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.best = score
        return stop


@exercise.misconception("the best starts at 0")
class TheBestStartsAtZero(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = 0.0
