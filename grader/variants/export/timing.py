"""Exercise 8.5 in other styles."""

import itertools
import random
from collections import defaultdict
from functools import partial
from statistics import median

import numpy as np
import torch

from grader.checks.export.timing import solution


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


CORRECT = [two_loops, a_table, in_random_order, one_reading_between_two]
REWRITTEN = {}
BROKEN = {}
COMBINED = [
    ({"one after the other", "the mean"}, the_usual_loop),
    ({"no warm-up", "the shortest"}, partial(solution, warm_up=0, timed_from=0, summary=min)),
]
EQUIVALENT = {}
