"""Truth tables, recorded from the code."""

from collections.abc import Iterable
from pathlib import Path

from grader.checks import exercises
from grader.experiment import Exercise
from grader.golden import FOLDER, dump, load
from grader.observe import observe
from helpers.files import write_text


def record(exercise: Exercise, seed: int = 0) -> dict[str, dict[str, dict | None]]:
    """Run every subject of an exercise through every experiment and return its truth table."""
    return {
        experiment.key: {
            name: observe(experiment, subject, seed, exercise.number).facts for name, subject in exercise.subjects.items()
        }
        for experiment in exercise.experiments
    }


def write_tables(topics: Iterable[str], folder: Path = FOLDER) -> None:
    """Record the truth tables of topics, each into its file in the folder."""
    for topic in topics:
        write_text(folder / f"{topic}.json", dump({number: record(e) for number, e in exercises(topic).items()}))
    load.cache_clear()
