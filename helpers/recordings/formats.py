"""Which format when: one model in every format that can be had here, with its size, its time and its parity.

    print(compare(model, inputs, folder))       # a model of yours, measured here and now
    print(recorded("resnet18")[32])             # three models, batches of 1, 8 and 32 rows, measured once

`python -m helpers.recordings.formats` measures what `recorded` gives and writes it into `formats.json`, with the machine and
the versions; it takes minutes, on a machine that does nothing else. What needs a format is in `NEEDS`.

Sources: PyTorch's documentation of torch.jit, torch.export, torch.compile and AOTInductor; ONNX Runtime's and TensorRT's.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from helpers import expect
from helpers.backbones import glyphnet, text_backbone
from helpers.data import digits, docstrings
from helpers.environment import processor
from helpers.export import (
    ExportFailed,
    OnnxSession,
    quiet,
    snapshot_of,
    to_onnx,
    to_program,
    to_torchscript,
)
from helpers.files import write_text
from helpers.parity import BatchParity, Inputs, Parity, first_line, parity, rows_of, tensors_of
from helpers.tensorrt import TensorRTEngine, to_tensorrt
from helpers.timing import in_turns, quartiles
from helpers.training import one_thread

RECORD = Path(__file__).with_suffix(".json")
ROUNDS = {1: 30, 8: 10, 32: 5}  # of the record: rows in a batch -> how often it is timed


class Needs(NamedTuple):
    """What there has to be for a format to run, beside the file; `compiler` is needed where the file is made."""

    python: bool
    torch: bool  # PyTorch, or the part of it that is written in C++
    compiler: bool  # of C++
    gpu: bool  # of the kind that the file was made on


NEEDS = {
    "eager": Needs(python=True, torch=True, compiler=False, gpu=False),
    "TorchScript": Needs(python=False, torch=True, compiler=False, gpu=False),
    "torch.export": Needs(python=True, torch=True, compiler=False, gpu=False),
    "ONNX Runtime": Needs(python=False, torch=False, compiler=False, gpu=False),
    "TensorRT": Needs(python=False, torch=False, compiler=False, gpu=True),
    "torch.compile": Needs(python=True, torch=True, compiler=True, gpu=False),
    "AOTInductor": Needs(python=False, torch=True, compiler=True, gpu=False),
}


@dataclass(frozen=True)
class Format:
    """One row of `compare`. `note` says why a format is not there; then nothing else is measured."""

    name: str
    needs_python: bool
    bytes: int | None = None  # on disk; None for what lives in memory alone
    seconds: float | None = None  # to export, compile and write
    milliseconds: tuple[float, float, float] | None = None  # of one batch: lower quartile, median, upper quartile
    parity: Parity | None = None
    note: str = ""


class Formats(list[Format]):
    """Rows of `compare`; `print(rows)` shows them as a table."""

    def __str__(self) -> str:
        lines = [f"{'format':16} {'Python':6} {'KB':>8} {'export s':>8} {'median ms (quartiles)':>24} {'error':>8}  within"]
        for row in self:
            start = f"{row.name:16} {'yes' if row.needs_python else 'no':6}"
            if row.note:
                lines.append(f"{start} {row.note}")
                continue
            size = "-" if row.bytes is None else f"{row.bytes / 1000:.0f}"
            low, middle, high = row.milliseconds
            spread = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            verdict = f"{row.parity.tolerance:g}: {'yes' if row.parity.ok else 'no'}"
            lines.append(f"{start} {size:>8} {row.seconds:8.2f} {spread:>24} {row.parity.error:8.0e}  {verdict}")
        return "\n".join(lines)


def compare(
    model: nn.Module,
    inputs: Inputs,
    folder: str | Path,
    batch: int = 1,
    rounds: int = 30,
    compiled: bool = False,
    freeze_branches: bool = False,
) -> Formats:
    """Export the model, on the CPU, once to each format, then time them in turns on one thread, and measure their parity.

    Sizes are of files in `folder`: "eager" is a state dict, which needs the model's code too. What is not installed
    or refuses the model has a row that says why. TensorRT starts from the ONNX file.

    Args:
        model: any model on the CPU.
        inputs: (n, ...), or a tuple of such tensors; an example, and what is timed.
        folder: for the files, made if missing.
        batch: rows in what is timed.
        rounds: how often each is timed.
        compiled: torch.compile and AOTInductor too. They need a C++ compiler, and take half a minute for a small network.
        freeze_branches: as for `to_torchscript`.
    """
    rows = tensors_of("inputs", inputs)
    expect.whole_number("batch", batch)
    done, runs = _built(model, inputs, Path(folder), compiled, freeze_branches)
    reports = _proved(model, runs, inputs)
    return _timed(done, runs, reports, rows_of(rows, batch), rounds, warm_up=3)  # TorchScript optimises in its first two runs


def _built(
    model: nn.Module, inputs: Inputs, folder: Path, compiled: bool, freeze_branches: bool
) -> tuple[dict[str, Format], dict[str, Callable]]:
    """A row for each format, without times, and what runs of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    builds = {
        "eager": lambda: _eager(model, folder / "eager.pt"),
        "TorchScript": lambda: _torchscript(model, inputs, folder / "torchscript.pt", freeze_branches),
        "torch.export": lambda: _program(model, inputs, folder / "program.pt2"),
        "ONNX Runtime": lambda: _onnx(model, inputs, folder / "model.onnx"),
        "TensorRT": lambda: _engine(folder / "model.onnx", folder / "model.engine"),
    }
    if compiled:
        builds["torch.compile"] = lambda: _compiled(model, tensors_of("inputs", inputs))
        builds["AOTInductor"] = lambda: _aot(model, inputs, folder / "aot.pt2")
    done, runs = {}, {}
    with one_thread(), torch.no_grad():
        for name, build in builds.items():
            started = time.perf_counter()
            try:
                runs[name], path = build()
            except Exception as error:  # a row says why; the other formats are still worth measuring
                note = str(error) if isinstance(error, ExportFailed) else first_line(error)
                done[name] = Format(name, NEEDS[name].python, note=note)
                continue
            seconds = time.perf_counter() - started
            done[name] = Format(name, NEEDS[name].python, path and path.stat().st_size, seconds)
    return done, runs


def _proved(model: nn.Module, runs: Mapping[str, Callable], inputs: Inputs, **options) -> dict[str, Parity]:
    with one_thread():
        return {name: parity(model, run, inputs, **options) for name, run in runs.items()}


def _timed(
    done: Mapping[str, Format],
    runs: Mapping[str, Callable],
    reports: Mapping[str, Parity],
    batch: tuple,
    rounds: int,
    warm_up: int,
) -> Formats:
    """The rows, with the time of what runs on this batch."""
    calls = {name: lambda run=run: run(*batch) for name, run in runs.items()}
    with one_thread(), torch.no_grad():
        times = in_turns(calls, rounds, warm_up)
    rows = dict(done)
    for name, seconds in times.items():
        milliseconds = tuple(1000 * number for number in quartiles(seconds))
        rows[name] = replace(rows[name], milliseconds=milliseconds, parity=reports[name])
    return Formats(rows.values())


def _eager(model, path):
    snapshot = snapshot_of(model)
    torch.save(snapshot.state_dict(), path)
    return snapshot, path


def _torchscript(model, inputs, path, freeze_branches):
    script = to_torchscript(model, inputs, freeze_branches)
    script.save(str(path))
    return script, path


def _program(model, inputs, path):
    program = to_program(model, rows_of(tensors_of("inputs", inputs), 1))  # the file holds the example too
    torch.export.save(program, path)
    return program.module(), path


def _onnx(model, inputs, path):
    return OnnxSession(to_onnx(model, inputs, path), threads=1), path


def _engine(onnx_path, path):
    return TensorRTEngine(to_tensorrt(onnx_path, path)), path


def _compiled(model, rows):
    run = torch.compile(snapshot_of(model), dynamic=True)
    with quiet():
        for count in (max(2, len(rows[0])), 1):  # compiles, and again for a single row
            run(*rows_of(rows, count))
    return run, None


def _aot(model, inputs, path):
    from torch import _inductor  # where torch's documentation of AOTInductor has it

    with quiet():
        _inductor.aoti_compile_and_package(to_program(model, inputs), package_path=str(path))
        return _inductor.aoti_load_package(str(path)), path


# --- the record ---------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A model of the record, and what it is tried on."""

    about: str
    make: Callable[[], tuple[nn.Module, Inputs]]  # draws random numbers
    freeze_branches: bool = False


def _glyphnet() -> tuple[nn.Module, Inputs]:
    return glyphnet(classes=10), digits("test").inputs[:32]


def _resnet18() -> tuple[nn.Module, Inputs]:
    from torchvision.models import resnet18

    return resnet18(), torch.rand(32, 3, 224, 224)


def _minilm() -> tuple[nn.Module, Inputs]:
    backbone, texts = text_backbone(max_length=32), docstrings("test").inputs
    batch = backbone.preprocess([" ".join(texts[row : row + 16]) for row in range(32)])  # none is shorter than 32 tokens
    return backbone.encoder, (batch["input_ids"], batch["attention_mask"])


MODELS = {
    "glyphnet": Model("glyphnet with a new head for digits, images of 32 x 32", _glyphnet),
    "resnet18": Model("torchvision's resnet18, images of 224 x 224, random weights (of no effect on size and time)", _resnet18),
    "MiniLM": Model("the encoder of all-MiniLM-L6-v2, texts of 32 tokens; TorchScript with its branches frozen", _minilm, True),
}


def recorded(model: str) -> dict[int, Formats]:
    """Kept results for one of `MODELS`: {rows in a batch: what `compare` gives, with torch.compile and AOTInductor}.

    Errors are the largest over these batches.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: nothing has been recorded.
    """
    kept = _record()["models"][_known(model)]
    batches = next(row["milliseconds"] for row in kept.values() if row["milliseconds"])
    return {int(rows): Formats(_format(name, row, rows) for name, row in kept.items()) for rows in batches}


def circumstances() -> dict:
    """What the kept results were measured on: "machine", "gpu" (None without one), "threads", "versions" and "date"."""
    return {name: value for name, value in _record().items() if name != "models"}


def record(models: Sequence[str] = tuple(MODELS), rounds: Mapping[int, int] = ROUNDS, compiled: bool = True) -> dict:
    """Measure what `recorded` gives, with the machine and the versions.

    Args:
        models: which of `MODELS`.
        rounds: {rows in a batch: how often it is timed}.
        compiled: torch.compile and AOTInductor too.
    """
    kept, models = {}, [_known(name) for name in models]
    with tempfile.TemporaryDirectory() as folder, _empty_caches(Path(folder)), torch.random.fork_rng(devices=[]):
        compare(nn.Linear(2, 2), torch.ones(2, 2), Path(folder) / "first", rounds=1, compiled=compiled)  # imports
        for name in models:
            torch.manual_seed(0)
            model, inputs = MODELS[name].make()
            done, runs = _built(model, inputs, Path(folder) / name, compiled, MODELS[name].freeze_branches)
            reports = _proved(model, runs, inputs, batch_sizes=tuple(rounds))
            rows = tensors_of("inputs", inputs)
            timed = {  # parity has run each batch once before
                batch: _timed(done, runs, reports, rows_of(rows, batch), often, warm_up=2) for batch, often in rounds.items()
            }
            kept[name] = {row[0].name: _kept(dict(zip(timed, row, strict=True))) for row in zip(*timed.values(), strict=True)}
            print(f"{name}, batch of {max(timed)}", timed[max(timed)], sep="\n", flush=True)
    packages = ("torch", "torchvision", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {
        "models": kept,
        "machine": f"{processor()}, {platform.system()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": 1,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "date": date.today().isoformat(),
    }


def _record() -> dict:
    if not RECORD.exists():
        raise FileNotFoundError(
            f"{RECORD.name} must be beside {RECORD.stem}.py, got none. Run: python -m helpers.recordings.formats"
        )
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _known(model: str) -> str:
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(map(repr, MODELS))}, got {model!r}.")
    return model


def _kept(timed: Mapping[int, Format]) -> dict:
    """One format of one model, as {rows in a batch: row}, for the file."""
    row = next(iter(timed.values()))
    times = {str(rows): [round(number, 4) for number in measured.milliseconds or ()] for rows, measured in timed.items()}
    return {
        "seconds": row.seconds and round(row.seconds, 3),
        "bytes": row.bytes,
        "milliseconds": times if row.parity else {},
        "parity": row.parity and _parity_kept(row.parity),
        "note": row.note,
    }


def _parity_kept(report: Parity) -> dict:
    kept = ("batch", "error", "absolute", "problem")
    rows = [{key: value for key, value in asdict(row).items() if key in kept} for row in report.rows]
    return asdict(report) | {"dtype": str(report.dtype).removeprefix("torch."), "rows": rows}


def _format(name: str, kept: Mapping, rows: str) -> Format:
    report = kept["parity"]
    if report:
        batches = tuple(BatchParity(**row) for row in report["rows"])
        report = Parity(**(report | {"dtype": getattr(torch, report["dtype"]), "rows": batches}))
    times = tuple(kept["milliseconds"].get(rows, ())) or None
    return Format(name, NEEDS[name].python, kept["bytes"], kept["seconds"], times, report, kept["note"])


@contextmanager
def _empty_caches(folder: Path) -> Iterator[None]:
    """Compilers begin anew: what an earlier run left on the disk would make them look fast."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    try:
        yield
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


if __name__ == "__main__":
    write_text(RECORD, json.dumps(record(), indent=1) + "\n")
