"""Diagnosis on truth tables small enough to check by eye."""

import pytest

from grader.experiment import Exercise, Experiment, Misconception, equal
from grader.verdict import Observation, Problem, judge


class Asks(Experiment):
    def __init__(self, key: str, points: int) -> None:
        self.key = self.claim = key
        self.points = points


EXPERIMENTS = [Asks("one", 1), Asks("two", 2), Asks("three", 1)]
EXPECTED = {"one": 0, "two": "a", "three": 1.0}
FACTS = {"one": "x", "two": "y", "three": "x"}


def exercise_with(**wrong: dict):
    """An exercise whose misconceptions show the reference's facts, but for those given."""
    misconceptions = [Misconception(key, key, "hint", "source", lambda: None) for key in wrong]
    exercise = Exercise(__name__, "9.1", lambda: None, "thing", experiments=EXPERIMENTS, misconceptions=misconceptions)
    table = {
        e.key: {"reference": {FACTS[e.key]: EXPECTED[e.key]}}
        | {name: {FACTS[e.key]: (EXPECTED | facts)[e.key]} for name, facts in wrong.items()}
        for e in EXPERIMENTS
    }
    return exercise, table


def verdict(setup, **seen):
    exercise, table = setup
    observations = {
        key: value if isinstance(value, Observation) else Observation({FACTS[key]: value})
        for key, value in (EXPECTED | seen).items()
    }
    return judge(exercise, observations, table)


def test_the_references_facts_pass():
    result = verdict(exercise_with(m={"one": 1}))
    assert (result.outcome, result.named, result.unexplained, result.points) == ("passed", (), False, 4)


def test_equal_facts_name_the_misconception():
    result = verdict(exercise_with(m={"one": 1}, other={"one": 2}), one=1)
    assert (result.outcome, result.named, result.unexplained, result.points) == ("not yet", ("m",), False, 3)


def test_unknown_facts_name_nobody():
    result = verdict(exercise_with(m={"one": 1}), one=7)
    assert (result.named, result.unexplained) == ((), True)


def test_a_misconception_that_would_fail_what_passed_is_ruled_out():
    result = verdict(exercise_with(m={"one": 1, "two": "b"}), one=1)
    assert (result.named, result.unexplained) == ((), True)


def test_two_mistakes_are_two_names():
    result = verdict(exercise_with(m={"one": 1}, n={"two": "b"}), one=1, two="b")
    assert (result.named, result.unexplained) == (("m", "n"), False)


def test_one_name_is_preferred_to_two_that_explain_as_much():
    result = verdict(exercise_with(m={"one": 1}, n={"two": "b"}, both={"one": 1, "two": "b"}), one=1, two="b")
    assert result.named == ("both",)


def test_between_equally_good_names_none_is_guessed():
    setup = exercise_with(m={"one": 1, "two": "b"}, n={"one": 1, "two": "c"})
    result = verdict(setup, one=1, two="z")
    assert (result.named, result.unexplained) == ((), True)


def test_what_a_name_leaves_unexplained_is_said():
    result = verdict(exercise_with(m={"one": 1}), one=1, two="z")
    assert (result.named, result.unexplained) == (("m",), True)


def test_nothing_is_named_while_another_experiment_shows_the_same_fact_unexplained():
    result = verdict(exercise_with(m={"one": 1}, n={"two": "b"}), one=1, two="b", three=7.0)
    assert (result.named, result.unexplained) == (("n",), True)


def test_what_could_not_be_seen_because_of_another_is_no_mistake_of_its_own():
    result = verdict(exercise_with(m={"one": 1, "three": None}), one=7, three=None)
    assert [finding.outcome for finding in result.findings] == ["not yet", "passed", "not seen"]
    assert (result.outcome, result.named, result.points) == ("not yet", (), 2)


def test_what_cannot_be_observed_explains_nothing():
    result = verdict(exercise_with(m={"one": None}), one=None)
    assert (result.outcome, result.named) == ("not yet", ())


def test_with_fine_print_alone_missing_the_core_has_passed(monkeypatch):
    monkeypatch.setattr(EXPERIMENTS[1], "in_core", False)
    result = verdict(exercise_with(m={"two": "b"}), two="b")
    assert (result.outcome, result.core_passed, result.named) == ("core passed", True, ("m",))
    assert (result.points, result.points_of(True), result.points_of(False)) == (2, 2, 0)
    assert not verdict(exercise_with(m={"two": "b"}), one=7).core_passed


def test_what_cannot_be_observed_needs_no_explanation_beside_a_name():
    result = verdict(exercise_with(m={"one": 1, "two": None}), one=1, two=None)
    assert (result.named, result.unexplained) == (("m",), False)


@pytest.mark.parametrize(
    ("x", "outcome"), [(1.0009, "passed"), (0.9991, "passed"), (1.0011, "not yet"), (float("nan"), "not yet")]
)
def test_numbers_are_compared_to_three_digits(x, outcome):
    assert verdict(exercise_with(m={"three": 2.0}), three=x).outcome == outcome


@pytest.mark.parametrize(("one", "other"), [(True, 1), ("1", 1), (None, 0), ([1, 2], [1]), ([1, 2], [1, 3])])
def test_facts_of_another_kind_or_length_differ(one, other):
    assert not equal(one, other)


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("not attempted", "not attempted"),
        ("needs", "not attempted"),
        ("raised", "error"),
        ("time", "error"),
        ("returned", "not yet"),
        ("not finite", "not yet"),
        ("changed inputs", "not yet"),
        ("changed state", "not yet"),
    ],
)
def test_a_problem_is_an_outcome_and_explains_nothing(kind, outcome):
    result = verdict(exercise_with(m={"one": 1}), one=Observation(None, Problem(kind, "because")))
    assert (result.outcome, result.named, result.points) == (outcome, (), 3)
