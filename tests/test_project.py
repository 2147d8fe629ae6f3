"""What the repository promises about itself."""

import re
import shutil
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import tracked_files


@pytest.fixture(scope="module")
def project(request):
    return tomllib.loads((request.config.rootpath / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(project):
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def test_conda_installs_the_project_itself_and_keeps_no_list_of_its_own(root, project):
    environment = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    python, pip, project_itself = environment["dependencies"]
    assert python == f"python {project['requires-python']}"
    assert pip == "pip"
    assert project_itself == {"pip": ["--constraint constraints.txt", '--editable ".[dev]"']}


def test_constraints_pin_names_and_versions_only(root, project):
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in requirements(project):
        if requirement.name != "warmstart":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert (pinned["torch"], pinned["torchvision"]) == ("2.14.0", "0.29.2")


def test_no_range_admits_the_torch_that_no_torchvision_imports_beside(project):
    torch = next(r.specifier for r in requirements(project) if r.name == "torch")
    assert not any(torch.contains(version) for version in ("2.10.0", "2.13.0", "2.13.0+cpu", "2.13.1"))
    assert all(torch.contains(version) for version in ("2.11.0", "2.12.0", "2.14.0"))


def test_what_is_installed_holds_every_file_that_the_packages_read(root):
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for package, patterns in declared.items():
        data = {path for path in tracked_files(root) if path.is_relative_to(root / package) and path.suffix != ".py"}
        data -= set((root / "grader/golden/records").glob("**/*"))  # compared in the repository, where the variants are
        assert data and data == {path for pattern in patterns for path in (root / package).glob(pattern)} & data


def test_this_python_is_one_that_is_claimed(project):
    from packaging.specifiers import SpecifierSet

    claimed = SpecifierSet(project["requires-python"])
    assert claimed.contains(".".join(map(str, sys.version_info[:3])))
    assert [v for v in ("3.10", "3.11", "3.12", "3.13", "3.14") if claimed.contains(Version(v))] == ["3.11", "3.12", "3.13"]


def test_code_is_formatted_and_clean(root):
    for arguments in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_make_help_lists_the_targets(root):
    done = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True)
    listed = re.findall(r"make ([a-z-]+)", done.stdout)
    assert {"lab", "test", "test-fast", "grade", "course", "help"} <= set(listed)


def test_no_file_is_large_and_none_holds_an_address_of_a_registry_or_a_home(root):
    for path in tracked_files(root):
        assert path.stat().st_size <= 3_000_000, path
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not re.search(r"/roo[t]/|/home/\w+/|pypi[.]org|pythonhosted[.]|download[.]pytorch[.]org/whl", text), path


def test_ci_runs_make_test(root):
    assert "make test" in (root / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def conftest(request):
    """The module `tests/conftest.py`, whatever path pytest knows it by: a checkout may be a link."""
    return next(plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "_together"))


def test_processes_side_by_side_take_whole_files_chapters_and_single_proofs(conftest):
    chapter = "tests/test_course.py 06"
    cases = {
        "tests/test_lab.py::test_every_figure_shows_something": "tests/test_lab.py",
        "tests/peers/test_lora.py::test_the_scaling_equals_pefts[False]": "tests/peers/test_lora.py",
        "tests/test_course.py::test_a_solution_notebook_runs_and_every_check_passes[06_lora]": chapter,
        "tests/test_course.py::test_what_chapter_06_says_of_its_results_holds": chapter,
        "tests/test_course.py::test_every_link_into_the_glossary_leads_to_a_term": "tests/test_course.py",
        "tests/test_proof.py::test_checks_are_proven[2.3]": "tests/test_proof.py::test_checks_are_proven[2.3]",
    }
    assert {nodeid: conftest._together(nodeid) for nodeid in cases} == cases


MADE_ONCE = """
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def made():
    with open("made.txt", "a") as file:
        file.write(f"{Path(__file__).name} ")


@pytest.mark.parametrize("number", range(6))
def test_it(made, number):
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_what_a_file_makes_once_is_made_once_by_processes_side_by_side(root, tmp_path):
    """Two files of six tests each: dealt out one by one, both processes would make both."""
    (tmp_path / "tests").mkdir()
    shutil.copy(root / "tests" / "conftest.py", tmp_path / "tests")
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / "tests" / name).write_text(MADE_ONCE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]", encoding="utf-8")  # its own project
    command = [sys.executable, "-m", "pytest", "--numprocesses=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "12 passed" in done.stdout and "2 workers" in done.stdout, done.stdout + done.stderr
    assert sorted((tmp_path / "made.txt").read_text(encoding="utf-8").split()) == ["test_one.py", "test_two.py"]


def test_another_way_to_deal_out_tests_is_left_to_xdist(conftest):
    for dist in ("each", "loadscope", "loadfile", "loadgroup", "worksteal"):
        config = SimpleNamespace(getoption={"dist": dist}.get)
        assert conftest.pytest_xdist_make_scheduler(config, None) is None
