"""Exercise 8.1: how far an exported model is from its original, at every batch size, and where."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import itemgetter

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from grader.near import near
from helpers import expect
from helpers.parity import largest_error

exercise = Exercise(__name__, "8.1", largest_error)

WIDTH = 4  # outputs of a row, where the model gives ones
RELATIVE_ERROR = "the largest absolute difference over the largest absolute output"


@exercise.experiment("the worst element")
class TheWorstElement(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        # Outputs (n, 3, 4) of sizes 0.1, 0.2, 0.3 and 0.4 and a few special ones, all of them times `scale`.
        n = trial.integer(5, 7)
        outputs = 0.1 * (1 + torch.stack([trial.permutation(4) for _ in range(3 * n)]).view(n, 3, 4))
        outputs *= trial.normal(n, 3, 4).sign()
        differences = 0.0004 * (0.5 + torch.rand(n, 3, 4, generator=trial.generator)) * trial.normal(n, 3, 4).sign()
        rows = [0, *(1 + trial.permutation(n - 1)[:4]).tolist()]  # a row for each special element
        positive, largest, worst, upwards, ratio = ((row, trial.integer(0, 2), trial.integer(0, 3)) for row in rows)
        outputs[positive], outputs[largest], outputs[ratio] = 0.6, -1.0, 0.004
        differences[worst], differences[upwards], differences[ratio] = -0.04, 0.016, -0.02
        scale = 0.005 + 0.005 * torch.rand((), generator=trial.generator)
        return {
            "inputs": trial.normal(n, 3),
            "outputs": scale * outputs,
            "differences": scale * differences,
            "worst": list(worst),
        }

    def measure(self, subject, inputs):
        outputs, n = inputs["outputs"], len(inputs["inputs"])
        model = _Table(inputs["inputs"], outputs)
        exported = _Table(inputs["inputs"], outputs + inputs["differences"])
        return _ask(subject, model, exported, inputs["inputs"], (n,))

    def facts(self, raw, inputs):
        figure = _figure(raw, _figures(inputs["outputs"], inputs["outputs"] + inputs["differences"]))
        where = "the worst element's" if raw["index"] == inputs["worst"] else "None" if raw["index"] is None else "another"
        return {"the error": figure, "`index`": where if figure == RELATIVE_ERROR else None}


class _ThreeSizes(Experiment):
    """Draws three batch sizes, of which the second is the smallest and the one to name."""

    def draw(self, trial: Trial) -> dict:
        small, middle, large = trial.integer(2, 3), trial.integer(4, 5), trial.integer(6, 8)
        return {"inputs": trial.normal(large + 3, 3), "sizes": [middle, small, large]}

    def ask(self, subject, inputs: dict, change: Callable[[Tensor], Tensor], sizes: Sequence[int] = ()) -> dict:
        """Ask about a model whose outputs are all 1, where it is the same how differences are divided and averaged."""
        sizes = sizes or inputs["sizes"]
        model = _Table(inputs["inputs"], inputs["inputs"].new_ones(len(inputs["inputs"]), WIDTH))
        table = copy.deepcopy(model)
        answer = _ask(subject, model, lambda x: change(table(x)), inputs["inputs"], sizes)
        named = {sizes[1]: "the worst", None: "None"}.get(answer["batch_size"], "another")
        return answer | {"batch_size": named}


@exercise.experiment("every batch size")
class EveryBatchSize(_ThreeSizes):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return super().draw(trial) | {"unit": 0.01 + 0.01 * torch.rand((), generator=trial.generator).item()}

    def measure(self, subject, inputs):
        errors = dict(zip(inputs["sizes"], (2, 5, 3), strict=True))
        return self.ask(subject, inputs, lambda out: out + inputs["unit"] * errors.get(len(out), 1))

    def facts(self, raw, inputs):
        worst, another = [5 * inputs["unit"]], [times * inputs["unit"] for times in (1, 2, 3)]
        figure = _figure(raw, {"that of the worst batch size": worst, "that of another batch size": another, "0": [0.0]})
        return {"the error": figure, "`batch_size`": raw["batch_size"] if figure == "that of the worst batch size" else None}


@exercise.experiment("modes")
class Modes(_ThreeSizes):
    points = 2

    def draw(self, trial: Trial) -> dict:
        dropouts = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        model = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48), dropouts, nn.Linear(48, 4))
        model[1].eval()  # frozen
        dropouts[trial.integer(0, 1)].eval()
        return super().draw(trial) | {"model": model}

    def measure(self, subject, inputs):
        model = inputs["model"]
        raw = _ask(subject, model, copy.deepcopy(model).eval(), inputs["inputs"], inputs["sizes"])
        return raw | {"traces": traces.of(model)}

    def facts(self, raw, inputs):
        far = "far from 0" if raw["kind"] == "a number" else raw["kind"]
        error = {"the error of an exact export": "0, or nearly" if far == "far from 0" and near(raw["error"], 0) else far}
        return error | traces.changes(inputs["model"], raw["traces"], "modes")


@exercise.experiment("not finite")
class NotFinite(_ThreeSizes):
    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        return drawn | {"place": [trial.integer(0, drawn["sizes"][1] - 1), trial.integer(1, WIDTH - 1)]}

    def measure(self, subject, inputs):
        row, column = inputs["place"]

        def spoil(out: Tensor) -> Tensor:
            out = out + 0.01
            if len(out) == inputs["sizes"][1]:
                out[row, column] = math.nan
            return out

        return self.ask(subject, inputs, spoil)

    def facts(self, raw, inputs):
        return {"the error": raw["kind"], "`batch_size`": raw["batch_size"] if raw["kind"] == "infinite" else None}


@exercise.experiment("another shape")
class AnotherShape(_ThreeSizes):
    def measure(self, subject, inputs):
        middle, small, large = inputs["sizes"]
        column = self.ask(subject, inputs, lambda out: out[:, :1] if len(out) == small else out)
        return {"column": column, "squeezed": self.ask(subject, inputs, torch.squeeze, [middle, 1, large])}

    def facts(self, raw, inputs):
        column, squeezed = raw["column"], raw["squeezed"]
        infinite = column["kind"] == squeezed["kind"] == "infinite"
        return {
            f"(b, 1) in place of (b, {WIDTH}): the error": column["kind"],
            f"({WIDTH},) in place of (1, {WIDTH}): the error": squeezed["kind"],
            "`batch_size` of each": [column["batch_size"], squeezed["batch_size"]] if infinite else None,
        }


@exercise.experiment("refusal")
class Refusal(_ThreeSizes):
    def measure(self, subject, inputs):
        # The types that TorchScript and torch.export raise where a batch size was built in.
        refusals = RuntimeError("shape '[2, 3]' is invalid"), AssertionError("Guard failed: input.size()[0] == 2")
        return {type(refusal).__name__: self._refused(subject, inputs, refusal) for refusal in refusals}

    def _refused(self, subject, inputs, refusal: Exception) -> dict:
        def refuse(out: Tensor) -> Tensor:
            if len(out) == inputs["sizes"][1]:
                raise refusal
            return out + 0.01

        try:
            return self.ask(subject, inputs, refuse)
        except Exception as error:
            if error is not refusal:
                raise
            return {"kind": "none, the exception came through"}

    def facts(self, raw, inputs):
        infinite = all(answer["kind"] == "infinite" for answer in raw.values())
        return {
            **{f"a batch size refused with {name}: the error": answer["kind"] for name, answer in raw.items()},
            "`batch_size` of each": [answer["batch_size"] for answer in raw.values()] if infinite else None,
        }


class _Table(nn.Module):
    """Gives each of the known inputs the output that belongs to it."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs.clone())
        self.register_buffer("outputs", outputs.clone())

    def forward(self, x: Tensor) -> Tensor:  # (b, 3) -> (b, ...)
        return self.outputs[(x[:, None] == self.inputs).all(-1).float().argmax(1)]


def _ask(subject, model: nn.Module, exported: Callable, inputs: Tensor, sizes: Sequence[int]) -> dict:
    """What the subject answers, in a form without NaN and infinity."""
    answer = subject(model, exported, inputs, tuple(sizes))
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


def _figures(wanted: Tensor, got: Tensor) -> dict[str, list[float]]:
    """What can be made of two tensors of outputs: words -> figures."""
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
        "the largest difference upwards over the largest absolute output": [difference.max() / largest],
        "the largest difference upwards over the largest output, signs included": [difference.max() / wanted.max()],
        "the largest difference upwards, not divided": [difference.max()],
        "the largest ratio of a difference to its own element": [(size / wanted.abs()).max()],
        "an average over all elements": averages,
        "the largest difference of probabilities": [apart, apart / p.max(), logs, logs / p.log().abs().max()],
        "0": [0.0],
    }
    return {word: [float(figure) for figure in figures] for word, figures in words.items()}


def _figure(raw: dict, known: dict[str, list[float]]) -> str:
    """Which of the known figures the error is, to within 2 %: there may be an epsilon in what it was divided by."""
    if raw["kind"] != "a number":
        return raw["kind"]
    least = min(abs(figure) for figures in known.values() for figure in figures if figure)
    error = 0.0 if near(raw["error"], 0, scale=least) else raw["error"]  # softmax makes nearly 0 of equal differences
    for name, figures in known.items():
        if any(abs(error - figure) <= 0.02 * abs(figure) for figure in figures):
            return name
    return "another number"


def _worst(rows):
    return max(rows, key=itemgetter("error"))


def _worst_but_nan(rows):
    return _worst([row for row in rows if row["error"] >= 0])


@contextmanager
def _trained_afterwards(model: nn.Module) -> Iterator[None]:
    yield
    model.train()


def solution(
    model,
    exported,
    inputs,
    batch_sizes,
    evaluated=nn.Module.eval,
    keeping=traces.kept,
    caught=Exception,
    skipped=(),
    broadcast=False,
    errors=lambda wanted, got: (got - wanted).abs() / wanted.abs().max(),
    nan=math.inf,
    figure=torch.max,
    choose=_worst,
):
    """A right solution, in pieces that a misconception replaces."""
    rows = []
    with keeping(model), torch.no_grad():
        evaluated(model)
        for size in batch_sizes:
            wanted = model(inputs[:size])
            row = {"error": math.inf, "batch_size": size, "index": None}
            try:
                got = exported(inputs[:size])
            except skipped:
                continue
            except caught:
                got = None
            if got is not None and (broadcast or got.shape == wanted.shape):
                each = errors(wanted, got)
                each = torch.where(each.isnan(), nan, each)
                row |= {"error": figure(each).item(), "index": torch.unravel_index(each.argmax(), each.shape)}
            rows.append(row)
    return choose(rows)


exercise.misconceptions_of(
    solution,
    {
        "each element by itself": {"errors": lambda wanted, got: (got - wanted).abs() / wanted.abs()},
        "not relative": {"errors": lambda wanted, got: (got - wanted).abs()},
        "an average": {"figure": torch.mean},
        "differences with their sign": {"errors": lambda wanted, got: (got - wanted) / wanted.abs().max()},
        "probabilities compared": {"errors": lambda wanted, got: (got.softmax(-1) - wanted.softmax(-1)).abs()},
        "only the predicted classes": {"errors": lambda wanted, got: (got.argmax(-1) != wanted.argmax(-1)).float()},
        "one batch size": {"choose": itemgetter(-1)},
        "compared in train mode": {"evaluated": lambda model: model},
        "left in eval mode": {"keeping": nullcontext},
        "every module to train mode": {"keeping": _trained_afterwards},
        "NaN never larger": {"nan": math.nan, "choose": _worst_but_nan},
        "shapes that broadcast": {"broadcast": True},
        "the refusal passed on": {"caught": ()},
        "the refused batch size left out": {"skipped": Exception},
    },
)
