"""From an author's script to what nbgrader and learners open.

    solutions/02_features/02_features.py      written by the author (jupytext percent script)
    solutions/02_features/02_features.ipynb   the same with nbgrader's metadata, made here
    course/02_features/02_features.ipynb      released from that by nbgrader: stubs for solutions
    grader/golden/features.json               truth tables, recorded from grader/checks/features/
    docs/mistakes/features.md                 the mistakes that the checks know, in the words of their hints

nbgrader's metadata follows from what the author writes: a cell with `### BEGIN SOLUTION` is an answer, a cell that
calls `check("2.1", ...)` is worth that exercise's points, a cell tagged `demo` is the learner's to play with and is not
run when grading, and every other code cell is locked.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from grader import golden
from grader.checks import TOPICS, exercises
from grader.golden.truth import write_tables
from helpers.files import write_text

CHECK = re.compile(r'^check\("(\d+\.\d+[a-z]?)", ', re.MULTILINE)
MISTAKES = "## Common mistakes"


def make_course(root: Path, tables: Path = golden.FOLDER, topic: str | None = None) -> None:
    """Write every generated file below `root`, or those of one topic: truth tables, paired and released notebooks."""
    write_tables([topic] if topic else TOPICS.values(), tables)
    for name in [topic] if topic else TOPICS.values():
        write_text(root / "docs" / "mistakes" / f"{name}.md", mistakes_page(name))
    for script in sorted((root / "solutions").glob(f"*_{topic or '*'}/*.py")):
        write_text(script.with_suffix(".ipynb"), nbformat.writes(notebook(script)))
        release(root, script.stem)


def release(root: Path, chapter: str, *options: str) -> None:
    """Release one chapter with nbgrader, from `solutions` into `course`; by default without a gradebook."""
    nbgrader(root, "generate_assignment", chapter, "--force", *(options or ("--no-db",)))


def nbgrader(root: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a stock nbgrader command in `root`, with this environment's programs first on PATH.

    Raises:
        RuntimeError: the command failed; the message ends with what it printed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=root,
        env=os.environ | {"PATH": path} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"nbgrader {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done


def notebook(script: Path) -> NotebookNode:
    """The notebook of a chapter, with nbgrader's metadata; the same bytes for the same script.

    Raises:
        ValueError: an answer without a check after it, or two checks of one exercise.
    """
    nb = jupytext.read(script)
    topic = script.stem.partition("_")[2]
    nb.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nb.nbformat, nb.nbformat_minor = 4, 5
    answer, numbers, locked = None, set(), 0
    for position, cell in enumerate(nb.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        cell.id = f"{topic}-{position}"
        if cell.cell_type == "markdown":
            if cell.source.startswith(MISTAKES):
                cell.source = mistakes_section(topic)
            continue
        if "demo" in cell.metadata.get("tags", ()):
            continue
        if "### BEGIN SOLUTION" in cell.source:
            answer = cell
            continue
        if called := CHECK.search(cell.source):
            number = called[1]
            if answer is None or number in numbers:
                raise ValueError(f"{script.name}: exercise {number} needs one answer cell and one check below it.")
            numbers.add(number)
            _grade(answer, f"answer-{number}", solution=True)
            _grade(cell, f"check-{number}", grade=True, points=exercises(topic)[number].points)
            answer = None
        else:
            locked += 1
            _grade(cell, f"run-{locked}")
    if answer is not None:
        raise ValueError(f"{script.name}: the last answer cell has no check below it.")
    return nb


def mistakes_section(topic: str) -> str:
    """The section near the end of a chapter: where its mistakes can be read. In the chapter they would give answers away."""
    known = sum(len(exercise.misconceptions) for exercise in exercises(topic).values())
    page = f"[a page of their own](../../docs/mistakes/{topic}.md)"
    return f"{MISTAKES}\n\nThe checks of this chapter know {known} mistakes by name. They are on {page}, to read afterwards."


def mistakes_page(topic: str) -> str:
    """All misconceptions of a topic, in the words of their hints."""
    lines = [f"# Common mistakes: {topic}", "", "The checks know these mistakes by name. Read them when you have passed."]
    for number, exercise in exercises(topic).items():
        lines += ["", f"## {number} `{exercise.name}`", ""]
        lines += [f"- *{wrong.name}.* {wrong.hint}" for wrong in exercise.misconceptions]
    return "\n".join(lines) + "\n"


def _grade(
    cell: NotebookNode, grade_id: str, *, solution: bool = False, grade: bool = False, points: int | None = None
) -> None:
    meta = {
        "schema_version": 3,
        "grade_id": grade_id.replace(".", "_"),  # nbgrader refuses a dot
        "cell_type": "code",
        "solution": solution,
        "grade": grade,
        "locked": not solution,
        "task": False,
    }
    cell.metadata["nbgrader"] = nbformat.from_dict(meta | ({"points": points} if grade else {}))
