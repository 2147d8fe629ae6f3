"""A class of sample students through stock nbgrader: release, collect, autograde, feedback, export."""

import html
import re
from pathlib import Path

import pytest

from grader.checks import exercises
from grader.sample import CHAPTER, grade_class, sample_submissions

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FIRST, SECOND = exercises("features").values()
FULL = FIRST.points + SECOND.points


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    rows = grade_class(ROOT, folder, sample_submissions(ROOT))
    return folder, {row["student"]: row for row in rows}


def feedback(folder, student):
    page = (folder / "feedback" / student / CHAPTER / f"{CHAPTER}.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_the_class_is_large_enough(graded):
    assert len(graded[1]) >= 8
    assert all(row["of"] == FULL for row in graded[1].values())


@pytest.mark.parametrize(
    ("student", "points"),
    [
        ("perfect", FULL),
        ("empty", 0),
        ("half-done", FIRST.points),
        ("right-but-noisy", FULL),
        ("output-switched-off", FULL),
        ("syntax-error", SECOND.points),
        ("definition-missing", SECOND.points),
        ("returns-nan", SECOND.points),
        ("returns-text", SECOND.points),
    ],
)
def test_nothing_but_the_verdict_earns_or_costs_points(graded, student, points):
    assert graded[1][student]["points"] == points


@pytest.mark.parametrize("wrong", FIRST.misconceptions, ids=lambda m: m.name)
def test_each_misconception_is_scored_named_and_explained_in_the_feedback(graded, wrong):
    folder, rows = graded
    row = next(row for row in rows.values() if row["2.1"] == f"not yet: {wrong.name}")
    assert SECOND.points <= row["points"] < FULL
    assert row["2.2"] == "passed"
    assert wrong.hint in feedback(folder, row["student"])


def test_feedback_holds_no_seed_no_solution_and_no_path_of_the_grader(graded):
    folder, rows = graded
    seeds = (folder / "seeds.txt").read_text(encoding="utf-8").strip().split(",")
    assert len(seeds) == 2
    for student in rows:
        text = feedback(folder, student)
        assert not any(seed in text for seed in seeds)
        assert "BEGIN SOLUTION" not in text and "grader/checks" not in text


def test_demo_cells_were_not_run(graded):
    folder, _ = graded
    assert "you predicted" not in feedback(folder, "perfect")
    assert "continuing with your extract" in feedback(folder, "perfect")


def test_the_gradebook_was_exported(graded):
    folder, rows = graded
    lines = (folder / "grades.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(rows)
