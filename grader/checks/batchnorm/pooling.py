"""Exercise 5.5: mean and variance over batches, as if they were one."""

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from grader.checks.batchnorm.cuts import far_known_as, known_as, known_statistics, rows_of, uneven
from grader.experiment import Exercise, Experiment, Trial, expect_tensor, wrong_return
from helpers.batchnorm import pooled_statistics

exercise = Exercise(__name__, "5.5", pooled_statistics)


def _pooled(subject, batches: Iterable[Tensor], drawn: list[Tensor]) -> dict[str, Tensor]:
    """What the subject makes of the batches, which have the channels of those drawn; or a sentence about its form."""
    pair = subject(batches)
    if not isinstance(pair, tuple | list | Tensor) or len(pair) != 2:
        raise wrong_return("pooled_statistics must return mean and var", pair)
    channels = drawn[0].shape[1]
    return {
        name: expect_tensor(values, (channels,), name).detach().clone()
        for name, values in zip(("mean", "var"), pair, strict=True)
    }


@exercise.experiment("mean of all values")
class MeanOfAllValues(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"batches": uneven(trial, [(2,), (9,), (4,), (6 + trial.integer(0, 3),)], channels=trial.integer(3, 5))}

    def measure(self, subject, inputs):
        return {"mean": _pooled(subject, inputs["batches"], inputs["batches"])["mean"]}

    def facts(self, raw, inputs):
        return {"the mean is": known_as(raw["mean"], known_statistics(inputs["batches"])["mean"])}


@exercise.experiment("variance of all values")
class VarianceOfAllValues(MeanOfAllValues):
    points = 2

    def measure(self, subject, inputs):
        return {"var": _pooled(subject, inputs["batches"], inputs["batches"])["var"]}

    def facts(self, raw, inputs):
        return {"the variance is": known_as(raw["var"], known_statistics(inputs["batches"])["var"])}


@exercise.experiment("every position counts")
class EveryPositionCounts(MeanOfAllValues):
    def draw(self, trial: Trial) -> dict:
        sizes = [(2, 2, 2), (5, 1, 3), (3, 4, trial.integer(2, 4))]
        return {"batches": uneven(trial, sizes, channels=trial.integer(3, 5))}


@exercise.experiment("far from zero")
class FarFromZero(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        far = uneven(trial, [(4, 9), (12, 2), (40, 1), (6, 6)], channels=6, offset=100.0, unit=0.002)
        return {"far": far, "near": [batch - 100 for batch in far]}  # exact: the difference of two near float32 numbers

    def measure(self, subject, inputs):
        variances = {name: _pooled(subject, batches, batches)["var"] for name, batches in inputs.items()}
        return {name: var.nan_to_num(-1, -1, -1) for name, var in variances.items()}  # NaN is no variance, and neither is -1

    def facts(self, raw, inputs):
        words = {name: far_known_as(raw[name], known_statistics(inputs[name])["var"]) for name in inputs}
        return {"the variance is": words["far"], "that of the same values less 100 is": words["near"]}

    def notes(self, raw, inputs):
        right = known_statistics(inputs["far"])["var"]["that of all values, divided by n - 1"][0]
        return {"the variance is": f"such as {raw['far'][0]:.2g} where {right[0]:.2g} is right"}


@exercise.experiment("batches of one value")
class BatchesOfOneValue(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"batches": [*uneven(trial, [(1,), (4,), (1,), (1,)], 4), *uneven(trial, [(7,)], 4)]}

    def measure(self, subject, inputs):
        return _variance(subject, inputs["batches"], inputs["batches"])

    def facts(self, raw, inputs):
        known = known_statistics(inputs["batches"])["var"] | {"0": [torch.tensor(0.0)]}
        return {"the variance is": known_as(raw["var"], known) if raw["finite"] else "NaN or infinite"}


@exercise.experiment("nothing kept")
class NothingKept(BatchesOfOneValue):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        sizes = [(5,), (2,), (4,), (6,), (3,)]
        return {"batches": [batch for _ in range(4) for batch in uneven(trial, sizes, channels)]}

    def measure(self, subject, inputs):
        in_memory: list[int] = []
        variance = _variance(subject, _one_by_one(inputs["batches"], in_memory), inputs["batches"])
        return variance | {"in memory": max(in_memory, default=0)}

    def facts(self, raw, inputs):
        few = raw["in memory"] <= len(inputs["batches"]) // 2
        return super().facts(raw, inputs) | {"batches in memory at once": "few" if few else "most of them"}


def _variance(subject, batches: Iterable[Tensor], drawn: list[Tensor]) -> dict:
    """The variance, and whether it is finite: here that is a fact like any other."""
    var = _pooled(subject, batches, drawn)["var"]
    return {"finite": bool(var.isfinite().all()), "var": var.nan_to_num(0, 0, 0)}


def _one_by_one(batches: list[Tensor], in_memory: list[int]) -> Iterator[Tensor]:
    """Clones of the batches; after each, note how many are in memory, whole or as views. Copies of them are not seen."""
    given: list[weakref.ref] = []
    for batch in batches:
        copy = batch.clone()
        given.append(weakref.ref(copy.untyped_storage()))
        yield copy
        del copy
        in_memory.append(sum(storage() is not None for storage in given))


Summary = tuple[int, Tensor, Tensor]  # the number of values per channel, their mean, their sum of squared deviations


def _summary(batch: Tensor) -> Summary:
    rows = rows_of(batch)
    return rows.shape[1], rows.mean(1), rows.var(1, correction=0) * rows.shape[1]


def _merge(summaries: Iterable[Summary]) -> Summary:
    n, mean, squares = 0, 0.0, 0.0
    for count, its_mean, its_squares in summaries:
        shift = its_mean - mean
        squares = squares + its_squares + shift**2 * n * count / (n + count)
        mean = mean + shift * count / (n + count)
        n += count
    return n, mean, squares


def _finish(n: int, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    return mean.float(), (squares / (n - 1)).float()


@exercise.misconception("mean of the batches' means")
def mean_of_the_means(batches):
    summaries = [_summary(batch) for batch in batches]
    return torch.stack([mean for _, mean, _ in summaries]).mean(0).float(), _finish(*_merge(summaries))[1]


@exercise.misconception("spread between batches lost")
def mean_of_the_variances(batches):
    summaries = [_summary(batch) for batch in batches]
    return _finish(*_merge(summaries))[0], torch.stack([squares / n for n, _, squares in summaries]).mean(0).float()


@exercise.misconception("difference of two large numbers")
def difference_of_squares(batches):
    n, total, squares = 0, 0.0, 0.0
    for batch in batches:
        rows = batch.transpose(0, 1).flatten(1)
        n, total, squares = n + rows.shape[1], total + rows.sum(1), squares + rows.square().sum(1)
    mean = total / n
    return mean, (squares / n - mean**2) * n / (n - 1)


@exercise.misconception("moving average")
def moving_average(batches):
    mean, var = 0.0, 1.0
    for batch in batches:
        rows = rows_of(batch)
        mean = 0.9 * mean + 0.1 * rows.mean(1)
        var = 0.9 * var + 0.1 * rows.var(1, correction=0)
    return mean.float(), var.float()


@exercise.misconception("last batch only")
def last_batch_only(batches):
    for batch in batches:
        summary = _summary(batch)
    return _finish(*summary)


@exercise.misconception("divided by n")
def divided_by_n(batches):
    n, mean, squares = _merge(map(_summary, batches))
    return mean.float(), (squares / n).float()


@exercise.misconception("channels pooled too")
def channels_pooled_too(batches):
    summaries = []
    for batch in batches:
        channels = batch.shape[1]
        summaries.append(_summary(batch.reshape(-1, 1)))
    return tuple(values.expand(channels) for values in _finish(*_merge(summaries)))


@exercise.misconception("samples counted, not values")
def samples_counted(batches):
    summaries = ((len(batch), *_summary(batch)) for batch in batches)
    return _finish(*_merge((samples, mean, squares * samples / count) for samples, count, mean, squares in summaries))


@exercise.misconception("read twice")
def read_twice(batches):
    n, mean, _ = _merge(map(_summary, batches))
    squares = torch.zeros_like(mean)
    for batch in batches:
        squares += (rows_of(batch) - mean[:, None]).square().sum(1)
    return _finish(n, mean, squares)


@exercise.misconception("all batches kept")
def all_batches_kept(batches):
    rows = torch.cat([batch.transpose(0, 1).flatten(1) for batch in batches], dim=1).double()
    return rows.mean(1).float(), rows.var(1).float()


@exercise.misconception("variance of a single value")
def variance_of_a_single_value(batches):
    summaries = ((rows.shape[1], rows.mean(1), rows.var(1) * (rows.shape[1] - 1)) for rows in map(rows_of, batches))
    return _finish(*_merge(summaries))
