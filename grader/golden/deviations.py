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
    unlike: str | None = None  # the first thing that is not a number and differs


def between(ours: Results, theirs: Results) -> dict[tuple[str, str], Deviation]:
    """(number, experiment) -> how far `ours` are from `theirs`, for what both have."""
    known = {tuple(key): raw for *key, raw in each(theirs)}
    deviations: dict[tuple[str, str], Deviation] = {}
    for number, experiment, subject, seed, raw in each(ours):
        theirs_too = known.get((number, experiment, subject, seed))
        if theirs_too is None or ("problem" in raw) != ("problem" in theirs_too):  # a GPU refuses what is for the CPU only
            continue
        far, unlike = _compare(raw, theirs_too, subject)
        before = deviations.get((number, experiment), Deviation(0.0))
        deviations[number, experiment] = Deviation(max(before.far, far), before.unlike or unlike)
    return deviations


def _compare(ours: Any, theirs: Any, where: str) -> tuple[float, str | None]:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.is_floating_point() and ours.shape == theirs.shape:
        return distance(ours, theirs), None
    if isinstance(ours, float) and isinstance(theirs, float):
        return distance(ours, theirs), None
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool((ours == theirs).all())
        return 0.0, None if same else f"{where}: {_short(ours)} and {_short(theirs)}"
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return _worst([_compare(value, theirs[key], f"{where}, {key}") for key, value in ours.items()])
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        return _worst([_compare(*pair, where) for pair in zip(ours, theirs, strict=True)])
    # What holds tensors and got here has other keys, another length or another kind on the other side.
    same = type(ours) is type(theirs) and not isinstance(ours, Tensor | dict | list | tuple) and ours == theirs
    return 0.0, None if same else f"{where}: {_short(ours)} and {_short(theirs)}"


def _worst(compared: list[tuple[float, str | None]]) -> tuple[float, str | None]:
    return max((far for far, _ in compared), default=0.0), next((unlike for _, unlike in compared if unlike), None)


def _short(value: Any) -> str:
    text = f"{tuple(value.shape)} tensor" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:60] + " …"
