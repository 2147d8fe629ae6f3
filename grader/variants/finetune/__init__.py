"""Exercises of chapter 04, in other styles."""

from grader.variants.finetune import finder, freezing, groups, probing, stopping, unfreezing

_MODULES = {"4.1": freezing, "4.2": groups, "4.3": unfreezing, "4.4": probing, "4.5": stopping, "4.6": finder}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
EQUIVALENT = {number: module.EQUIVALENT for number, module in _MODULES.items()}
