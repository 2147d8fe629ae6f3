"""Truth tables, recorded from the code."""

import json

from grader.experiment import Exercise
from grader.observe import observe
from grader.verdict import Table


def record(exercise: Exercise, seed: int = 0) -> dict[str, dict[str, dict | None]]:
    """Run every subject of an exercise through every experiment and return its truth table."""
    return {
        experiment.name: {
            name: observe(experiment, subject, seed, exercise.number).facts for name, subject in exercise.subjects.items()
        }
        for experiment in exercise.experiments
    }


def dump(tables: dict[str, Table]) -> str:
    """Tables as the text that is committed: one line per subject."""
    blocks = []
    for number, table in tables.items():
        experiments = []
        for name, row in table.items():
            facts = [f"   {json.dumps(who)}: {json.dumps(facts, ensure_ascii=False)}" for who, facts in row.items()]
            experiments.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(facts) + "\n  }")
        blocks.append(f" {json.dumps(number)}: {{\n" + ",\n".join(experiments) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
