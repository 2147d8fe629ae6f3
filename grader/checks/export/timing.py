"""Exercise 8.5: the median time of each function, measured in turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import groupby

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from grader.near import near, which
from helpers import expect
from helpers.timing import median_seconds

exercise = Exercise(__name__, "8.5", median_seconds, core=4)

NAMES = "onnx", "eager", "traced"  # in no alphabetical order
MILLISECOND = 1e-3  # what the functions' times are given in, as those of small networks are
IN_ROUNDS = "each once in every round"
IN_MILLISECONDS = ", in milliseconds"
DIFFERENT = "different"


@exercise.experiment("warm up", 1)
class WarmUp(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        # One round: where only one time is to be reported, no median hides that another one was taken.
        return {"first": 100 * _milliseconds(trial), "later": _milliseconds(trial)}

    def measure(self, subject, inputs):
        return _ask(subject, {name: [inputs["first"]] + [inputs["later"]] * 9 for name in NAMES}, 1)

    def facts(self, raw, inputs):
        first, later = inputs["first"], inputs["later"]
        known = {
            "those of a later call": later,
            "those of the first call": first,
            "between those of the first call and of a later one": (first + later) / 2,
            "those of the first call and of a later one, added up": first + later,
        }
        each = [_which(seconds, known) for seconds in raw["seconds"]]
        if not raw["reads"] or DIFFERENT in each:
            return {"seconds in one round": None}
        alike = each[0] if len(set(each)) == 1 else "those of a later call for some, of the first call for others"
        return {"seconds in one round": alike}


@exercise.experiment("in turns", 2)
class InTurns(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        return {"milliseconds": _milliseconds(trial), "rounds": trial.integer(8, 10)}

    def measure(self, subject, inputs):
        equal = {name: [inputs["milliseconds"]] for name in NAMES}
        return _ask(subject, equal, inputs["rounds"], doubles_after=4 * inputs["rounds"] / 3)

    def facts(self, raw, inputs):
        first, second, third = map(abs, raw["seconds"])
        # In turns, the slowest takes up to 1.14 times as long as the fastest; in a row, each takes 1.7 times the one before.
        rising = third > 1.25 * second > 1.25**2 * first
        alike = max(first, second, third) < 1.4 * min(first, second, third)
        order, how = (
            _order(raw["calls"], inputs["rounds"]),
            "alike" if alike else "more from each to the next" if rising else None,
        )
        if not raw["reads"] or (order == IN_ROUNDS and how != "alike"):
            how = None  # the order is not what made them so
        return {"calls of the functions": order, "seconds of three equal functions on a machine that slows down": how}


@exercise.experiment("median", 2, 4)
class Median(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        odd, even = _times(trial, 2 * trial.integer(2, 3) + 1), _times(trial, 6)
        return {"odd": odd, "even": even, "alike": [8000.0, 125.0, 1000.0, 125.0, 2000.0, 500.0, 125.0]}

    def measure(self, subject, inputs):
        return {name: _ask(subject, {"eager": times}, len(times), starts_at=0.0) for name, times in inputs.items()}

    def facts(self, raw, inputs):
        facts, slow = {}, "one of them far too long"
        what = {"odd": f"odd number of times, {slow}", "even": f"even number of times, {slow}", "alike": "times that are alike"}
        for name, times in inputs.items():
            figure = _which(raw[name]["seconds"], _summaries(times))
            if figure != "the median" and len(raw[name]["calls"]) >= 2 * len(times):
                figure = DIFFERENT  # of other calls, so that its likeness to one of these figures says nothing
            facts[what[name]] = figure if raw[name]["reads"] else None
        return facts


@exercise.experiment("each by itself", 3)
class EachByItself(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"milliseconds": [scale * _milliseconds(trial) for scale in (1, 4, 16)], "rounds": trial.integer(3, 5)}

    def measure(self, subject, inputs):
        unequal = {name: [own] for name, own in zip(NAMES, inputs["milliseconds"], strict=True)}
        return _ask(subject, unequal, inputs["rounds"], starts_at=-1.5)

    def facts(self, raw, inputs):
        own, rounds = inputs["milliseconds"], inputs["rounds"]
        known = {
            "of one call of its own": own,
            "of all its calls": [rounds * each for each in own],
            "of its own call and of those before it in the round": [sum(own[: end + 1]) for end in range(3)],
            "of a whole round": [sum(own)] * 3,
            "of a whole round, divided by the number of functions": [sum(own) / 3] * 3,
            "of all rounds": [rounds * sum(own)] * 3,
            "those of the function in the middle": [own[1]] * 3,
        }
        word = _which(raw["seconds"], known) if raw["reads"] else "not by the clock that was given"
        return {"seconds of each of three unequal functions": word}


class _Machine:
    """A clock that only functions move on, and a record of their calls."""

    def __init__(self, starts_at: float, doubles_after: float) -> None:
        self.now, self.reads, self.calls = starts_at, 0, []
        self.doubles_after = doubles_after  # calls of any function, after which each of them takes twice as long

    def clock(self) -> float:
        self.reads += 1
        return self.now

    def function(self, name: str, times: list[float]) -> Callable[[], str | None]:
        """A function whose calls take these milliseconds, one after the other and then from the beginning again."""

        def run() -> str | None:
            own = times[self.calls.count(name) % len(times)]
            self.now += MILLISECOND * own * 2 ** (len(self.calls) / self.doubles_after)
            self.calls.append(name)
            return None if name == NAMES[0] else name  # any(), all() and next() over the calls end at one or the other

        return run


def _milliseconds(trial: Trial) -> float:
    return 1.037 + trial.integer(0, 9) / 10


def _times(trial: Trial, count: int) -> list[float]:
    """Times that all differ, the first of them far longer than the others, whose order is random.

    The call after the last takes as long as the first: any `count` calls in a row take the same times. Of those after
    the first call, the one in the middle is the second shortest.
    """
    ranks = trial.permutation(count - 1).tolist()
    middle, short = count // 2, ranks.index(1)
    ranks[middle], ranks[short] = ranks[short], ranks[middle]
    return [500.037 + trial.integer(0, 99), *(10 + 2 * rank + trial.integer(0, 9) / 10 for rank in ranks)]


def _summaries(times: list[float]) -> dict[str, float]:
    """What can be made of several times."""
    return {
        "the median": statistics.median(times),
        "the lower of the middle two": statistics.median_low(times),
        "the upper of the middle two": statistics.median_high(times),
        "the median of one time more": statistics.median([*times, times[0]]),
        "the mean": statistics.fmean(times),
        "the shortest": min(times),
        "the one that came in the middle": times[len(times) // 2 + 1],
        "the longest": max(times),
        "the sum": sum(times),
    }


def _ask(
    subject, times: Mapping[str, list[float]], rounds: int, *, starts_at: float = 1000.0, doubles_after: float = math.inf
) -> dict:
    """What the subject gives for functions that take these times, in their order, in milliseconds; and what the machine saw."""
    machine = _Machine(starts_at, doubles_after)
    functions = {name: machine.function(name, each) for name, each in times.items()}
    answer = subject(functions, rounds, machine.clock)
    if not isinstance(answer, Mapping) or set(answer) != set(functions):
        came = f"a dict with {sorted(map(str, answer))}" if isinstance(answer, Mapping) else expect.describe(answer)
        question = " Is there a return?" if answer is None else ""
        raise WrongReturn(f"median_seconds must return a dict with the keys {sorted(functions)}, got {came}.{question}")
    seconds = [expect_number(answer[name], f"the value of {name!r}") / MILLISECOND for name in functions]
    return {"seconds": seconds, "reads": machine.reads, "calls": machine.calls}


def _which(seconds: float | list[float], known: Mapping[str, float | list[float]]) -> str:
    """Which of the known milliseconds these are, or a thousand times which."""
    name = which(seconds, known)
    if name != DIFFERENT:
        return name
    by_thousand = (name for name, value in known.items() if near(_parts(seconds), value))
    return next((name + IN_MILLISECONDS for name in by_thousand), DIFFERENT)


def _parts(seconds: float | list[float]) -> float | list[float]:
    return [each * MILLISECOND for each in seconds] if isinstance(seconds, list) else seconds * MILLISECOND


def _order(calls: list[str], rounds: int) -> str:
    """The order of the last calls, as many as there are in `rounds` rounds."""
    last = calls[-3 * rounds :]
    if len(last) == 3 * rounds and all(set(last[start : start + 3]) == set(NAMES) for start in range(0, len(last), 3)):
        return IN_ROUNDS
    in_a_row = [len(list(group)) for _, group in groupby(last)][1:]  # the first may be cut
    if len(in_a_row) <= 3:
        return "all of one, then all of the next"
    return "each several times in a row" if min(in_a_row) == max(in_a_row) > 1 else "in another order"


def solution(
    functions, rounds, clock, warm_up=1, timed_from=1, turns=True, again=False, warmed=list, summary=statistics.median, unit=1
):
    """A right solution, in pieces that a misconception replaces."""
    seconds = {name: [] for name in functions}
    names = list(functions) * rounds if turns else [name for name in functions for _ in range(rounds)]
    names = [name for name in warmed(functions) for _ in range(warm_up)] + names
    for name in names:
        if again:
            functions[name]()
        start = clock()
        functions[name]()
        seconds[name].append(clock() - start)
    return {name: unit * summary(times[-rounds if timed_from else 0 :]) for name, times in seconds.items()}


exercise.misconceptions_of(
    solution,
    {
        "no warm-up": {"warm_up": 0},
        "only one function warmed up": {"warmed": lambda functions: list(functions)[:1]},
        "warm-up timed too": {"timed_from": 0},
        "one after the other": {"turns": False},
        "warmed up again in every round": {"again": True},
        "the mean": {"summary": statistics.fmean},
        "the shortest": {"summary": min},
        "the lower of the middle two": {"summary": statistics.median_low},
        "the upper of the middle two": {"summary": statistics.median_high},
        "not sorted": {"summary": lambda times: times[len(times) // 2]},
        "the sum": {"summary": sum},
        "in milliseconds": {"unit": 1000},
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
