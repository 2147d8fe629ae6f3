"""A progress bar for what takes seconds, on stdout, gone when the work is done.

tqdm writes to stderr by default. Notebooks show that like an error, and nbgrader takes it for one.
"""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], description: str, show: bool = True) -> "tqdm[Item]":
    """`items`, with a bar beside the description that says how many of them are done.

    Args:
        items: what a loop runs over, with a length.
        description: of the work, in a word or two.
        show: False gives the items without a bar.
    """
    return tqdm(items, description, leave=False, file=sys.stdout, mininterval=0.3, disable=not show)
