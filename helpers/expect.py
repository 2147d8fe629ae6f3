"""Arguments as they are documented, or an error in one sentence: what was wanted, what came, what to do."""

from numbers import Integral, Real

from torch import Tensor, nn


def whole_number(name: str, value: object, least: int = 1, most: int | None = None, advice: str = "") -> int:
    """Pass on a whole number from `least` to `most` (no upper limit if None).

    Raises:
        ValueError: it is something else; the message ends with `advice`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {span}, got {describe(value)}. {advice}".rstrip())
    return int(value)


def positive(name: str, value: object, advice: str = "") -> float:
    """Pass on a finite number above 0.

    Raises:
        ValueError: it is something else; the message ends with `advice`.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0, got {describe(value)}. {advice}".rstrip())
    return float(value)


def module(name: str, value: object) -> nn.Module:
    """Pass on an nn.Module.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {describe(value)}. Pass the model itself.")
    return value


def tensor(name: str, value: object, shape: tuple[int | str, ...]) -> Tensor:
    """Pass on a tensor of that shape; a string in `shape` stands for any size of at least 1, "..." for any rest.

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape is another.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_spell(shape)}, got {describe(value)}.")
    wanted = shape[:-1] if shape[-1:] == ("...",) else shape
    fits = value.ndim == len(shape) if wanted == shape else value.ndim >= len(wanted)
    sizes = zip(wanted, value.shape, strict=False)
    if not fits or not all(size >= 1 if isinstance(want, str) else size == want for want, size in sizes):
        raise ValueError(f"{name} must have shape {_spell(shape)}, got {_spell(tuple(value.shape))}.")
    return value


def describe(value: object) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {_spell(tuple(value.shape))}"
    if isinstance(value, bool | int | float | str | None):
        return repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "…"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _spell(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
