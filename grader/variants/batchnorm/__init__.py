"""Exercises of chapter 05, in other styles."""

from grader.variants.batchnorm import formula, freezing, meanings, moving, pooling, recomputing

_MODULES = {"5.1": formula, "5.2": moving, "5.3": meanings, "5.4": freezing, "5.5": pooling, "5.6": recomputing}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
EQUIVALENT = {number: module.EQUIVALENT for number, module in _MODULES.items()}
