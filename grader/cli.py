"""The `warmstart` command."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Warm Start: a course on using pre-trained models.")


def _root() -> Path:
    """The course's repository: the first folder from here upwards that holds nbgrader_config.py."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "nbgrader_config.py").is_file():
            return folder
    raise typer.BadParameter("no nbgrader_config.py here or above. Change to a folder of the course and run this again.")


@app.command()
def lab() -> None:
    """Open JupyterLab on the first chapter; without a display, print the address."""
    first = "/lab/tree/course/00_start/00_start.ipynb"
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    options = [f"--LabApp.default_url={first}", *([] if display else ["--no-browser"])]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    if not display:
        print("no display here: open the address that ends in ?token=... below in a browser", flush=True)
    raise typer.Exit(subprocess.call([sys.executable, "-m", "jupyter", "lab", *options], cwd=_root()))


@app.command()
def course(topic: Annotated[str | None, typer.Argument(help="A topic, such as features; all if left out.")] = None) -> None:
    """Write everything that is generated: truth tables, paired notebooks, released notebooks."""
    from grader.authoring import make_course
    from grader.checks import TOPICS

    if topic and topic not in TOPICS.values():
        raise typer.BadParameter(f"no topic {topic!r}. Choose from {', '.join(TOPICS.values())}.")
    make_course(_root(), topic=topic)


@app.command()
def prove(
    topic: Annotated[str | None, typer.Argument(help="A topic or an exercise, such as lora or 6.1; all if left out.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of the inputs.")] = 20,
    processes: Annotated[int, typer.Option(min=1, help="How many exercises are proven at a time.")] = os.cpu_count() or 1,
) -> None:
    """Prove the checks: right solutions pass, and each misconception is rejected under its own name."""
    from grader.checks import TOPICS, exercises
    from grader.proof import all_faults

    numbers = [number for name in TOPICS.values() for number in exercises(name) if topic in (None, name, number)]
    if not numbers:
        raise typer.BadParameter(f"no topic or exercise {topic!r}. Choose from {', '.join(TOPICS.values())}, or a number.")
    faulty = False
    for fault in all_faults(numbers, range(seeds), processes):
        faulty = True
        print(fault, flush=True)
    if not faulty:
        print("all checks proven")
    raise typer.Exit(faulty)


@app.command()
def new(
    number: Annotated[str, typer.Argument(help="Of the exercise, such as 7.3: it belongs to that chapter.")],
    name: Annotated[str, typer.Argument(help="Of what learners write, such as assert_frozen.")],
) -> None:
    """Make the files of a new exercise: a small one that passes its proof, to be replaced piece by piece."""
    from grader.new import make_exercise

    try:
        files = make_exercise(_root(), number, name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print("\n".join(str(file.relative_to(_root())) for file in files))
    topic = files[-1].stem
    print(f"\nReplace what they hold. After each change: `python -m grader.golden tables {topic}`, `warmstart prove {number}`.")
    print("CONTRIBUTING.md says in which order, and what to do at the end.")


@app.command()
def mutants(
    numbers: Annotated[list[str] | None, typer.Argument(help="Exercises, such as 2.4 6.1; all if left out.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Print the mutants and run none.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the counts into the table of docs/proofs.md.")] = False,
    cap: Annotated[
        int, typer.Option(min=1, help="How many mutants of an exercise are run; of more, always the same ones.")
    ] = 100,
    processes: Annotated[int, typer.Option(min=1, help="How many exercises run at a time.")] = os.cpu_count() or 1,
) -> None:
    """Measure the checks: change each solution in one place, and count the mutants that are rejected.

    Ends with status 1 if a score is below the one in docs/proofs.md, what is declared equivalent is not, or a count is not
    written: from a part of the mutants, or with a lower score.
    """
    from grader.checks import TOPICS, exercises, find
    from grader.mutants import SolutionRejected, list_mutants, measure

    chosen = numbers or [number for topic in TOPICS.values() for number in exercises(topic)]
    for number in chosen:
        try:
            find(number)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if only_list:
        list_mutants(_root(), chosen)
        return
    if not hasattr(os, "fork"):
        print(
            "warmstart mutants forks a process for each mutant, and this platform cannot: use Linux, or --list.",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    try:
        good = measure(_root(), chosen, cap=cap, processes=processes, write=write)
    except SolutionRejected as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(not good)


@app.command()
def grade(
    folder: Annotated[Path | None, typer.Argument(help="Where to work; a new temporary folder if left out.")] = None,
) -> None:
    """Grade a sample class with stock nbgrader and print a table."""
    from grader.sample import grade_sample

    grade_sample(_root(), folder)


if __name__ == "__main__":
    app()
