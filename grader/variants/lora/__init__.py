"""Exercises of chapter 06, in other styles."""

from grader.variants.lora import convolution, costs, injection, layer, merging, ranks, saving

_MODULES = {"6.1": layer, "6.2": costs, "6.3": injection, "6.4": merging, "6.5": convolution, "6.6": saving, "6.7": ranks}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
EQUIVALENT = {number: module.EQUIVALENT for number, module in _MODULES.items()}
