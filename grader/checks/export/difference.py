"""Exercise 8.1: how far an exported model is from its original, at every batch size, and where."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from operator import itemgetter

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.export.errors import (
    AVERAGE,
    BY_EXPORT,
    OF_PROBABILITIES,
    RELATIVE_ERROR,
    WIDTH,
    Refused,
    Remembering,
    Table,
    above_zero,
    ask,
    figure_of,
    figures_of,
    read,
    trained_afterwards,
    worst,
    worst_but_nan,
)
from grader.experiment import Exercise, Experiment, Trial
from grader.near import near
from helpers.parity import largest_error

exercise = Exercise(__name__, "8.1", largest_error, core=5)

SMALL = 2.0**-18  # what 1 can be added to without rounding; torch.allclose takes twice as much for nothing
WORST = 1.0003  # so much is one element more than those beside it


@exercise.experiment("the worst element", 1, 2)
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
        outputs[positive], outputs[largest], outputs[ratio], outputs[worst] = 0.6, -1.0, 0.004, 0.04
        differences[worst], differences[upwards], differences[ratio] = -0.08, 0.03, -0.02  # the worst changes its sign
        differences[largest] = -0.06  # so the largest output of the export is another one
        scale = 0.005 + 0.005 * torch.rand((), generator=trial.generator)
        return {
            "inputs": trial.normal(n, 3),
            "outputs": scale * outputs,
            "differences": scale * differences,
            "worst": list(worst),
        }

    def measure(self, subject, inputs):
        outputs, n = inputs["outputs"], len(inputs["inputs"])
        model = Table(inputs["inputs"], outputs)
        exported = Table(inputs["inputs"], outputs + inputs["differences"])
        return ask(subject, model, exported, inputs["inputs"], (n,))

    def facts(self, raw, inputs):
        figure = figure_of(raw, figures_of(inputs["outputs"], inputs["outputs"] + inputs["differences"]))
        where = "the worst element's" if raw["index"] == inputs["worst"] else "None" if raw["index"] is None else "another"
        return {"the error": figure, "`index`": where if figure == RELATIVE_ERROR else None}


@exercise.experiment("the first inputs", 1, 2)
class TheFirstInputs(Experiment):
    def draw(self, trial: Trial) -> dict:
        # The last rows are in no batch. The largest output of the largest batch makes its error smaller than the other's.
        sizes, rows = (2, 4, 7), torch.tensor([0.2, 0.3, 0.5, 0.4, 2.0, 0.3, 0.1, 9.0, 9.0, 9.0])
        differences = torch.tensor([0.001, 0.004, 0.003, 0.05, 0.04, 0.06, 0.02, 5.0, 5.0, 5.0])
        scale = 0.001 + 0.001 * torch.rand((), generator=trial.generator)
        signs = trial.normal(10, WIDTH).sign()
        spread = 0.5 + 0.5 * torch.rand(10, WIDTH, generator=trial.generator)
        spread[:, trial.integer(0, WIDTH - 1)] = 1  # the largest of its row
        return {
            "inputs": trial.normal(10, 3),
            "outputs": scale * rows[:, None] * signs * spread,
            "differences": scale * differences[:, None] * spread,
            "sizes": sizes,
        }

    def measure(self, subject, inputs):
        model, seen = Table(inputs["inputs"], inputs["outputs"]), []
        table = Table(inputs["inputs"], inputs["outputs"] + inputs["differences"])

        def exported(x: Tensor) -> Tensor:
            seen.append(len(x))
            return table(x)

        return ask(subject, model, exported, inputs["inputs"], inputs["sizes"]) | {"seen": seen}

    def facts(self, raw, inputs):
        size, output = inputs["differences"].abs().amax(1), inputs["outputs"].abs().amax(1)
        largest = {b: size[:b].max() for b in inputs["sizes"]}
        known = {
            "that of the first rows": [largest[4] / output[:4].max()],
            "the largest difference of all batches, over the largest output of all": [size[:7].max() / output[:7].max()],
            "the largest difference, not divided": [size[:7].max()],
            "the largest difference over the largest output of its own row": [(size / output)[:7].max()],
            "0": [0.0],
        }
        each = [figures_of(inputs["outputs"][:b], (inputs["outputs"] + inputs["differences"])[:b]) for b in inputs["sizes"]]
        known |= {word: [figure for figures in each for figure in figures[word]] for word in (AVERAGE, OF_PROBABILITIES)}
        return {
            "the error of rows of different sizes": figure_of(raw, known),
            "batch sizes that the export was given": "all" if set(inputs["sizes"]) <= set(raw["seen"]) else "not all",
        }


class _FourSizes(Experiment):
    """Draws batch sizes in any order, 1 among them."""

    def draw(self, trial: Trial) -> dict:
        sizes = torch.tensor([1, trial.integer(2, 3), trial.integer(5, 6), trial.integer(7, 8)])
        return {"inputs": trial.normal(11, 3), "sizes": sizes[trial.permutation(4)].tolist()}

    def ask_ones(
        self, subject, inputs: dict, change: Callable[[Tensor], Tensor], wanted: int, sizes: Sequence[int] = ()
    ) -> dict:
        """Ask about a model whose outputs are all 1, where it is the same how differences are divided and averaged.

        Args:
            wanted: the batch size to name; the answer has no kind if the export was not run at it.
        """
        model = Table(inputs["inputs"], inputs["inputs"].new_ones(len(inputs["inputs"]), WIDTH))
        table, seen = copy.deepcopy(model), []

        def exported(x: Tensor) -> Tensor:
            seen.append(len(x))
            return change(table(x))

        answer = ask(subject, model, exported, inputs["inputs"], sizes or inputs["sizes"])
        named = {wanted: "the worst", None: "None"}.get(answer["batch_size"], "another")
        return answer | {"batch_size": named} | ({} if wanted in seen else {"kind": None})


@exercise.experiment("every batch size", 2)
class EveryBatchSize(_FourSizes):
    points = 2

    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        unit, column = 0.01 + 0.01 * torch.rand((), generator=trial.generator).item(), trial.integer(1, WIDTH - 1)
        return drawn | {"unit": unit, "column": column}

    def measure(self, subject, inputs):
        def spoil(out: Tensor, times: dict[int, float]) -> Tensor:
            out = out + inputs["unit"] * times.get(len(out), 1)
            out[len(out) // 2, inputs["column"]] *= WORST
            return out

        largest = inputs["sizes"][-1]
        raw = {"small": self.ask_ones(subject, inputs, lambda out: out + (2 if len(out) == largest else 1) * SMALL, largest)}
        for place, size_of_worst in zip(("first", "second", "third", "last"), inputs["sizes"], strict=True):
            times = {b: 5 if b == size_of_worst else 2 + (k + 1) % 3 / 2 for k, b in enumerate(inputs["sizes"])}
            raw[place] = self.ask_ones(subject, inputs, lambda out, times=times: spoil(out, times), size_of_worst)
        return raw

    def facts(self, raw, inputs):
        worst, *others = [self._figures(times, inputs) for times in (5, 1, 2, 2.5, 3)]
        known = {
            "that of the worst": worst[RELATIVE_ERROR],
            "that of another": [figures[RELATIVE_ERROR][0] for figures in others],
            "0": [0.0],
            **{
                word: [figure for figures in (worst, *others) for figure in figures[word]]
                for word in (BY_EXPORT, OF_PROBABILITIES)
            },
            "1": [1.0],
        }
        raw, small = {place: answer for place, answer in raw.items() if place != "small"}, raw["small"]
        figures = [figure_of(answer, known) for answer in raw.values()]
        right = all(figure == "that of the worst" for figure in figures)
        return {
            "the error, if it is largest at the first size": figures[0],
            "the error, if it is largest at a later one": figures[1] if len(set(figures[1:])) == 1 else "it depends",
            "the error, if it is some millionths": figure_of(small, known | {"that of the worst": [2 * SMALL]}),
            "`batch_size`": [answer["batch_size"] for answer in raw.values()] if right else None,
            "`index`": self._index(raw, inputs) if right else None,
        }

    def _figures(self, times: float, inputs: dict) -> dict[str, list[float]]:
        """What can be made of a row that is off by so many units."""
        ones = torch.ones(1, WIDTH)
        spoilt = ones + times * inputs["unit"]
        spoilt[0, inputs["column"]] *= WORST
        return figures_of(ones, spoilt)

    def _index(self, raw: dict, inputs: dict) -> str:
        worst = [[size // 2, inputs["column"]] for size in inputs["sizes"]]
        answers = [answer["index"] for answer in raw.values()]
        return "the worst element's" if answers == worst else "None" if None in answers else "another"


@exercise.experiment("refusal", 3)
class Refusal(_FourSizes):
    def measure(self, subject, inputs):
        # The types that TorchScript and torch.export raise where a batch size was built in, and one that nobody foresaw.
        refusals = (
            RuntimeError("shape '[2, 3]' is invalid"),
            AssertionError("Guard failed: input.size()[0] == 2"),
            Refused("got an invalid dimension"),
            IndexError("too many rows"),
        )
        return {
            place: {"type": type(refusal).__name__, **self._refused(subject, inputs, refusal, size)}
            for place, refusal, size in zip(("first", "second", "third", "last"), refusals, inputs["sizes"], strict=True)
        }

    def _refused(self, subject, inputs, refusal: Exception, size: int) -> dict:
        def refuse(out: Tensor) -> Tensor:
            if len(out) == size:
                raise refusal
            return out + 0.01

        try:
            return self.ask_ones(subject, inputs, refuse, size)
        except Exception as error:
            if error is not refusal:
                raise
            return {"kind": "none, the exception came through"}

    def facts(self, raw, inputs):
        infinite = all(answer["kind"] == "infinite" for answer in raw.values())
        return {
            **{f"{place} batch size refused with {answer['type']}: the error": answer["kind"] for place, answer in raw.items()},
            "`batch_size` of each": [answer["batch_size"] for answer in raw.values()] if infinite else None,
        }


@exercise.experiment("not finite", 4)
class NotFinite(_FourSizes):
    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        return drawn | {"column": trial.integer(1, WIDTH - 1)}

    def measure(self, subject, inputs):
        def spoil(out: Tensor, size: int) -> Tensor:
            out = out + 0.01
            if len(out) == size:
                out[size // 2, inputs["column"]] = math.nan
            return out

        return {
            place: self.ask_ones(subject, inputs, lambda out, size=size: spoil(out, size), size)
            for place, size in zip(("first", "second", "third", "last"), inputs["sizes"], strict=True)
        }

    def facts(self, raw, inputs):
        kinds = {place: answer["kind"] for place, answer in raw.items()}
        sizes = [answer["batch_size"] for answer in raw.values()]
        return {
            **{f"NaN at the {place} batch size: the error": kind for place, kind in kinds.items()},
            "`batch_size` of each": sizes if set(kinds.values()) == {"infinite"} else None,
        }


@exercise.experiment("another shape", 4)
class AnotherShape(_FourSizes):
    def draw(self, trial: Trial) -> dict:
        middle, small, large = trial.integer(4, 5), trial.integer(2, 3), trial.integer(6, 8)
        return {"inputs": trial.normal(11, 3), "sizes": [middle, small, large]}

    def measure(self, subject, inputs):
        middle, small, large = inputs["sizes"]

        def changed(change: Callable[[Tensor], Tensor], size: int) -> dict:
            sizes = [middle, size, large]
            return self.ask_ones(subject, inputs, lambda out: change(out) if len(out) == size else out, size, sizes)

        def in_no_way_alike() -> dict:
            try:
                return changed(torch.flatten, small)
            except Exception:  # of the subtraction
                return {"kind": "none, an exception came through"}

        return {
            "column": changed(lambda out: out[:, :1], small),
            "squeezed": changed(torch.squeeze, 1),
            "more": changed(lambda out: out[None], small),
            "flat": in_no_way_alike(),
        }

    def facts(self, raw, inputs):
        kinds = {name: answer["kind"] for name, answer in raw.items()}
        sizes = [answer.get("batch_size") for answer in raw.values()]
        return {
            f"(b, 1) in place of (b, {WIDTH}): the error": kinds["column"],
            f"({WIDTH},) in place of (1, {WIDTH}): the error": kinds["squeezed"],
            f"(1, b, {WIDTH}) in place of (b, {WIDTH}): the error": kinds["more"],
            f"({WIDTH} b,) in place of (b, {WIDTH}): the error": kinds["flat"],
            "`batch_size` of each": sizes if set(kinds.values()) == {"infinite"} else None,
        }


class _OfModes(_FourSizes):
    """Draws a model in train mode, parts of which are in eval mode."""

    def draw(self, trial: Trial) -> dict:
        dropouts = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
        model = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48), dropouts, nn.Linear(48, 4))
        model[1].eval()  # frozen
        dropouts[trial.integer(0, 1)].eval()
        return super().draw(trial) | {"model": model}


@exercise.experiment("eval mode", 5)
class EvalMode(_OfModes):
    def measure(self, subject, inputs):
        model = inputs["model"]
        return ask(subject, model, copy.deepcopy(model).eval(), inputs["inputs"], inputs["sizes"])

    def facts(self, raw, inputs):
        far = "far from 0" if raw["kind"] == "a number" else raw["kind"]
        return {"the error of an exact export": "0, or nearly" if far == "far from 0" and near(raw["error"], 0) else far}


@exercise.experiment("modes", 6)
class Modes(_OfModes):
    def measure(self, subject, inputs):
        model, raw = inputs["model"], {}
        exact = copy.deepcopy(model).eval()

        def refuse(x: Tensor) -> Tensor:
            if len(x) == inputs["sizes"][1]:
                raise Refused("a batch size that was built in")
            return exact(x)

        for name, exported in {"a comparison": exact, "a refusal": refuse}.items():
            with traces.kept(model, "modes"):
                with suppress(Refused):
                    ask(subject, model, exported, inputs["inputs"], inputs["sizes"])
                raw[name] = traces.of(model)
        return raw

    def facts(self, raw, inputs):
        changes = {name: traces.changes(inputs["model"], after) for name, after in raw.items()}
        return {f"after {name}: {fact}": value for name in changes for fact, value in changes[name].items()}


@exercise.experiment("no graph", 7)
class NoGraph(_FourSizes):
    def measure(self, subject, inputs):
        model = Remembering(inputs["inputs"])
        table, alive = copy.deepcopy(model.table), []

        def exported(x: Tensor) -> Tensor:
            alive.append(model.alive())
            return table(x) + 0.01

        answer = subject(model, exported, inputs["inputs"], tuple(inputs["sizes"]))
        read(answer)
        return {"alive": [*alive, *model.before, model.alive()]}

    def facts(self, raw, inputs):
        return {"graphs of the model that were kept": "some" if any(raw["alive"]) else "none"}


@exercise.experiment("exact", 8)
class Exact(_FourSizes):
    def measure(self, subject, inputs):
        answers = {}
        for name, sizes in {"several": inputs["sizes"], "one": inputs["sizes"][1:2]}.items():
            model = Table(inputs["inputs"], inputs["inputs"].new_ones(len(inputs["inputs"]), WIDTH))
            answer = ask(subject, model, copy.deepcopy(model), inputs["inputs"], sizes)
            named = "None" if answer["batch_size"] is None else "one of them" if answer["batch_size"] in sizes else "another"
            answers[name] = answer | {"batch_size": named}
        return answers

    def facts(self, raw, inputs):
        return {"`batch_size` of an export without any error": [answer["batch_size"] for answer in raw.values()]}


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
    choose=worst,
    graph=torch.no_grad,
    batch=lambda inputs, size: inputs[:size],
):
    """A right solution, in pieces that a misconception replaces."""
    rows = []
    with keeping(model), graph():
        evaluated(model)
        for size in batch_sizes:
            wanted = model(batch(inputs, size))
            row = {"error": math.inf, "batch_size": size, "index": None}
            try:
                got = exported(batch(inputs, size))
            except skipped:
                continue
            except caught:
                got = None
            if got is not None and (broadcast or got.shape == wanted.shape):
                each = errors(wanted, got).detach()
                each = torch.where(each.isnan(), nan, each)
                row |= {"error": figure(each).item(), "index": torch.unravel_index(each.argmax(), each.shape)}
            rows.append(row)
    return choose(rows)


exercise.misconceptions_of(
    solution,
    {
        "each element by itself": {"errors": lambda wanted, got: (got - wanted).abs() / wanted.abs()},
        "not relative": {"errors": lambda wanted, got: (got - wanted).abs()},
        "relative to the export": {"errors": lambda wanted, got: (got - wanted).abs() / got.abs().max()},
        "each row by itself": {
            "errors": lambda wanted, got: (got - wanted).flatten(1).abs() / wanted.flatten(1).abs().amax(1, keepdim=True)
        },
        "close is equal": {
            "errors": lambda wanted, got: torch.where(got.isclose(wanted), 0, (got - wanted).abs() / wanted.abs().max())
        },
        "an average": {"figure": torch.mean},
        "differences with their sign": {"errors": lambda wanted, got: (got - wanted) / wanted.abs().max()},
        "probabilities compared": {"errors": lambda wanted, got: (got.softmax(-1) - wanted.softmax(-1)).abs()},
        "only the predicted classes": {"errors": lambda wanted, got: (got.argmax(-1) != wanted.argmax(-1)).float()},
        "one batch size": {"choose": itemgetter(-1)},
        "compared in train mode": {"evaluated": lambda model: model},
        "left in eval mode": {"keeping": nullcontext},
        "every module to train mode": {"keeping": trained_afterwards},
        "NaN never larger": {"nan": math.nan, "choose": worst_but_nan},
        "shapes that broadcast": {"broadcast": True},
        "the refusal passed on": {"caught": ()},
        "the refused batch size left out": {"skipped": Exception},
        "a graph kept": {"graph": nullcontext},
        "nothing for an exact export": {"choose": above_zero},
    },
)
