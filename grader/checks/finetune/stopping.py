"""Exercise 4.5: stop when validation no longer improves, and put the best state back."""

import copy
import math

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from grader.near import near, same
from helpers import expect
from helpers.finetune import EarlyStopping

exercise = Exercise(__name__, "4.5", EarlyStopping)

NAN = None  # how a draw spells it: a NaN in the inputs would not equal itself when they are compared afterwards

State = dict[str, dict[str, Tensor]]  # {"parameters": by name, "buffers": by name}, as a snapshot of traces has them


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
        return {"stops": [_stop(subject, inputs["patience"], inputs[name]) for name in ("falling", "late", "zigzag")]}

    def facts(self, raw, inputs):
        falling, late, zigzag = (
            _waited(stop, best, inputs["patience"]) for stop, best in zip(raw["stops"], inputs["last best"], strict=True)
        )
        return {
            "negative scores that rise, then fall: it stops": falling,
            "a new best just in time, three times, then none: it stops": late,
            "up and down below the best: it stops": zigzag,
        }


class _BesideAControl(Experiment):
    """Compares when it stops for some scores with when it stops for ordinary ones: whatever else it does is in both."""

    fact: str
    control: str  # what is ordinary

    def measure(self, subject, inputs):
        return {name: _stop(subject, inputs["patience"], inputs[name]) for name in ("scores", "control")}

    def facts(self, raw, inputs):
        return {self.fact: self.moment(raw["scores"], raw["control"], inputs["best"])}

    def moment(self, stop: int | None, usual: int | None, best: int) -> str:
        """When it stops, beside when it usually does; `best` is the position of the best of the ordinary scores."""
        if usual is None:
            return f"never, and never with {self.control} either"
        if usual == 0:
            return f"at the very first score, and with {self.control} as well"
        if usual <= best:
            return f"too early with {self.control} as well"
        if stop is None:
            return "never"
        return f"{'when' if stop == usual else 'later than' if stop > usual else 'earlier than'} it does with {self.control}"


@exercise.experiment("ties")
class Ties(_BesideAControl):
    fact = "where scores equal the best, it stops"
    control = "scores below the best"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(2, 4)
        fall = [90 - k for k in range(2 * patience + 2)]
        equal, lower = [0, 100, 99, *([100] * len(fall))], [0, 100, 99, *fall]
        scores = _scores(trial, equal + lower)
        return {"patience": patience, "scores": scores[: len(equal)], "control": scores[len(equal) :], "best": 1}


@exercise.experiment("NaN first")
class NanFirst(_BesideAControl):
    fact = "NaN, then rising, then low scores: it stops"
    control = "a low first score"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, *range(2, patience + 4), *([1] * (2 * patience + 2))])
        return {"patience": patience, "scores": [NAN, *scores[1:]], "control": scores, "best": patience + 2}


@exercise.experiment("NaN later")
class NanLater(_BesideAControl):
    fact = "the best, then NaN, then falling scores: it stops"
    control = "a lower score in place of NaN"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        scores = _scores(trial, [0, 100, *range(50, 45 - 2 * patience, -1)])
        return {"patience": patience, "scores": [*scores[:2], NAN, *scores[3:]], "control": scores, "best": 1}


class _Restoring(Experiment):
    """A model that has another state at every score, and one more after the last."""

    ranks: tuple[int, ...]  # of the scores

    def draw(self, trial: Trial) -> dict:
        scores = _scores(trial, list(self.ranks))
        return {"model": _model(), "scores": scores, "states": _states(trial, len(scores) + 1)}

    def train(self, subject, inputs: dict):
        """Tell a stopper the scores, go on training, and ask it to restore."""
        model, states = inputs["model"], inputs["states"]
        stopper = _stopper(subject, model, 10)
        for state, score in zip(states, inputs["scores"], strict=False):
            traces.put_back(model, state)
            _say(stopper, score)
        traces.put_back(model, states[-1])
        stopper.restore()
        return stopper


@exercise.experiment("restores the best")
class RestoresTheBest(_Restoring):
    points = 2
    ranks = (2, 1, 4, 0, 3)  # first, last, lowest and best are four different ones

    def measure(self, subject, inputs):
        self.train(subject, inputs)
        return {"state": traces.of(inputs["model"])}

    def facts(self, raw, inputs):
        states = inputs["states"]
        known = {
            "the best score": states[2],
            "the first score": states[0],
            "the last score": states[4],
            "the lowest score": states[3],
            "the moment restore was called": states[5],
            "the moment EarlyStopping was made": traces.of(inputs["model"]),
        }
        return {f"{kind} after restore": _whose(kind, raw["state"], known) for kind in ("parameters", "buffers")}


@exercise.experiment("goes on training")
class GoesOnTraining(_Restoring):
    points = 2
    ranks = (0, 2, 1)

    def measure(self, subject, inputs):
        model = inputs["model"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        stopper = self.train(subject, inputs)
        restored = traces.of(model)
        optimizer.zero_grad()
        trainable = [parameter.sum() for parameter in model.parameters() if parameter.requires_grad]
        if trainable:
            torch.stack(trainable).sum().backward()
        optimizer.step()
        trained = traces.of(model)
        stopper.restore()
        return {"restored": restored, "trained": trained, "again": traces.of(model)}

    def facts(self, raw, inputs):
        states = inputs["states"]
        scored = {"the best score": states[1], "the last score": states[2], "the first score": states[0]}
        before, after = raw["restored"]["parameters"], raw["trained"]["parameters"]
        moved = all(not same(before[name], after[name]) for name in before)
        known = [scored | {"the moment restore was called": state} for state in (states[3], raw["trained"])]
        return {
            "parameters after restore": _whose("parameters", raw["restored"], known[0]),
            "a step of the optimizer built before trains the model": "yes" if moved else "no",
            "parameters after that step and another restore": _whose("parameters", raw["again"], known[1]),
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
    model = traces.of(_model())
    return [
        {
            kind: {
                name: trial.normal(*tensor.shape) if tensor.is_floating_point() else torch.tensor(10 + number)
                for name, tensor in model[kind].items()
            }
            for kind in ("parameters", "buffers")
        }
        for number in range(count)
    ]


def _whose(kind: str, state: State, known: dict[str, State]) -> str:
    """The first of the known states that has the parameters, or the buffers, of this one."""
    for name, candidate in known.items():
        if all(key in state[kind] and near(state[kind][key], value) for key, value in candidate[kind].items()):
            return f"those of {name}"
    return "different"


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
        raise wrong_return("step must return True or False", stop)
    return bool(stop)


def _stop(subject, patience: int, scores: list[float | None]) -> int | None:
    """The position of the score after which it says stop."""
    stopper = _stopper(subject, _model(), patience)
    return next((position for position, score in enumerate(scores) if _say(stopper, score)), None)


def _waited(stop: int | None, best: int, patience: int) -> str:
    """How many scores after the last best it stops, in words that hold for every patience."""
    if stop is None:
        return "never"
    if stop < best:
        return "before the best score has come"
    extra = stop - best - patience
    return "patience scores after the best" + (f" {'plus' if extra > 0 else 'minus'} {abs(extra)}" if extra else "")


class _Stopping:
    """A right solution, in pieces that a misconception replaces."""

    best, bad, kept = -math.inf, 0, None

    def __init__(self, model, patience):
        self.model, self.patience = model, patience

    def step(self, score):
        if self.better(score):
            self.best, self.bad, self.kept = score, 0, self.keep()
        else:
            self.bad += 1
        return self.stop()

    def better(self, score):
        return score > self.best

    def stop(self):
        return self.bad >= self.patience

    def keep(self):
        return copy.deepcopy(self.model.state_dict())

    def restore(self):
        self.model.load_state_dict(self.kept)


exercise.misconceptions_of(
    _Stopping,
    {
        "restore changes nothing": {"keep": lambda self: self.model.state_dict()},
        "buffers forgotten": {
            "keep": lambda self: copy.deepcopy(dict(self.model.named_parameters())),
            "restore": lambda self: self.model.load_state_dict(self.kept, strict=False),
        },
        "one score too many": {"stop": lambda self: self.bad > self.patience},
        "a tie taken as better": {"better": lambda self, score: score >= self.best},
        "lower taken as better": {"best": math.inf, "better": lambda self, score: score < self.best},
        "the first score is the best, even NaN": {
            "best": None,
            "better": lambda self, score: self.best is None or score > self.best,
        },
        "whatever is not worse is better": {"better": lambda self, score: not score <= self.best},
        "new Parameter objects": {"restore": lambda self: self.model.load_state_dict(copy.deepcopy(self.kept), assign=True)},
        "the best starts at 0": {"best": 0.0},
    },
)


@exercise.misconception("the last state kept")
class TheLastStateKept(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.kept = self.keep()
        return stop


@exercise.misconception("bad scores added up")
class BadScoresAddedUp(_Stopping):
    def step(self, score):
        bad = self.bad
        super().step(score)
        self.bad = bad + (self.bad > 0)
        return self.stop()


@exercise.misconception("compared with the previous score")
class ComparedWithThePreviousScore(_Stopping):
    def step(self, score):
        stop = super().step(score)
        self.best = score
        return stop
