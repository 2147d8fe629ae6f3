"""Exercise 8.1: how far an exported model is from its original, at every batch size, and where."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from grader.near import near
from helpers import expect
from helpers.parity import largest_error

exercise = Exercise(__name__, "8.1", largest_error)

WIDTH = 4  # outputs of a row, where the model gives ones
RIGHT = "the largest absolute difference over the largest absolute output"


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
        return {"the error": figure, "`index`": where if figure == RIGHT else None}


@exercise.experiment("every batch size")
class EveryBatchSize(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _sizes(trial) | {"unit": 0.01 + 0.01 * torch.rand((), generator=trial.generator).item()}

    def measure(self, subject, inputs):
        errors = dict(zip(inputs["sizes"], (2, 5, 3), strict=True))
        return _with_ones(subject, inputs, lambda out: out + inputs["unit"] * errors.get(len(out), 1))

    def facts(self, raw, inputs):
        worst, others = [5 * inputs["unit"]], [of * inputs["unit"] for of in (1, 2, 3)]
        known = {"that of the worst batch size": worst, "that of another batch size": others, "0": [0.0]}
        figure = _figure(raw, known)
        named = _batch_size(raw, inputs["sizes"]) if figure == "that of the worst batch size" else None
        return {"the error": figure, "`batch_size`": named}


@exercise.experiment("modes")
class Modes(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        dropouts = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        model = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48), dropouts, nn.Linear(48, 4))
        model[1].eval()  # frozen
        dropouts[trial.integer(0, 1)].eval()
        return _sizes(trial) | {"model": model}

    def measure(self, subject, inputs):
        model = inputs["model"]
        raw = _ask(subject, model, copy.deepcopy(model).eval(), inputs["inputs"], inputs["sizes"])
        return raw | {"modes": [module.training for module in model.modules()]}

    def facts(self, raw, inputs):
        modes = list(zip((module.training for module in inputs["model"].modules()), raw["modes"], strict=True))
        far = "far from 0" if raw["kind"] == "a number" else raw["kind"]
        return {
            "the error of an exact export": "0, or nearly" if far == "far from 0" and near(raw["error"], 0) else far,
            "modules that came in train mode": _now({now for was, now in modes if was}),
            "modules that came in eval mode": _now({now for was, now in modes if not was}),
        }


@exercise.experiment("not finite")
class NotFinite(Experiment):
    def draw(self, trial: Trial) -> dict:
        drawn = _sizes(trial)
        return drawn | {"place": [trial.integer(0, drawn["sizes"][1] - 1), trial.integer(1, WIDTH - 1)]}

    def measure(self, subject, inputs):
        row, column = inputs["place"]

        def spoil(out: Tensor) -> Tensor:
            out = out + 0.01
            if len(out) == inputs["sizes"][1]:
                out[row, column] = math.nan
            return out

        return _with_ones(subject, inputs, spoil)

    def facts(self, raw, inputs):
        named = _batch_size(raw, inputs["sizes"]) if raw["kind"] == "infinite" else None
        return {"the error": raw["kind"], "`batch_size`": named}


@exercise.experiment("another shape")
class AnotherShape(Experiment):
    def draw(self, trial: Trial) -> dict:
        drawn = _sizes(trial)
        middle, _, large = drawn["sizes"]
        return drawn | {"sizes with 1": [middle, 1, large]}

    def measure(self, subject, inputs):
        small = inputs["sizes"][1]
        column = _with_ones(subject, inputs, lambda out: out[:, :1] if len(out) == small else out)
        squeezed = _with_ones(subject, inputs | {"sizes": inputs["sizes with 1"]}, torch.squeeze)
        return {"column": column, "squeezed": squeezed}

    def facts(self, raw, inputs):
        column, squeezed = raw["column"], raw["squeezed"]
        named = [_batch_size(column, inputs["sizes"]), _batch_size(squeezed, inputs["sizes with 1"])]
        return {
            f"(b, 1) in place of (b, {WIDTH}): the error": column["kind"],
            f"({WIDTH},) in place of (1, {WIDTH}): the error": squeezed["kind"],
            "`batch_size` of each": named if column["kind"] == squeezed["kind"] == "infinite" else None,
        }


@exercise.experiment("refusal")
class Refusal(Experiment):
    def draw(self, trial: Trial) -> dict:
        return _sizes(trial)

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
            return _with_ones(subject, inputs, refuse)
        except Exception as error:
            if error is not refusal:
                raise
            return {"kind": "none, the exception came through"}

    def facts(self, raw, inputs):
        infinite = all(one["kind"] == "infinite" for one in raw.values())
        return {
            **{f"a batch size refused with {name}: the error": one["kind"] for name, one in raw.items()},
            "`batch_size` of each": [_batch_size(one, inputs["sizes"]) for one in raw.values()] if infinite else None,
        }


class _Table(nn.Module):
    """Gives each of the known inputs the output that belongs to it."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs.clone())
        self.register_buffer("outputs", outputs.clone())

    def forward(self, x: Tensor) -> Tensor:  # (b, 3) -> (b, ...)
        return self.outputs[(x[:, None] == self.inputs).all(-1).float().argmax(1)]


def _sizes(trial: Trial) -> dict:
    """Three batch sizes, of which the second is the smallest, and more inputs than the largest needs."""
    small, middle, large = trial.integer(2, 3), trial.integer(4, 5), trial.integer(6, 8)
    return {"inputs": trial.normal(large + 3, 3), "sizes": [middle, small, large]}


def _with_ones(subject, inputs: dict, change: Callable[[Tensor], Tensor]) -> dict:
    """Ask about a model whose outputs are all 1, where it is the same how differences are divided and averaged."""
    model = _Table(inputs["inputs"], inputs["inputs"].new_ones(len(inputs["inputs"]), WIDTH))
    exported = copy.deepcopy(model)
    return _ask(subject, model, lambda x: change(exported(x)), inputs["inputs"], inputs["sizes"])


def _ask(subject, model: nn.Module, exported: Callable, inputs: Tensor, sizes: Sequence[int]) -> dict:
    """What the subject says, in a form without NaN and infinity."""
    said = subject(model, exported, inputs, tuple(sizes))
    if not isinstance(said, dict) or not {"error", "batch_size", "index"} <= said.keys():
        came = f"a dict with {sorted(map(str, said))}" if isinstance(said, dict) else expect.describe(said)
        question = " Is there a return?" if said is None else ""
        raise WrongReturn(f"largest_error must return a dict with 'error', 'batch_size' and 'index', got {came}.{question}")
    error = expect_number(said["error"], "'error'")
    kind = "NaN" if math.isnan(error) else "a number" if math.isfinite(error) else "infinite"
    size = said["batch_size"]
    return {
        "kind": kind,
        "error": error if kind == "a number" else 0.0,
        "batch_size": None if size is None else expect_number(size, "'batch_size'"),
        "index": _index(said["index"]),
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
        RIGHT: [size.max() / largest],
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
    least = min(abs(one) for several in known.values() for one in several if one)
    error = 0.0 if near(raw["error"], 0, scale=least) else raw["error"]  # softmax makes nearly 0 of equal differences
    found = (word for word, several in known.items() if any(abs(error - one) <= 0.02 * abs(one) for one in several))
    return next(found, "another number")


def _batch_size(raw: dict, sizes: list[int]) -> str:
    return "the worst" if raw["batch_size"] == sizes[1] else "None" if raw["batch_size"] is None else "another"


def _now(modes: set[bool]) -> str:
    return "some in train, some in eval mode" if len(modes) > 1 else "in train mode" if True in modes else "in eval mode"


class _Comparison:
    """A right solution, in pieces that a misconception replaces."""

    for_nan = math.inf

    def __new__(cls, model, exported, inputs, batch_sizes):
        self = super().__new__(cls)
        modes = {module: module.training for module in model.modules()}
        self.prepare(model)
        found = []
        with torch.no_grad():
            for size in batch_sizes:
                wanted = model(inputs[:size])
                try:
                    error, index = self.compare(wanted, self.run(exported, inputs[:size]))
                except _LeftOut:
                    continue
                found.append({"error": error, "batch_size": size, "index": index})
        self.put_back(model, modes)
        return self.choose(found)

    def prepare(self, model):
        model.eval()

    def put_back(self, model, modes):
        for module, mode in modes.items():
            module.training = mode

    def run(self, exported, batch):
        try:
            return exported(batch)
        except Exception:
            return None

    def comparable(self, wanted, got):
        return got.shape == wanted.shape

    def compare(self, wanted, got):
        if got is None or not self.comparable(wanted, got):
            return math.inf, None
        errors = self.errors(wanted, got)
        errors = torch.where(errors.isnan(), self.for_nan, errors)
        return self.one(errors).item(), tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))

    def errors(self, wanted, got):
        return (got - wanted).abs() / wanted.abs().max()

    def one(self, errors):
        return errors.max()

    def choose(self, found):
        return max(found, key=lambda one: one["error"])


class _LeftOut(Exception):
    """Of the comparison: a batch size."""


@exercise.misconception("each element by itself")
class EachElementByItself(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted).abs() / wanted.abs()


@exercise.misconception("not relative")
class NotRelative(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted).abs()


@exercise.misconception("an average")
class AnAverage(_Comparison):
    def one(self, errors):
        return errors.mean()


@exercise.misconception("differences with their sign")
class DifferencesWithTheirSign(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted) / wanted.abs().max()


@exercise.misconception("probabilities compared")
class ProbabilitiesCompared(_Comparison):
    def errors(self, wanted, got):
        return (got.softmax(-1) - wanted.softmax(-1)).abs()


@exercise.misconception("only the predicted classes")
class OnlyThePredictedClasses(_Comparison):
    def errors(self, wanted, got):
        return (got.argmax(-1) != wanted.argmax(-1)).float()


@exercise.misconception("one batch size")
class OneBatchSize(_Comparison):
    def choose(self, found):
        return found[-1]


@exercise.misconception("compared in train mode")
class ComparedInTrainMode(_Comparison):
    def prepare(self, model):
        pass


@exercise.misconception("left in eval mode")
class LeftInEvalMode(_Comparison):
    def put_back(self, model, modes):
        pass


@exercise.misconception("every module to train mode")
class EveryModuleToTrainMode(_Comparison):
    def put_back(self, model, modes):
        model.train()


@exercise.misconception("NaN never larger")
class NanNeverLarger(_Comparison):
    for_nan = math.nan

    def choose(self, found):
        worst = {"error": -1.0, "batch_size": None, "index": None}
        for one in found:
            if one["error"] > worst["error"]:
                worst = one
        return worst


@exercise.misconception("shapes that broadcast")
class ShapesThatBroadcast(_Comparison):
    def comparable(self, wanted, got):
        return True


@exercise.misconception("the refusal passed on")
class TheRefusalPassedOn(_Comparison):
    def run(self, exported, batch):
        return exported(batch)


@exercise.misconception("the refused batch size left out")
class TheRefusedBatchSizeLeftOut(_Comparison):
    def run(self, exported, batch):
        try:
            return exported(batch)
        except Exception:
            raise _LeftOut from None
