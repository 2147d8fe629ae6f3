"""Exercise 8.5: the median time of each function, measured in turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from grader.near import which
from helpers import expect
from helpers.timing import median_seconds

exercise = Exercise(__name__, "8.5", median_seconds)

NOT_GIVEN = "not by the clock that was given"


@exercise.experiment("warm up")
class WarmUp(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        # One round: where only one time is to be reported, no median hides that another one was taken.
        return {"first": 100 * _seconds(trial), "later": _seconds(trial)}

    def measure(self, subject, inputs):
        return _ask(subject, {"a": [inputs["first"]] + [inputs["later"]] * 9}, 1)

    def facts(self, raw, inputs):
        first, later = inputs["first"], inputs["later"]
        known = {
            "those of a later call": later,
            "those of the first call": first,
            "between those of the first call and of a later one": (first + later) / 2,
            "those of the first call and of a later one, added up": first + later,
        }
        return {"seconds in one round": _which(raw, known)}


@exercise.experiment("in turns")
class InTurns(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        return {"seconds": _seconds(trial), "rounds": trial.integer(8, 10)}

    def measure(self, subject, inputs):
        equal = {name: [inputs["seconds"]] for name in "abc"}
        return _ask(subject, equal, inputs["rounds"], doubles_after=4 * inputs["rounds"] / 3)

    def facts(self, raw, inputs):
        first, second, third = map(abs, raw["seconds"])
        # In turns, the slowest takes up to 1.14 times as long as the fastest; in a row, each takes 1.7 times the one before.
        rising = third > 1.25 * second > 1.25**2 * first
        alike = max(first, second, third) < 1.25 * min(first, second, third)
        how = "alike" if alike else "more from each to the next" if rising else "not alike"
        return {
            "calls of the functions": _order(raw["calls"], inputs["rounds"]),
            "seconds of three equal functions": how if raw["reads"] else NOT_GIVEN,
        }


@exercise.experiment("median")
class Median(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"odd": _times(trial, 2 * trial.integer(2, 3) + 1), "even": _times(trial, 2 * trial.integer(2, 3))}

    def measure(self, subject, inputs):
        return {name: _ask(subject, {"a": times}, len(times)) for name, times in inputs.items()}

    def facts(self, raw, inputs):
        facts = {}
        for name, times in inputs.items():
            figure = _which(raw[name], _summaries(times))
            if figure not in ("the median", NOT_GIVEN) and len(raw[name]["calls"]) >= 2 * len(times):
                figure = "different"  # of other calls, so that its likeness to one of these figures says nothing
            facts[f"{name} number of times, one of them far too long"] = figure
        return facts


@exercise.experiment("each by itself")
class EachByItself(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"seconds": [scale * _seconds(trial) for scale in (1, 4, 16)], "rounds": trial.integer(3, 5)}

    def measure(self, subject, inputs):
        unequal = {name: [own] for name, own in zip("abc", inputs["seconds"], strict=True)}
        return _ask(subject, unequal, inputs["rounds"])

    def facts(self, raw, inputs):
        own, rounds = inputs["seconds"], inputs["rounds"]
        known = {
            "of one call of its own": own,
            "of all its calls": [rounds * seconds for seconds in own],
            "of its own call and of those before it in the round": [sum(own[: end + 1]) for end in range(3)],
            "of a whole round": [sum(own)] * 3,
            "of a whole round, divided by the number of functions": [sum(own) / 3] * 3,
            "of all rounds": [rounds * sum(own)] * 3,
        }
        return {"seconds of each of three unequal functions": _which(raw, known)}


class _Machine:
    """A clock that only functions move on, and a record of their calls."""

    def __init__(self, doubles_after: float) -> None:
        self.now, self.reads, self.calls = 1000.0, 0, ""
        self.doubles_after = doubles_after  # calls of any function, after which each of them takes twice as long

    def clock(self) -> float:
        self.reads += 1
        return self.now

    def function(self, name: str, seconds: list[float]) -> Callable[[], str]:
        """A function whose calls take these seconds, one after the other and then from the beginning again."""

        def run() -> str:
            own = seconds[self.calls.count(name) % len(seconds)]
            self.now += own * 2 ** (len(self.calls) / self.doubles_after)
            self.calls += name
            return name

        return run


def _seconds(trial: Trial) -> float:
    return 1 + trial.integer(0, 9) / 10


def _times(trial: Trial, count: int) -> list[float]:
    """Times that all differ, the first of them far longer than the others, whose order is random.

    The call after the last takes as long as the first: any `count` calls in a row take the same times.
    """
    times = [10 + 2 * rank + trial.integer(0, 9) / 10 for rank in trial.permutation(count - 1).tolist()]
    return [500 + trial.integer(0, 99), *times]


def _summaries(times: list[float]) -> dict[str, float]:
    """What can be made of several times."""
    return {
        "the median": statistics.median(times),
        "the lower of the middle two": statistics.median_low(times),
        "the upper of the middle two": statistics.median_high(times),
        "the median of one time more": statistics.median([*times, times[0]]),
        "the mean": statistics.fmean(times),
        "the shortest": min(times),
        "the longest": max(times),
        "the sum": sum(times),
    }


def _ask(subject, times: Mapping[str, list[float]], rounds: int, doubles_after: float = math.inf) -> dict:
    """The seconds that the subject gives for functions that take these times, in their order; and what the machine saw."""
    machine = _Machine(doubles_after)
    functions = {name: machine.function(name, seconds) for name, seconds in times.items()}
    answer = subject(functions, rounds, machine.clock)
    if not isinstance(answer, Mapping) or set(answer) != set(functions):
        came = f"a dict with {sorted(map(str, answer))}" if isinstance(answer, Mapping) else expect.describe(answer)
        question = " Is there a return?" if answer is None else ""
        raise WrongReturn(f"median_seconds must return a dict with the keys {sorted(functions)}, got {came}.{question}")
    seconds = [expect_number(answer[name], f"the value of {name!r}") for name in functions]
    return {"seconds": seconds, "reads": machine.reads, "calls": machine.calls}


def _which(raw: dict, known: Mapping[str, float | list[float]]) -> str:
    """Which of the known seconds these are."""
    return which(raw["seconds"], known) if raw["reads"] else NOT_GIVEN


def _order(calls: str, rounds: int) -> str:
    """The order of the last calls, as many as there are in `rounds` rounds."""
    last = calls[-3 * rounds :]
    if len(last) == 3 * rounds and all(set(last[start : start + 3]) == set("abc") for start in range(0, len(last), 3)):
        return "each once in every round"
    changes = sum(name != following for name, following in pairwise(last))
    return "all of one, then all of the next" if changes <= 3 else "in another order"


def solution(functions, rounds, clock, warm_up=1, timed_from=1, turns=True, summary=statistics.median):
    """A right solution, in pieces that a misconception replaces."""
    seconds = {name: [] for name in functions}
    names = list(functions) * (warm_up + rounds) if turns else [n for n in functions for _ in range(warm_up + rounds)]
    for name in names:
        start = clock()
        functions[name]()
        seconds[name].append(clock() - start)
    return {name: summary(times[timed_from:]) for name, times in seconds.items()}


exercise.misconceptions_of(
    solution,
    {
        "no warm-up": {"warm_up": 0, "timed_from": 0},
        "warm-up timed too": {"timed_from": 0},
        "one after the other": {"turns": False},
        "the mean": {"summary": statistics.fmean},
        "the shortest": {"summary": min},
        "the lower of the middle two": {"summary": statistics.median_low},
        "the sum": {"summary": sum},
    },
)


@exercise.misconception("the clock started once a round")
def the_clock_started_once_a_round(functions, rounds, clock):
    seconds = {name: [] for name in functions}
    for _ in range(1 + rounds):
        start = clock()
        for name, function in functions.items():
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@exercise.misconception("another clock")
def another_clock(functions, rounds, clock):
    return solution(functions, rounds, time.perf_counter)
