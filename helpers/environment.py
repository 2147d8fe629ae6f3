"""What the course runs on here, and what its records were measured on, in a few lines."""

import os
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from helpers.training import best_device

PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "matplotlib")


def describe_environment() -> None:
    """Print Python, the packages that the chapters use, and the device that training takes.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    missing = []
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ImportError(
            f"the course needs {', '.join(missing)}. Install it into this kernel: %pip install {' '.join(missing)}"
        )
    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    network = "off (WARMSTART_OFFLINE is set)" if os.environ.get("WARMSTART_OFFLINE") else "not needed so far"
    print(f"Python {platform.python_version()} on {platform.system()}")
    print(", ".join(versions))
    print(f"device: {name}")
    print(f"network: {network}")


def here_and_now(*packages: str) -> dict:
    """What a record made now says of how it was made: "machine", "versions" of these packages, and "date".

    Records are made in processes of one thread each: where several share a number's work, its last bits differ.
    """
    versions = {name: version(name) for name in packages}
    return {"machine": f"{platform.machine()} CPU, one thread", "versions": versions, "date": date.today().isoformat()}


def recorded_on(recordings: Iterable[dict]) -> str:
    """The machines and the dates that recordings have from `here_and_now`, in words."""
    dates: dict[str, set[str]] = {}
    for recording in recordings:
        dates.setdefault(recording["machine"], set()).add(recording["date"])
    return "recorded " + "; ".join(f"on an {machine}, {' and '.join(sorted(days))}" for machine, days in dates.items())


def processor() -> str:
    """The name of the CPU, "AMD EPYC", or what Python's `platform` knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
