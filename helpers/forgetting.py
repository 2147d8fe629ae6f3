"""What a network that learns handwritten digits keeps elsewhere: printed digits, and the letters it was pre-trained on."""

from functools import cache

from torch import nn

from helpers.backbones import glyphnet
from helpers.data import Examples, letters, printed_digits
from helpers.features import extract
from helpers.training import accuracy


@cache
def printed() -> Examples:
    """Digits of another domain: 1,000 rendered ones."""
    return printed_digits(1000, seed=1)


def letters_kept(backbone: nn.Module) -> float:
    """Accuracy on 1,000 letters of a backbone that once was glyphnet's, with the head that glyphnet had for them.

    0.98 before fine-tuning; what is missing afterwards was forgotten. The letters are not those of pre-training.
    """
    drawn = _letters()
    return accuracy(extract(nn.Sequential(backbone, glyphnet().fc), drawn.inputs), drawn.labels)


@cache
def _letters() -> Examples:
    return letters(1000, seed=12345)  # other letters than those of pre-training, whose seed is in the card
