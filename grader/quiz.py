"""Quizzes: a reason for every choice, choices in another order each time.

A question unfolds its answer on a click, by HTML alone: it needs neither widgets nor a kernel. The questions of a topic
are in `quizzes/<topic>.toml`.
"""

import html
import random
import re
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent / "quizzes"
LEVELS = ("easy", "medium", "hard")


class Quiz:
    """Questions with shuffled choices, as a page and as text.

    Args:
        questions: [{"question", "level", "choices": [{"text", "right", "reason"}]}].
        seed: of the order of the choices; None takes another one each time.
    """

    def __init__(self, questions: list[dict], seed: int | None = None) -> None:
        shuffle = random.Random(seed)
        self.questions = [
            question | {"choices": shuffle.sample(question["choices"], len(question["choices"]))} for question in questions
        ]

    def answer(self, question: int, choice: str) -> None:
        """Print whether a choice is right and why, where the page cannot be clicked: `answer(1, "b")`.

        Raises:
            ValueError: there is no such question or choice.
        """
        count = len(self.questions)
        if question not in range(1, count + 1):
            raise ValueError(f"question must be a whole number from 1 to {count}, got {question!r}.")
        choices = dict(zip("abcdef", self.questions[question - 1]["choices"], strict=False))
        if choice not in choices:
            raise ValueError(f"choice must be one of {', '.join(choices)}, got {choice!r}.")
        print(_verdict(choices[choice]), choices[choice]["reason"])

    def _repr_html_(self) -> str:
        parts = []
        for number, question in enumerate(self.questions, 1):
            parts.append(
                f'<p style="margin-top: 1.5em"><b>{number}.</b> {_code(question["question"])} <i>({question["level"]})</i></p>'
            )
            for choice in question["choices"]:
                parts.append(
                    f'<details style="margin-left: 1.5em"><summary>{_code(choice["text"])}</summary>'
                    f'<p style="margin-left: 1.5em"><b>{_verdict(choice)}</b> {_code(choice["reason"])}</p></details>'
                )
        return "\n".join(parts)

    def __repr__(self) -> str:
        lines = []
        for number, question in enumerate(self.questions, 1):
            lines.append(f"{number}. {question['question']} ({question['level']})")
            lines += [f"   {letter}) {choice['text']}" for letter, choice in zip("abcdef", question["choices"], strict=False)]
        return "\n".join([*lines, 'Answer with .answer(1, "b").'])


def quiz(topic: str, seed: int | None = None) -> Quiz:
    """The quiz of a topic; put it on the last line of a cell.

    Raises:
        ValueError: the topic has no quiz.
    """
    file = FOLDER / f"{topic}.toml"
    if not file.is_file():
        there = ", ".join(repr(path.stem) for path in sorted(FOLDER.glob("*.toml")))
        raise ValueError(f"topic must be one of {there}, got {topic!r}.")
    return Quiz(tomllib.loads(file.read_text(encoding="utf-8"))["questions"], seed)


def _verdict(choice: dict) -> str:
    return "Right." if choice["right"] else "No."


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
