"""What was handed in, looked at before nbgrader runs: whose it is, and whether it can be graded.

    ada_02_features.ipynb        graded
    ada_02_features (1).ipynb    graded as the one above, if it came alone: browsers and JupyterLab name copies so
    jane_doe.ipynb               set aside: is it jane's notebook "doe"? Nobody's score rests on a guess

A file that is set aside stays where it was handed in; only nbgrader does not get it.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from grader.checks import TOPICS

_COPY = r"(?: ?\(\d+\)|-Copy\d+)?"  # "(1)" by browsers, "-Copy1" by JupyterLab


@dataclass(frozen=True)
class HandedIn:
    """One file that was handed in.

    Attributes:
        file: its path below the folder of all that was handed in.
        student: whose it is; empty if the name does not say.
        gradable: whether nbgrader should get it.
        note: a sentence or two on what was wanted, what came and what to do; empty if all was as wanted.
    """

    file: str
    student: str
    gradable: bool
    note: str = ""


def take_in(folder: Path, released: Path) -> list[HandedIn]:
    """Look at every file in `folder` and below it, in the order of their names; change nothing.

    Args:
        folder: what an LMS gave.
        released: the chapter's released notebook; its name is the chapter's, and its cells are those to be handed in.
    """
    wanted = _exercise_cells(released.read_bytes())
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): path for path in paths}
    handed_in = [examine(file, path.read_bytes(), released.stem, wanted) for file, path in files.items()]
    by_student: dict[str, list[HandedIn]] = {}
    for submission in handed_in:
        by_student.setdefault(submission.student, []).append(submission)
    return [_alone(submission, by_student[submission.student], released.stem) for submission in handed_in]


def examine(file: str, content: bytes, chapter: str, wanted: list[str]) -> HandedIn:
    """Look at one file by itself.

    Args:
        file: its name or path.
        content: what is in it.
        chapter: "02_features".
        wanted: nbgrader's names of the chapter's answers and checks, ["answer-2_1", "check-2_1"].
    """
    name = Path(file).name
    # A student's name becomes a folder's, and nbgrader looks for folders with patterns.
    match = re.fullmatch(rf"(?P<student>[^.*?\[\]][^*?\[\]]*)_{re.escape(chapter)}{_COPY}\.ipynb", name)
    if match is None:
        return HandedIn(
            file,
            "",
            False,
            f"expected a name like ada_{chapter}.ipynb, got {name}, which does not say for certain whose it is. "
            "Find out, rename it, and grade again.",
        )
    student = match["student"]
    again = f"Ask {student} to hand in {chapter}.ipynb again."
    try:
        notes = _compare(_exercise_cells(content), wanted, chapter)
    except ValueError as error:
        return HandedIn(file, student, False, f"{error} {again}")
    if name != f"{student}_{chapter}.ipynb":
        notes.insert(0, f"expected {student}_{chapter}.ipynb, got {name}: graded as that, nothing to do.")
    return HandedIn(file, student, True, " ".join(notes))


def _alone(submission: HandedIn, of_student: list[HandedIn], chapter: str) -> HandedIn:
    """The submission; if its student handed in several files, only the one with the expected name can be graded."""
    expected = f"{submission.student}_{chapter}.ipynb"
    named_right = [file.file for file in of_student if Path(file.file).name == expected]
    if not submission.gradable or len(of_student) == 1 or named_right == [submission.file]:
        return submission
    files = ", ".join(file.file for file in of_student)
    todo = f"name that one {expected}, remove the others, and grade again"
    counts = f"{expected} counts; if it should not" if len(named_right) == 1 else "Ask which counts"
    return replace(
        submission, gradable=False, note=f"expected one file of {submission.student}, got {files}. {counts}, {todo}."
    )


def _exercise_cells(content: bytes) -> list[str]:
    """The names of a notebook's answers and checks in nbgrader's metadata, "answer-2_1".

    Raises:
        ValueError: it is no notebook; the message says what came.
    """
    if not content.strip():
        raise ValueError(f"expected a notebook, got an empty file ({len(content)} bytes).")
    try:
        text = content.decode("utf-8")
        json.loads(text)  # names the line, which nbformat does not
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a notebook, got {len(content)} bytes cut off or damaged in line {error.lineno}.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected a notebook, got {len(content)} bytes of something else.") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about cells without ids and the like
            cells = nbformat.reads(text, as_version=4).cells
        return _exercise_ids(cells)
    except Exception as error:  # nbformat has no common exception for what a file may hold
        raise ValueError("expected a notebook, got JSON of something else.") from error


def _compare(cells: list[str], wanted: list[str], chapter: str) -> list[str]:
    """Sentences about cells that are missing or came twice.

    Raises:
        ValueError: none of them is the chapter's.
    """
    came = Counter(cells)
    if not came.keys() & set(wanted):
        chapters = " and ".join(sorted({_chapter_of(name) for name in came})) or "none"
        raise ValueError(f"expected the exercises of {chapter}, got {chapters}.")
    notes = []
    if missing := [name for name in wanted if name.startswith("check-") and not came[name]]:
        notes.append(f"expected {', '.join(missing)}, got no such cell: put back and scored, nothing to do.")
    if missing := [name for name in wanted if name.startswith("answer-") and not came[name]]:
        notes.append(f"expected {', '.join(missing)}, got no such cell: without an answer in another cell it scores 0.")
    if twice := [name for name in wanted if came[name] > 1]:
        notes.append(f"expected {', '.join(twice)} once, got copies: the last counts, the others run unscored. Nothing to do.")
    return notes


def _exercise_ids(cells: Iterable[NotebookNode]) -> list[str]:
    """The names of answers and checks; those of other cells, such as "run-1", occur in every chapter."""
    metadata = [cell.metadata.get("nbgrader") for cell in cells]
    names = [str(meta.get("grade_id")) for meta in metadata if isinstance(meta, dict)]
    return [name for name in names if re.fullmatch(r"(answer|check)-\d+_\d+[a-z]?", name)]


def _chapter_of(name: str) -> str:
    number = re.findall(r"\d+", name)[0]
    return f"{number:0>2}_{TOPICS[number]}" if number in TOPICS else f"chapter {number}"
