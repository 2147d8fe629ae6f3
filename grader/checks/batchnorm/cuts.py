"""What one can make of several batches in place of their joint mean and variance, for exercises 5.5 and 5.6."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grader.experiment import Trial
from grader.near import near

BEFORE, DIFFERENT, RIGHT_TO_1_PERCENT = "as before", "different", "right to 1 %"
Known = dict[str, list[Tensor]]  # a name, and the values (channels,) that it stands for

_MOMENTUM = 0.1  # of a moving average: what torch's layers start with


def rows_of(batch: Tensor) -> Tensor:
    """(n, channels, ...) -> (channels, values), float64."""
    return batch.double().transpose(0, 1).flatten(1)


def known_statistics(batches: list[Tensor], stored: Mapping[str, Tensor] | None = None) -> dict[str, Known]:
    """The means that have a name, as "mean", and the variances, as "var".

    `stored` is what there was before, under the same two keys: there a moving average may begin, or at 0 and 1, or with
    the first batch.
    """
    before = {key: [value.double()] for key, value in stored.items()} if stored else {"mean": [], "var": []}
    rows = [rows_of(batch) for batch in batches]
    together, means = torch.cat(rows, 1), torch.stack([row.mean(1) for row in rows])
    samples = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    values = torch.tensor([row.shape[1] for row in rows], dtype=torch.float64)
    biased = torch.stack([row.var(1, correction=0) for row in rows])
    unbiased = biased * (values / (values - 1).clamp_min(1))[:, None]
    n = samples.sum()
    weighted = samples @ means / n
    as_samples = samples @ (biased + (means - weighted) ** 2)
    squares = together.var(1, correction=0) * values.sum()
    zero = torch.zeros_like(means[0])
    mean = {
        BEFORE: before["mean"],
        "that of all values": [together.mean(1)],
        "the mean of the batches' means": [means.mean(0)],
        "counted in samples": [weighted, together.sum(1) / n],
        "a moving average": _moving(means, [zero, *before["mean"]]),
        "the last batch's": [means[-1]],
        "that of all channels together": [together.mean().expand(len(together))],
    }
    var = {
        BEFORE: before["var"],
        "that of all values, divided by n - 1": [squares / (values.sum() - 1)],
        "that of all values, divided by n": [squares / values.sum()],
        "the mean of the batches' variances": [
            *(variances.mean(0) for variances in (biased, unbiased)),
            *(weights @ biased / weights.sum() for weights in (values, samples)),
            values @ biased / (values.sum() - 1),
            *(weights @ unbiased / weights.sum() for weights in (values, samples, values - 1)),
        ],
        "counted in samples": [as_samples / (n - 1), as_samples / n, squares / (n - 1), squares / n],
        "a moving average": [
            average for variances in (biased, unbiased) for average in _moving(variances, [zero, zero + 1, *before["var"]])
        ],
        "the last batch's": [biased[-1], unbiased[-1]],
        "that of all channels together": [together.var(correction=c).expand(len(together)) for c in (1, 0)],
    }
    return {"mean": mean, "var": var}


def known_as(values: Tensor, known: Known, equal: Callable[[Tensor, Tensor], bool] = near) -> str:
    """The first name under which the values are known."""
    return next((name for name, candidates in known.items() if any(equal(values, c) for c in candidates)), DIFFERENT)


def far_known_as(var: Tensor, known: Known) -> str:
    """The same for variances of numbers far from zero, to 1 %: what is right divides by n or n - 1, it is all the same."""
    name = known_as(var, known, lambda values, expected: _to_a_part(values, expected, 0.01))
    if name.startswith("that of all values"):
        return RIGHT_TO_1_PERCENT
    lost = name == DIFFERENT and not _to_a_part(var, known["that of all values, divided by n - 1"][0], 0.5)
    return "lost in rounding: off by more than half of itself" if lost else name


def _to_a_part(values: Tensor, expected: Tensor, part: float) -> bool:
    """Whether no channel is off by more than that part of what is expected."""
    return bool(((values.double() - expected).abs() <= part * expected.abs()).all())


def uneven(trial: Trial, sizes: list[tuple[int, ...]], channels: int, offset: float = 0.0, unit: float = 1.0) -> list[Tensor]:
    """Batches of sizes (n, ...) in random order, each with its own mean and spread in each channel: none is like another.

    Later channels are spread wider: up to twice `unit`, and more by what is drawn.
    """
    width = unit * (1 + torch.arange(channels) / channels)
    shift, spread = torch.tensor([0.0, 4.0, -3.0, 7.0, -6.0]), torch.tensor([1.0, 3.0, 0.5, 2.0, 1.5])
    batches = []
    for i, (n, *rest) in enumerate(sizes):
        column = (-1, *[1] * len(rest))
        own = (shift[i] + trial.normal(channels)).view(column)
        batches.append(offset + width.view(column) * (own + spread[i] * trial.normal(n, channels, *rest)))
    return [batches[i] for i in trial.permutation(len(sizes))]


def _moving(each: Tensor, starts: list[Tensor]) -> list[Tensor]:
    """Moving averages over the batches: from each start, and from the first batch."""
    averages = []
    for average, rest in (*((start, each) for start in starts), (each[0], each[1:])):
        for batch in rest:
            average = (1 - _MOMENTUM) * average + _MOMENTUM * batch
        averages.append(average)
    return averages
