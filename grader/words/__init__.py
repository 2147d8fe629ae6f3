"""What learners read of the exercises: claims of experiments, names and hints of misconceptions, hints of exercises.

    ["6.1"]
    hints = ["a question", "an observation to make", "the formula, or the name of the operation"]

    ["6.1".claims]
    "fresh layer" = "A new layer computes what base computes."

    ["6.1".misconceptions."alpha alone"]
    hint = "With twice the rank the update has twice as many terms. What keeps its size?"
    source = "seen in public teaching code"
    name = "only if learners are to read another one than the key"

One file per topic, `grader/words/<topic>.toml`. Its texts can be rewritten freely. The keys in quotes are those that the
exercise's module and its truth table have, so they stay.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


class NoWords(LookupError):
    """An exercise has something of which no words are there."""


@dataclass(frozen=True)
class Words:
    """The words of one exercise."""

    file: str
    number: str
    hints: list[str]
    claims: dict[str, str]
    misconceptions: dict[str, dict[str, str]]

    def claim(self, key: str) -> str:
        """What an experiment says is so."""
        return self._entry("claims", key)

    def misconception(self, key: str) -> tuple[str, str, str]:
        """Name, hint and source of a misconception."""
        entry = self._entry("misconceptions", key)
        return entry.get("name", key), entry["hint"], entry["source"]

    def _entry(self, part: str, key: str):
        try:
            return getattr(self, part)[key]
        except KeyError:
            raise NoWords(f'{self.file} must have the key "{key}" in ["{self.number}".{part}], and has not. Add it.') from None


def of(topic: str, number: str) -> Words:
    """The words of an exercise.

    Raises:
        NoWords: there are none; the message says where they belong.
    """
    file = f"grader/words/{topic}.toml"
    if number not in _read(topic):
        raise NoWords(f'{file} must have a table ["{number}"] with the words of that exercise, and has none. Add it.')
    return Words(file, number, **_read(topic)[number])


@cache
def _read(topic: str) -> dict:
    path = FOLDER / f"{topic}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
