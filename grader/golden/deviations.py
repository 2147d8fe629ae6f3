"""How far results are from each other: one device beside another, one version beside another."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grader.golden.records import Results, each
from grader.near import distance


@dataclass(frozen=True)
class Deviation:
    """Of one experiment, over all right solutions and seeds."""

    far: float  # the largest difference of numbers, beside 1 or the largest number where that is more
    other: str | None = None  # the first thing that is not a number and differs


def between(ours: Results, theirs: Results) -> dict[tuple[str, str], Deviation]:
    """(number, experiment) -> how far `ours` are from `theirs`, for what both have."""
    known = {tuple(key): raw for *key, raw in each(theirs)}
    found: dict[tuple[str, str], Deviation] = {}
    for number, experiment, who, seed, raw in each(ours):
        theirs_too = known.get((number, experiment, who, seed))
        if theirs_too is None or ("problem" in raw) != ("problem" in theirs_too):  # a GPU refuses what is for the CPU only
            continue
        far, other = _compare(raw, theirs_too, who)
        before = found.get((number, experiment), Deviation(0.0))
        found[number, experiment] = Deviation(max(before.far, far), before.other or other)
    return found


def _compare(one: Any, other: Any, where: str) -> tuple[float, str | None]:
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point() and one.shape == other.shape:
        return distance(one, other), None
    if isinstance(one, float) and isinstance(other, float):
        return distance(one, other), None
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
        return 0.0, None if same else f"{where}: {_short(one)} and {_short(other)}"
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return _worst([_compare(value, other[key], f"{where}, {key}") for key, value in one.items()])
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return _worst([_compare(*pair, where) for pair in zip(one, other, strict=True)])
    return 0.0, None if type(one) is type(other) and one == other else f"{where}: {_short(one)} and {_short(other)}"


def _worst(found: list[tuple[float, str | None]]) -> tuple[float, str | None]:
    return max((far for far, _ in found), default=0.0), next((other for _, other in found if other), None)


def _short(value: Any) -> str:
    text = f"{tuple(value.shape)} tensor" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:60] + " …"
