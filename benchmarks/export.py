"""Latency of one batch: the model as it is, compiled by torch.compile, and exported to ONNX Runtime.

The models of `helpers.recordings.formats`, in eval mode and without gradients, in one thread. Compiling and exporting come
before and do not count.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Comparison
from helpers.export import OnnxSession, quiet, snapshot_of, to_onnx
from helpers.parity import rows_of, tensors_of
from helpers.recordings.formats import MODELS
from helpers.timing import timed
from helpers.training import one_thread

Run = Callable[..., object]


@cache
def _model(name: str, device: str) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = MODELS[name].make()
    return snapshot_of(model).to(device), tuple(tensor.to(device) for tensor in tensors_of("inputs", inputs))


@cache
def _compiled(name: str, device: str) -> Run:
    model, _ = _model(name, device)
    return torch.compile(model, dynamic=True)


@cache
def _session(name: str, device: str) -> Run:
    model, inputs = _model(name, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        return OnnxSession(to_onnx(model, inputs, Path(folder) / "model.onnx"), threads=1, device=device)


def _build(name: str, make: Callable[[str, str], Run], batch: int, device: str):
    def build():
        model, inputs = _model(name, device)
        rows, exported = rows_of(inputs, batch), make(name, device)

        def call(run: Run) -> Callable[[], float]:
            def once():
                with one_thread(), torch.no_grad():
                    run(*rows)
                if device != "cpu":
                    torch.cuda.synchronize(device)

            with quiet():  # compiles, and optimises in the first two runs
                once()
                once()
            return timed(once)

        return call(exported), call(model)

    return build


def comparisons(device: str = "cpu") -> list[Comparison]:
    """The rows of the table, on "cpu" or "cuda"; ONNX Runtime takes its inputs from the CPU and answers there."""
    return [
        Comparison(f"{name}, batch of {batch}, {way}", way, "eager", _build(name, make, batch, device), rounds)
        for name in MODELS
        for batch, rounds in ((1, 31), (8, 11))
        for way, make in (("torch.compile", _compiled), ("ONNX Runtime", _session))
    ]


COMPARISONS = comparisons()
