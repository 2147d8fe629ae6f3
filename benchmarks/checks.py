"""How long a check takes, warm: `python benchmarks/checks.py`. Medians over 15 runs of each chapter's own solution."""

import contextlib
import io
import os
import statistics
import time
from pathlib import Path

import nbformat
import torch

from grader import check
from grader.checks import TOPICS, exercises

ROOT = Path(__file__).parents[1]


def main() -> None:
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    for topic in TOPICS.values():
        notebook = nbformat.read(next((ROOT / "solutions").glob(f"*_{topic}/*.ipynb")), 4)
        names = {}  # of the chapter: its imports, and the answers so far, which later ones may use
        exec(next(c.source for c in notebook.cells if c.cell_type == "code"), names)
        for number, exercise in exercises(topic).items():
            grade_id = f"answer-{number.replace('.', '_')}"
            answer = next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)
            exec(answer.source, names)
            seconds = [_timed(number, names[exercise.name]) for _ in range(16)][1:]  # the first warms up
            median, largest = 1000 * statistics.median(seconds), 1000 * max(seconds)
            print(f"{number}  {exercise.name:<16} median {median:.0f} ms, largest {largest:.0f} ms")


def _timed(number: str, solution) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        check(number, solution)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
