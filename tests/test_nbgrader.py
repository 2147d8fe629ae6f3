"""A class of sample students through stock nbgrader: release, collect, autograde, feedback, export."""

import csv
import html
import re
from pathlib import Path

import pytest

from grader import golden
from grader.checks import exercises
from grader.sample import CHAPTER, TOPIC, by_name, grade_class, print_rows, sample_submissions

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FIRST, SECOND = by_name("extract"), by_name("linear_probe")
MISTAKES = (FIRST.misconceptions[1], FIRST.misconceptions[-1])  # the others are proven; these differ in points, one in signs
FULL = sum(exercise.points for exercise in exercises(TOPIC).values())
NOT_GRADED = {
    "homework.ipynb": "expected a name like ada_02_features.ipynb, got homework.ipynb, which does not say for certain whose "
    "it is. Find out, rename it, and grade again.",
    "named_homework.ipynb": "expected a name like ada_02_features.ipynb, got named_homework.ipynb, which does not say for "
    "certain whose it is. Find out, rename it, and grade again.",
    "cut-off_02_features.ipynb": "expected a notebook, got N bytes cut off or damaged in line N. "
    "Ask cut-off to hand in 02_features.ipynb again.",
    "empty-file_02_features.ipynb": "expected a notebook, got an empty file (N bytes). "
    "Ask empty-file to hand in 02_features.ipynb again.",
    "other-chapter_02_features.ipynb": "expected the exercises of 02_features, got 00_start. "
    "Ask other-chapter to hand in 02_features.ipynb again.",
    "kernel-dies_02_features.ipynb": "expected a notebook that runs to its end, got DeadKernelError: Kernel died. "
    "Ask kernel-dies to run it in a fresh kernel, and to hand it in again.",
}


@pytest.fixture(scope="module")
def handed_in():
    return sample_submissions(ROOT, MISTAKES)


@pytest.fixture(scope="module")
def graded(tmp_path_factory, handed_in):
    folder = tmp_path_factory.mktemp("class")
    rows = grade_class(ROOT, folder, handed_in)
    return folder, {row["file"].removesuffix(f"_{CHAPTER}.ipynb"): row for row in rows}


def test_the_class_of_make_grade_has_a_student_for_each_misconception(handed_in):
    nobody, everybody = sample_submissions(ROOT, ()), sample_submissions(ROOT)
    assert nobody.keys() < handed_in.keys() < everybody.keys()
    assert len(everybody) - len(nobody) == len(FIRST.misconceptions) > len(MISTAKES) == len(handed_in) - len(nobody)
    answers = {everybody[file] for file in everybody.keys() - nobody.keys()}
    assert len(answers) == len(FIRST.misconceptions) and everybody[f"perfect_{CHAPTER}.ipynb"] not in answers


@pytest.fixture
def healthy(graded):
    return {student: row for student, row in graded[1].items() if row["file"] not in NOT_GRADED}


def points_of(wrong):
    """What a misconception of the first exercise earns there: the experiments that do not tell it from the reference."""
    table = golden.load(TOPIC)[FIRST.number]
    alike = (e for e in FIRST.experiments if table[e.key][wrong.key] == table[e.key]["reference"])
    return sum(experiment.points for experiment in alike)


def feedback(folder, student):
    page = (folder / "feedback" / student / CHAPTER / f"{CHAPTER}.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_the_class_is_large_enough(graded, healthy):
    assert 8 <= len(healthy) < len(graded[1]) <= 20
    assert all(row["of"] == FULL for row in healthy.values())


@pytest.mark.parametrize(
    ("student", "points"),
    [
        ("perfect", FULL),
        ("empty", 0),
        ("half-done", FIRST.points),
        ("right-but-noisy", FULL),
        ("nan-and-syntax-error", FULL - FIRST.points - SECOND.points),
        ("untidy-cells", FULL),
    ],
)
def test_nothing_but_the_verdict_earns_or_costs_points(graded, student, points):
    assert graded[1][student]["points"] == points


@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda m: m.key)
def test_a_misconception_is_scored_named_and_explained_in_the_feedback(graded, wrong):
    folder, rows = graded
    row = next(row for row in rows.values() if row[FIRST.number].partition(": ")[2] == wrong.key)
    assert row["points"] == FULL - FIRST.points + points_of(wrong)
    assert row[SECOND.number] == "passed"
    assert wrong.hint in feedback(folder, row["student"])


@pytest.mark.parametrize("file", NOT_GRADED)
def test_what_cannot_be_graded_gets_a_sentence_and_stops_nobody(graded, handed_in, file):
    folder, rows = graded
    row = next(row for row in rows.values() if row["file"] == file)
    assert re.sub(r"\d+(?= bytes)|(?<=line )\d+", "N", row["note"]) == NOT_GRADED[file]
    assert (row["points"], row["of"], {row[number] for number in exercises(TOPIC)}) == (None, None, {""})
    assert (folder / "downloaded" / CHAPTER / "archive" / file).read_bytes() == handed_in[file]


def test_what_is_set_aside_never_reaches_nbgrader(graded):
    folder, rows = graded
    collected = {path.name for path in (folder / "submitted").iterdir()}
    assert collected == {row["student"] for row in rows.values() if row["points"] is not None} | {"kernel-dies"}


def test_changed_global_state_changes_no_verdict_and_changed_torch_is_said(graded):
    row = graded[1]["changes-global-state"]
    assert row[SECOND.number] == "passed"
    assert row[FIRST.number] == "error"
    assert row["note"].startswith(
        f"{FIRST.number}: the reference fails here too, so something in this kernel has changed torch"
    )


def test_untidy_cells_are_put_right_and_said(graded):
    check = {exercise.name: f"check-{exercise.number.replace('.', '_')}" for exercise in (FIRST, SECOND)}
    assert graded[1]["untidy-cells"]["note"] == (
        f"expected {check['extract']}, got no such cell: put back and scored, nothing to do. "
        f"expected {check['linear_probe']} once, got copies: the last counts, the others run unscored. Nothing to do."
    )
    assert graded[1]["half-done"][SECOND.number] == "no verdict"
    assert "NameError: name 'linear_probe' is not defined. Look at the cell above the check." in graded[1]["half-done"]["note"]


def test_who_handed_in_as_wanted_gets_no_note(healthy):
    odd = {"half-done", "untidy-cells", "nan-and-syntax-error", "changes-global-state"}
    assert {student for student, row in healthy.items() if row["note"]} == odd


def test_the_sentences_are_printed_and_in_the_class_folder(graded, capsys):
    folder, rows = graded
    print_rows(list(rows.values()))
    printed = " ".join(re.sub(r"[│┃├┤─┼]", " ", capsys.readouterr().out).split())
    for student in ("homework.ipynb", "cut-off", "kernel-dies"):
        assert f"{student} not graded" in printed
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        written = {row["file"]: row for row in csv.DictReader(file)}
    for row in rows.values():
        assert written[row["file"]]["note"] == row["note"]
        assert written[row["file"]]["points"] == ("" if row["points"] is None else str(row["points"]))
        assert all(word in printed for word in row["note"].split())


def test_feedback_holds_no_seed_no_solution_and_no_path_of_the_grader(graded, healthy):
    folder, _ = graded
    seeds = (folder / "seeds.txt").read_text(encoding="utf-8").strip().split(",")
    assert len(seeds) == 2
    for student in healthy:
        text = feedback(folder, student)
        assert not any(seed in text for seed in seeds)
        assert "BEGIN SOLUTION" not in text and "grader/checks" not in text


def test_demo_cells_were_not_run(graded):
    folder, _ = graded
    assert "you predicted" not in feedback(folder, "perfect")
    assert "continuing with your extract" in feedback(folder, "perfect")


def test_the_gradebook_was_exported(graded, healthy):
    folder, _ = graded
    with (folder / "grades.csv").open(encoding="utf-8", newline="") as file:
        exported = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert exported == {student: row["points"] for student, row in healthy.items()} | {"kernel-dies": 0}


def test_a_class_without_one_gradable_file(tmp_path):
    archive, row = grade_class(ROOT, tmp_path, {"homework.ipynb": b"", "ada_02_features.zip": b"PK, but cut off"})
    assert (row["points"], row["note"]) == (None, NOT_GRADED["homework.ipynb"])
    assert archive["note"] == NOT_GRADED["homework.ipynb"].replace("homework.ipynb", "ada_02_features.zip")


def test_brackets_in_what_a_student_wrote_are_printed_as_they_are(capsys):
    row = {"file": "a.ipynb", "student": "[/b]", "points": None, "of": None, "note": "x[/b] and [red]"}
    print_rows([row | dict.fromkeys(exercises(TOPIC), "")])
    printed = capsys.readouterr().out
    assert "[/b] " in printed and "x[/b] and [red]" in printed
