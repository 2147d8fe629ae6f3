"""Features from the cache beside features computed again."""

import tempfile
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from benchmarks.timing import Comparison
from helpers.backbones import glyphnet, text_backbone
from helpers.data import digits, docstrings
from helpers.features import cached_features, drop_head, extract
from helpers.timing import timed


def _glyphnet() -> tuple[nn.Module, Tensor]:
    return drop_head(glyphnet()), digits("test").inputs


def _minilm() -> tuple[nn.Module, Sequence[str]]:
    return text_backbone(), docstrings("test").inputs


def _build(data: Callable[[], tuple[nn.Module, Tensor | Sequence[str]]]):
    def build():
        backbone, inputs = data()
        folder = tempfile.TemporaryDirectory()  # goes with the function below, which holds it
        return (
            timed(lambda: cached_features(folder.name, extract, backbone, inputs)),
            timed(lambda: extract(backbone, inputs)),
        )

    return build


COMPARISONS = [
    Comparison("glyphnet, 800 digits again", "`cached_features`", "`extract`", _build(_glyphnet), 7),
    Comparison("MiniLM, 360 docstrings again", "`cached_features`", "`extract`", _build(_minilm), 3),
]
