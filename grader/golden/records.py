"""Raw results of right solutions: what an experiment measured, recorded once on a machine, and read ever after.

    records/<versions>/<setting>/<topic>.safetensors        such as records/torch-2.14.0/cpu-float32/lora.safetensors

A file holds, for every experiment of a topic, what the reference and each right variant gave with each of `SEEDS`, and
beside it what it was measured on. Tensors are stored as they came; the tree that they hang in is JSON in the metadata.
"""

import datetime
import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from grader.checks import exercises
from grader.experiment import Exercise, Subject
from grader.golden import FOLDER
from grader.observe import run
from grader.setting import CPU, PRECISIONS, Setting
from grader.variants import variants_of
from helpers.environment import processor
from helpers.files import write_bytes

SEEDS = (0, 1)
SETTINGS = (CPU, Setting("cpu", "bfloat16"), *(Setting("cuda", precision) for precision in PRECISIONS))
_PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn")

Raw = dict[str, Any]
Results = dict[str, dict[str, dict[str, dict[int, Raw]]]]  # number -> experiment -> subject -> seed -> raw, or {"problem": ...}


@dataclass(frozen=True)
class About:
    """What a record was measured on."""

    device: str  # "NVIDIA H200", "AMD EPYC"
    driver: str | None  # of the GPU
    precision: str
    versions: dict[str, str]
    system: str
    date: str


@dataclass(frozen=True)
class Record:
    """One file."""

    about: About
    results: Results


def versions() -> str:
    """The name of the folder for what is installed here: "torch-2.14.0"."""
    return f"torch-{torch.__version__.partition('+')[0]}"


def path_of(topic: str, setting: Setting, version: str | None = None, folder: Path = FOLDER) -> Path:
    """Where a record is or will be; `version`: the name of its folder, this environment's if left out."""
    return folder / "records" / (version or versions()) / str(setting).replace(" ", "-") / f"{topic}.safetensors"


def all_versions(folder: Path = FOLDER) -> list[str]:
    """The folders that hold records, the newest last."""
    names = (path.name for path in (folder / "records").glob("torch-*"))
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def right_solutions(exercise: Exercise) -> dict[str, Subject]:
    """The reference as "reference", and the right variants by their names."""
    variants = variants_of(exercise).CORRECT
    return {"reference": exercise.reference} | {getattr(v, "__name__", type(v).__name__): v for v in variants}


def mistakes(exercise: Exercise) -> dict[str, Subject]:
    """The misconceptions by their keys."""
    return {wrong.key: wrong.subject for wrong in exercise.misconceptions}


def measure(
    topic: str,
    setting: Setting,
    subjects: Callable[[Exercise], dict[str, Subject]] = right_solutions,
    seeds: tuple[int, ...] = SEEDS,
) -> Record:
    """Run those subjects of a topic through every experiment that has that setting, here and now."""
    results: Results = {}
    for number, exercise in exercises(topic).items():
        if setting.precision != "bfloat16" or exercise.autocast:
            results[number] = {
                experiment.key: {
                    name: {seed: _raw(run(experiment, subject, seed, number, setting)) for seed in seeds}
                    for name, subject in subjects(exercise).items()
                }
                for experiment in exercise.experiments
            }
    return Record(about(setting), results)


def about(setting: Setting) -> About:
    """What this machine is."""
    on_gpu = setting.device == "cuda"
    return About(
        device=torch.cuda.get_device_name() if on_gpu else processor(),
        driver=_driver() if on_gpu else None,
        precision=setting.precision,
        versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        system=f"{platform.system()} {platform.machine()}",
        date=f"{datetime.date.today()}",
    )


def write(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = _packed(record.results, tensors)
    metadata = {"about": json.dumps(asdict(record.about)), "results": json.dumps(tree, ensure_ascii=False)}
    write_bytes(path, save(tensors, metadata))


def read(path: Path) -> Record:
    """Read a record."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = file.metadata()
    results = _unpacked(json.loads(metadata["results"]), tensors)
    for experiments in results.values():
        for subjects in experiments.values():
            for name, seeds in subjects.items():
                subjects[name] = {int(seed): raw for seed, raw in seeds.items()}
    return Record(About(**json.loads(metadata["about"])), results)


def each(results: Results) -> Iterator[tuple[str, str, str, int, Raw]]:
    """(number, experiment, subject, seed, raw), one after the other."""
    for number, experiments in results.items():
        for experiment, subjects in experiments.items():
            for name, seeds in subjects.items():
                for seed, raw in seeds.items():
                    yield number, experiment, name, seed, raw


def _raw(ran) -> Raw:
    return {"problem": ran.problem.message} if ran.problem else ran.raw


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.exists() else f"CUDA {torch.version.cuda}"


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON; a tensor becomes {"tensor": its name in the file}, a tuple {"tuple": [...]}."""
    if isinstance(value, Tensor):
        kept = value.detach().clone().contiguous()
        content = kept.flatten().view(torch.uint8).numpy().tobytes() if kept.numel() else b""
        name = sha256(f"{kept.dtype} {tuple(kept.shape)} ".encode() + content).hexdigest()[:16]
        tensors[name] = kept  # what several solutions gave is stored once
        return {"tensor": name}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _packed(item, tensors) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"raw results are tensors, numbers, strings, lists and dicts, got a {type(value).__name__}.")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["tuple"])
    return {key: _unpacked(item, tensors) for key, item in value["dict"].items()}
