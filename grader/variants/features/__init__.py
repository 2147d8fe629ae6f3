"""Exercises of chapter 02, in other styles."""

from grader.variants.features import cache, embedding, extraction, head, pooling, probe, tokens

_MODULES = dict(
    zip(
        ("2.1", "2.2", "2.3", "2.4", "2.6", "2.7", "2.8"),
        (head, extraction, probe, cache, tokens, pooling, embedding),
        strict=True,
    )
)

RIGHT = {number: module.RIGHT for number, module in _MODULES.items()}
AGAIN = {number: module.AGAIN for number, module in _MODULES.items()}
BOTH = {number: module.BOTH for number, module in _MODULES.items()}
