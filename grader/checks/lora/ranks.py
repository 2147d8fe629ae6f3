"""Exercise 6.7: how many singular values hold a share of what fine-tuning changed."""

import math

import torch
from torch import Tensor, nn

from grader.checks.lora.adapters import attempt, failed
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_number
from helpers.lora import rank_of_update

exercise = Exercise(__name__, "6.7", rank_of_update)

SPECTRUM = (12.0, 10.0, 10.0, 5.0, 5.0, 5.0, 4.0, 3.0)  # no way to count comes within 0.009 of one of the shares
SHARES = (0.5, 0.65, 0.8, 0.9)
SIDE = 8  # the smaller side of every matrix here


def _frame(trial: Trial, size: int, vectors: int) -> Tensor:
    """Orthonormal columns, (size, vectors), each of which sums to 0: taking means away changes nothing made from them."""
    return torch.linalg.qr(torch.cat([torch.ones(size, 1), trial.normal(size, vectors)], 1)).Q[:, 1:]


def _scale(trial: Trial) -> float:
    return 2.0 ** trial.integer(-4, 4)


def _few_equal(trial: Trial, vectors: int) -> Tensor:
    """A tall matrix of rank `vectors`, all of whose singular values are one number: no way to weigh them matters."""
    rows = SIDE + trial.integer(2, 5)
    return _scale(trial) * _frame(trial, rows, vectors) @ _frame(trial, SIDE, vectors).T


@exercise.experiment("shares of squares")
class SharesOfSquares(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        def update(rows: int, columns: int) -> Tensor:
            sides = [torch.cat([torch.ones(size, 1), trial.normal(size, SIDE - 1)], 1) for size in (rows, columns)]
            left, right = (torch.linalg.qr(side).Q for side in sides)
            turn = torch.linalg.qr(trial.normal(SIDE, SIDE)).Q  # one vector of the left is constant, none of the right
            return _scale(trial) * left * torch.tensor(SPECTRUM) @ (right @ turn).T

        longer = SIDE + trial.integer(2, 5)
        return {"tall": update(longer, SIDE), "wide": update(SIDE, longer)}

    def measure(self, subject, inputs):
        return {
            name: [_counted(subject, torch.zeros_like(update), update, share) for share in SHARES]
            for name, update in inputs.items()
        }

    def facts(self, raw, inputs):
        return {f"for shares of {list(SHARES)}, {name} matrix": counts for name, counts in raw.items()}


@exercise.experiment("the update alone")
class TheUpdateAlone(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        rows, scale = SIDE + trial.integer(2, 5), _scale(trial)
        weight = torch.diag(torch.tensor([12.0, 11.0, 10.0, 8.0, 3.0, 2.0]))
        update = torch.zeros(6, 6)
        update[1, 2] = update[2, 1] = 2.5  # turns singular vectors; their singular values move by less
        left, right = _frame(trial, rows, 6), _frame(trial, SIDE, 6)
        before, after = (scale * left @ matrix @ right.T for matrix in (weight, weight + update))
        return {"before": before, "after": after}

    def measure(self, subject, inputs):
        return {"count": _counted(subject, inputs["before"], inputs["after"], 0.9)}

    def facts(self, raw, inputs):
        return {"for an update of two equal singular values": raw["count"]}


@exercise.experiment("kernels")
class Kernels(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = trial.integer(4, 6)

        def update(channels: Tensor, kernels: Tensor) -> Tensor:
            """Terms of one size, each an output's pattern x an input's x a kernel, (8, inputs, 3, 3)."""
            terms = _frame(trial, SIDE, channels.shape[1]), channels, kernels
            return torch.einsum("ok,ik,sk->ois", *terms).unflatten(2, (3, 3)) * _scale(trial)

        def unit(size: int, vectors: int) -> Tensor:
            return torch.linalg.qr(trial.normal(size, vectors)).Q

        return {
            "channels": update(unit(inputs, 3), unit(9, 1).expand(9, 3)),
            "kernels": update(unit(inputs, 1).expand(inputs, 2), unit(9, 2)),
        }

    def measure(self, subject, inputs):
        return {name: _counted(subject, torch.zeros_like(update), update, 0.9) for name, update in inputs.items()}

    def facts(self, raw, inputs):
        counts = {name: count if count <= SIDE else "more than the matrix has rows" for name, count in raw.items()}
        return {
            "three terms that differ in their channels": counts["channels"],
            "two terms that differ in their kernels": counts["kernels"],
        }


@exercise.experiment("half precision")
class HalfPrecision(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        return {name: _few_equal(trial, 3).to(dtype) for name, dtype in names.items()}

    def measure(self, subject, inputs):
        plain = inputs["float32"]
        _counted(subject, torch.zeros_like(plain), plain, 0.9)  # what raises here raises for any weight

        def as_parameters(update: Tensor) -> int:
            return _counted(subject, nn.Parameter(torch.zeros_like(update)), nn.Parameter(update), 0.9)

        return {name: attempt(lambda update=update: as_parameters(update)) for name, update in inputs.items()}

    def facts(self, raw, inputs):
        counts = {name: "an error" if failed(count) else count for name, count in raw.items()}
        return {f"for three equal singular values, {name}": count for name, count in counts.items()}

    def notes(self, raw, inputs):
        return {f"for three equal singular values, {name}": failed(count) for name, count in raw.items() if failed(count)}


@exercise.experiment("nothing changed")
class NothingChanged(Experiment):
    def draw(self, trial: Trial) -> dict:
        weight = _few_equal(trial, SIDE - 1)
        return {"before": weight, "after": weight.clone()}

    def measure(self, subject, inputs):
        return {"count": _counted(subject, inputs["before"], inputs["after"], 0.9)}

    def facts(self, raw, inputs):
        return {"for two equal weights": raw["count"]}


def _counted(subject, before: Tensor, after: Tensor, share: float) -> int:
    number = expect_number(subject(before, after, share), "what rank_of_update returns")
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
) -> int:
    """The fewest singular values that hold a share of the squares: a right solution, with an option for each piece of it."""
    change = update(wide(before.detach()), wide(after.detach()))
    return count(_fewest(torch.linalg.svdvals(matrix(change)) ** power, threshold(share)))


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
}
exercise.misconceptions_of(rank_of, CHANGES)


@exercise.misconception("compared with the largest")
def compared_with_the_largest(before, after, share):
    singular = torch.linalg.svdvals((after - before).double().flatten(1))
    return int(((singular > 0) & (singular >= (1 - share) * singular[0])).sum())


@exercise.misconception("share of how many there are")
def share_of_how_many(before, after, share):
    return math.ceil(share * min(after.flatten(1).shape))


@exercise.misconception("difference of the singular values")
def difference_of_the_singular_values(before, after, share):
    was, now = (torch.linalg.svdvals(weight.detach().double().flatten(1)) for weight in (before, after))
    return _fewest((now - was).square(), share)
