"""Exercise 4.5: stop when validation no longer improves, and put the best state back."""

import copy
import math
from typing import ClassVar

import torch
from torch import nn

from grader.checks import traces
from grader.checks.finetune.stoppers import (
    NAN,
    OTHER,
    draw_scores,
    draw_states,
    make_stopper,
    moment,
    small_model,
    stops_after,
    tell,
    waited,
    whose,
)
from grader.experiment import Exercise, Experiment, Trial
from grader.near import same
from helpers.finetune import EarlyStopping

exercise = Exercise(__name__, "4.5", EarlyStopping, core=5)


@exercise.experiment("stops after patience", 1)
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
            "falling": draw_scores(trial, rise + fall, above=-3.0),  # all of them negative, as minus a loss is
            "late": draw_scores(trial, late + [rank - 10 for rank in fall]),
            "zigzag": draw_scores(trial, zigzag),
            "short": draw_scores(trial, [0, 1, 2, 1.5, 1.4, 3, 1.2]),
            "last best": [len(rise) - 1, 3 * patience, 0, 2],
        }

    def measure(self, subject, inputs):
        stops = [stops_after(subject, inputs["patience"], inputs[name]) for name in ("falling", "late", "zigzag")]
        return {"stops": [*stops, stops_after(subject, 1, inputs["short"])]}

    def facts(self, raw, inputs):
        waits = [inputs["patience"]] * 3 + [1]
        falling, late, zigzag, short = (
            waited(stop, best, patience) for stop, best, patience in zip(raw["stops"], inputs["last best"], waits, strict=True)
        )
        return {
            "negative scores that rise, then fall: it stops": falling,
            "a new best just in time, three times, then none: it stops": late,
            "up and down below the best: it stops": zigzag,
            "a patience of 1, scores that rise, then fall: it stops": short,
        }


class _BesideAControl(Experiment):
    """Compares when it stops for some scores with when it stops for ordinary ones: whatever else it does is in both."""

    fact: str
    control: str  # what is ordinary

    def measure(self, subject, inputs):
        return {name: stops_after(subject, inputs["patience"], inputs[name]) for name in ("scores", "control")}

    def facts(self, raw, inputs):
        return {self.fact: moment(raw["scores"], raw["control"], inputs["best"], self.control)}


@exercise.experiment("ties", 2)
class Ties(_BesideAControl):
    fact = "where scores equal the best, it stops"
    control = "scores below the best"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(2, 4)
        fall = [90 - k for k in range(2 * patience + 2)]
        equal, lower = [0, 100, 99, *([100] * len(fall))], [0, 100, 99, *fall]
        scores = draw_scores(trial, equal + lower)
        return {"patience": patience, "scores": scores[: len(equal)], "control": scores[len(equal) :], "best": 1}


@exercise.experiment("by a little", 2)
class ByALittle(_BesideAControl):
    fact = "where each score is above the best by 0.00001, then scores fall, it stops"
    control = "scores that are further apart"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(2, 4)
        rise = range(2 * patience + 2)
        start, fall = 0.5 + 0.1 * float(trial.normal(1).abs()), [0.4 - 0.02 * k for k in range(2 * patience + 2)]
        near_by, apart = ([start + step * k for k in rise] + fall for step in (1e-5, 0.02))
        return {"patience": patience, "scores": near_by, "control": apart, "best": len(rise) - 1}


@exercise.experiment("nothing but NaN", 6)
class NothingButNan(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"patience": trial.integer(2, 4), "falling": draw_scores(trial, [-k for k in range(10)])}

    def measure(self, subject, inputs):
        patience = inputs["patience"]
        return {"nan": stops_after(subject, patience, [NAN] * 10), "falling": stops_after(subject, patience, inputs["falling"])}

    def facts(self, raw, inputs):
        # Of falling scores the first is the best, and waiting begins after it. Of NaNs it may as well begin with the first.
        moments = [moment(raw["nan"], raw["falling"], 0, "falling scores", sooner) for sooner in (0, 1)]
        usual = "as it does with falling scores"
        return {"where no score is a number, it stops": usual if usual in moments else moments[0]}


class _Restoring(Experiment):
    """A model that has another state at every score, and one more after the last."""

    ranks: tuple[int, ...]  # of the scores

    def draw(self, trial: Trial) -> dict:
        scores = draw_scores(trial, list(self.ranks))
        return {"model": small_model(), "scores": scores, "states": draw_states(trial, len(scores) + 1)}

    def train(self, subject, inputs: dict, model: nn.Module | None = None, scores: list | None = None):
        """Tell a stopper the scores, each after some training, train once more, and ask it to restore."""
        model, scores, states = model or inputs["model"], scores or inputs["scores"], inputs["states"]
        stopper = make_stopper(subject, model, 10)
        for state, score in zip(states, scores, strict=False):
            traces.put_back(model, state)
            tell(stopper, score)
        traces.put_back(model, states[-1])
        stopper.restore()
        return stopper


class _RestoringBesideNan(_Restoring):
    """One of the scores is NaN. Whether `restore` brings back the best of numbers is the question of other experiments."""

    place: int  # of NaN
    best: int  # the position of the best score
    fact: str

    def measure(self, subject, inputs):
        raw = {}
        for name, scores in (("numbers", None), ("nan", self.with_nan(inputs["scores"]))):
            model = copy.deepcopy(inputs["model"])
            self.train(subject, inputs, model, scores)
            raw[name] = traces.of(model)
        return raw

    def with_nan(self, scores: list[float]) -> list[float | None]:
        return [*scores[: self.place], NAN, *scores[self.place + 1 :]]

    def facts(self, raw, inputs):
        names = {self.place: "those of NaN", self.best: "those of the best score"}
        numbers, with_nan = (
            next(
                (n for p, n in names.items() if whose("parameters", raw[name], {"it": inputs["states"][p]}) != OTHER),
                OTHER,
            )
            for name in ("numbers", "nan")
        )
        return {self.fact: with_nan if numbers == "those of the best score" else None}


@exercise.experiment("NaN first", 6)
class NanFirst(_RestoringBesideNan):
    ranks = (0, 1, 3, 2)
    place, best = 0, 2
    fact = "parameters after NaN, three numbers and restore"


@exercise.experiment("restores the best", 3)
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
        return {f"{kind} after restore": whose(kind, raw["state"], known) for kind in ("parameters", "buffers")}


class _TrainingOn(_Restoring):
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
        return {"restored": restored, "trained": trained} | self.afterwards(stopper, inputs)

    def afterwards(self, stopper, inputs: dict) -> dict:
        return {}


@exercise.experiment("goes on training", 4)
class GoesOnTraining(_TrainingOn):
    points = 2

    def facts(self, raw, inputs):
        before, after = raw["restored"]["parameters"], raw["trained"]["parameters"]
        moved = all(not same(before[name], after[name]) for name in before)
        return {"a step of the optimizer built before trains the model": "yes" if moved else "no"}


@exercise.experiment("the best is still the best", 5)
class TheBestIsStillTheBest(_TrainingOn):
    points = 2

    def afterwards(self, stopper, inputs):
        model, states, scores = inputs["model"], inputs["states"], inputs["scores"]
        stopper.restore()
        again = traces.of(model)
        traces.put_back(model, states[0])
        tell(stopper, (scores[1] + scores[2]) / 2)  # below the best
        stopper.restore()
        return {"again": again, "below": traces.of(model)}

    def facts(self, raw, inputs):
        states = inputs["states"]
        scored = {"the best score": states[1], "the last score": states[2], "the first score": states[0]}
        first = whose("parameters", raw["restored"], scored)
        # Whether `restore` brings back the best at all is the question of another experiment.
        if first != "those of the best score":
            return {"after a step and another restore": None, "after a lower score and another restore": None}
        known = scored | {"the moment restore was called": raw["trained"]}
        lower = {"the best score": states[1], "the lower score": states[0]}
        return {
            "after a step and another restore": whose("parameters", raw["again"], known),
            "after a lower score and another restore": whose("parameters", raw["below"], lower),
        }


@exercise.experiment("NaN later", 6)
class NanLater(_RestoringBesideNan):
    ranks = (0, 3, 1, 2)
    place, best = 2, 1
    fact = "parameters after the best, NaN, a low score and restore"

    def draw(self, trial: Trial) -> dict:
        patience = trial.integer(3, 5)
        falling = draw_scores(trial, [0, 100, *range(50, 45 - 2 * patience, -1)], above=-3.0)
        return super().draw(trial) | {"patience": patience, "falling": falling}

    def measure(self, subject, inputs):
        falling, patience = inputs["falling"], inputs["patience"]
        stops = [stops_after(subject, patience, scores) for scores in (self.with_nan(falling), falling)]
        return super().measure(subject, inputs) | {"stops": stops}

    def facts(self, raw, inputs):
        stops = {"the best, then NaN, then falling scores: it stops": moment(*raw["stops"], 1, "a lower score in place of NaN")}
        return stops | super().facts(raw, inputs)


@exercise.experiment("two at once", 7)
class TwoAtOnce(Experiment):
    def draw(self, trial: Trial) -> dict:
        models = nn.ModuleList([small_model(), small_model(), small_model()])
        return {"models": models, "states": draw_states(trial, 3), "scores": draw_scores(trial, [0, 1])}

    def measure(self, subject, inputs):
        (first, second, alone), (mine, others, last), raw = inputs["models"], inputs["states"], {}
        for name, model in (("alone", alone), ("beside", first)):
            stoppers = [make_stopper(subject, own, 10) for own in (model, second)]
            traces.put_back(model, mine)
            tell(stoppers[0], inputs["scores"][0])
            if name == "beside":
                traces.put_back(second, others)
                tell(stoppers[1], inputs["scores"][1])
            traces.put_back(model, last)
            stoppers[0].restore()
            raw[name] = traces.of(model)
        return raw

    def facts(self, raw, inputs):
        known = dict(zip(("its best score", "the other's best score"), inputs["states"], strict=False))
        alone, beside = (whose("parameters", state, known) for state in raw.values())
        return {"parameters after a best score of another": beside if alone == "those of its best score" else None}


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
        "a least improvement of its own": {"better": lambda self, score: score > self.best + 1e-3},
    },
)


@exercise.misconception("NaN left uncounted")
class NanLeftUncounted(_Stopping):
    def step(self, score):
        return super().step(score) if score == score else False


@exercise.misconception("restore forgets the best")
class RestoreForgetsTheBest(_Stopping):
    def restore(self):
        super().restore()
        self.best, self.bad = -math.inf, 0


@exercise.misconception("one checkpoint for all")
class OneCheckpointForAll(_Stopping):
    file: ClassVar[dict] = {}

    def keep(self):
        self.file["checkpoint.pt"] = copy.deepcopy(self.model.state_dict())

    def restore(self):
        self.model.load_state_dict(self.file["checkpoint.pt"])


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
