"""What one can make of several batches in place of their joint mean and variance, for exercises 5.5 and 5.6."""

from collections.abc import Callable

import torch
from torch import Tensor

from grader.experiment import Trial
from grader.near import near

OTHER = "something else"
Known = dict[str, list[Tensor]]  # a name, and the values (channels,) that it stands for

_MOMENTUM = 0.1  # of a moving average: what torch's layers start with


def rows_of(batch: Tensor) -> Tensor:
    """(n, channels, ...) -> (channels, values), float64."""
    return batch.double().transpose(0, 1).flatten(1)


def known_means(batches: list[Tensor], stored: Tensor | None = None) -> Known:
    """Means by name; `stored` is where a moving average may begin, beside 0 and the first batch."""
    rows = [rows_of(batch) for batch in batches]
    together, means = torch.cat(rows, 1), torch.stack([row.mean(1) for row in rows])
    samples = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    return {
        "that of all values": [together.mean(1)],
        "the mean of the batches' means": [means.mean(0)],
        "counted in samples": [samples @ means / samples.sum(), together.sum(1) / samples.sum()],
        "a moving average": _moving(means, [0 * means[0], *_there(stored)]),
        "the last batch's": [means[-1]],
        "that of all channels together": [together.mean().expand(len(together))],
    }


def known_variances(batches: list[Tensor], stored: Tensor | None = None) -> Known:
    """Variances by name; `stored` is where a moving average may begin, beside 0, 1 and the first batch."""
    rows = [rows_of(batch) for batch in batches]
    together, means = torch.cat(rows, 1), torch.stack([row.mean(1) for row in rows])
    samples = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    values = torch.tensor([row.shape[1] for row in rows], dtype=torch.float64)
    biased = torch.stack([row.var(1, correction=0) for row in rows])
    unbiased = biased * (values / (values - 1).clamp_min(1))[:, None]
    weighted = samples @ means / samples.sum()
    as_samples = samples @ (biased + (means - weighted) ** 2)
    squares = together.var(1, correction=0) * values.sum()
    n = samples.sum()
    return {
        "that of all values, divided by n - 1": [squares / (values.sum() - 1)],
        "that of all values, divided by n": [squares / values.sum()],
        "the mean of the batches' variances": [
            *(var.mean(0) for var in (biased, unbiased)),
            *(weights @ biased / weights.sum() for weights in (values, samples)),
            *(weights @ unbiased / weights.sum() for weights in (values, samples, values - 1)),
        ],
        "counted in samples": [as_samples / (n - 1), as_samples / n, squares / (n - 1), squares / n],
        "a moving average": [
            average
            for var in (biased, unbiased)
            for average in _moving(var, [0 * var[0], torch.ones_like(var[0]), *_there(stored)])
        ],
        "the last batch's": [biased[-1], unbiased[-1]],
        "that of all channels together": [together.var(correction=c).expand(len(together)) for c in (1, 0)],
    }


def which(values: Tensor, known: Known, equal: Callable[[Tensor, Tensor], bool] = near) -> str:
    """The first name under which the values are known."""
    return next((name for name, candidates in known.items() if any(equal(values, c) for c in candidates)), OTHER)


def which_far(var: Tensor, known: Known) -> str:
    """The same for variances of numbers far from zero, to 1 %: what is right divides by n or n - 1, it is all the same."""
    right = known["that of all values, divided by n - 1"][0]
    found = which(var, known, lambda values, wanted: _to_a_part(values, wanted, 0.01))
    if found.startswith("that of all values"):
        return "right to 1 %"
    return "lost in rounding: off by more than half of itself" if found == OTHER and not _to_a_part(var, right, 0.5) else found


def _to_a_part(values: Tensor, wanted: Tensor, part: float) -> bool:
    """Whether no channel is off by more than that part of what is wanted."""
    return bool(((values.double() - wanted).abs() <= part * wanted.abs()).all())


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


def _there(stored: Tensor | None) -> list[Tensor]:
    return [] if stored is None else [stored.double()]
