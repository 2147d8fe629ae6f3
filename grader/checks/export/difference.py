"""Exercise 8.1: how far an exported model is from its original, at every batch size, and where."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number, misconception
from grader.near import near
from helpers import expect
from helpers.parity import largest_error

WIDTH = 4  # outputs of a row, where the model gives ones
RIGHT = "the largest absolute difference over the largest absolute output"


class TheWorstElement(Experiment):
    """The error is the largest absolute difference over the largest absolute output, and `index` is where it is."""

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


class EveryBatchSize(Experiment):
    """The error is that of the batch size at which it is largest, and `batch_size` says which one that is."""

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


class Modes(Experiment):
    """The model computes in eval mode, and then each of its modules is back in the mode it had."""

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


class NotFinite(Experiment):
    """One NaN among the outputs is an infinite error."""

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


class AnotherShape(Experiment):
    """Outputs of another shape are an infinite error, also where they broadcast."""

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


class Refusal(Experiment):
    """A batch size that is refused is an infinite error, whatever the type of the exception."""

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

    def __call__(self, model, exported, inputs, batch_sizes):
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


def _mistake(name: str, *, hint: str, source: str):
    """A misconception that is written as a class: its instance is what is asked."""
    return lambda kind: misconception(name, hint=hint, source=source)(kind())


@_mistake(
    "each element by itself",
    hint="The element that you name is nearly 0 in the model, and other differences are larger than the one there. What does a "
    "ratio say whose denominator is next to nothing?",
    source="NumPy's assert_allclose, which reports the largest relative difference element by element",
)
class EachElementByItself(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted).abs() / wanted.abs()


@_mistake(
    "not relative",
    hint="All outputs of this model are below 0.01, and so is your error, whatever the export does. What would it be if both "
    "gave outputs a thousand times as large?",
    source="seen in many public export scripts: the largest absolute difference, below a fixed 1e-4",
)
class NotRelative(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted).abs()


@_mistake(
    "an average",
    hint="One element is far off, and your error hardly notices. What becomes of your figure when there are ten times as many "
    "elements, and all the new ones are right?",
    source="seen in issue trackers: the mean of the squared differences between two runtimes, as for a loss",
)
class AnAverage(_Comparison):
    def one(self, errors):
        return errors.mean()


@_mistake(
    "differences with their sign",
    hint="The error is too small, and the element that you name is not the worst. Which sign has exported minus model at the "
    "worst one?",
    source="seen in a public script that compares two ONNX models: the differences added up with their signs",
)
class DifferencesWithTheirSign(_Comparison):
    def errors(self, wanted, got):
        return (got - wanted) / wanted.abs().max()


@_mistake(
    "probabilities compared",
    hint="Your figure is not of the outputs, but of what softmax makes of them. Add 1 to every output of the export: what "
    "does softmax say?",
    source="a line of reasoning: both programs end in a softmax when they are used, so that is what is compared",
)
class ProbabilitiesCompared(_Comparison):
    def errors(self, wanted, got):
        return (got.softmax(-1) - wanted.softmax(-1)).abs()


@_mistake(
    "only the predicted classes",
    hint="The outputs differ, and you find no error as long as the largest of each row is the same one. What would change for "
    "somebody who uses the outputs themselves, or a threshold?",
    source="seen in public export scripts: the share of inputs to which both programs give the same class",
)
class OnlyThePredictedClasses(_Comparison):
    def errors(self, wanted, got):
        return (got.argmax(-1) != wanted.argmax(-1)).float()


@_mistake(
    "one batch size",
    hint="There is a batch size at which the export is further off than you say. Which ones does your answer stand for?",
    source="PyTorch's tutorial on exporting to ONNX: the comparison is made on the example that was exported",
)
class OneBatchSize(_Comparison):
    def choose(self, found):
        return found[-1]


@_mistake(
    "compared in train mode",
    hint="An exact export comes out as wrong, each time by another error. Which modules give another output every time, and in "
    "which mode?",
    source="ONNX Runtime's issue 4589 and others: an export is said to differ from its model, which was not in eval mode",
)
class ComparedInTrainMode(_Comparison):
    def prepare(self, model):
        pass


@_mistake(
    "left in eval mode",
    hint="The model came in train mode and no longer is. What would go on training without its dropout?",
    source="seen in public teaching code: model.eval() at the beginning of a helper, and nothing at its end",
)
class LeftInEvalMode(_Comparison):
    def put_back(self, model, modes):
        pass


@_mistake(
    "every module to train mode",
    hint="A BatchNorm that was frozen in eval mode is now in train mode. Does a model have one mode, or each module its own?",
    source="seen in public teaching code: model.eval() before, model.train() after",
)
class EveryModuleToTrainMode(_Comparison):
    def put_back(self, model, modes):
        model.train()


@_mistake(
    "NaN never larger",
    hint="There is a NaN among the outputs, and your error does not show it. What does Python answer to nan > 0.1, and to "
    "nan < 0.1?",
    source="IEEE 754: every comparison with NaN is false, so `if error > worst` never takes it",
)
class NanNeverLarger(_Comparison):
    for_nan = math.nan

    def choose(self, found):
        worst = {"error": -1.0, "batch_size": None, "index": None}
        for one in found:
            if one["error"] > worst["error"]:
                worst = one
        return worst


@_mistake(
    "shapes that broadcast",
    hint="A tensor (b, 1) was compared with one of shape (b, 4), and nothing complained. Which shape has their difference?",
    source="torch.allclose, which broadcasts: it calls zeros(2, 1) close to zeros(2, 10)",
)
class ShapesThatBroadcast(_Comparison):
    def comparable(self, wanted, got):
        return True


@_mistake(
    "the refusal passed on",
    hint="One batch size is refused, and nothing is said of the others. What should a report say of a batch size that does not "
    "run?",
    source="a line of reasoning: an export that cannot run is noticed anyway; and a table of five formats ends at the first",
)
class TheRefusalPassedOn(_Comparison):
    def run(self, exported, batch):
        return exported(batch)


@_mistake(
    "the refused batch size left out",
    hint="The export does not run at one of the batch sizes, and your error is as if nobody had asked for it. Which is worse, "
    "an output that is 1 % off or none at all?",
    source="a line of reasoning: whatever cannot be compared is skipped, except: continue",
)
class TheRefusedBatchSizeLeftOut(_Comparison):
    def run(self, exported, batch):
        try:
            return exported(batch)
        except Exception:
            raise _LeftOut from None


EXERCISE = Exercise(
    number="8.1",
    name="largest_error",
    reference=largest_error,
    experiments=(TheWorstElement(), EveryBatchSize(), Modes(), NotFinite(), AnotherShape(), Refusal()),
    misconceptions=(
        *(EachElementByItself, NotRelative, AnAverage, DifferencesWithTheirSign, ProbabilitiesCompared),
        *(OnlyThePredictedClasses, OneBatchSize, ComparedInTrainMode, LeftInEvalMode, EveryModuleToTrainMode),
        *(NanNeverLarger, ShapesThatBroadcast, TheRefusalPassedOn, TheRefusedBatchSizeLeftOut),
    ),
    hints=(
        "Which differences between two programs would a single number hide from you: those at one batch size, in one element, "
        "in one mode?",
        "Compare a model with itself, in train mode and in eval mode. Then with lambda x: model(x)[:, :1], with outputs of "
        "which one is NaN, and with a function that raises. What does your function answer to each?",
        "For each b, with x the first b inputs: the largest |exported(x) - model(x)| over the largest |model(x)|; infinity "
        "for an exception, another shape or NaN. The answer is the largest of these.",
    ),
)
