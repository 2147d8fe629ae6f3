"""What the experiments of exercise 8.1 ask with: models that are tables, and names for what an error may be."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter

from torch import Tensor, nn

from grader.checks.shared_list import SharedList
from grader.experiment import WrongReturn, expect_number
from grader.near import near
from helpers import expect

ROUNDING = 1e-7  # of a probability in float32, and of its difference from another
WIDTH = 4  # outputs of a row, where the model gives ones
RELATIVE_ERROR = "the largest absolute difference over the largest absolute output"
BY_EXPORT = "the largest absolute difference over the largest absolute output of the export"
AVERAGE, OF_PROBABILITIES = "an average over all elements", "the largest difference of probabilities"


class Table(nn.Module):
    """Gives each of the known inputs the output that belongs to it."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs.clone())
        self.register_buffer("outputs", outputs.clone())

    def forward(self, x: Tensor) -> Tensor:  # (b, 3) -> (b, ...)
        return self.outputs[(x[:, None] == self.inputs).all(-1).float().argmax(1)]


class Remembering(nn.Module):
    """A table times a parameter, that remembers which of its outputs have a graph."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.table = Table(inputs, inputs.new_ones(len(inputs), WIDTH))
        self.factor = nn.Parameter(inputs.new_ones(()))
        self.outputs, self.before = SharedList(), SharedList()

    def alive(self) -> int:
        return sum(output() is not None for output in self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        self.before.append(self.alive())
        output = self.table(x) * self.factor
        if output.requires_grad:
            self.outputs.append(weakref.ref(output))
        return output


def ask(subject, model: nn.Module, exported: Callable, inputs: Tensor, sizes: Sequence[int]) -> dict:
    """What the subject answers, in a form without NaN and infinity."""
    return read(subject(model, exported, inputs, tuple(sizes)))


def read(answer: object) -> dict:
    if not isinstance(answer, dict) or not {"error", "batch_size", "index"} <= answer.keys():
        came = f"a dict with {sorted(map(str, answer))}" if isinstance(answer, dict) else expect.describe(answer)
        question = " Is there a return?" if answer is None else ""
        raise WrongReturn(f"largest_error must return a dict with 'error', 'batch_size' and 'index', got {came}.{question}")
    error, size = expect_number(answer["error"], "'error'"), answer["batch_size"]
    kind = "NaN" if math.isnan(error) else "a number" if math.isfinite(error) else "infinite"
    return {
        "kind": kind,
        "error": error if kind == "a number" else 0.0,
        "batch_size": None if size is None else expect_number(size, "'batch_size'"),
        "index": _index(answer["index"]),
    }


def _index(index: object) -> list[int] | None:
    if index is None:
        return None
    if hasattr(index, "tolist"):  # a tensor or an array
        index = index.tolist()
    items = index if isinstance(index, list | tuple) else [index]
    return [int(expect_number(item, "each number of 'index'")) for item in items]


def figures_of(wanted: Tensor, got: Tensor) -> dict[str, list[float]]:
    """What can be made of two tensors of outputs (n, ...): words -> figures."""
    wanted, got = wanted.double(), got.double()
    difference = got - wanted
    size, largest = difference.abs(), wanted.abs().max()
    p, q = wanted.softmax(-1), got.softmax(-1)
    apart, logs = (q - p).abs().max(), (q.log() - p.log()).abs().max()
    averages = [size.mean(), size.square().mean(), size.square().mean().sqrt()]
    averages += [average / largest for average in averages]
    averages += [size.sum() / wanted.abs().sum(), size.norm() / wanted.norm()]
    words = {
        RELATIVE_ERROR: [size.max() / largest],
        "the largest absolute difference, not divided": [size.max()],
        "the largest absolute difference over the largest output, signs included": [size.max() / wanted.max()],
        "the largest absolute difference over the mean absolute output": [size.max() / wanted.abs().mean()],
        BY_EXPORT: [size.max() / got.abs().max()],
        "the largest absolute difference over the largest absolute output of its own row": [
            (size.flatten(1).amax(1) / wanted.flatten(1).abs().amax(1)).max()
        ],
        "the largest difference upwards over the largest absolute output": [difference.max() / largest],
        "the largest difference upwards over the largest output, signs included": [difference.max() / wanted.max()],
        "the largest difference upwards, not divided": [difference.max()],
        "the largest ratio of a difference to its own element": [(size / wanted.abs()).max()],
        AVERAGE: averages,
        OF_PROBABILITIES: [apart, apart / p.max(), logs, logs / p.log().abs().max()],
        "0": [0.0],
    }
    return {word: [float(figure) for figure in figures] for word, figures in words.items()}


def figure_of(raw: dict, known: dict[str, list[float]]) -> str:
    """Which of the known figures the error is.

    The first of them, which is right, to within 2 %: there may be an epsilon in what it was divided by. The others to within
    0.2 %, or the rounding of tiny ones: there are so many that something else would soon be near one of them.
    """
    if raw["kind"] != "a number":
        return raw["kind"]
    least = min(abs(figure) for figures in known.values() for figure in figures if figure)
    error = 0.0 if near(raw["error"], 0, scale=least) else raw["error"]  # softmax makes nearly 0 of equal differences
    for name, figures in known.items():
        margin = 0.02 if name == next(iter(known)) else 0.002
        if any(abs(error - figure) <= max(margin * abs(figure), min(ROUNDING, 0.01 * abs(figure))) for figure in figures):
            return name
    return "another number"


# --- pieces of solutions


class Refused(Exception):
    """What a runtime raises that has exceptions of its own."""


def worst(rows):
    return max(rows, key=itemgetter("error"))


def worst_but_nan(rows):
    return worst([row for row in rows if row["error"] >= 0])


def above_zero(rows):
    return worst([{"error": 0.0, "batch_size": None, "index": None}, *rows])


@contextmanager
def trained_afterwards(model: nn.Module) -> Iterator[None]:
    yield
    model.train()
