"""Everything global that a learner's code could leave changed: saved before, put back after, and reported."""

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def matmul_precision() -> str:
    """How products are computed: "highest", "high" or "medium"; theirs where newer settings disagree and torch refuses."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set `fp32_precision`, which is newer
        return torch.backends.cuda.matmul.fp32_precision


def set_matmul_precision(value: str) -> None:
    """Put back what `matmul_precision` gave."""
    if value in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(value)
    else:
        torch.backends.cuda.matmul.fp32_precision = value


# What later cells would notice: (how it is called, how it is read, how it is put back).
_NOTICED: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
    ("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("default device", torch.get_default_device, lambda d: torch.set_default_device(None if d.type == "cpu" else d)),
    ("number of threads", torch.get_num_threads, torch.set_num_threads),
    ("float32 matmul precision", matmul_precision, set_matmul_precision),
    ("deterministic algorithms", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    ("inference mode", torch.is_inference_mode_enabled, lambda _: None),
    ("working directory", os.getcwd, os.chdir),
    ("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
)


# Checks mean the same whatever a learner's earlier cells did: inside, these are as in a fresh process.
_FRESH: tuple[tuple[Callable[[], Any], Callable[[Any], Any], Any], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled, True),
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_default_device, torch.set_default_device, torch.device("cpu")),
)


@contextmanager
def fresh_defaults() -> Iterator[None]:
    """Gradients on, float32, CPU, no autocast and no inference mode inside the `with`; afterwards all as it was."""
    before = [read() for read, _, _ in _FRESH]
    for (_, restore, default), old in zip(_FRESH, before, strict=True):
        if old != default:
            restore(default)
    try:
        no_autocast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        with torch.inference_mode(False), no_autocast[0], no_autocast[1], torch.enable_grad():
            yield
    finally:
        for (_, restore, default), old in zip(_FRESH, before, strict=True):
            if old != default:
                restore(old)


@contextmanager
def preserved(seed: int) -> Iterator[list[str]]:
    """Run the body with seeded random generators; put all global state back; fill the yielded list with what had changed.

    Random states are put back in silence, since any honest code draws numbers. So are warning filters,
    environment variables and the module search path. An entry reads "default dtype: torch.float32 -> torch.float64".
    """
    before = [_read(read) for _, read, _ in _NOTICED]
    randomness = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    environment, path = dict(os.environ), list(sys.path)
    main = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT) if main else None
    changed: list[str] = []
    try:
        with warnings.catch_warnings():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield changed
    finally:
        for (name, read, restore), old in zip(_NOTICED, before, strict=True):
            new = _read(read)
            if new != old:
                changed.append(f"{name}: {old} -> {new}")
                if old != "gone":
                    restore(old)
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])
        torch.set_rng_state(randomness[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.path[:] = path
        if main and interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError:  # the working directory may have been deleted
        return "gone"
