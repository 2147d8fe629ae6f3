"""Exercise 8.5 in other styles."""

import itertools
import random
import statistics
import timeit
from collections import defaultdict
from functools import partial
from statistics import median

import numpy as np
import torch

from grader.checks.export.timing import another_clock, solution, the_clock_started_once_a_round


def two_loops(functions, rounds, clock):
    for function in functions.values():
        function()
    seconds = defaultdict(list)
    for _ in range(rounds):
        for name in functions:
            start = clock()
            functions[name]()
            stop = clock()
            seconds[name].append(stop - start)
    return {name: median(times) for name, times in seconds.items()}


def a_table(functions, rounds, clock):
    _ = [run() for run in functions.values()]
    table = np.empty((rounds, len(functions), 2))
    for cell in np.ndindex(rounds, len(functions)):
        table[cell][0] = clock()
        list(functions.values())[cell[1]]()
        table[cell][1] = clock()
    return dict(zip(functions, np.median(np.diff(table)[..., 0], axis=0), strict=True))


def in_random_order(functions, rounds, clock):
    names = list(functions)
    measured = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in random.sample(names, len(names)):
            before = clock()
            functions[name]()
            if turn >= 0:
                measured[name] += [clock() - before]
    result = {}
    for name, times in measured.items():
        times.sort()
        half = len(times) // 2
        result[name] = (times[half] + times[-half - 1]) / 2
    return result


def one_reading_between_two(functions, rounds, clock):
    """Where one function stops, the next starts."""
    for _, function in sorted(functions.items()):
        function()
    columns = {}
    now = clock()
    for name, function in itertools.chain.from_iterable(itertools.repeat(tuple(functions.items()), rounds)):
        function()
        then, now = now, clock()
        columns.setdefault(name, []).append(now - then)
    return {name: torch.tensor(column, dtype=torch.float64).quantile(0.5) for name, column in columns.items()}


def the_usual_loop(functions, rounds, clock):
    result = {}
    for name, function in functions.items():
        function()
        start = clock()
        for _ in range(rounds):
            function()
        result[name] = (clock() - start) / rounds
    return result


def by_timeit(functions, rounds, clock):
    timers = {name: timeit.Timer(function, timer=clock) for name, function in functions.items()}
    for timer in timers.values():
        timer.timeit(number=1)
    rows = [[timer.timeit(number=1) for timer in timers.values()] for _ in range(rounds)]
    return {name: float(np.quantile(column, 0.5)) for name, column in zip(timers, zip(*rows, strict=True), strict=True)}


def each_warmed_up_before_its_own_rounds(functions, rounds, clock):
    seconds = {}
    for name, function in functions.items():
        function()
        times = []
        for _ in range(rounds):
            start = clock()
            function()
            times.append(clock() - start)
        seconds[name] = median(times)
    return seconds


def until_one_returns_nothing(functions, rounds, clock):
    all(run() is not None for run in functions.values())
    return cold(functions, rounds, clock)


def cold(functions, rounds, clock):
    columns = [[] for _ in functions]
    for _ in range(rounds):
        for column, function in zip(columns, functions.values(), strict=True):
            started = clock()
            function()
            column.append(clock() - started)
    return dict(zip(functions, map(median, columns), strict=True))


def the_first_of_them_warm(functions, rounds, clock):
    next(iter(functions.values()))()
    return cold(functions, rounds, clock)


def first_round_counts_as_warm_up(functions, rounds, clock):
    if rounds == 1:
        return two_loops(functions, 1, clock)
    return two_loops(functions, rounds - 1, clock)


def one_round_more(functions, rounds, clock):
    return two_loops(functions, rounds + 1, clock)


def three_calls_at_a_time(functions, rounds, clock):
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for name in [name for name in functions for _ in range(3)] * -(-rounds // 3):
        before = clock()
        functions[name]()
        times[name].append(clock() - before)
    return {name: median(column[:rounds]) for name, column in times.items()}


def from_one_stop_to_the_next_round(functions, rounds, clock):
    """All of a round's readings come after its last function."""
    for function in functions.values():
        function()
    rows = []
    for _ in range(rounds):
        started = clock()
        for function in functions.values():
            function()
        rows.append([(clock() - started) / len(functions)] * len(functions))
    return dict(zip(functions, np.median(rows, axis=0), strict=True))


def sorted_by_name(functions, rounds, clock):
    """The times of the functions in their order, under their names in the order of the alphabet."""
    return dict(zip(sorted(functions), two_loops(functions, rounds, clock).values(), strict=True))


def rounded(functions, rounds, clock):
    return {name: round(seconds, 3) for name, seconds in two_loops(functions, rounds, clock).items()}


def without_the_outlier(functions, rounds, clock):
    return solution(functions, rounds, clock, summary=lambda times: median(sorted(times)[:-1] or times))


def trimmed_mean(functions, rounds, clock):
    return solution(functions, rounds, clock, summary=lambda times: sum(sorted(times)[1:-1] or times) / max(1, len(times) - 2))


def sorted_and_halved(functions, rounds, clock):
    def upper(times):
        return sorted(times)[len(times) // 2]

    return solution(functions, rounds, clock, summary=upper)


def each_time_once(functions, rounds, clock):
    return solution(functions, rounds, clock, summary=lambda times: median({round(seconds, 9) for seconds in times}))


def torch_median(functions, rounds, clock):
    return solution(functions, rounds, clock, summary=lambda times: torch.tensor(times, dtype=torch.float64).median().item())


def doubled(functions, rounds, clock):
    result = {name: [] for name in functions}
    for run in functions.values():
        run()
    for _ in range(rounds):
        for name, run in functions.items():
            run()
            start = clock()
            run()
            result[name].append(clock() - start)
    return {name: median(times) for name, times in result.items()}


CORRECT = [two_loops, a_table, in_random_order, one_reading_between_two, by_timeit]
REWRITTEN = {
    "no warm-up": cold,
    "only one function warmed up": the_first_of_them_warm,
    "one after the other": each_warmed_up_before_its_own_rounds,
    "warmed up again in every round": doubled,
    "the lower of the middle two": torch_median,
    "the upper of the middle two": sorted_and_halved,
}
BROKEN = {
    1: [cold, the_first_of_them_warm, until_one_returns_nothing],
    2: [each_warmed_up_before_its_own_rounds, three_calls_at_a_time, first_round_counts_as_warm_up, one_round_more, doubled],
    3: [from_one_stop_to_the_next_round, the_clock_started_once_a_round, sorted_by_name, another_clock],
    4: [without_the_outlier, trimmed_mean, each_time_once, sorted_and_halved, torch_median, partial(solution, summary=min)],
}
COMBINED = [
    ({"one after the other", "the mean"}, the_usual_loop),
    ({"no warm-up", "the shortest"}, partial(solution, warm_up=0, summary=min)),
    ({"in milliseconds", "the upper of the middle two"}, partial(solution, unit=1000, summary=statistics.median_high)),
]
EQUIVALENT = {}
