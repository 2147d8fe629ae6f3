"""Times that can be compared: every function once, then every function again, so that a busy moment strikes all alike.

    round 1: a, b, c    round 2: a, b, c    ...    the seconds of a: one number for each round

A time is not one number. Report the median, which a few slow rounds do not move, and the quartiles, which say how far
the rounds lie apart: two formats whose quartiles overlap have not been told apart.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from helpers import expect

Result = TypeVar("Result")


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds that each function took, one entry for each round.

    On a CPU, time inside `helpers.training.one_thread`: more threads measure what else the machine does. A function
    that starts work on a GPU must wait for it, `torch.cuda.synchronize()`, or only the starting is timed.

    Args:
        functions: by name; each does its work once. They run in this order in every round.
        rounds: how many are timed, at least 1.
        warm_up: rounds before those, not timed: the first run of most things fills caches or compiles.
        clock: gives seconds.
    """
    return results_in_turns({name: timed(function, clock) for name, function in functions.items()}, rounds, warm_up)


def median_seconds(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median of the seconds that each function takes in `rounds` rounds, timed in turns after one run of each.

    The median of an even number of times is the mean of the middle two. One slow call, which moves a mean, leaves it as it
    is; and unlike the minimum it is what a call usually takes.

    Args:
        functions: name -> callable without arguments. On a GPU it has to end with `torch.cuda.synchronize()`.
        rounds: how often each of them is timed, at least 1.
        clock: gives seconds, of which only differences mean anything.

    Returns:
        The names in their order, each with its median in seconds.
    """
    return {name: statistics.median(seconds) for name, seconds in in_turns(functions, rounds, clock=clock).items()}


def results_in_turns(functions: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 1) -> dict[str, list[Result]]:
    """What each function gives, one entry for each round: for functions that tell their time themselves."""
    expect.whole_number("rounds", rounds)
    expect.whole_number("warm_up", warm_up, least=0)
    if not functions:
        raise ValueError("functions must hold at least 1 function, got none. Name each: {'eager': run}.")
    turns = [{name: function() for name, function in functions.items()} for _ in range(warm_up + rounds)]
    return {name: [turn[name] for turn in turns[warm_up:]] for name in functions}


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that calls `function` and returns how long that took, by `clock`."""

    def run() -> float:
        started = clock()
        function()
        return clock() - started

    return run


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; between two numbers they are interpolated.

    Raises:
        ValueError: there are no numbers.
    """
    if len(numbers) == 0:
        raise ValueError("numbers must hold at least 1 number, got none. Time at least one round.")
    if len(numbers) == 1:  # statistics.quantiles took no single number before Python 3.13
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high
