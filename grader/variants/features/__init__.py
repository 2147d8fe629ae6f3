"""Exercises of chapter 02, in other styles."""

from grader.variants.features import extraction, probe

_MODULES = {"2.2": extraction, "2.3": probe}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
