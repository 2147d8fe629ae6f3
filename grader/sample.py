"""A sample class, graded with stock nbgrader from release to export.

Each student is called after what they handed in: everything right, nothing, half of it, each misconception of
exercise 2.1, and the accidents that cost or earn points in an unprotected nbgrader.
"""

import csv
import inspect
import re
import secrets
import shutil
import tempfile
import textwrap
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from rich.console import Console
from rich.table import Table

from grader.authoring import nbgrader, release
from grader.checks import exercises
from grader.experiment import Subject
from helpers.files import write_text

CHAPTER = "02_features"


def grade_sample(root: Path, folder: Path | None = None) -> list[dict]:
    """Grade the sample class of chapter 02 in `folder` with the repository's nbgrader configuration; print a table.

    Returns:
        One row per student: {"student", "points", "of", "2.1", "2.2"}, the last two as the check's verdicts.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="warmstart-class-"))
    submissions = sample_submissions(root)
    rows = grade_class(root, folder, submissions)
    print_table(rows)
    print(f"\nsubmissions, graded notebooks, feedback and grades.csv are in {folder}")
    return rows


def grade_class(root: Path, folder: Path, submissions: dict[str, NotebookNode]) -> list[dict]:
    """One nbgrader round on a class: release, collect, autograde, feedback, export.

    Args:
        root: the course's repository.
        folder: where the class's files go.
        submissions: student -> notebook of chapter 02.
    """
    shutil.copytree(root / "solutions" / CHAPTER, folder / "solutions" / CHAPTER)
    shutil.copy(root / "nbgrader_config.py", folder)
    release(folder, CHAPTER, "--create")  # makes the gradebook too, before anything else wants it
    for student, notebook in submissions.items():
        write_text(folder / "downloaded" / CHAPTER / "archive" / f"{student}_{CHAPTER}.ipynb", nbformat.writes(notebook))
    nbgrader(folder, "zip_collect", CHAPTER)
    seeds = ",".join(str(secrets.randbelow(2**31)) for _ in range(2))  # the same for all, known to nobody before
    write_text(folder / "seeds.txt", seeds + "\n")  # so that a regrade can use the same
    nbgrader(folder, "autograde", CHAPTER, environment={"WARMSTART_SEEDS": seeds})
    nbgrader(folder, "generate_feedback", CHAPTER)
    nbgrader(folder, "export", "--to", "grades.csv")
    with (folder / "grades.csv").open(encoding="utf-8", newline="") as file:
        grades = {row["student_id"]: row for row in csv.DictReader(file)}
    return [
        {"student": student, "points": float(grades[student]["score"]), "of": float(grades[student]["max_score"])}
        | _verdicts(folder / "autograded" / student / CHAPTER / f"{CHAPTER}.ipynb")
        for student in submissions
    ]


def print_table(rows: list[dict]) -> None:
    """Print a class as a table: points, and the verdict on each exercise."""
    numbers = [key for key in rows[0] if key[0].isdigit()]
    table = Table("student", "points", *numbers, title=f"{CHAPTER}, {len(rows)} submissions")
    for row in rows:
        table.add_row(row["student"], f"{row['points']:g} of {row['of']:g}", *(row[number] for number in numbers))
    Console(width=max(120, Console().width)).print(table)


def sample_submissions(root: Path) -> dict[str, NotebookNode]:
    """The notebooks that the sample class hands in, made from the released chapter."""
    released = nbformat.read(root / "course" / CHAPTER / f"{CHAPTER}.ipynb", 4)
    solved = nbformat.read(root / "solutions" / CHAPTER / f"{CHAPTER}.ipynb", 4)
    right = {number: _without_markers(_answer(solved, number).source) for number in exercises("features")}
    first = exercises("features")["2.1"]
    wrong = {_file_name(m.name): source_as(m.subject, first.name) for m in first.misconceptions}

    def hand_in(**answers: str) -> NotebookNode:
        return with_answers(released, {number.replace("_", ".").lstrip("e"): text for number, text in answers.items()})

    second = right["2.2"]
    noise = "import os, sys, warnings; warnings.warn('careful'); print('oh', file=sys.stderr); os.write(2, b'C code')"
    noisy = right["2.1"].replace("    modes =", f"    {noise}\n    modes =", 1)
    return {
        "perfect": hand_in(e2_1=right["2.1"], e2_2=second),
        "empty": hand_in(),
        "half-done": hand_in(e2_1=right["2.1"]),
        **{name: hand_in(e2_1=text, e2_2=second) for name, text in wrong.items()},
        "right-but-noisy": hand_in(e2_1=noisy, e2_2=second),
        "syntax-error": hand_in(e2_1=right["2.1"].replace("):", ")", 1), e2_2=second),
        "definition-missing": hand_in(e2_1="# I will do this later", e2_2=second),
        "returns-nan": hand_in(e2_1="def extract(backbone, images, batch_size):\n    return float('nan')", e2_2=second),
        "returns-text": hand_in(e2_1="def extract(backbone, images, batch_size):\n    return 'abc'", e2_2=second),
        "output-switched-off": hand_in(e2_1=right["2.1"] + "\n\nget_ipython().ast_node_interactivity = 'none'", e2_2=second),
    }


def with_answers(released: NotebookNode, answers: dict[str, str]) -> NotebookNode:
    """A copy of a released notebook with answers filled in: {exercise number: source of the answer cell}."""
    notebook = nbformat.reads(nbformat.writes(released), 4)
    for number, source in answers.items():
        _answer(notebook, number).source = source
    return notebook


def source_as(subject: Subject, name: str) -> str:
    """The source of a function, without decorators, under another name."""
    source = textwrap.dedent(inspect.getsource(subject))
    return re.sub(r"^def \w+", f"def {name}", source[source.index("def ") :], count=1).rstrip()


def _answer(notebook: NotebookNode, number: str) -> NotebookNode:
    grade_id = f"answer-{number.replace('.', '_')}"
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def _without_markers(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.strip().startswith("### "))


def _verdicts(graded: Path) -> dict[str, str]:
    verdicts = {}
    for cell in nbformat.read(graded, 4).cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("check-"):
            verdict = cell.metadata.get("warmstart") or {"outcome": "no verdict", "named": []}
            named = f": {', '.join(verdict['named'])}" if verdict["named"] else ""
            verdicts[grade_id.removeprefix("check-").replace("_", ".")] = verdict["outcome"] + named
    return verdicts


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
