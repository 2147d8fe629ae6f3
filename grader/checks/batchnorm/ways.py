"""Every way to normalise a batch, and to move buffers, that exercise 5.1 can tell apart."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from grader.near import near

DIVISORS = {"n": 0, "n - 1": 1}  # what a variance is divided by, and the `correction` that torch calls it
SHARES: dict[str, Callable[[float], float]] = {  # of the batch in the new running statistics
    "momentum": lambda momentum: momentum,
    "1 - momentum": lambda momentum: 1 - momentum,
    "0, it stays": lambda momentum: 0.0,
    "0.1": lambda momentum: 0.1,
    "1": lambda momentum: 1.0,
}
ROOTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inside the root": lambda var, eps: (var + eps).sqrt(),
    "outside the root": lambda var, eps: var.sqrt() + eps,
    "nowhere, or another eps": lambda var, eps: (var + 1e-5).sqrt(),
}


def column(values: Tensor, x: Tensor) -> Tensor:
    """(channels,) -> (channels, 1, ...), which broadcasts along the channels of x."""
    return values.view(-1, *[1] * (x.ndim - 2))


def all_but_channels(dimensions: int) -> list[int]:
    return [axis for axis in range(dimensions) if axis != 1]


def moments(x: Tensor, axes: Sequence[int], correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over those axes, as they broadcast against x."""
    return x.mean(axes, keepdim=True), x.var(axes, correction=correction, keepdim=True)


def ways(x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> Iterator[tuple[dict[str, str | None], Tensor, Tensor]]:
    """Every way to normalise that this check knows: its facts, the normalised x, and what x was divided by."""
    rest = list(range(2, x.ndim))
    axes = {
        "the batch's, one for each channel": [0, *rest],
        "the sample's own, over all channels": [1, *rest],
        "the sample's own, one for each channel": rest,
        "the batch's, one for each channel and position": [0],
    }
    found = [
        (name, divisor, *moments(x, over, correction))
        for name, over in axes.items()
        for divisor, correction in DIVISORS.items()
        if math.prod(x.shape[axis] for axis in over) > correction and over
    ]
    for buffers in (before.state_dict(), after):
        mean, var = (buffers[name].to(x) for name in ("running_mean", "running_var"))
        found.append(("the running ones", "as stored", column(mean, x), column(var, x)))
        found.append(("the running ones, along the last axis", "as stored", mean, var))
    for name, divisor, mean, var in found:
        for where, root in ROOTS.items():
            facts = {"mean and variance are": name, "the variance is divided by": divisor, "eps is added": where}
            yield facts, (x - mean) / root(var, before.eps), root(var, before.eps)


def way_of(y: Tensor, x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> tuple[dict[str, str | None], Tensor, Tensor]:
    """The way in which y is x normalised; x in float64, perhaps with a graph."""
    return next((way for way in ways(x, before, after) if near(y, way[1])), (UNKNOWN, x, x))


UNKNOWN = {"mean and variance are": "different", "the variance is divided by": None, "eps is added": None}


def shares_of(x: Tensor, before: nn.Module, after: dict, *, of: tuple[str, ...] = ("running_mean",)) -> set[str]:
    """The names of all shares of the batch that make of the buffers before what they are afterwards."""
    rows, shares = x.double().transpose(0, 1).flatten(1), set()
    goals = {"running_mean": [rows.mean(1)], "running_var": list(variances(x).values())}
    for name, share in SHARES.items():
        start = {buffer: getattr(before, buffer).double() for buffer in of}
        ends = {buffer: [start[buffer].lerp(goal, share(before.momentum)) for goal in goals[buffer]] for buffer in of}
        if all(any(near(after[buffer], end) for end in ends[buffer]) for buffer in of):
            shares.add(name)
    return shares


def variances(x: Tensor) -> dict[str, Tensor]:
    """What running_var can move towards, (channels,) each."""
    rows = x.double().transpose(0, 1).flatten(1)
    known = {name: rows.var(1, correction=correction) for name, correction in DIVISORS.items()}
    return known | {"n - 1, with n the number of samples": known["n"] * len(x) / max(len(x) - 1, 0.5)}


def divisors_of(x: Tensor, before: nn.Module, after: dict) -> list[str]:
    """The names of all variances that running_var can have moved towards, as far as it went."""
    start = before.running_var.double()
    step = after["running_var"].double() - start
    known = {"it stays": torch.zeros_like(step)}
    for name, variance in variances(x).items():
        way = variance - start
        known[name] = (step @ way) / (way @ way) * way
    return [name for name, steps in known.items() if near(step, steps)]
