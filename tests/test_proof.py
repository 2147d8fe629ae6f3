"""Every exercise's checks are proven; and the proof itself notices what it should."""

from dataclasses import replace

import pytest

from grader.checks import TOPICS, exercises
from grader.experiment import Misconception, misconception
from grader.observe import observe
from grader.proof import _alike, _alike_pairs, faults

ALL = [pytest.param(topic, exercise, id=exercise.number) for topic in TOPICS.values() for exercise in exercises(topic).values()]


@pytest.mark.slow
@pytest.mark.parametrize(("topic", "exercise"), ALL)
def test_checks_are_proven_over_twenty_seeds(topic, exercise):
    assert faults(topic, exercise, seeds=20) == []


@pytest.mark.parametrize(("topic", "exercise"), ALL)
def test_checks_are_proven_on_one_seed(topic, exercise):
    assert faults(topic, exercise, seeds=1) == []


@pytest.mark.parametrize(("topic", "exercise"), ALL)
def test_misconceptions_run_and_return_what_has_the_right_form(topic, exercise):
    """At least four of them run through every experiment: they are wrong, not broken."""
    running = [
        m.name
        for m in exercise.misconceptions
        if all(observe(experiment, m.subject, 0, exercise.number).problem is None for experiment in exercise.experiments)
    ]
    assert len(running) >= 4


def test_a_misconception_that_passes_is_noticed():
    exercise = exercises("features")["2.2"]
    right = Misconception("graph kept", "A hint?", "a test", exercise.reference)
    changed = replace(exercise, misconceptions=(right, *(m for m in exercise.misconceptions if m.name != "graph kept")))
    assert any("“graph kept” must be 'not yet'" in fault for fault in faults("features", changed, seeds=1))


def test_a_reference_that_fails_is_noticed():
    exercise = exercises("features")["2.2"]
    wrong = exercise.misconceptions[0].subject
    assert any("the reference must be 'passed'" in fault for fault in faults("features", replace(exercise, reference=wrong), 1))


def test_too_few_misconceptions_are_noticed():
    exercise = exercises("start")["0.1"]
    few = replace(exercise, misconceptions=exercise.misconceptions[:3])
    assert any("3 misconceptions, at least 4 are needed" in fault for fault in faults("start", few, seeds=1))


def test_the_same_solution_in_other_words_is_noticed():
    def one(a, b):
        total = a + 2 * b
        return total.mean()

    def other(left, right):
        result = left + 3 * right

        return result.mean()

    assert list(_alike([one, other])) == ["other and one are the same solution in other words"]


def test_a_misconception_written_again_in_the_same_words_is_noticed():
    @misconception("doubled", hint="Which of the two counts twice?", source="a test")
    def doubled(a, b):
        total = a + 2 * b
        return total.mean()

    def again(left, right):
        result = left + 3 * right
        return result.mean()

    found = list(_alike_pairs({"doubled": (doubled.subject, again)}))
    assert found == ["“doubled”: again and doubled are the same solution in other words"]
