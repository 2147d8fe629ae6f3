"""Exercise 4.5: stop when validation no longer improves, and put the best state back."""

import copy
import math

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, misconception
from grader.near import near
from helpers import expect
from helpers.finetune import EarlyStopping

NAN = None  # how a draw spells it: a NaN in the inputs would not equal itself when they are compared afterwards

State = dict[str, Tensor]


class StopsAfterPatience(Experiment):
    """It says stop once the last `patience` scores brought none above the best, not earlier and not later."""

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


class Ties(Experiment):
    """A score equal to the best is no improvement."""

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


class NanFirst(Experiment):
    """A first score of NaN is not the best: a number after it is better."""

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, *range(2, patience + 4), *([1] * (2 * patience + 2))])
        return {"patience": patience, "scores": [NAN, *scores[1:]], "control": scores}

    def measure(self, subject, inputs):
        return _two_stops(subject, inputs)

    def facts(self, raw, inputs):
        return {"NaN, then rising, then low scores: it stops": _moment(raw, inputs["patience"] + 2, "a low first score")}


class NanLater(Experiment):
    """A NaN after the best counts as a score that is not better."""

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, 100, *range(50, 45 - 2 * patience, -1)])
        return {"patience": patience, "scores": [*scores[:2], NAN, *scores[3:]], "control": scores}

    def measure(self, subject, inputs):
        return _two_stops(subject, inputs)

    def facts(self, raw, inputs):
        return {"the best, then NaN, then falling scores: it stops": _moment(raw, 1, "a lower score in place of NaN")}


class RestoresTheBest(Experiment):
    """`restore` puts parameters and buffers back to what they were at the best score."""

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


class GoesOnTraining(Experiment):
    """After `restore` the optimizer goes on training the same parameters, and the best is still there to return to."""

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
    return f"those of {found}" if (found := next(same, None)) else "others"


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


@misconception(
    "restore changes nothing",
    hint="After restore the model is as it was before. Did you keep a copy of its numbers, or the tensors that went on "
    "training? And does restore write into the model that you were given?",
    source="seen in public teaching code: best = model.state_dict(); its tensors share memory with the model's",
)
class RestoreChangesNothing(_Stopping):
    def keep(self):
        return self.model.state_dict()


@misconception(
    "the last state kept",
    hint="What comes back is the state of the last score, whatever that score was. When is there something new worth keeping?",
    source="a line of reasoning: one checkpoint file, overwritten after every epoch",
)
class TheLastStateKept(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.kept = self.keep()
        return stop


@misconception(
    "buffers forgotten",
    hint="The weights are those of the best score, the running statistics are not. What else does a network carry, besides "
    "what is trained?",
    source="a line of reasoning: best = [p.clone() for p in model.parameters()]",
)
class BuffersForgotten(_Stopping):
    def keep(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def restore(self):
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.kept, strict=True):
                parameter.copy_(value)


@misconception(
    "one score too many",
    hint="With a patience of 2 you wait for a third bad score. How many were not better when you say stop?",
    source="a line of reasoning: stop when more than `patience` scores were bad, as some libraries count it",
)
class OneScoreTooMany(_Stopping):
    def step(self, score):
        super().step(score)
        return self.bad > self.patience


@misconception(
    "bad scores added up",
    hint="It stops although a new best has just come. Which scores does patience count, all bad ones or those since the best?",
    source="a line of reasoning: one counter, which nobody sets back",
)
class BadScoresAddedUp(_Stopping):
    def step(self, score):
        bad = self.bad
        super().step(score)
        self.bad = bad + (self.bad > 0)
        return self.bad >= self.patience


@misconception(
    "a tie taken as better",
    hint="On a plateau every score equals the best. Does such a score bring anything that you did not have?",
    source="seen in public teaching code: if score >= best",
)
class ATieTakenAsBetter(_Stopping):
    def better(self, score):
        return score >= self.best


@misconception(
    "lower taken as better",
    hint="It stops while the scores rise, and what it keeps is the worst. Is what you are given a loss or an accuracy?",
    source="a line of reasoning: early stopping is mostly shown with a validation loss",
)
class LowerTakenAsBetter(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = math.inf

    def better(self, score):
        return score < self.best


@misconception(
    "the first score is the best, even NaN",
    hint="The first score was NaN, and nothing has been better since. What is the answer when a number is compared with NaN?",
    source="seen in public teaching code: if best is None or score > best",
)
class TheFirstScoreIsTheBest(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = None

    def better(self, score):
        return self.best is None or score > self.best


@misconception(
    "whatever is not worse is better",
    hint="A NaN came after the best and took its place. What does your way of comparing two scores answer when one is NaN?",
    source="seen in public teaching code: if the score is lower, then count, else keep; every comparison with NaN is False",
)
class WhateverIsNotWorseIsBetter(_Stopping):
    def step(self, score):
        if score <= self.best:
            self.bad += 1
        else:
            self.best, self.bad, self.kept = score, 0, self.keep()
        return self.bad >= self.patience


@misconception(
    "new Parameter objects",
    hint="The model has its best weights, and the optimizer's steps no longer reach it. Which objects does the optimizer hold?",
    source="a line of reasoning: load_state_dict(..., assign=True), or setattr, puts other Parameters in the place of the old",
)
class NewParameterObjects(_Stopping):
    def restore(self):
        self.model.load_state_dict(copy.deepcopy(self.kept), assign=True)


@misconception(
    "compared with the previous score",
    hint="Scores that go up and down far below the best never make it stop. Which score must a new one beat?",
    source="a line of reasoning: last = score at the end of every epoch",
)
class ComparedWithThePreviousScore(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.best = score
        return stop


@misconception(
    "the best starts at 0",
    hint="With minus a loss as score nothing is ever kept. Which number is below every score there can be?",
    source="seen in public teaching code: best_acc = 0.0",
)
class TheBestStartsAtZero(_Stopping):
    def __init__(self, model, patience):
        super().__init__(model, patience)
        self.best = 0.0


EXERCISE = Exercise(
    number="4.5",
    name="EarlyStopping",
    reference=EarlyStopping,
    experiments=(StopsAfterPatience(), Ties(), NanFirst(), NanLater(), RestoresTheBest(), GoesOnTraining()),
    misconceptions=(
        *(RestoreChangesNothing, TheLastStateKept, BuffersForgotten, OneScoreTooMany, BadScoresAddedUp, ATieTakenAsBetter),
        *(LowerTakenAsBetter, TheFirstScoreIsTheBest, WhateverIsNotWorseIsBetter, NewParameterObjects),
        *(ComparedWithThePreviousScore, TheBestStartsAtZero),
    ),
    hints=(
        "Which three things must it remember between two scores, and which of them are numbers?",
        "Keep a state, take one optimizer step, and compare what you kept with the model, a BatchNorm's running_mean included. "
        "Then call step with 0.5, 0.5 and NaN, and look at what it takes as the best.",
        "The best score starts below every number; only `score > best` is an improvement, which sets the counter to 0 and "
        "keeps a deep copy of the state dict; everything else adds 1; `restore` copies values into the tensors that are there.",
    ),
)
