"""Exercise 5.5 in other styles."""

import math
from functools import reduce

import numpy as np
import torch

from grader.checks.batchnorm.pooling import (
    difference_of_squares,
    divided_by_n,
    mean_of_the_means,
    read_twice,
    variance_of_a_single_value,
)


def deviations_from_the_first_value(batches):
    origin, n = None, 0
    for batch in batches:
        values = torch.movedim(batch, 1, -1).reshape(-1, batch.size(1))
        if origin is None:
            origin = values[0].clone()  # near enough to the mean, and float32 is fine from there
            linear, square = torch.zeros_like(origin), torch.zeros_like(origin)
        deviation = values - origin
        linear += deviation.sum(dim=0)
        square += deviation.pow(2).sum(dim=0)
        n += values.size(0)
    return [origin + linear / n, (square - linear.pow(2) / n) / (n - 1)]


class Welford:
    """One value of each channel after the other, in float32."""

    def __call__(self, batches):
        n = 0
        for batch in batches:
            for value in batch.swapaxes(0, 1).flatten(1).unbind(1):
                n += 1
                if n == 1:
                    mean, m2 = value.clone(), torch.zeros_like(value)
                else:
                    delta = value - mean
                    mean = mean + delta / n
                    m2 = torch.addcmul(m2, delta, value - mean)
        return mean, m2.div(n - 1)


def summaries_first_and_then_all_at_once(batches):
    counts, means, variances = [], [], []
    for batch in batches:
        var, mean = torch.var_mean(batch.double(), dim=(0, *range(2, batch.dim())), unbiased=False)
        counts.append(math.prod(batch.shape) / batch.shape[1])
        means.append(mean)
        variances.append(var)
    weights = torch.tensor(counts, dtype=torch.double).unsqueeze(1)
    means, variances, n = torch.stack(means), torch.stack(variances), weights.sum()
    mean = (weights * means).sum(0) / n
    within, between = (weights * variances).sum(0), (weights * (means - mean) ** 2).sum(0)
    return torch.stack([mean, (within + between) / (n - 1)])


def in_numpy(batches):
    def describe(batch):
        rows = np.moveaxis(np.asarray(batch, dtype=np.float64), 1, 0).reshape(batch.shape[1], -1)
        return rows.shape[1], np.average(rows, 1), np.var(rows, 1) * rows.shape[1]

    def join(left, right):
        a, m, s = left
        b, k, t = right
        return a + b, (a * m + b * k) / (a + b), s + t + np.square(m - k) * a * b / (a + b)

    n, mean, squares = reduce(join, map(describe, batches))
    return torch.from_numpy(mean).float(), torch.from_numpy(squares / (n - 1)).float()


def both_averaged(batches):
    rows = ((row.mean(1), row.var(1, correction=0)) for row in map(_rows, batches))
    return tuple(torch.stack(figures).mean(0).float() for figures in zip(*rows, strict=True))


def textbook_with_n_and_all_in_memory(batches):
    rows = torch.cat([b.movedim(1, 0).flatten(1) for b in [*batches]], 1).double()
    return rows.mean(1).float(), rows.var(1, correction=0).float()


def _rows(batch):
    return batch.double().movedim(1, 0).flatten(1)


def _described(batches):
    """For each batch: number of values and of samples, mean, sum of squared deviations."""
    rows_and_samples = ((_rows(batch), len(batch)) for batch in batches)
    return [(rows.shape[1], n, rows.mean(1), rows.var(1, correction=0) * rows.shape[1]) for rows, n in rows_and_samples]


def _together(described):
    """Number of values, mean, sum of squared deviations."""
    n = sum(count for count, *_ in described)
    mean = sum(count * own for count, _, own, _ in described) / n
    return n, mean, sum(squares + count * (own - mean) ** 2 for count, _, own, squares in described)


def mean_of_samples(batches):
    described = _described(batches)
    n, _, squares = _together(described)
    mean = sum(samples * own for _, samples, own, _ in described) / sum(samples for _, samples, *_ in described)
    return mean.float(), (squares / (n - 1)).float()


def half_of_the_mean_so_far(batches):
    described = _described(batches)
    n, _, squares = _together(described)
    return reduce(lambda mean, own: (mean + own) / 2, [own for _, _, own, _ in described]), squares / (n - 1)


def spread_within(batches):
    described = _described(batches)
    n, mean, _ = _together(described)
    return mean.float(), (sum(squares for *_, squares in described) / (n - 1)).float()


def one_less_for_every_batch(batches):
    described = _described(batches)
    n, mean, squares = _together(described)
    return mean.float(), (squares / max(1, n - len(described))).float()


def samples_less_one(batches):
    described = _described(batches)
    n, mean, squares = _together(described)
    samples = sum(samples for _, samples, *_ in described)
    return mean.float(), (squares / n * samples / (samples - 1)).float()


def single_values_are_no_batch(batches):
    described = _described(batches)
    n, _, squares = _together([each for each in described if each[0] > 1])
    return _together(described)[1].float(), (squares / (n - 1)).float()


def single_values_with_a_spread(batches):
    """The unbiased variance of one value is taken as 1."""
    described = _described(batches)
    n, mean, squares = _together(described)
    return mean.float(), ((squares + sum(count == 1 for count, *_ in described)) / (n - 1)).float()


def pooled_to_samples(batches):
    """Every sample counts by the mean of its positions."""
    n, mean, squares = _together(_described(b.reshape(*b.shape[:2], -1).double().mean(2) for b in batches))
    return mean.float(), (squares / (n - 1)).float()


def negative_variances_clamped(batches):
    mean, var = difference_of_squares(batches)
    return mean, var.clamp(min=1e-8)


def with_the_square_of_the_mean(batches):
    """The right merge, of means and of means of squares, in float32."""
    n, mean, square = 0, 0.0, 0.0
    for batch in batches:
        rows = batch.movedim(1, 0).flatten(1)
        share = rows.shape[1] / (n + rows.shape[1])
        mean = (1 - share) * mean + share * rows.mean(1)
        square = (1 - share) * square + share * rows.pow(2).mean(1)
        n += rows.shape[1]
    return mean, (square - mean.pow(2)) * (n / (n - 1))


def one_cat_after_the_other(batches):
    everything = None
    for batch in batches:
        rows = batch.double().transpose(0, 1).flatten(1)
        everything = rows if everything is None else torch.cat([everything, rows], dim=1)
    return everything.mean(1).float(), everything.var(1).float()


def numbers_in_lists(batches):
    columns = None
    for batch in batches:
        rows = batch.transpose(0, 1).flatten(1).tolist()
        columns = rows if columns is None else [[*column, *row] for column, row in zip(columns, rows, strict=True)]
    return torch.tensor([np.mean(column) for column in columns]), torch.tensor([np.var(column, ddof=1) for column in columns])


def arrays_in_a_list(batches):
    array = np.concatenate([np.moveaxis(np.array(batch), 1, -1).reshape(-1, batch.shape[1]) for batch in batches])
    return torch.from_numpy(array.mean(0, dtype=float)), torch.from_numpy(array.var(0, ddof=1, dtype=float))


def measured_and_then_read(batches):
    count = sum(batch.numel() // batch.shape[1] for batch in batches)
    total = sum(_rows(batch).sum(1) for batch in batches)
    squares = sum((_rows(batch) - (total / count)[:, None]).pow(2).sum(1) for batch in batches)
    return total / count, squares / (count - 1)


CORRECT = [deviations_from_the_first_value, Welford(), summaries_first_and_then_all_at_once, in_numpy]
REWRITTEN = {
    "spread between batches lost": spread_within,
    "batches of one value left out": single_values_are_no_batch,
    "positions averaged first": pooled_to_samples,
    "all batches kept": one_cat_after_the_other,
    "difference of two large numbers": with_the_square_of_the_mean,
}
BROKEN = {
    1: [mean_of_the_means, mean_of_samples, half_of_the_mean_so_far],
    2: [divided_by_n, spread_within, one_less_for_every_batch, samples_less_one],
    3: [negative_variances_clamped, with_the_square_of_the_mean],
    4: [one_cat_after_the_other, numbers_in_lists, arrays_in_a_list, measured_and_then_read, read_twice],
    5: [variance_of_a_single_value, single_values_are_no_batch, single_values_with_a_spread],
}
COMBINED = [
    ({"mean of the batches' means", "spread between batches lost"}, both_averaged),
    ({"divided by n", "all batches kept"}, textbook_with_n_and_all_in_memory),
]

EQUIVALENT = {
    "n, mean, squares = (0, 0.0, 0.0) -> n, mean, squares = (0, 1.0, 0.0)": "while n is 0, the first mean has no weight",
    "values = batch.double().transpose(0, 1).flatten(1) -> "
    "values = batch.double().transpose(1, 0).flatten(1)": "the two axes are exchanged either way",
    "values = batch.double().transpose(0, 1).flatten(1) -> "
    "values = batch.transpose(0, 1).flatten(1)": "float32 is right to 1 % too, if deviations are from the mean",
    "return (mean.float(), (squares / (n - 1)).float()) -> "
    "return (mean, (squares / (n - 1)).float())": "the dtype of the result is not asked for",
    "return (mean.float(), (squares / (n - 1)).float()) -> "
    "return (mean.float(), squares / (n - 1))": "the dtype of the result is not asked for",
}
