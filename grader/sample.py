"""A sample class, graded with stock nbgrader from release to export.

Each student is called after what they handed in: everything right, nothing, half of it, each misconception of
`extract`, the accidents that cost or earn points in an unprotected nbgrader, and files that cannot be graded at all.
"""

import csv
import inspect
import re
import secrets
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from rich.console import Console
from rich.table import Table

from grader.authoring import nbgrader, release
from grader.checks import exercises
from grader.experiment import Exercise, Misconception, Subject
from grader.intake import take_in
from helpers.files import write_text

CHAPTER = "02_features"
TOPIC = "features"


def grade_sample(root: Path, folder: Path | None = None) -> list[dict]:
    """Grade the sample class of chapter 02 in `folder` with the repository's nbgrader configuration; print it.

    Returns:
        The rows of `grade_class`.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="warmstart-class-"))
    rows = grade_class(root, folder, sample_submissions(root))
    print_rows(rows)
    print(f"\nresults.csv, grades.csv, submissions, graded notebooks and feedback are in {folder}")
    return rows


def grade_class(root: Path, folder: Path, handed_in: dict[str, bytes]) -> list[dict]:
    """One nbgrader round on a class: release, collect, autograde, feedback, export.

    Whatever was handed in, the others are graded. Beside nbgrader's files, results.csv holds the rows.

    Args:
        root: the course's repository.
        folder: where the class's files go.
        handed_in: name of a file -> what is in it, as it came; those that can be graded are named <student>_02_features.ipynb.

    Returns:
        One row per file: {"file", "student", "points", "of", "2.1", ..., "note"}. The numbers hold the checks' verdicts,
        the note says in a sentence what was not as wanted and what to do. "points" is None if it could not be graded.
    """
    shutil.copytree(root / "solutions" / CHAPTER, folder / "solutions" / CHAPTER)
    shutil.copy(root / "nbgrader_config.py", folder)
    release(folder, CHAPTER, "--create")  # makes the gradebook too, before anything else wants it
    downloaded = folder / "downloaded" / CHAPTER
    (downloaded / "archive").mkdir(parents=True)
    for file, content in handed_in.items():
        (downloaded / "archive" / file).write_bytes(content)
    nbgrader(folder, "zip_collect", CHAPTER)
    submissions = take_in(downloaded / "extracted", folder / "course" / CHAPTER / f"{CHAPTER}.ipynb")
    seeds = ",".join(str(secrets.randbelow(2**31)) for _ in range(2))  # the same for all, known to nobody before
    write_text(folder / "seeds.txt", seeds + "\n")  # so that a regrade can use the same
    students = [submission.student for submission in submissions if submission.gradable]
    failures = autograde(folder, students, seeds)
    if len(failures) < len(students):
        nbgrader(folder, "generate_feedback", CHAPTER)
    nbgrader(folder, "export", "--to", "grades.csv")
    with (folder / "grades.csv").open(encoding="utf-8", newline="") as file:
        grades = {row["student_id"]: row for row in csv.DictReader(file)}
    rows = []
    for submission in submissions:
        row = {"file": submission.file, "student": submission.student, "points": None, "of": None}
        verdicts, notes = dict.fromkeys(exercises(TOPIC), ""), [submission.note]
        if submission.gradable and submission.student not in failures:
            grade = grades[submission.student]
            row |= {"points": float(grade["score"]), "of": float(grade["max_score"])}
            verdicts, errors = _verdicts(_graded(folder, submission.student))
            notes += errors
        elif submission.gradable:
            notes.append(failures[submission.student])
        rows.append(row | verdicts | {"note": " ".join(filter(None, notes))})
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)
    return rows


def autograde(folder: Path, students: list[str], seeds: str) -> dict[str, str]:
    """Run nbgrader's autograde on a class; return a sentence for each student who could not be graded.

    Some failures stop nbgrader's batch, so everyone without a grade after it gets a run of their own.
    """
    failures = {}
    if students:
        with suppress(RuntimeError):  # says that some failed; who has no grade is seen below
            nbgrader(folder, "autograde", CHAPTER, environment={"WARMSTART_SEEDS": seeds})
    for student in students:
        if _graded(folder, student).exists():
            continue
        try:
            nbgrader(folder, "autograde", CHAPTER, f"--student={student}", environment={"WARMSTART_SEEDS": seeds})
        except RuntimeError as error:
            failures[student] = (
                f"expected a notebook that runs to its end, got {_cause(str(error))}. "
                f"Ask {student} to run it in a fresh kernel, and to hand it in again."
            )
    return failures


def print_rows(rows: list[dict]) -> None:
    """Print a class as a table: points, and what did not pass. Below it, a note on whatever was not as wanted."""
    console = Console(width=max(120, Console().width), markup=False)  # a [bracket] of a student's stays one
    table = Table("student", "points", "what did not pass", title=f"{CHAPTER}, {len(rows)} submissions")
    for row in rows:
        points = "not graded" if row["points"] is None else f"{row['points']:g} of {row['of']:g}"
        by_verdict: dict[str, list[str]] = {}
        for number in exercises(TOPIC):
            by_verdict.setdefault(row[number], []).append(number)
        failed = [f"{', '.join(numbers)} {verdict}" for verdict, numbers in by_verdict.items() if verdict not in ("passed", "")]
        table.add_row(row["student"] or row["file"], points, "; ".join(failed))
    console.print(table)
    notes = Table("file", "note", title="what was not as wanted", show_lines=True)
    for row in rows:
        if row["note"]:
            notes.add_row(row["file"], row["note"])
    if notes.row_count:
        console.print(notes)


def sample_submissions(root: Path, mistakes: Sequence[Misconception] | None = None) -> dict[str, bytes]:
    """What the sample class hands in, made from the released chapter: name of a file -> what is in it.

    Args:
        root: the course's repository.
        mistakes: the misconceptions of `extract` that have a student each; None takes all.
    """
    released = nbformat.read(root / "course" / CHAPTER / f"{CHAPTER}.ipynb", 4)
    solved = nbformat.read(root / "solutions" / CHAPTER / f"{CHAPTER}.ipynb", 4)
    right = {number: _without_markers(_cell(solved, "answer", number).source) for number in exercises(TOPIC)}
    start = nbformat.read(root / "course" / "00_start" / "00_start.ipynb", 4)
    first, second = by_name("extract"), by_name("linear_probe")
    number, next_number = first.number, second.number
    chosen = first.misconceptions if mistakes is None else mistakes
    wrong = {_file_name(m.key): source_as(m.subject, first.name) for m in chosen}
    answers = {
        "perfect": right,
        "empty": {},
        "half-done": {number: right[number]},
        **{student: right | {number: text} for student, text in wrong.items()},
        "right-but-noisy": right | {number: f"{right[number]}\n\n{NOISE}"},
        "nan-and-syntax-error": right
        | {number: f"def extract{RETURNS_NAN}", next_number: right[next_number].replace("):", ")", 1)},
        "changes-global-state": right | {number: f"{right[number]}\n\n{GLOBAL_STATE}"},
        "untidy-cells": right,  # one deleted, one copied, one pasted from another chapter, some with damaged metadata
        "kernel-dies": right | {number: f"{right[number]}\n\nimport os\nos.abort()  # as when memory runs out"},
    }
    notebooks = {student: with_answers(released, filled) for student, filled in answers.items()}
    half = notebooks["half-done"]  # its student deleted what they did not do
    half.cells = [
        cell for cell in half.cells if cell not in (_cell(half, "answer", next_number), _cell(half, "check", next_number))
    ]
    untidy = notebooks["untidy-cells"]
    untidy.cells.remove(_cell(untidy, "check", number))
    untidy.cells = [_with_id(_cell(untidy, "check", next_number)), *untidy.cells, _with_id(_cell(start, "answer", "0.1"))]
    _cell(untidy, "answer", number).metadata.nbgrader.schema_version = 1
    _cell(untidy, "answer", next_number).metadata.nbgrader.locked = True
    files = {f"{student}_{CHAPTER}.ipynb": nbformat.writes(notebook).encode() for student, notebook in notebooks.items()}
    perfect = files[f"perfect_{CHAPTER}.ipynb"]
    return files | {
        "homework.ipynb": perfect,
        "named_homework.ipynb": perfect,
        f"cut-off_{CHAPTER}.ipynb": perfect[: len(perfect) // 2],
        f"empty-file_{CHAPTER}.ipynb": b"",
        f"other-chapter_{CHAPTER}.ipynb": nbformat.writes(start).encode(),
    }


# Warnings, text on stderr from Python and from C, and a display that is switched off: nothing of that is wrong.
NOISE = """import os, sys, warnings
_quiet = extract
def extract(backbone, images, batch_size):
    warnings.warn('careful'); print('oh', file=sys.stderr); os.write(2, b'C code')
    return _quiet(backbone, images, batch_size)
get_ipython().ast_node_interactivity = 'none'"""

RETURNS_NAN = "(backbone, images, batch_size):\n    return float('nan')"

GLOBAL_STATE = """import os, random, sys
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.manual_seed(1), random.seed(1)
os.chdir('/')
os.environ['HOME'] = '/nowhere'
sys.path.insert(0, '/nowhere')
del F.gelu
nn.BatchNorm2d.train = lambda self, mode=True: self"""


def by_name(name: str) -> Exercise:
    """The exercise of the chapter with that name; its number may change."""
    return next(exercise for exercise in exercises(TOPIC).values() if exercise.name == name)


def with_answers(released: NotebookNode, answers: dict[str, str]) -> NotebookNode:
    """A copy of a released notebook with answers filled in: {exercise number: source of the answer cell}."""
    notebook = nbformat.reads(nbformat.writes(released), 4)
    for number, source in answers.items():
        _cell(notebook, "answer", number).source = source
    return notebook


def source_as(subject: Subject, name: str) -> str:
    """The source of a function, without decorators, under another name."""
    source = textwrap.dedent(inspect.getsource(subject))
    return re.sub(r"^def \w+", f"def {name}", source[source.index("def ") :], count=1).rstrip()


def _cell(notebook: NotebookNode, kind: str, number: str) -> NotebookNode:
    grade_id = f"{kind}-{number.replace('.', '_')}"
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id:
            return cell
    raise ValueError(f"the notebook must have a cell {grade_id}, and has none. Run `make course` and try again.")


def _with_id(cell: NotebookNode) -> NotebookNode:
    """A copy of a cell as JupyterLab makes it: all the same but its id."""
    return nbformat.from_dict({**cell, "id": f"copy-of-{cell.id}"})


def _without_markers(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.strip().startswith("### "))


def _graded(folder: Path, student: str) -> Path:
    return folder / "autograded" / student / CHAPTER / f"{CHAPTER}.ipynb"


def _verdicts(graded: Path) -> tuple[dict[str, str], list[str]]:
    """The verdict on each exercise, and what its check said in place of one."""
    verdicts, errors = {}, []
    for cell in nbformat.read(graded, 4).cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("check-"):
            number = grade_id.removeprefix("check-").replace("_", ".")
            verdict = cell.metadata.get("warmstart") or {"outcome": "no verdict", "named": []}
            named = f": {', '.join(verdict['named'])}" if verdict["named"] else ""
            verdicts[number] = verdict["outcome"] + named
            if verdict["outcome"] in ("error", "no verdict"):
                errors.append(f"{number}: {_said(cell)}")
    return verdicts, errors


def _said(cell: NotebookNode) -> str:
    """What a check without a proper verdict said: the first "got" that it printed, or the error that stopped it."""
    printed = "".join(output.get("text", "") for output in cell.outputs)
    if match := re.search(r"^ +got +(.*?)(?=^ +(?:got|more|next|note|[✗✓–]) |^\S|\Z)", printed, re.MULTILINE | re.DOTALL):
        return " ".join(match[1].split())
    stopped = [f"{output.ename}: {output.evalue}" for output in cell.outputs if output.output_type == "error"]
    return f"{(stopped or ['nothing came out'])[-1]}. Look at the cell above the check."


def _cause(log: str) -> str:
    """The last exception in nbgrader's log, without its module; else the log's last line."""
    raised = re.findall(r"^\s+(?:\w+\.)*(\w+: \S.*)$", log, re.MULTILINE)
    return (raised or log.strip().splitlines())[-1].strip().rstrip(".")


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
