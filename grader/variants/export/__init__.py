"""Exercises of chapter 08, in other styles."""

from grader.variants.export import difference, onnxfile, programs, timing, torchscript

_MODULES = {"8.1": difference, "8.2": torchscript, "8.3": programs, "8.4": onnxfile, "8.5": timing}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
EQUIVALENT = {number: module.EQUIVALENT for number, module in _MODULES.items()}
