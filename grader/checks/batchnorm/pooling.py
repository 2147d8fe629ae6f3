"""Exercise 5.5: mean and variance over batches, as if they were one."""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from grader.checks.batchnorm.cuts import known_means, known_variances, rows_of, uneven, which, which_far
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor, misconception
from helpers import expect
from helpers.batchnorm import pooled_statistics


class MeanOfAllValues(Experiment):
    """The mean is that of all values, however they are cut into batches."""

    def draw(self, trial: Trial) -> dict:
        return {"batches": uneven(trial, [(2,), (9,), (4,), (6 + trial.integer(0, 3),)], channels=trial.integer(3, 5))}

    def measure(self, subject, inputs):
        return {"mean": _pooled(subject, inputs["batches"], inputs["batches"])["mean"]}

    def facts(self, raw, inputs):
        return {"the mean is": which(raw["mean"], known_means(inputs["batches"]))}


class VarianceOfAllValues(MeanOfAllValues):
    """The variance is the unbiased one of all values: also the batches' means differ from each other."""

    points = 2

    def measure(self, subject, inputs):
        return {"var": _pooled(subject, inputs["batches"], inputs["batches"])["var"]}

    def facts(self, raw, inputs):
        return {"the variance is": which(raw["var"], known_variances(inputs["batches"]))}


class EveryPositionCounts(MeanOfAllValues):
    """Every position of every sample is a value of its channel, and batches may be of different sizes there too."""

    def draw(self, trial: Trial) -> dict:
        sizes = [(2, 2, 2), (5, 1, 3), (3, 4, trial.integer(2, 4))]
        return {"batches": uneven(trial, sizes, channels=trial.integer(3, 5))}


class FarFromZero(Experiment):
    """With a mean of 100 and a standard deviation of 0.01, the variance is right to 1 %."""

    points = 3

    def draw(self, trial: Trial) -> dict:
        far = uneven(trial, [(4, 9), (12, 2), (40, 1), (6, 6)], channels=6, offset=100.0, unit=0.002)
        return {"far": far, "near": [batch - 100 for batch in far]}  # exact: the difference of two near float32 numbers

    def measure(self, subject, inputs):
        found = {name: _pooled(subject, batches, batches)["var"] for name, batches in inputs.items()}
        return {name: var.nan_to_num(-1, -1, -1) for name, var in found.items()}  # NaN is no variance, and neither is -1

    def facts(self, raw, inputs):
        words = {name: which_far(raw[name], known_variances(inputs[name])) for name in inputs}
        return {"the variance is": words["far"], "that of the same values less 100 is": words["near"]}

    def notes(self, raw, inputs):
        right = known_variances(inputs["far"])["that of all values, divided by n - 1"][0]
        return {"the variance is": f"such as {raw['far'][0]:.2g} where {right[0]:.2g} is right"}


class BatchesOfOneValue(Experiment):
    """A batch may hold one value per channel."""

    def draw(self, trial: Trial) -> dict:
        return {"batches": [*uneven(trial, [(1,), (4,), (1,), (1,)], 4), *uneven(trial, [(7,)], 4)]}

    def measure(self, subject, inputs):
        var = _pooled(subject, inputs["batches"], inputs["batches"])["var"]
        return {"finite": bool(var.isfinite().all()), "var": var.nan_to_num(0, 0, 0)}

    def facts(self, raw, inputs):
        found = which(raw["var"], known_variances(inputs["batches"])) if raw["finite"] else "NaN or infinite"
        return {"the variance is": found}


class NothingKept(Experiment):
    """Batches that come one by one are read once and not kept."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        sizes = [(5,), (2,), (4,), (6,), (3,)]
        return {"batches": [batch for _ in range(4) for batch in uneven(trial, sizes, channels)]}

    def measure(self, subject, inputs):
        held: list[int] = []
        var = _pooled(subject, _one_by_one(inputs["batches"], held), inputs["batches"])["var"]
        return {"held": max(held, default=0), "finite": bool(var.isfinite().all()), "var": var.nan_to_num(0, 0, 0)}

    def facts(self, raw, inputs):
        known = known_variances(inputs["batches"]) | {"0": [torch.zeros(len(raw["var"]), dtype=torch.float64)]}
        return {
            "the variance is": which(raw["var"], known) if raw["finite"] else "NaN or infinite",
            "batches in memory at once": "few" if raw["held"] <= len(inputs["batches"]) // 2 else "most of them",
        }


def _pooled(subject, batches, drawn: list[Tensor]) -> dict[str, Tensor]:
    pair = subject(batches)
    if not isinstance(pair, tuple | list | Tensor) or len(pair) != 2:
        question = " Is there a return?" if pair is None else ""
        raise WrongReturn(f"pooled_statistics must return mean and var, got {expect.describe(pair)}.{question}")
    channels = drawn[0].shape[1]
    return {
        name: expect_tensor(values, (channels,), name).detach().clone()
        for name, values in zip(("mean", "var"), pair, strict=True)
    }


def _one_by_one(batches: list[Tensor], held: list[int]) -> Iterator[Tensor]:
    """Clones of the batches; after each, note how many are in memory, whole or as views. Copies of them are not seen."""
    given: list[weakref.ref] = []
    for batch in batches:
        copy = batch.clone()
        given.append(weakref.ref(copy.untyped_storage()))
        yield copy
        del copy
        held.append(sum(storage() is not None for storage in given))


def _summary(batch: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number of values per channel, their mean and their sum of squared deviations."""
    rows = rows_of(batch)
    return rows.shape[1], rows.mean(1), rows.var(1, correction=0) * rows.shape[1]


def _merge(summaries) -> tuple[int, Tensor, Tensor]:
    n, mean, squares = next(summaries := iter(summaries))
    for count, other, more in summaries:
        shift = other - mean
        squares = squares + more + shift**2 * n * count / (n + count)
        mean = mean + shift * count / (n + count)
        n += count
    return n, mean, squares


def _finish(n: int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    return mean.float(), (squares / (n - 1)).float()


@misconception(
    "mean of the batches' means",
    hint="Two batches, one of a single 0 and one of nine 1s. What is the mean of the ten numbers, and what do you get?",
    source="a line of reasoning: right for batches of equal size, and the last batch of a data set is short",
)
def mean_of_the_means(batches):
    summaries = [_summary(batch) for batch in batches]
    return torch.stack([mean for _, mean, _ in summaries]).mean(0).float(), _finish(*_merge(summaries))[1]


@misconception(
    "spread between batches lost",
    hint="One batch holds only 0s, another only 1s. What is the variance of each, and what is that of all the numbers?",
    source="a line of reasoning: what works for the mean is done to the variance; BatchNorm with momentum=None does so",
)
def mean_of_the_variances(batches):
    summaries = [_summary(batch) for batch in batches]
    return _finish(*_merge(summaries))[0], torch.stack([squares / n for n, _, squares in summaries]).mean(0).float()


@misconception(
    "difference of two large numbers",
    hint="Print the mean of x² and the square of the mean of x for numbers around 100. In which digit do they differ?",
    source="a known weakness of a library for precise BatchNorm: E[x²] - E[x]² in float32 became negative",
)
def difference_of_squares(batches):
    n, total, squares = 0, 0.0, 0.0
    for batch in batches:
        rows = batch.transpose(0, 1).flatten(1)
        n, total, squares = n + rows.shape[1], total + rows.sum(1), squares + rows.square().sum(1)
    mean = total / n
    return mean, (squares / n - mean**2) * n / (n - 1)


@misconception(
    "moving average",
    hint="Reverse the order of the batches. Does your result change, and should it?",
    source="what BatchNorm itself does in training, where the statistics it follows are moving as well",
)
def moving_average(batches):
    mean, var = 0.0, 1.0
    for batch in batches:
        rows = rows_of(batch)
        mean = 0.9 * mean + 0.1 * rows.mean(1)
        var = 0.9 * var + 0.1 * rows.var(1, correction=0)
    return mean.float(), var.float()


@misconception(
    "last batch only",
    hint="Change something in the first batch. Does your result move?",
    source="a line of reasoning: each round of the loop computes the statistics anew; momentum=1.0 does the same",
)
def last_batch_only(batches):
    for batch in batches:
        n, mean, squares = _summary(batch)
    return mean.float(), (squares / max(1, n - 1)).float()


@misconception(
    "divided by n",
    hint="Two values, 0 and 2. Which variance would running_var store for them, 1 or 2?",
    source="a line of reasoning: BatchNorm normalises with the biased variance, and stores the unbiased one",
)
def divided_by_n(batches):
    n, mean, squares = _merge(_summary(batch) for batch in batches)
    return mean.float(), (squares / n).float()


@misconception(
    "channels pooled too",
    hint="One channel holds only 0s, another only 1s. Does your result say so?",
    source="a line of reasoning: mean() and var() without axes give one number for all channels",
)
def channels_pooled_too(batches):
    summaries = []
    for batch in batches:
        summaries.append(_summary(batch.reshape(-1, 1)))
        channels = batch.shape[1]
    return tuple(values.expand(channels) for values in _finish(*_merge(summaries)))


@misconception(
    "samples counted, not values",
    hint="How many values of one channel are in a batch of shape (n, channels, h, w)? Compare with the number you weigh it by.",
    source="a line of reasoning: len(batch) is the number of values for (n, channels), and only there",
)
def samples_counted(batches):
    summaries = ((len(batch), *_summary(batch)) for batch in batches)
    return _finish(*_merge((samples, mean, squares * samples / count) for samples, count, mean, squares in summaries))


@misconception(
    "read twice",
    hint="Run over a generator in two loops, one after the other, and count the rounds of the second. How many are there?",
    source="a line of reasoning: the textbook's variance needs the mean first, so it takes two passes",
)
def read_twice(batches):
    n, mean = 0, 0.0
    for batch in batches:
        rows = rows_of(batch)
        mean = mean + rows.sum(1)
        n += rows.shape[1]
    mean = mean / n
    squares = torch.zeros_like(mean)
    for batch in batches:
        squares += (rows_of(batch) - mean[:, None]).square().sum(1)
    return _finish(n, mean, squares)


@misconception(
    "all batches kept",
    hint="Suppose that the batches are 100 GB of images, read from disk one by one. How much of that do you hold at the end?",
    source="a line of reasoning: torch.cat makes the definition a single line, and the data set is small today",
)
def all_batches_kept(batches):
    rows = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], dim=1).double()
    return rows.mean(1).float(), rows.var(1).float()


@misconception(
    "variance of a single value",
    hint="What does torch say is the variance of one number, and what is 0 times that?",
    source="a line of reasoning: (n - 1) * var is the sum of squares, until n is 1 and var is NaN",
)
def variance_of_a_single_value(batches):
    summaries = ((rows.shape[1], rows.mean(1), rows.var(1) * (rows.shape[1] - 1)) for rows in map(rows_of, batches))
    return _finish(*_merge(summaries))


EXERCISE = Exercise(
    number="5.5",
    name="pooled_statistics",
    reference=pooled_statistics,
    experiments=(
        *(MeanOfAllValues(), VarianceOfAllValues(), EveryPositionCounts()),
        *(FarFromZero(), BatchesOfOneValue(), NothingKept()),
    ),
    misconceptions=(
        *(mean_of_the_means, mean_of_the_variances, difference_of_squares, moving_average, last_batch_only),
        *(divided_by_n, channels_pooled_too, samples_counted, read_twice, all_batches_kept, variance_of_a_single_value),
    ),
    hints=(
        "What do you have to remember of the batches so far, so that a further one can be added to them?",
        "Take the batches 0, 2 and 10, 10, 10, 10. Compute count, mean and sum of squared deviations of each and of all six "
        "numbers. By how much is the sum of squares of all larger than those of the two together?",
        "Two sets with counts a and b, means m and k: together m + (k - m) b / (a + b), and the sums of squared deviations "
        "add up, plus (k - m)² a b / (a + b). In float64, or deviation by deviation, but not as a difference of squares.",
    ),
)
