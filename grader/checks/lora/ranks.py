"""Exercise 6.7: how many singular values hold a share of what fine-tuning changed."""

import math
from numbers import Integral

import torch
from torch import Tensor, nn

from grader.checks.lora.adapters import attempt, failed
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from helpers.lora import rank_of_update

exercise = Exercise(__name__, "6.7", rank_of_update, core=4)

SPECTRUM = (12.0, 10.0, 10.0, 5.0, 5.0, 5.0, 4.0, 3.0)  # no way to count comes within 0.009 of one of the shares
SHARES = (0.5, 0.65, 0.8, 0.9)
SIDE = 8  # the smaller side of every matrix here, of one row or column aside
WHAT = "what rank_of_update returns"


def _frame(trial: Trial, size: int, vectors: int) -> Tensor:
    """Orthonormal columns, (size, vectors), each of which sums to 0: taking means away changes nothing made from them."""
    return torch.linalg.qr(torch.cat([torch.ones(size, 1), trial.normal(size, vectors)], 1)).Q[:, 1:]


def _scale(trial: Trial) -> float:
    return 2.0 ** trial.integer(-4, 4)


def _few_equal(trial: Trial, vectors: int, rows: int = 0, scale: float = 0) -> Tensor:
    """A tall matrix of rank `vectors`, all of whose singular values are one number: no way to weigh them matters."""
    rows, scale = rows or SIDE + trial.integer(2, 5), scale or _scale(trial)
    return scale * _frame(trial, rows, vectors) @ _frame(trial, SIDE, vectors).T


@exercise.experiment("shares of squares", 1)
class SharesOfSquares(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        def update(rows: int, columns: int) -> Tensor:
            sides = [torch.cat([torch.ones(size, 1), trial.normal(size, SIDE - 1)], 1) for size in (rows, columns)]
            left, right = (torch.linalg.qr(side).Q for side in sides)
            turn = torch.linalg.qr(trial.normal(SIDE, SIDE)).Q  # one vector of the left is constant, none of the right
            return _scale(trial) * left * torch.tensor(SPECTRUM) @ (right @ turn).T

        longer = SIDE + trial.integer(2, 5)
        line = _scale(trial) * trial.normal(longer)
        return {
            "tall": update(longer, SIDE),
            "wide": update(SIDE, longer),
            "diagonal": _scale(trial) * torch.diag(torch.tensor(SPECTRUM)),  # rows of many lengths
            "one-row": line[None],
            "one-column": line[:, None],
        }

    def measure(self, subject, inputs):
        return {
            name: [_counted(subject, torch.zeros_like(update), update, share) for share in SHARES]
            for name, update in inputs.items()
        }

    def facts(self, raw, inputs):
        return {f"for shares of {list(SHARES)}, {name} matrix": counts for name, counts in raw.items()}


@exercise.experiment("the update alone", 1)
class TheUpdateAlone(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        rows, scale = SIDE + trial.integer(2, 5), _scale(trial)
        weight = torch.diag(torch.tensor([12.0, 11.0, 10.0, 8.0, 3.0, 2.0]))
        update = torch.zeros(6, 6)
        update[1, 2] = update[2, 1] = 2.5  # turns singular vectors; their singular values move by less
        left, right = _frame(trial, rows, 6), _frame(trial, SIDE, 6)
        before, after = (scale * left @ matrix @ right.T for matrix in (weight, weight + update))
        near = torch.ones(rows, SIDE)  # whose rounding is a fiftieth of the update that is added
        return {"before": before, "after": after, "near": near, "small": near + 1e-5 * _few_equal(trial, 3, rows, scale=1.0)}

    def measure(self, subject, inputs):
        return {
            "count": _counted(subject, inputs["before"], inputs["after"], 0.9),
            "small": _counted(subject, inputs["near"], inputs["small"], 0.9),
        }

    def facts(self, raw, inputs):
        return {
            "for an update of two equal singular values": raw["count"],
            "for three beside a far larger weight": raw["small"],
        }


@exercise.experiment("kernels", 2)
class Kernels(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = trial.integer(4, 6)

        def update(channels: Tensor, kernels: Tensor) -> Tensor:
            """Terms of one size, each an output's pattern x an input's x a kernel, (8, inputs, 3, 2)."""
            terms = _frame(trial, SIDE, channels.shape[1]), channels, kernels
            return torch.einsum("ok,ik,sk->ois", *terms).unflatten(2, (3, 2)) * _scale(trial)

        def unit(size: int, vectors: int) -> Tensor:
            return torch.linalg.qr(trial.normal(size, vectors)).Q

        return {
            "channels": update(unit(inputs, 3), unit(6, 1).expand(6, 3)),
            "kernels": update(unit(inputs, 1).expand(inputs, 2), unit(6, 2)),
        }

    def measure(self, subject, inputs):
        return {name: _counted(subject, torch.zeros_like(update), update, 0.9) for name, update in inputs.items()}

    def facts(self, raw, inputs):
        counts = {name: count if count <= SIDE else "more than the matrix has rows" for name, count in raw.items()}
        return {
            "three terms that differ in their channels": counts["channels"],
            "two terms that differ in their kernels": counts["kernels"],
        }


@exercise.experiment("nothing changed", 3)
class NothingChanged(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {
            "linear": _few_equal(trial, SIDE - 1),
            "kernel": _few_equal(trial, SIDE - 1).unflatten(1, (2, 2, 2)),
            "row": trial.normal(1, SIDE),
        }

    def measure(self, subject, inputs):
        return {name: _counted(subject, weight, weight.clone(), 0.9) for name, weight in inputs.items()}

    def facts(self, raw, inputs):
        return {
            "for two equal weights": raw["linear"],
            "for two equal kernels, and two equal rows": [raw["kernel"], raw["row"]],
        }


@exercise.experiment("parameters", 4)
class Parameters(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"update": _few_equal(trial, 3)}

    def measure(self, subject, inputs):
        update = inputs["update"]
        _counted(subject, torch.zeros_like(update), update, 0.9)  # what raises here raises for any weight
        trained = nn.Parameter(torch.zeros_like(update)), nn.Parameter(update)
        return {"count": attempt(lambda: _counted(subject, *trained, 0.9))}

    def facts(self, raw, inputs):
        return {"for three equal singular values, as parameters": "an error" if failed(raw["count"]) else raw["count"]}

    def notes(self, raw, inputs):
        raised = failed(raw["count"])
        return {"for three equal singular values, as parameters": raised} if raised else {}


@exercise.experiment("half precision", 5)
class HalfPrecision(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {name: _few_equal(trial, 3) for name in ("float16", "bfloat16")}

    def measure(self, subject, inputs):
        plain = inputs["float16"]
        _counted(subject, torch.zeros_like(plain), plain, 0.9)

        def in_half(name: str) -> int:
            update = inputs[name].to(getattr(torch, name))
            return _counted(subject, torch.zeros_like(update), update, 0.9)

        return {name: attempt(lambda name=name: in_half(name)) for name in inputs}

    def facts(self, raw, inputs):
        counts = {name: "an error" if failed(count) else count for name, count in raw.items()}
        return {f"for three equal singular values, {name}": count for name, count in counts.items()}

    def notes(self, raw, inputs):
        return {f"for three equal singular values, {name}": failed(count) for name, count in raw.items() if failed(count)}


@exercise.experiment("an int", 6)
class AnInt(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"update": _few_equal(trial, 3)}

    def measure(self, subject, inputs):
        number = subject(torch.zeros_like(inputs["update"]), inputs["update"], 0.9)
        expect_number(number, WHAT)
        kinds = {"a tensor": Tensor, "an int": Integral, "a float": float}  # NumPy's ints are some, too
        return {"kind": next((name for name, kind in kinds.items() if isinstance(number, kind)), type(number).__name__)}

    def facts(self, raw, inputs):
        return {"the number is": raw["kind"]}


def _counted(subject, before: Tensor, after: Tensor, share: float) -> int:
    number = expect_number(subject(before, after, share), WHAT)
    if number != round(number):
        raise WrongReturn(f"rank_of_update must return a whole number, got {number:g}.")
    return round(number)


# --- the misconceptions ---------------------------------------------------------------------------------------------


def _fewest(energy: Tensor, share: float) -> int:
    """How many of these numbers, in their order, sum to at least `share` of them all; 0 if all are 0."""
    energy = energy.flatten()
    if not energy.any():
        return 0
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1


def rank_of(
    before: Tensor,
    after: Tensor,
    share: float,
    *,
    wide=lambda weight: weight.double(),
    update=lambda before, after: after - before,
    matrix=lambda update: update.flatten(1),
    power=2,
    threshold=lambda share: share,
    count=lambda fewest: fewest,
    order=lambda energy: energy,
) -> int:
    """The fewest singular values that hold a share of the squares: a right solution, with an option for each piece of it."""
    change = update(wide(before.detach()), wide(after.detach()))
    return count(_fewest(order(torch.linalg.svdvals(matrix(change)) ** power), threshold(share)))


CHANGES = {
    "not squared": {"power": 1},
    "share of the norm": {"threshold": lambda share: share**2},
    "squared twice": {"power": 4},
    "error of the norm": {"threshold": lambda share: 1 - (1 - share) ** 2},
    "position for a number": {"count": lambda fewest: max(fewest - 1, 0)},
    "one too many": {"count": lambda fewest: fewest + 1 if fewest else 0},
    "means taken away": {"matrix": lambda update: update.flatten(1) - update.flatten(1).mean(0)},
    "the weight instead of its update": {"update": lambda before, after: after},
    "kernel by kernel": {"matrix": lambda update: update},
    "outputs and inputs on one side": {"matrix": lambda update: update.flatten(2).flatten(0, 1) if update.ndim > 2 else update},
    "half precision as it comes": {"wide": lambda weight: weight},
    "one of nothing": {"count": lambda fewest: max(fewest, 1)},
    "the smallest first": {"order": lambda energy: energy.flip(-1)},
    "a tensor for an int": {"count": torch.tensor},
}
exercise.misconceptions_of(rank_of, CHANGES)


@exercise.misconception("compared with the largest")
def compared_with_the_largest(before, after, share):
    singular = torch.linalg.svdvals((after - before).double().flatten(1))
    return int(((singular > 0) & (singular >= (1 - share) * singular[0])).sum())


@exercise.misconception("the rank, whatever the share")
def the_rank(before, after, share):
    return int(torch.linalg.matrix_rank((after - before).double().flatten(1), rtol=0.1))


@exercise.misconception("share of how many there are")
def share_of_how_many(before, after, share):
    return math.ceil(share * min(after.flatten(1).shape))


@exercise.misconception("difference of the singular values")
def difference_of_the_singular_values(before, after, share):
    was, now = (torch.linalg.svdvals(weight.detach().double().flatten(1)) for weight in (before, after))
    return _fewest((now - was).square(), share)
