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
    """A file of words lacks something, or cannot be read; the message says where, and what to do."""


@dataclass(frozen=True)
class Words:
    """The words of one exercise."""

    file: str
    number: str
    hints: list[str]  # three
    claims: dict[str, str]
    misconceptions: dict[str, dict[str, str]]

    def claim(self, key: str) -> str:
        """What an experiment says is so."""
        return self._entry(self.claims, f'["{self.number}".claims]', key)

    def misconception(self, key: str) -> tuple[str, str, str]:
        """Name, hint and source of a misconception."""
        table = f'["{self.number}".misconceptions'
        entry = self._entry(self.misconceptions, f"{table}]", key)
        hint, source = (self._entry(entry, f'{table}."{key}"]', part) for part in ("hint", "source"))
        return entry.get("name", key), hint, source

    def _entry(self, entries: dict, table: str, key: str):
        if key not in entries:
            raise NoWords(f'{self.file} must have the key "{key}" in {table}, but does not. Add it.')
        return entries[key]


def of(topic: str, number: str) -> Words:
    """The words of an exercise.

    Raises:
        NoWords: there are none, or not three hints.
    """
    file = f"grader/words/{topic}.toml"
    table = _read(topic).get(number)
    if table is None:
        raise NoWords(f'{file} must have a table ["{number}"] with the words of that exercise, and has none. Add it.')
    hints = table.get("hints", [])
    if len(hints) != 3:
        raise NoWords(f'{file} must have 3 hints in ["{number}"], got {len(hints)}: a question, an observation, the formula.')
    return Words(file, number, hints, table.get("claims", {}), table.get("misconceptions", {}))


@cache
def _read(topic: str) -> dict:
    path = FOLDER / f"{topic}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise NoWords(f"grader/words/{topic}.toml must be TOML, got: {error}. Mend that line.") from None
