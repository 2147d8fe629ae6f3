"""Exercises of chapter 02, in other styles."""

from grader.variants.features import cache, embedding, extraction, head, pooling, probe, tokens, weights

_IMAGES = {"2.1": head, "2.2": extraction, "2.3": probe, "2.4": cache, "2.5": weights}
_MODULES = _IMAGES | {"2.6": tokens, "2.7": pooling, "2.8": embedding}

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
EQUIVALENT = {number: module.EQUIVALENT for number, module in _MODULES.items()}
