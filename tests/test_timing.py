import re
import statistics

import pytest

from helpers.timing import in_turns, median_seconds, quartiles, results_in_turns


class Clock:
    """Tells the time that was set."""

    now = 0.0

    def __call__(self):
        return self.now


def test_functions_run_in_turns_and_warm_up_rounds_do_not_count():
    clock, log = Clock(), []

    def taking(name, seconds):
        durations = iter(seconds)

        def run():
            log.append(name)
            clock.now += next(durations)

        return run

    functions = {"a": taking("a", [90, 1, 2]), "b": taking("b", [50, 3, 4])}
    assert in_turns(functions, rounds=2, clock=clock) == {"a": [1, 2], "b": [3, 4]}
    assert log == ["a", "b"] * 3


def test_without_warm_up_every_round_counts():
    numbers = iter(range(3))
    assert results_in_turns({"count": lambda: next(numbers)}, rounds=3, warm_up=0) == {"count": [0, 1, 2]}


def test_quartiles_are_those_of_the_standard_library():
    numbers = [5.0, 1.0, 4.0, 2.0]
    assert list(quartiles(numbers)) == statistics.quantiles(numbers, n=4, method="inclusive")
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: in_turns({"a": int}, rounds=0), "rounds must be a whole number of at least 1, got 0."),
        (lambda: in_turns({"a": int}, rounds=1, warm_up=-1), "warm_up must be a whole number of at least 0, got -1."),
        (
            lambda: in_turns({}, rounds=1),
            "functions must hold at least 1 function, got none. Name each: {'eager': run}.",
        ),
        (lambda: quartiles([]), "numbers must hold at least 1 number, got none. Time at least one round."),
    ],
)
def test_errors_say_what_was_wanted(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_the_median_of_a_function_leaves_out_its_first_call():
    now, took = [0.0], [900.0, 3.0, 1.0, 8.0, 2.0]

    def run():
        now[0] += took[runs.pop()]

    runs = [4, 3, 2, 1, 0]
    assert median_seconds({"a": run}, 4, lambda: now[0]) == {"a": statistics.median(took[1:])}
