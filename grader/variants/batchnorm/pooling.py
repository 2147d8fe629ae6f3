"""Exercise 5.5 in other styles."""

import math
from functools import reduce

import numpy as np
import torch


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
    rows = [batch.double().movedim(1, 0).flatten(1) for batch in batches]
    means, variances = torch.stack([row.mean(1) for row in rows]), torch.stack([row.var(1, correction=0) for row in rows])
    return means.mean(0).float(), variances.mean(0).float()


def textbook_with_n_and_all_in_memory(batches):
    rows = torch.cat([b.movedim(1, 0).flatten(1) for b in [*batches]], 1).double()
    return rows.mean(1).float(), rows.var(1, correction=0).float()


CORRECT = [deviations_from_the_first_value, Welford(), summaries_first_and_then_all_at_once, in_numpy]
REWRITTEN = {}
BROKEN = {}
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
