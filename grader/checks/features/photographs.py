"""Photographs to draw, networks that look at them, and weights with a preset: what the checks of exercise 2.5 are made of."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from grader.checks import networks
from grader.experiment import Trial

CATEGORIES = ("accordion", "beaver", "gondola", "kite", "lighthouse", "pretzel", "teapot", "zebra")
ALL = len(CATEGORIES)


def weights(trial: Trial, categories: Sequence[str] = CATEGORIES):
    """A member of a weights enum: torchvision's own preset with unusual numbers, and categories in random order."""
    from torchvision.models import ResNet18_Weights, Weights, WeightsEnum  # here: it takes as long to import as torch

    preset = partial(
        ResNet18_Weights.DEFAULT.transforms.func,
        resize_size=16,
        crop_size=8,  # the central half of an image: ImageNet's 224 of 256 is more
        mean=[trial.integer(10, 30) / 100 for _ in range(3)],
        std=[trial.integer(45, 65) / 100 for _ in range(3)],
    )
    shuffled = [categories[i] for i in trial.permutation(len(categories))]
    return WeightsEnum("TinyNet_Weights", {"V1": Weights("", preset, {"categories": shuffled})}).V1


def plain_network(trial: Trial, n: int = ALL) -> nn.Sequential:
    """Logits that are an affine function of the mean colour, the same in train and in eval mode."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, n))
    network[2].weight.data.copy_(trial.normal(n, 3))
    network[2].bias.data.copy_(torch.linspace(-1, 1, n)[trial.permutation(n)])
    return network


def trained_network(trial: Trial, norm: bool = True, dropout: bool = True) -> nn.Sequential:
    """A network with BatchNorm, dropout or both, in train mode.

    LeakyReLU lets something of every image through; with LayerNorm no probability is near 1, however large the pixels are;
    with that eps, a BatchNorm makes nothing of what rounding leaves of equal pixels.
    """
    width = 16  # of so many features, dropout never takes the same ones twice
    head = nn.Linear(width, ALL)
    head.weight.data.copy_(trial.normal(ALL, width) / 5)
    norms = [networks.with_statistics(nn.BatchNorm2d(n, eps=0.1), trial) if norm else nn.Identity() for n in (6, width)]
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), norms[0], nn.LeakyReLU(0.5), nn.Conv2d(6, width, 1), norms[1], nn.LeakyReLU(0.5)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Dropout(0.3 if dropout else 0.0), head),
    )


def photos(trial: Trial, n: int) -> list[Tensor]:
    """Images of n sizes, each with a colour and a texture of its own."""
    images = []
    for _ in range(n):
        colour, texture = 40 + 175 * torch.rand(3, 1, 1, generator=trial.generator), trial.normal(3, 20, 24)
        size = trial.integer(12, 20), trial.integer(12, 24)
        images.append((colour + 15 * texture).clamp(0, 255).to(torch.uint8)[:, : size[0], : size[1]].clone())
    return images


def bright(image: Tensor, start: float, stop: float) -> Tensor:
    """A copy whose pixels from `start` to `stop` are bright, counted from the centre, along either axis."""
    rows, columns = (torch.arange(size) - (size - 1) / 2 for size in image.shape[1:])
    bright = ((start < rows) & (rows < stop))[:, None] | ((start < columns) & (columns < stop))
    if math.isfinite(start + stop):  # then only what lies before `stop` along the other axis, too
        bright &= (rows.abs() < stop)[:, None] & (columns.abs() < stop)
    return image.where(~bright, torch.tensor(255, dtype=torch.uint8))


def striped(image: Tensor, first: int) -> Tensor:
    """A copy in which every fifth column is bright; where 40 pixels become 16, interpolation alone passes some of them over."""
    return image.where(torch.arange(image.shape[2]) % 5 != first, torch.tensor(255, dtype=torch.uint8))
