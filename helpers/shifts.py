"""Digits that are not as a network knows them: what its BatchNorms then see, and what that costs.

    as they are    x
    grey paper     s + (1 - s) x               ink stays 1, paper becomes s
    dim ink        (1 - s) x                   ink becomes 1 - s, paper stays 0
    inverted       s + (1 - 2 s) x             paper becomes s, ink 1 - s: nothing is left at 0.5, white on black at 1
    noise          x + s / 2 * normal noise
    blur           a Gaussian of 4 s pixels
    printed        a share s of the images are printed digits instead

The network is glyphnet with a linear probe on 10 digits of each class as they are. Nothing of it learns again.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.backbones import glyphnet
from helpers.batchnorm import Drift, adabn, drift
from helpers.data import Examples, digits
from helpers.finetune import probe_head
from helpers.forgetting import printed
from helpers.training import accuracy, one_thread

KINDS = ("as they are", "grey paper", "dim ink", "inverted", "noise", "blur", "printed")
STATISTICS = ("stored", "recomputed")
COUNT = 400  # images that are measured on


class Measured(NamedTuple):
    """What `measure` found with one kind of images."""

    drift: list[Drift]  # of each BatchNorm, from stem to head
    accuracy: float  # from 0.0 to 1.0


def shifted(kind: str, strength: float) -> Examples:
    """400 test digits, half of all, shifted; the same kind and strength give the same images.

    Args:
        kind: one of `KINDS`.
        strength: s above, from 0, as they are, to 1; "as they are" does not look at it.

    Raises:
        ValueError: another kind, or a strength out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength!r}. At 0 the digits are as they are.")
    test = digits("test")
    x, labels, s = test.inputs[::2], test.labels[::2], strength
    if kind == "printed":
        chosen = torch.arange(COUNT) * 0.618034 % 1 < s  # spread evenly over the images
        printed_digits = printed()
        x = torch.where(chosen[:, None, None, None], printed_digits.inputs[:COUNT], x)
        labels = torch.where(chosen, printed_digits.labels[:COUNT], labels)
    elif kind == "noise":
        x = x + s / 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    elif kind == "blur" and s > 0:
        x = _blur(x, 4 * s)
    elif kind in ("grey paper", "dim ink", "inverted"):
        paper, ink = _paper_and_ink(kind, s)
        x = paper + (ink - paper) * x
    return Examples(x, labels, test.classes)


def described(kind: str, strength: float) -> str:
    """What the images are, in words and numbers: "grey paper: paper at 0.50, ink at 1.00"."""
    if kind in ("grey paper", "dim ink", "inverted"):
        paper, ink = _paper_and_ink(kind, strength)
        return f"{kind}: paper at {paper:.2f}, ink at {ink:.2f}"
    detail = {
        "noise": f"standard deviation {strength / 2:.2f}",
        "blur": f"standard deviation {4 * strength:.1f} pixels",
        "printed": f"{strength:.0%} of the images",
    }
    return f"{kind}: {detail[kind]}" if kind in detail else kind


@cache
def network() -> nn.Module:
    """Glyphnet with its head, `fc`, the linear probe on 10 digits of each class as they are; made once."""
    examples = digits("train", 10)
    with torch.random.fork_rng(devices=[]), one_thread():  # a new head is drawn at random before it becomes the probe
        model = glyphnet(classes=len(examples.classes))
        probe_head(model, "fc", examples.inputs, examples.labels, penalty=1e-2)
    return model


@cache
def measure(kind: str, strength: float, statistics: str = "stored") -> Measured:
    """Drift and accuracy on `shifted(kind, strength)`, with the statistics that are stored or with those of these images.

    Args:
        kind, strength: as for `shifted`.
        statistics: "stored": those of the letters that glyphnet was trained on. "recomputed": `adabn` from the 400 images
            that are measured on, all in one batch; labels are not looked at. The head stays as it is in both.

    Raises:
        ValueError: other statistics, or as `shifted`.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(map(repr, STATISTICS))}, got {statistics!r}.")
    examples = shifted(kind, strength)
    with one_thread():
        model = network()
        if statistics == "recomputed":
            model = adabn(model, [examples.inputs], passes="one")
        logits: list[Tensor] = []
        kept = model.register_forward_hook(lambda *call: logits.append(call[-1]))  # drift runs the model as it is used
        try:
            drifts = drift(model, [examples.inputs])
        finally:
            kept.remove()
    return Measured(drifts, accuracy(logits[0], examples.labels))


def _paper_and_ink(kind: str, s: float) -> tuple[float, float]:
    return {"grey paper": (s, 1.0), "dim ink": (0.0, 1 - s), "inverted": (s, 1 - s)}[kind]


def _blur(images: Tensor, std: float) -> Tensor:
    """Convolve (n, 1, height, width) with a Gaussian of `std` pixels; outside of an image there is paper."""
    reach = int(3 * std + 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / std) ** 2)
    weights = weights / weights.sum()
    images = F.conv2d(images, weights.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(images, weights.view(1, 1, 1, -1), padding=(0, reach))
