"""The exercises of every chapter, one module per topic."""

from functools import cache
from importlib import import_module

from grader.experiment import Exercise

TOPICS = {"0": "start", "2": "features", "4": "finetune", "5": "batchnorm", "6": "lora", "8": "export"}  # chapter -> topic


@cache
def exercises(topic: str) -> dict[str, Exercise]:
    """The exercises of a topic by number, in the chapter's order."""
    return {exercise.number: exercise for exercise in import_module(f"grader.checks.{topic}").EXERCISES}


def find(number: str) -> tuple[str, Exercise]:
    """The topic and the exercise with that number.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    topic = TOPICS.get(str(number).partition(".")[0])
    if topic is None or number not in exercises(topic):
        known = [exercise for name in TOPICS.values() for exercise in exercises(name)]
        raise ValueError(f"no exercise {number!r}. Choose from {', '.join(known)}.")
    return topic, exercises(topic)[number]
