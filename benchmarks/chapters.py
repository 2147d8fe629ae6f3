"""How long a chapter takes: `python benchmarks/chapters.py [06_lora ...]`, on an idle machine.

Runs solution notebooks one after the other, each in a new kernel with all cores, and prints for each its seconds and the
cells that take more than three; the slowest first. What is measured goes into the head of the chapter and into the README.
"""

import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from helpers.environment import processor

ROOT = Path(__file__).parents[1]
LONG = 3  # seconds; a cell that takes more shows a progress bar


def main(names: list[str]) -> None:
    print(f"{processor()}, {os.cpu_count()} cores")
    for path in sorted((ROOT / "solutions").glob("*/*.ipynb")):
        if not names or path.stem in names:
            seconds = cell_seconds(path)
            print(f"{path.stem}  {sum(seconds.values()):.0f} s")
            for cell, took in sorted(seconds.items(), key=lambda row: -row[1]):
                if took > LONG:
                    print(f"    {took:5.1f} s  {cell}")


def cell_seconds(path: Path) -> dict[str, float]:
    """The cells of a notebook and their seconds; a cell goes by its number and its first line of code."""
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return {
        f"{position}: {cell.source.strip().splitlines()[0][:70]}": _between(cell.metadata.execution)
        for position, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and cell.source.strip()
    }


def _between(execution: dict[str, str]) -> float:
    first, last = (datetime.fromisoformat(execution[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
    return (last - first).total_seconds()


if __name__ == "__main__":
    main(sys.argv[1:])
