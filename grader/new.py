"""A new exercise that already passes its proof: what `warmstart new 7.3 assert_frozen` writes.

    helpers/<topic>.py                   the reference, at the end; where that is a folder, a module in it
    tests/test_<topic>.py                a test of the reference, at the end
    grader/checks/<topic>/<name>.py      one experiment and four misconceptions, to replace
    grader/variants/<topic>/<name>.py    three right solutions in other styles
    grader/words/<topic>.toml            its hints, its claims, and what is said of its misconceptions, at the end
    grader/golden/<topic>.json           its truth table
    solutions/<chapter>/<chapter>.py     statement, stub and check, before the common mistakes

All of it is made from `grader/template/`, in which the exercise is `a_name`, number 0.0, of `a_topic`.
"""

import keyword
import re
import subprocess
import sys
from pathlib import Path

from grader.authoring import MISTAKES
from grader.checks import CHAPTERS, TOPICS, exercises
from helpers.files import write_text

TEMPLATE = Path(__file__).parent / "template"


def make_exercise(root: Path, number: str, name: str) -> list[Path]:
    """Write the files of a new exercise and its truth table.

    Args:
        root: the course's repository.
        number: "7.3", in one of the course's chapters.
        name: of what the learner writes, "assert_frozen".

    Returns:
        The files, those that were there before included.

    Raises:
        ValueError: a number or a name that is taken or cannot be one; nothing is written then.
        RuntimeError: the truth table cannot be recorded.
    """
    topic = _topic_for(root, number, name)
    chapter = f"{int(number.partition('.')[0]):02}_{topic}"
    package = (root / "helpers" / topic).is_dir()
    module = f"helpers.{topic}.{name}" if package else f"helpers.{topic}"
    names = {r"helpers\.a_topic": module, "a_topic": topic, "a_name": name, r"\b0\.0\b": number, r"\b00\b": chapter[:2]}

    def filled(part: str) -> str:
        text = (TEMPLATE / part).read_text(encoding="utf-8")
        for pattern, word in names.items():
            text = re.sub(pattern, word, text)
        return text

    texts = {}
    for file, part in (
        (root / f"{module.replace('.', '/')}.py", "reference.py"),
        (root / "tests" / f"test_{topic}.py", "test.py"),
        (root / "grader" / "words" / f"{topic}.toml", "words.toml"),
    ):
        head, _, added = filled(part).partition("\n\n\n")  # what only a new file needs ends with two empty lines
        texts[file] = f"{file.read_text(encoding='utf-8').rstrip() if file.exists() else head}\n\n\n{added}"
    for folder, part in (("checks", "checks.py"), ("variants", "variants.py")):
        texts[root / "grader" / folder / topic / f"{name}.py"] = filled(part)
        if topic not in TOPICS.values():
            texts[root / "grader" / folder / topic / "__init__.py"] = f'"""Exercises of chapter {chapter[:2]}."""\n'
    script = root / "solutions" / chapter / f"{chapter}.py"
    cells = filled("chapter.py")
    texts[script] = _with_cells(script.read_text(encoding="utf-8"), cells) if script.exists() else cells
    for file, text in texts.items():
        write_text(file, text)
    # In a new process: this one may have imported what has just changed.
    command = [sys.executable, "-m", "grader.golden", "tables", topic]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the files are written, and their truth table cannot be recorded:\n{done.stdout}{done.stderr}")
    return [*texts, root / "grader" / "golden" / f"{topic}.json"]


def _with_cells(chapter: str, template: str) -> str:
    """A chapter's script with the template's exercise before its common mistakes."""
    mistakes = f"# %% [markdown]\n# {MISTAKES}"
    start = template.index("# %% [markdown]\n# ## Exercise")
    return chapter.replace(mistakes, template[start : template.index(mistakes)] + mistakes, 1)


def _topic_for(root: Path, number: str, name: str) -> str:
    chapter = number.partition(".")[0]
    if not re.fullmatch(r"\d+\.[1-9]\d*[a-z]?", number) or int(chapter) >= len(CHAPTERS) or chapter != str(int(chapter)):
        raise ValueError(f"number must be chapter.exercise, with a chapter from 0 to {len(CHAPTERS) - 1}, got {number!r}.")
    topic = CHAPTERS[int(chapter)]
    there = exercises(topic) if topic in TOPICS.values() else {}
    if number in there:
        raise ValueError(f"number must be a new one, got {number}, which is {there[number].name}. Take another.")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"name must be one that Python allows, got {name!r}. Take letters, digits and _.")
    files = (root / "grader" / "checks" / topic / f"{name}.py", root / "helpers" / topic / f"{name}.py")
    if name in {exercise.name for exercise in there.values()} or any(file.exists() for file in files):
        raise ValueError(f"name must be a new one in {topic}, got {name!r}, which is taken. Take another.")
    return topic
