"""The exercises of every chapter: a folder for each topic, in it a module for each exercise, found by being there."""

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from grader.experiment import Exercise

CHAPTERS = (  # the course's plan; a chapter's place here is its number
    *("start", "transfer", "features", "mismatch", "finetune", "batchnorm", "lora"),
    *("debugging", "export", "compress", "denoise", "capstone"),
)
TOPICS = {  # chapter -> topic, of those that have exercises
    str(number): topic for number, topic in enumerate(CHAPTERS) if Path(__file__).with_name(topic).is_dir()
}


@cache
def exercises(topic: str) -> dict[str, Exercise]:
    """The exercises of a topic by number, in the chapter's order."""
    package = import_module(f"grader.checks.{topic}")
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    there = [module.exercise for module in modules if hasattr(module, "exercise")]
    by_number: dict[str, Exercise] = {}
    for exercise in sorted(there, key=lambda exercise: place(exercise.number)):
        if exercise.number in by_number:
            modules = f"{by_number[exercise.number].module} and {exercise.module}"
            raise ValueError(f"a number must be one exercise's, got {exercise.number} in {modules}. Change one of them.")
        by_number[exercise.number] = exercise
    return by_number


def place(number: str) -> tuple[int, int, str]:
    """What to sort exercises by: 2.4a, a step towards 2.4, stands before it."""
    chapter, exercise, step = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)", number).groups()
    return int(chapter), int(exercise), step or "~"


def find(number: str) -> Exercise:
    """The exercise with that number.

    Raises:
        ValueError: there is none, or it is no string; the message lists those there are.
    """
    if not isinstance(number, str):
        raise ValueError(f'number must be a string, got {number!r}. Write it in quotes: "{number}".')
    topic = TOPICS.get(number.partition(".")[0])
    if topic is None or number not in exercises(topic):
        known = [exercise for name in TOPICS.values() for exercise in exercises(name)]
        raise ValueError(f"no exercise {number!r}. Choose from {', '.join(known)}.")
    return exercises(topic)[number]
