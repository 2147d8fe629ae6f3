"""What chapter 00 teaches, as it should be written.

(Formulas, what the names stand for, and the source.)
"""

from torch import Tensor


def a_name(x: Tensor) -> Tensor:
    """x with the mean of all its numbers subtracted. (An example: write what the exercise asks for.)

    Args:
        x: (rows, columns).

    Returns:
        The same shape.
    """
    return x - x.mean()
