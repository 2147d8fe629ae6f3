"""Every exercise's checks are proven; and the proof itself notices what it should."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from halves import Halves

from grader.checks import TOPICS, exercises
from grader.experiment import Misconception
from grader.golden import table_of
from grader.proof import Claim, _alike, _counts, _differing, _not_as_claimed, _written_once, faults, own_seed
from grader.variants import variants_of

ALL = [pytest.param(exercise, id=exercise.number) for topic in TOPICS.values() for exercise in exercises(topic).values()]
QUICK = ("0.1", "2.7", "4.2")  # proven in `make test-fast`, too
EXTRACT = exercises("features")["2.2"]


@pytest.mark.parametrize(
    "exercise", [pytest.param(*p.values, id=p.id, marks=() if p.id in QUICK else pytest.mark.slow) for p in ALL]
)
def test_checks_are_proven(exercise):
    """On seed 0 and on one that the exercise's own files decide; `make prove` takes twenty."""
    assert faults(exercise, seeds=(0, own_seed(exercise))) == []


@pytest.mark.parametrize("exercise", ALL)
def test_four_misconceptions_run_and_return_what_has_the_right_form(exercise):
    """They are wrong, not broken: the truth table, which `test_committed_files_…` makes again, has all facts of them."""
    rows = table_of(exercise).values()
    assert sum(all(row[m.key] is not None for row in rows) for m in exercise.misconceptions) >= 4


def test_changed_code_has_another_seed_and_unchanged_code_the_same(tmp_path, monkeypatch):
    seeds = {exercise.id: own_seed(*exercise.values) for exercise in ALL}
    assert len(set(seeds.values())) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds.values())
    assert own_seed(EXTRACT) == seeds["2.2"]
    module = import_module("grader.checks.features.extraction")
    changed = tmp_path / "extraction.py"
    changed.write_bytes(Path(module.__file__).read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(module, "__file__", str(changed))
    assert own_seed(EXTRACT) == seeds["2.2"], "line ends are no change"
    changed.write_bytes(changed.read_bytes() + b"# changed\n")
    assert own_seed(EXTRACT) != seeds["2.2"]


def test_a_misconception_that_passes_is_noticed_once_with_its_seeds():
    right = Misconception("graph kept", "graph kept", "A hint?", "a test", EXTRACT.reference)
    changed = replace(EXTRACT, misconceptions=[right, *(m for m in EXTRACT.misconceptions if m.key != "graph kept")])
    found = [fault for fault in faults(changed, seeds=(0, 3)) if fault.startswith("2.2: “graph kept” must be")]
    assert found == ["2.2: “graph kept” must be 'not yet' as ['graph kept'], got 'passed' as [], with seed 0, 3: []"]


def test_a_reference_that_fails_is_noticed():
    """And it is all that is said: every other fault would follow from it."""
    changed = replace(EXTRACT, reference=EXTRACT.misconceptions[0].subject, misconceptions=[])
    found_faults = faults(changed, seeds=(0,))
    assert found_faults and all("the reference must" in fault for fault in found_faults)


def test_too_few_misconceptions_are_noticed():
    exercise = exercises("start")["0.1"]
    few = replace(exercise, misconceptions=exercise.misconceptions[:3])
    assert "3 misconceptions, at least 4 are needed" in list(_counts(few, [], {}, []))


@pytest.mark.parametrize(("off", "margin"), [(0.0, None), (5e-5, 0.1), (5e-4, 10), (2e-3, None)])
def test_a_fact_that_rounding_could_change_is_noticed(off, margin):
    """Right solutions need less than a tenth of the tolerance, and a mistake is more than ten times it away."""
    halves = replace(EXTRACT, experiments=[Halves()], misconceptions=[], autocast=False)
    table = {"halves": {"reference": {"y": "half"}}}
    claim = Claim(lambda x: x / 2 + off, "it", "passed" if off < 1e-4 else "not yet")
    found = [fault for fault, _ in _not_as_claimed(halves, table, claim, seed=0) if "must keep" in fault]
    assert found == ([f"it must keep its facts, and does not: y at {margin} times the tolerance"] if margin else [])


@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        (lambda x: x / 2, None),
        (lambda x: x / 2 if not torch.is_autocast_enabled("cpu") else x, "it must keep its facts in autocast, and does not: y"),
        (
            lambda x: x / 2 if not torch.is_autocast_enabled("cpu") else 1 / 0,
            "it must work in autocast: your code raised ZeroDivisionError: division by zero",
        ),
    ],
)
def test_what_autocast_changes_is_noticed_where_the_statement_asks_for_it(subject, fault):
    halves = replace(EXTRACT, experiments=[Halves()], misconceptions=[], autocast=True)
    table = {"halves": {"reference": {"y": "half"}}}
    found = [line for line, _ in _not_as_claimed(halves, table, Claim(subject, "it", "passed"), seed=0)]
    assert len(found) == bool(fault) and (not fault or fault.split(": ")[0] in found[0])


def test_two_mistakes_that_one_fact_tells_apart_need_a_second_writing():
    exercise = replace(EXTRACT, misconceptions=[Misconception(key, key, "?", "a test", None) for key in "abc"])
    table = {
        "one": {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 2, "y": 3}},
        "two": {"a": {"z": "same"}, "b": {"z": "same"}, "c": None},
    }
    assert _differing(table, "a", "b") == [("one", "y")]
    assert _differing(table, "a", "c") == [("one", "x"), ("one", "y"), ("two", "")]
    assert list(_written_once(exercise, table, {"c": None})) == [
        "“a” and “b” differ in one fact: one of the two must be written again in other words"
    ]
    assert list(_written_once(exercise, table, {"b": None})) == []


def test_the_same_solution_in_other_words_is_noticed():
    def one(a, b):
        total = a + 2 * b
        return total.mean()

    def other(left, right):
        result = left + 3 * right

        return result.mean()

    assert list(_alike([one, other])) == ["other and one are the same solution in other words"]


def test_a_misconception_written_again_in_the_same_words_is_noticed(monkeypatch):
    wrong = next(m for m in EXTRACT.misconceptions if m.key == "graph kept")
    monkeypatch.setattr(variants_of(EXTRACT), "REWRITTEN", {"graph kept": wrong.subject})
    name = wrong.subject.__name__
    assert f"2.2: “graph kept”: {name} and {name} are the same solution in other words" in faults(EXTRACT, seeds=())


def test_the_same_operations_in_another_order_are_another_solution():
    def one(x):
        return x.mean() / x.sum()

    def other(x):
        return x.sum() / x.mean()

    assert list(_alike([one, other])) == []
