"""What exercise 6.6 is made of: models of which a part trains, files, and a right solution in pieces."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grader.checks.refusals import raised
from grader.experiment import Trial, WrongReturn
from helpers import expect


class Adapted(nn.Module):
    """A frozen layer and an adapter, under the names of exercise 6.1."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, width))
        self.B = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class Network(nn.Module):
    """Frozen but for the adapters of its blocks and the head. Every number of it is random."""

    def __init__(self, width: int, ranks: list[int], bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(Adapted(width, rank) for rank in ranks)
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class Shared(nn.Module):
    """A trained weight that two modules share, an adapter, and trained parameters of other dtypes."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.block = Adapted(width, rank)
        self.scale = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.bfloat16))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight


class Strided(nn.Module):
    """Trained weights that do not lie in memory in the order of their axes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3).to(memory_format=torch.channels_last)
        self.mix = nn.Parameter(torch.randn(width, 3).T)


def sizes(trial: Trial) -> tuple[int, list[int]]:
    """The width of a network, and the rank of its adapters, once for each block."""
    return trial.integer(5, 8), [trial.integer(2, 4)] * 3


def another_copy(model: nn.Module) -> nn.Module:
    """Another copy of the same pre-trained model: what is frozen is equal, what trains has other numbers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model


@contextmanager
def path_in_a_folder() -> Iterator[Path]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a file still mapped cannot be removed on Windows
        yield Path(folder) / "digits.adapter"


def file_of(subject, path: Path):
    file = subject(path)
    missing = [name for name in ("save", "load") if not callable(getattr(file, name, None))]
    if missing:
        raise WrongReturn(
            f"AdapterFile must have methods save and load, got {expect.describe(file)} without {' and '.join(missing)}."
        )
    return file


def saved_and_loaded(subject, saved: nn.Module, loading: nn.Module, path: Path | None = None) -> str:
    """What is raised, if anything is, where one model is saved and another one loads that."""
    if path is None:
        with path_in_a_folder() as path:
            return saved_and_loaded(subject, saved, loading, path)
    error, _ = raised(lambda: file_of(subject, path).save(saved))
    return error if error != "nothing" else raised(lambda: file_of(subject, path).load(loading))[0]


def content_of(path: Path) -> tuple[str, dict[str, str] | None]:
    """What kind of file there is, and the dtypes of the tensors in it, by name."""
    if not path.is_file():
        return "there is none at `path`", None
    try:
        with safe_open(path, "pt") as file:
            dtypes = {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return "in another format", None
    return "in the safetensors format" + ("" if dtypes else ", with nothing in it"), dtypes


class Solution:
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, path):
        self.path = path

    def save(self, model):
        draft = self.draft()
        self.write({name: self.written(parameter.detach()) for name, parameter in self.chosen(model).items()}, draft)
        draft.replace(self.path)

    def load(self, model):
        tensors = self.read()
        differing = self.surplus(model, tensors) | self.lacking(model, tensors) | self.misshapen(model, tensors)
        if differing:
            raise ValueError(f"file and model differ in {sorted(differing)}")
        self.put(model, tensors)

    def own(self, model):
        return dict(model.named_parameters())

    def chosen(self, model):
        return {name: parameter for name, parameter in self.own(model).items() if parameter.requires_grad}

    def draft(self):
        return self.path.with_name(self.path.name + ".part")

    def written(self, tensor):
        return tensor.contiguous()

    def write(self, tensors, path):
        save_file(tensors, path)

    def read(self):
        return load_file(self.path)

    def surplus(self, model, tensors):
        return tensors.keys() - self.own(model).keys()

    def lacking(self, model, tensors):
        return self.chosen(model).keys() - tensors.keys()

    def misshapen(self, model, tensors):
        return {name for name, parameter in self.own(model).items() if tensors.get(name, parameter).shape != parameter.shape}

    @torch.no_grad()
    def put(self, model, tensors):
        for name, parameter in self.own(model).items():
            if name in tensors:
                parameter.copy_(tensors[name])


def every_name(self, model):
    return dict(model.named_parameters(remove_duplicate=False))


def no_names(self, model, tensors):
    return set()


def cloned(self, tensor):
    return tensor.clone(memory_format=torch.contiguous_format)
