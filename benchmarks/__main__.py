"""`python -m benchmarks`, or `make bench`: run every comparison and write the table into benchmarks/results.md."""

import os
import platform
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import batchnorm, features, imports
from benchmarks.timing import Comparison, Timing, interleaved
from helpers.files import write_text

RESULTS = Path(__file__).with_name("results.md")
GROUPS = {
    "BatchNorm statistics": batchnorm.COMPARISONS,
    "Features, computed once": features.COMPARISONS,
    "Import time": imports.COMPARISONS,
}
ABOUT = """\
Ours and the peer take turns in one process (an import: in a new interpreter each time). The ratio is ours by the peer
within a turn: its median over the turns, and in brackets its quartiles. Below 1, ours is faster. The peer of an import is
importing, in a new interpreter, just what the module names of other packages at its top, through other modules of
`helpers` too; where that is the standard library alone there is no target, as it takes milliseconds."""


def main() -> None:
    load, started = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, time.perf_counter()
    sections = []
    for heading, comparisons in GROUPS.items():
        print(heading, flush=True)
        lines = [f"## {heading}", "", "| what | ours | peer | ratio | target | met |", "|---|---|---|---|---|---|"]
        for comparison in comparisons:
            lines.append(row(comparison, interleaved(*comparison.build(), comparison.rounds)))
            print(lines[-1], flush=True)
        sections.append("\n".join(lines))
    took = f"It took {time.perf_counter() - started:.0f} s."
    write_text(RESULTS, "\n\n".join(["# Benchmarks", f"{machine(load)} {took}", ABOUT, *sections]) + "\n")


def row(comparison: Comparison, timing: Timing) -> str:
    """One line of the table."""
    (ours, peer), (low, middle, high) = timing.medians, timing.ratio
    target = "" if comparison.target is None else f"at most {comparison.target:g}"
    met = "" if comparison.target is None else ("yes" if middle <= comparison.target else "no")
    ratio = f"{_digits(middle)} ({_digits(low)} to {_digits(high)})"
    cells = [comparison.what, f"{comparison.ours}: {_spell(ours)}", f"{comparison.peer}: {_spell(peer)}", ratio, target, met]
    return f"| {' | '.join(cells)} |"


def machine(load: float | None) -> str:
    """What was measured on, in a sentence; `load` is the machine's load average when it began."""
    busy = "" if load is None else f" The load average was {load:.1f} when it began."
    return (
        f"Measured by `make bench` on {date.today():%d %B %Y}: {_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}.{busy}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _spell(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _digits(ratio: float) -> str:
    """Three that count, also where the last is 0."""
    return f"{ratio:#.3g}".rstrip(".")


if __name__ == "__main__":
    main()
