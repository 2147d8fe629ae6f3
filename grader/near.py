"""The one comparison that facts are made with: whether two results are the same but for rounding."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# The largest difference that counts as rounding, relative.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Every fact of every right solution and of every known mistake is the same at so many times the tolerance. A vector of
# length 1 that was rounded to bfloat16 has lost up to 0.004 of its length, so there is less room below.
MARGINS = {"float32": (0.1, 10.0), "bfloat16": (0.25, 10.0)}

_tolerance = TOLERANCE["float32"]


@contextmanager
def rounded_to(precision: str, times: float = 1.0) -> Iterator[None]:
    """Inside the `with`, `near` compares what was computed in that precision, with so many times its tolerance."""
    global _tolerance
    before, _tolerance = _tolerance, times * TOLERANCE[precision]
    try:
        yield
    finally:
        _tolerance = before


def near(result: Tensor | float | Sequence, expected: Tensor | float | Sequence, scale: float | None = None) -> bool:
    """Whether a result is as expected but for rounding: `distance(result, expected, scale)` is at most the tolerance."""
    return distance(result, expected, scale) <= _tolerance


def distance(result: Tensor | float | Sequence, expected: Tensor | float | Sequence, scale: float | None = None) -> float:
    """The largest difference, max |result - expected| / scale, computed in float64 on the CPU.

    Args:
        result: numbers of any shape and dtype.
        expected: numbers of the same shape, or a single number to compare all of `result` with.
        scale: what counts as 1, above 0. Left out, it is the largest |expected|, or 1 where all of them are smaller.

    Returns:
        0 or more; infinity if the shapes differ or anything is NaN.
    """
    result, expected = (torch.as_tensor(value, dtype=torch.float64, device="cpu").detach() for value in (result, expected))
    if expected.ndim and result.shape != expected.shape:
        return float("inf")
    if result.numel() == 0:
        return 0.0
    if scale is None:
        scale = max(1.0, float(expected.abs().max()))
    far = float((result - expected).abs().max()) / scale
    return far if far == far else float("inf")


def same(value: object, expected: object) -> bool:
    """Whether two values are equal: tensors to the last bit, NaN to NaN, and of one dtype; all else of one type."""
    if not (isinstance(value, Tensor) and isinstance(expected, Tensor)):
        return type(value) is type(expected) and value == expected
    if value.dtype != expected.dtype or value.shape != expected.shape:
        return False
    if value.is_floating_point():
        return torch.allclose(value, expected, rtol=0, atol=0, equal_nan=True)
    return torch.equal(value, expected)


def which(
    result: Tensor | float | Sequence, known: Mapping[str, Tensor | float | Sequence], otherwise: str = "different"
) -> str:
    """The first name in `known` whose value the result is near to; `otherwise` if there is none."""
    return next((name for name, value in known.items() if near(result, value)), otherwise)
