"""What CONTRIBUTING.md says can be done: its paths exist, its commands run, its picture of imports holds."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from repository import tracked_files

from grader.checks import TOPICS, exercises
from grader.new import make_exercise


@pytest.fixture
def page(root):
    return (root / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def copy(root, tmp_path):
    """The repository in a folder of its own, and a function that runs a command there as somebody would in a shell."""
    for path in tracked_files(root):
        (tmp_path / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(root))

    def run(command):
        words = shlex.split(command.partition("#")[0])
        programs = {"warmstart": [sys.executable, "-m", "grader.cli"], "python": [sys.executable]}
        return subprocess.run(
            [*programs.get(words[0], words[:1]), *words[1:]],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return tmp_path, run


def commands(page):
    """Every command in the page, in its order: lines of blocks, and what stands between backticks."""
    blocks = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    starts = ("make ", "warmstart ", "python ", "bash ", ".venv/bin/python ")
    return [command for command in (*blocks, *inline) if command.startswith(starts)]


def test_every_path_in_it_exists(root, page):
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", page) + re.findall(r"\]\(([\w./-]+)\)", page)
    assert len(named) > 20
    assert [path for path in named if not (root / path).exists()] == []


def test_every_make_target_module_and_subcommand_in_it_exists(root, page):
    listed = commands(page)
    targets = {command.split()[1] for command in listed if command.startswith("make ")}
    assert {"lab", "test", "test-fast", "prove", "course"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    modules = re.findall(r"python -m ([\w.]+)", " ".join(listed))
    assert len(modules) >= 3
    for module in set(modules) - {"pytest"}:
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    files = re.findall(r"(?:bash|python) ([\w/.]+\.(?:sh|py))", " ".join(listed))
    assert files and all((root / file).exists() for file in files)


@pytest.mark.slow
def test_the_way_to_a_new_exercise_that_it_tells_works(page, copy):
    folder, run = copy
    steps = [command.partition("#")[0] for command in commands(page) if "7.3" in command or "debugging" in command]
    order = " ".join(re.findall(r"new|tables|prove|mutants|record|--write", " ".join(steps)))
    assert order == "new tables prove mutants record mutants --write"
    # With a number and a name that nobody takes; the topic may have exercises by then, or not.
    steps = [step.replace("prove 7.3", "prove 7.3 --seeds 2") for step in steps]  # 20 take half a minute
    steps = [step.replace("7.3", "7.93").replace("assert_frozen", "silly") for step in steps]
    outputs = []
    for step in steps:
        done = run(step)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    assert outputs[1:3] == ["no fact has changed\n", "all checks proven\n"]
    assert "| 7.93 `silly` | " in (folder / "docs" / "proofs.md").read_text(encoding="utf-8")
    assert list((folder / "grader/golden/records").glob("*/*/debugging.safetensors"))
    made = [line for line in outputs[0].splitlines() if line.endswith(".py") and not line.startswith("solutions")]
    assert len(made) >= 4
    for command in ("pytest -q tests/test_debugging.py", "ruff check", "ruff format --check"):
        done = run(f"python -m {command} {' '.join(made) if command.startswith('ruff') else ''}")
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_new_exercise_of_a_chapter_that_is_there_only_adds(root, copy):
    """In a topic whose reference is a folder, and in one where it is a file."""
    folder, run = copy
    for command in ("warmstart new 6.99 shrink", "warmstart new 2.99 shrink"):
        assert run(command).returncode == 0, run(command).stderr
    for topic, chapter in (("lora", "06_lora"), ("features", "02_features")):
        for path in (f"solutions/{chapter}/{chapter}.py", f"grader/words/{topic}.toml", f"tests/test_{topic}.py"):
            before, after = ((place / path).read_text(encoding="utf-8").splitlines() for place in (root, folder))
            rest = iter(after)
            assert all(line in rest for line in before), f"{path}: a line is gone"
    assert (folder / "helpers/lora/shrink.py").exists() and "def shrink(" in (folder / "helpers/features.py").read_text()


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        ("6.1", "mine", "number must be a new one, got 6.1, which is LoRALinear. Take another."),
        ("12.1", "mine", "number must be chapter.exercise, with a chapter from 0 to 11, got '12.1'."),
        ("7", "mine", "number must be chapter.exercise, with a chapter from 0 to 11, got '7'."),
        ("07.1", "mine", "number must be chapter.exercise, with a chapter from 0 to 11, got '07.1'."),
        ("6.99", "merged", "name must be a new one in lora, got 'merged', which is taken. Take another."),
        ("11.99", "two words", "name must be one that Python allows, got 'two words'. Take letters, digits and _."),
        ("11.99", "class", "name must be one that Python allows, got 'class'. Take letters, digits and _."),
    ],
)
def test_what_cannot_be_a_new_exercise_is_refused_and_nothing_is_written(tmp_path, number, name, message):
    with pytest.raises(ValueError, match=r"\.$") as error:
        make_exercise(tmp_path, number, name)
    assert str(error.value) == message and list(tmp_path.iterdir()) == []


def test_the_example_to_read_is_short_and_annotated(root):
    lines = (root / "grader/checks/start/accuracy.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 170 and sum("#" in line for line in lines) >= 10


def test_modules_import_downwards_only_as_the_picture_has_it(root, page):
    picture = re.search(r"\*\*Who imports whom\.\*\*.*?```\n(.*?)```", page, re.DOTALL)[1]
    row_of = {module: row for row, line in enumerate(picture.splitlines()) for module in line.split()}
    files = [file for part in ("grader", "helpers") for file in (root / part).rglob("*.py") if "template" not in file.parts]
    names = {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}

    for name in names:
        if name.count(".") == 1 and name.startswith("helpers."):
            row_of.setdefault(name, row_of["helpers.lora"])

    def place(module):
        """The name that stands in the picture for a module: its own, or that of a folder around it."""
        while module and module not in row_of:
            module = module.rpartition(".")[0]
        return module

    missing = [name for name in names if "." in name and not place(name)]
    assert missing == [], "name these in the picture of CONTRIBUTING.md, in any row above those of what they import"
    upwards = []
    for name, file in names.items():
        for imported in imports(file, names):
            here, there = place(name), place(imported)
            if here and there and here != there and row_of[there] <= row_of[here]:
                upwards.append(f"{name} imports {imported}")
    assert upwards == []


def test_topics_do_not_import_from_each_other(root):
    for file in (root / "grader").glob("*/*/*.py"):
        if file.parts[-3] in ("checks", "variants"):
            text = file.read_text(encoding="utf-8")
            topics = set(re.findall(r"from grader\.(?:checks|variants)\.(\w+)\.", text)) & set(TOPICS.values())
            assert topics <= {file.parts[-2]}, file


def test_no_module_is_long(root):
    files = [*(root / "grader").rglob("*.py"), *(root / "helpers").rglob("*.py")]
    assert [file for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 450] == []


def test_exercises_are_found_by_being_there(root):
    for topic in (root / "grader" / "checks").glob("*/"):
        with_exercise = [file for file in topic.glob("*.py") if re.search(r"^exercise = ", file.read_text(), re.MULTILINE)]
        if with_exercise:
            assert len(exercises(topic.name)) == len(with_exercise)


def imports(file, names):
    """The modules of `names` that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else node.module for alias in node.names
            ]
        else:
            continue
        yield from (module for module in found if module in names)
