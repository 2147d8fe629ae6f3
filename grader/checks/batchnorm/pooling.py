"""Exercise 5.5: mean and variance over batches, as if they were one."""

import gc
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from grader.checks.batchnorm.cuts import (
    DIFFERENT,
    RIGHT_TO_1_PERCENT,
    far_known_as,
    known_as,
    known_statistics,
    rows_of,
    uneven,
)
from grader.experiment import Exercise, Experiment, Trial, expect_tensor, wrong_return
from grader.near import near
from helpers.batchnorm import pooled_statistics

exercise = Exercise(__name__, "5.5", pooled_statistics, core=4)


def _pooled(subject, batches: Iterable[Tensor], channels: int) -> dict[str, Tensor]:
    """What the subject makes of batches of so many channels; or a sentence about its form."""
    pair = subject(batches)
    if not isinstance(pair, tuple | list | Tensor) or len(pair) != 2:
        raise wrong_return("pooled_statistics must return mean and var", pair)
    return {
        name: expect_tensor(values, (channels,), name).detach().clone()
        for name, values in zip(("mean", "var"), pair, strict=True)
    }


def _finite(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without NaN, which is a fact like any other here: it is no variance, and neither is -1."""
    return {name: values.nan_to_num(-1, -1, -1) for name, values in pair.items()}


class _ManyBatches(Experiment):
    """Draws batches of different sizes, each of values of its own kind."""

    def draw(self, trial: Trial) -> dict:
        return {"batches": uneven(trial, [(2,), (9,), (4,), (6 + trial.integer(0, 3),)], channels=trial.integer(3, 5))}

    def measure(self, subject, inputs):
        return _pooled(subject, inputs["batches"], inputs["batches"][0].shape[1])


@exercise.experiment("mean of all values", 1)
class MeanOfAllValues(_ManyBatches):
    def measure(self, subject, inputs):
        return {"mean": super().measure(subject, inputs)["mean"]}

    def facts(self, raw, inputs):
        return {"the mean is": known_as(raw["mean"], known_statistics(inputs["batches"])["mean"])}


@exercise.experiment("variance of all values", 2)
class VarianceOfAllValues(_ManyBatches):
    points = 2

    def measure(self, subject, inputs):
        return {"var": super().measure(subject, inputs)["var"]}

    def facts(self, raw, inputs):
        return {"the variance is": known_as(raw["var"], known_statistics(inputs["batches"])["var"])}


@exercise.experiment("every position counts", 1, 2)
class EveryPositionCounts(_ManyBatches):
    def draw(self, trial: Trial) -> dict:
        sizes = [(2, 2, 2), (5, 1, 3), (3, 4, trial.integer(2, 4))]
        return {"batches": uneven(trial, sizes, channels=trial.integer(3, 5))}

    def facts(self, raw, inputs):
        known, batches = known_statistics(inputs["batches"]), inputs["batches"]
        of_samples = known_statistics([rows_of(batch).T.reshape(len(batch), -1, batch.shape[1]).mean(1) for batch in batches])
        right = "that of all values, divided by n - 1"
        known["var"]["that of the samples' means"] = [
            values for name in (right, "that of all values, divided by n") for values in of_samples["var"][name]
        ]
        return {f"the {name} over positions is": known_as(raw[key], known[key]) for name, key in FIGURES}


FIGURES = ("mean", "mean"), ("variance", "var")


@exercise.experiment("odd batches", 1, 2)
class OddBatches(Experiment):
    def draw(self, trial: Trial) -> dict:
        wide = uneven(trial, [(4,), (6,), (3,)], 6)
        return {
            "plain": uneven(trial, [(2,), (9,), (4,)], 4),
            "one channel": uneven(trial, [(3,), (5,)], 1),
            "a single batch": uneven(trial, [(7, 2)], 4),
            "two values in all": uneven(trial, [(2,)], 3),
            "batches of one size": uneven(trial, [(4,), (4,), (4,)], 3),
            "a hundred batches": uneven(trial, [(2, 1)], 3) * 50 + uneven(trial, [(3, 1)], 3) * 50,
            "three dimensions after the channels": uneven(trial, [(2, 3, 1, 2), (3, 2, 2, 1)], 3),
            "slices that are not contiguous": [batch[:, ::2] for batch in wide],
            "no spread": [torch.full((size, 3), 2.5) for size in (3, 2)],
        }

    def measure(self, subject, inputs):
        pairs = {name: _finite(_pooled(subject, batches, batches[0].shape[1])) for name, batches in inputs.items()}
        return {key: {name: pair[key] for name, pair in pairs.items()} for _, key in FIGURES}

    def facts(self, raw, inputs):
        right = {"mean": _joint_mean, "var": _joint_variance}
        facts = {}
        for name, key in FIGURES:
            cases = [case for case, values in raw[key].items() if near(values, right[key](inputs[case]))]
            # What is wrong of plain batches, too, has nothing to do with these.
            facts[f"batches of which the {name} is right"] = cases[1:] if "plain" in cases else None
        return facts


def _joint_mean(batches: list[Tensor]) -> Tensor:
    return torch.cat([rows_of(batch) for batch in batches], 1).mean(1)


def _joint_variance(batches: list[Tensor]) -> Tensor:
    return torch.cat([rows_of(batch) for batch in batches], 1).var(1)


@exercise.experiment("far from zero", 3)
class FarFromZero(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        far = uneven(trial, [(4, 9), (12, 2), (40, 1), (6, 6)], channels=6, offset=100.0, unit=0.002)
        return {"far": far, "near": [batch - 100 for batch in far]}  # exact: the difference of two near float32 numbers

    def measure(self, subject, inputs):
        return {name: _finite(_pooled(subject, batches, 6))["var"] for name, batches in inputs.items()}

    def facts(self, raw, inputs):
        words = {name: far_known_as(raw[name], known_statistics(inputs[name])["var"]) for name in inputs}
        # What is wrong of values around 0, too, has nothing to do with 100.
        return {"the variance of values around 100 is": words["far"] if words["near"] == RIGHT_TO_1_PERCENT else None}

    def notes(self, raw, inputs):
        right = known_statistics(inputs["far"])["var"]["that of all values, divided by n - 1"][0]
        return {"the variance of values around 100 is": f"such as {raw['far'][0]:.2g} where {right[0]:.2g} is right"}


@exercise.experiment("nothing kept", 4)
class NothingKept(Experiment):
    points = 2
    on_fake_gpu = False  # whose memory is the CPU's

    def draw(self, trial: Trial) -> dict:
        return {"batches": [batch for _ in range(5) for batch in uneven(trial, [(60, 4), (40, 5), (50, 3)], 3)]}

    def measure(self, subject, inputs):
        kept: list[int] = []
        pairs = [_pooled(subject, batches, 3) for batches in (inputs["batches"], _one_by_one(inputs["batches"], kept))]
        from_list, one_by_one = map(_finite, pairs)
        return {"list": from_list, "one by one": one_by_one, "kept": kept}

    def facts(self, raw, inputs):
        alike = all(near(raw["one by one"][key], raw["list"][key]) for _, key in FIGURES)
        few, later = raw["kept"][:1], raw["kept"][1:]
        given = sum(batch.nbytes for batch in inputs["batches"][FEW:LAST])
        grown = bool(later) and later[0] - few[0] > given / 2
        return {
            "of batches that come one by one it makes": "what it makes of a list" if alike else "something else",
            "values in memory": "those of most batches" if grown else "few",
        }


FEW, LAST = 3, 12  # batches after which memory is looked at


def _one_by_one(batches: list[Tensor], kept: list[int]) -> Iterator[Tensor]:
    """Clones of the batches. Notes in `kept` the bytes in memory after `FEW` of them and after `LAST`."""
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    gc.freeze()  # what is there already need not be looked at
    try:
        for number, batch in enumerate(batches):
            if number in (FEW, LAST):
                kept.append(_bytes_in_memory())
            yield batch.clone()
    finally:
        gc.unfreeze()
        if not traced:
            tracemalloc.stop()


def _bytes_in_memory() -> int:
    """Of the new tensors, and of Python's and NumPy's new objects."""
    in_python, _ = tracemalloc.get_traced_memory()
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            with suppress(NotImplementedError, RuntimeError):  # somebody else's, without memory of its own
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return in_python + sum(sizes.values())


@exercise.experiment("batches of one value", 5)
class BatchesOfOneValue(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"batches": [*uneven(trial, [(1,), (4,), (1,), (1,)], 4), *uneven(trial, [(7,)], 4)]}

    def measure(self, subject, inputs):
        var = _pooled(subject, inputs["batches"], 4)["var"]
        return {"finite": bool(var.isfinite().all()), "var": var.nan_to_num(-1, -1, -1)}

    def facts(self, raw, inputs):
        every, larger = inputs["batches"], [batch for batch in inputs["batches"] if len(batch) > 1]
        known = {"right": _known_variances(every), "that of the other batches": _known_variances(larger)}
        word = known_as(raw["var"], known) if raw["finite"] else "NaN or infinite"
        # Any other number: the variance is wrong, and it is not these batches that make it so.
        return {"the variance with batches of one value is": None if word == DIFFERENT else word}


def _known_variances(batches: list[Tensor]) -> list[Tensor]:
    """What may be divided by is another sentence's."""
    known = known_statistics(batches)["var"]
    return [values for name in known if name.startswith("that of all values, ") for values in known[name]]


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


@exercise.misconception("batches of one value left out")
def batches_of_one_value_left_out(batches):
    return _finish(*_merge(_summary(batch) for batch in batches if rows_of(batch).shape[1] > 1))


@exercise.misconception("positions averaged first")
def positions_averaged_first(batches):
    return _finish(*_merge(_summary(batch.flatten(2).mean(2) if batch.ndim > 2 else batch) for batch in batches))
