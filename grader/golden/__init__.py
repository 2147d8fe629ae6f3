"""What was recorded of the exercises, and is compared with.

    <topic>.json            truth tables: the facts of the reference and of every misconception
                            {"2.1": {"<experiment>": {"reference": {<facts>}, "<misconception>": {<facts>} or null}}}
    records/                raw results of the reference and of right variants
    deviations.json         how far results of devices, and of versions, are from each other

null stands for a misconception that has no facts in that experiment, because it raises there. Nothing here is edited:
`make course` and `python -m grader.golden tables` record the truth tables, `python -m grader.golden record` the rest, and
tests record again and compare.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from grader.experiment import Exercise
from grader.verdict import Table

FOLDER = Path(__file__).parent
AWAITS = "awaits GPU"  # stands where nothing was recorded because there was no GPU


def table_of(exercise: Exercise) -> Table:
    """The truth table of an exercise."""
    return load(exercise.topic)[exercise.number]


@cache
def load(topic: str) -> dict[str, Table]:
    """The truth tables of a topic, by exercise number."""
    return read(FOLDER / f"{topic}.json")


def read(file: Path) -> dict[str, Table]:
    """The truth tables in a file, by exercise number."""
    return json.loads(file.read_text(encoding="utf-8"))


def dump(tables: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Tables by exercise and experiment as the text that is committed: one line per row."""
    blocks = []
    for number, table in tables.items():
        experiments = []
        for name, rows in table.items():
            lines = [f"   {_spelled(key)}: {_spelled(row)}" for key, row in rows.items()]
            experiments.append(f"  {_spelled(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        blocks.append(f" {_spelled(number)}: {{" + ("\n" + ",\n".join(experiments) + "\n }" if experiments else "}"))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _spelled(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
