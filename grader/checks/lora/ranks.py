"""Exercise 6.7: how many singular values hold a share of what fine-tuning changed."""

import math

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, misconception
from helpers.lora import rank_of_update

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


class SharesOfSquares(Experiment):
    """The fewest singular values whose squares sum to at least `share` of the sum of all squares."""

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


class TheUpdateAlone(Experiment):
    """What counts is after - before, however large the weight is beside it."""

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


class Kernels(Experiment):
    """A convolution's weight counts as the matrix (out_channels, in_channels / groups x kernel)."""

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
        return {
            "three terms that differ in their channels": _possible(raw["channels"]),
            "two terms that differ in their kernels": _possible(raw["kernels"]),
        }


class HalfPrecision(Experiment):
    """Weights may be float16 or bfloat16, and parameters that require gradients."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        return {name: _few_equal(trial, 3).to(dtype) for name, dtype in names.items()}

    def measure(self, subject, inputs):
        counts, errors = {}, {}
        for name, update in inputs.items():
            before, after = nn.Parameter(torch.zeros_like(update)), nn.Parameter(update)
            try:
                counts[name] = _counted(subject, before, after, 0.9)
            except WrongReturn:
                raise
            except Exception as error:
                if isinstance(error, NotImplementedError) and str(error).startswith("Exercise"):
                    raise  # the stub's
                counts[name], errors[name] = "an error", f"{type(error).__name__}: {error}"[:200]
        return {"counts": counts, "errors": errors}

    def facts(self, raw, inputs):
        return {f"for three equal singular values, {name}": count for name, count in raw["counts"].items()}

    def notes(self, raw, inputs):
        return {f"for three equal singular values, {name}": error for name, error in raw["errors"].items()}


class NothingChanged(Experiment):
    """If nothing changed, the answer is 0."""

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


def _possible(count: int) -> Fact:
    return count if count <= SIDE else "more than the matrix has rows"


def _matrix(before: Tensor, after: Tensor) -> Tensor:
    return (after.detach().double() - before.detach().double()).flatten(1)


def _fewest(energy: Tensor, share: float) -> int:
    """How many of these numbers, in their order, sum to at least `share` of them all; 0 if all are 0."""
    energy = energy.flatten()
    if not energy.any():
        return 0
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1


@misconception(
    "not squared",
    hint="Your shares are of the sum of the singular values. Which sum of theirs is the sum of the squares of all entries?",
    source="seen in public tools that resize LoRA files: the cumulative sum of the singular values themselves",
)
def not_squared(before, after, share):
    return _fewest(torch.linalg.svdvals(_matrix(before, after)), share)


@misconception(
    "share of the norm",
    hint="You compare norms, the statement compares their squares. Of singular values 4 and 3, does 4 hold 0.8 or 0.64?",
    source="seen in public tools that resize LoRA files: the squares are held against the square of the share",
)
def share_of_the_norm(before, after, share):
    return _fewest(torch.linalg.svdvals(_matrix(before, after)).square(), share**2)


@misconception(
    "squared twice",
    hint="Let the singular values be 4 and 3. Do you hold 16 and 9 against their sum, or 256 and 81 against theirs?",
    source="a line of reasoning: the eigenvalues of D D^T are taken for singular values; they are squares already",
)
def squared_twice(before, after, share):
    return _fewest(torch.linalg.svdvals(_matrix(before, after)) ** 4, share)


@misconception(
    "error of the norm",
    hint="An error of 0.1 of the norm is one of 0.01 of the squares. Which of the two may be left over for a share of 0.9?",
    source="a line of reasoning: the error of the best approximation is a norm, and at most 1 - share of it may remain",
)
def error_of_the_norm(before, after, share):
    return _fewest(torch.linalg.svdvals(_matrix(before, after)).square(), 1 - (1 - share) ** 2)


@misconception(
    "position for a number",
    hint="An update of rank 1 needs one singular value. What do you return for it, and from which number does that count?",
    source="torch.searchsorted and argmax return a position, and positions begin at 0",
)
def position_for_a_number(before, after, share):
    return max(_fewest(torch.linalg.svdvals(_matrix(before, after)).square(), share) - 1, 0)


@misconception(
    "one too many",
    hint="An update of rank 1 needs one singular value. How many have you added up when you find that it is enough?",
    source="an issue tracker: a tool that resizes LoRA files kept one singular value more than it was asked for",
)
def one_too_many(before, after, share):
    fewest = _fewest(torch.linalg.svdvals(_matrix(before, after)).square(), share)
    return fewest + 1 if fewest else 0


@misconception(
    "compared with the largest",
    hint="Each singular value was compared with the first, none was added to another. Of what is `share` a share?",
    source="torch.linalg.matrix_rank: its tolerances are limits for single values, in units of the largest",
)
def compared_with_the_largest(before, after, share):
    singular = torch.linalg.svdvals(_matrix(before, after))
    return int(((singular > 0) & (singular >= (1 - share) * singular[0])).sum())


@misconception(
    "share of how many there are",
    hint="Your answer depends on the shape alone. What is it for an update with one large singular value and seven tiny ones?",
    source="a line of reasoning: 90 % of the singular values, where 90 % of their squares are meant",
)
def share_of_how_many(before, after, share):
    update = _matrix(before, after)
    return math.ceil(share * min(update.shape))


@misconception(
    "means taken away",
    hint="Let every row of the weight move by the same vector: your answer misses it. Does the layer compute the same then?",
    source="scikit-learn's PCA centres the matrix, and torch.pca_lowrank does unless told otherwise",
)
def means_taken_away(before, after, share):
    update = _matrix(before, after)
    singular = torch.linalg.svdvals(update - update.mean(0))
    return _fewest(singular.square(), share) if update.any() else 0


@misconception(
    "the weight instead of its update",
    hint="Call it with two equal weights: your answer is not 0. Which of the two matrices does LoRA write as B A?",
    source="an issue tracker: a decomposition of the fine-tuned parameter, which is not of low rank, instead of its change",
)
def the_weight_instead(before, after, share):
    return _fewest(torch.linalg.svdvals(_matrix(torch.zeros_like(after), after)).square(), share)


@misconception(
    "difference of the singular values",
    hint="Two weights can have the same singular values in other directions. What is your answer then, and did nothing change?",
    source="a line of reasoning: decompose before, decompose after, compare",
)
def difference_of_the_singular_values(before, after, share):
    was, now = (torch.linalg.svdvals(weight.detach().double().flatten(1)) for weight in (before, after))
    return _fewest((now - was).square(), share)


@misconception(
    "kernel by kernel",
    hint="You found more singular values than there are rows. What shape has the result of the decomposition, and why?",
    source="an issue tracker: svd of a tensor with four dimensions is one for every pair of channels",
)
def kernel_by_kernel(before, after, share):
    update = after.detach().double() - before.detach().double()
    return _fewest(torch.linalg.svdvals(update).square(), share)


@misconception(
    "outputs and inputs on one side",
    hint="One side of your matrix is the kernel alone. On which side are the inputs of a Linear, and on which are yours?",
    source="a line of reasoning: view(-1, kernel) keeps the last two dimensions together and makes two of four",
)
def outputs_and_inputs_on_one_side(before, after, share):
    update = after.detach().double() - before.detach().double()
    if update.ndim > 2:
        update = update.flatten(2).flatten(0, 1)
    return _fewest(torch.linalg.svdvals(update).square(), share)


@misconception(
    "half precision as it comes",
    hint="Print the error. Which dtypes does the decomposition take, and what is lost if you convert before you subtract?",
    source="arcee-ai/mergekit issue 304: svd not implemented for 'BFloat16'",
)
def half_precision_as_it_comes(before, after, share):
    return _fewest(torch.linalg.svdvals((after - before).detach().flatten(1)).square(), share)


@misconception(
    "one of nothing",
    hint="Both weights are the same, and you say 1. Print the shares that your function compares: what is 0 divided by 0?",
    source="a line of reasoning: no comparison with NaN holds, so the count is 0, and the 1 is added to it",
)
def one_of_nothing(before, after, share):
    return max(_fewest(torch.linalg.svdvals(_matrix(before, after)).square(), share), 1)


EXERCISE = Exercise(
    number="6.7",
    name="rank_of_update",
    reference=rank_of_update,
    experiments=(SharesOfSquares(), TheUpdateAlone(), Kernels(), HalfPrecision(), NothingChanged()),
    misconceptions=(
        *(not_squared, share_of_the_norm, squared_twice, error_of_the_norm, position_for_a_number, one_too_many),
        *(
            compared_with_the_largest,
            share_of_how_many,
            means_taken_away,
            the_weight_instead,
            difference_of_the_singular_values,
        ),
        *(kernel_by_kernel, outputs_and_inputs_on_one_side, half_precision_as_it_comes, one_of_nothing),
    ),
    hints=(
        "The sum of the squares of all entries of a matrix is also a sum over its singular values. Which?",
        "Make updates that you know: one outer product, then a diagonal of 4 and 3. Print the singular values, their squares, "
        "and the running sum of these, divided by the last. Then do the same for a kernel, and for two equal weights.",
        "torch.linalg.svdvals of (after - before), both in float32 or float64 and flattened to (out, rest); squares; cumsum; "
        "one more than how many of the sums are below share times the total; 0 if the total is 0.",
    ),
)
