"""`python -m benchmarks`, or `make bench`: run every comparison and write the table into benchmarks/results.md.

    python -m benchmarks lora export --device cuda      print two of the tables, measured on the GPU; write nothing

On a GPU there are `lora` and `export` alone.
"""

import argparse
import os
import platform
import time
from datetime import date
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import batchnorm, export, features, imports, lora
from benchmarks.timing import Comparison, Timing, interleaved
from helpers.environment import processor
from helpers.export import ExportFailed
from helpers.files import write_text
from helpers.parity import first_line

RESULTS = Path(__file__).with_name("results.md")
GROUPS = {
    "BatchNorm statistics": batchnorm,
    "Features, computed once": features,
    "LoRA, one training step": lora,
    "Latency, exported and compiled": export,
    "Import time": imports,
}
ABOUT = """\
Ours and the peer take turns in one process (an import: in a new interpreter each time). The ratio is ours by the peer
within a turn: its median over the turns, and in brackets its quartiles. Below 1, ours is faster, or takes less. The peer of
an import is importing, in a new interpreter, just what the module names of other packages at its top, through other modules
of `helpers` too; where that is the standard library alone there is no target, as it takes milliseconds.

Training steps and latencies are of one thread. A step is forward, backward, AdamW and zero_grad; its peak memory is weights,
batch and optimizer state, and the most that torch's allocator holds beside them during a step, counted from each
allocation and release (`benchmarks/memory.py`)."""


def main() -> None:
    names = {module.__name__.partition(".")[2]: heading for heading, module in GROUPS.items()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        "groups", nargs="*", metavar="group", help=f"to print, of {', '.join(names)}; none: all, written to a file"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.groups if name not in names]:
        parser.error(f"not a group: {unknown[0]!r}. Choose from {', '.join(names)}.")
    if arguments.device != "cpu" and not (arguments.groups and set(arguments.groups) <= {"lora", "export"}):
        parser.error("on a GPU there are lora and export. Name one of them, or both.")
    load, started = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, time.perf_counter()
    headings = [names[name] for name in arguments.groups or names]
    sections = [table(heading, comparisons(GROUPS[heading], arguments.device)) for heading in headings]
    took = f"It took {time.perf_counter() - started:.0f} s."
    if arguments.groups:
        print(f"{machine(load, arguments.device)} {took}")
    else:
        write_text(RESULTS, "\n\n".join(["# Benchmarks", f"{machine(load)} {took}", ABOUT, *sections]) + "\n")


def comparisons(module: ModuleType, device: str = "cpu") -> list[Comparison]:
    """What a group compares, on "cpu" or "cuda"."""
    return module.COMPARISONS if device == "cpu" else module.comparisons(device)


def table(heading: str, comparisons: list[Comparison]) -> str:
    """Run the comparisons; a section of Markdown, printed row by row."""
    lines = [f"## {heading}", "", "| what | ours | peer | ratio | target | met |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for comparison in comparisons:
        lines.append(measured(comparison))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def measured(comparison: Comparison) -> str:
    """Run one comparison; one line of the table, which says why where something cannot be here."""
    try:
        functions = comparison.build()
    except (ImportError, ExportFailed) as error:
        why = first_line(error).replace("|", "\\|")
        return f"| {comparison.what} | {comparison.ours} | {comparison.peer} | not measured: {why} |  |  |"
    return row(comparison, interleaved(*functions, comparison.rounds))


def row(comparison: Comparison, timing: Timing) -> str:
    """One line of the table."""
    (ours, peer), (low, middle, high) = timing.medians, timing.ratio
    target = "" if comparison.target is None else f"at most {comparison.target:g}"
    met = "" if comparison.target is None else ("yes" if middle <= comparison.target else "no")
    ratio = f"{_digits(middle)} ({_digits(low)} to {_digits(high)})"
    ours, peer = _spell(ours, comparison.unit), _spell(peer, comparison.unit)
    cells = [comparison.what, f"{comparison.ours}: {ours}", f"{comparison.peer}: {peer}", ratio, target, met]
    return f"| {' | '.join(cells)} |"


def machine(load: float | None, device: str = "cpu") -> str:
    """What was measured on, in a sentence; `load` is the machine's load average when it began."""
    gpu = "" if device == "cpu" else f"{torch.cuda.get_device_name()}, "
    busy = "" if load is None else f" The load average was {load:.1f} when it began."
    return (
        f"Measured by `make bench` on {date.today():%d %B %Y}: {gpu}{processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}.{busy}"
    )


def _spell(number: float, unit: str) -> str:
    if unit == "bytes":
        return f"{number / 1e6:#.4g} MB"
    return f"{number:.2f} s" if number >= 1 else f"{1000 * number:.3g} ms"


def _digits(ratio: float) -> str:
    """Three that count, also where the last is 0."""
    return f"{ratio:#.3g}".rstrip(".")


if __name__ == "__main__":
    main()
