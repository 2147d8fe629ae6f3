"""The one comparison that facts are made with: whether two results are the same but for rounding.

How much rounding is not decided where results are compared. Each fact has a tolerance of its own, which comes from
results recorded on CPUs and GPUs (`grader.golden`), and `grader.observe` sets it while the fact is made.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

UNRECORDED = 1e-4  # the tolerance of a fact before its first record

_tolerance: ContextVar[float] = ContextVar("tolerance")


@contextmanager
def within(tolerance: float) -> Iterator[None]:
    """Inside the `with`, what is at most `tolerance` apart is near."""
    token = _tolerance.set(tolerance)
    try:
        yield
    finally:
        _tolerance.reset(token)


def near(one: Tensor | float | Sequence, other: Tensor | float | Sequence, scale: float | None = None) -> bool:
    """Whether `one` is `other` but for rounding: `distance(one, other, scale)` is at most the fact's tolerance.

    For `facts` and `notes` of an experiment alone.

    Raises:
        RuntimeError: no tolerance is set, since this is not called from there.
    """
    try:
        return distance(one, other, scale) <= _tolerance.get()
    except LookupError:
        raise RuntimeError("near() needs a tolerance: call it in `facts` or `notes`, or inside `with within(...)`.") from None


def distance(one: Tensor | float | Sequence, other: Tensor | float | Sequence, scale: float | None = None) -> float:
    """The largest difference, max |one - other| / scale, computed in float64 on the CPU.

    Args:
        one: numbers of any shape and dtype.
        other: numbers of the same shape, or a single number to compare all of `one` with.
        scale: what counts as 1, above 0. Left out, it is the largest |other|, or 1 where all of them are smaller.

    Returns:
        0 or more; infinity if the shapes differ or anything is NaN.
    """
    one, other = (torch.as_tensor(value, dtype=torch.float64, device="cpu").detach() for value in (one, other))
    if other.ndim and one.shape != other.shape:
        return float("inf")
    if one.numel() == 0:
        return 0.0
    if scale is None:
        scale = max(1.0, float(other.abs().max()))
    far = float((one - other).abs().max()) / scale
    return far if far == far else float("inf")
