"""Truth tables, recorded from the code."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from grader.checks import exercises
from grader.experiment import Exercise
from grader.golden import FOLDER, dump, load, read
from grader.observe import facts_of, observe, run
from helpers.files import write_text


def record(exercise: Exercise, seed: int = 0) -> dict[str, dict[str, dict | None]]:
    """Run every subject of an exercise through every experiment and return its truth table.

    Raises:
        ValueError: the reference cannot be measured. What is wrong in an experiment's own `facts` is raised as it is.
    """
    table = {}
    for experiment in exercise.experiments:
        reference = run(experiment, exercise.reference, seed, exercise.number)
        if reference.problem:
            raise ValueError(
                f"{exercise.number}, {experiment.key!r}: the reference must have facts, got: {reference.problem.message}. "
                "Mend the experiment or the reference first."
            )
        facts_of(experiment, reference.raw, seed)
        table[experiment.key] = {
            key: observe(experiment, subject, seed, exercise.number).facts for key, subject in exercise.subjects.items()
        }
    return table


def write_tables(topics: Iterable[str], folder: Path = FOLDER) -> list[str]:
    """Record the truth tables of topics, each into its file in the folder; return a line for each row that has changed."""
    changed = []
    for topic in topics:
        file = folder / f"{topic}.json"
        before = read(file) if file.exists() else {}
        tables = {number: record(exercise) for number, exercise in exercises(topic).items()}
        write_text(file, dump(tables))
        changed += _changed_rows(before, tables)
    load.cache_clear()
    return changed


def _changed_rows(before: dict, tables: dict) -> Iterator[str]:
    for number, table in tables.items():
        for key, rows in table.items():
            kept = before.get(number, {}).get(key, {})
            for name, facts in rows.items():
                if name not in kept or kept[name] != facts:
                    yield f"{number}, {key}: {name}: {facts}"
