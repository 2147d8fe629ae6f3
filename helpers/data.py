"""Labelled examples for every chapter: rendered letters (source task), handwritten digits (target task).

Both come as `Examples`: inputs of shape (n, 1, 32, 32), float32, ink 1 on paper 0; labels of shape (n,), int64.
Nothing here needs a network: the letters are drawn with fonts that matplotlib ships, the digits come with scikit-learn.

Source of the digits: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository,
as `sklearn.datasets.load_digits` gives it (the 1,797 images of its test half, 8 x 8, 17 grey levels).
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from helpers import expect

SIZE = 32  # pixels on a side, of every image here
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif"),
    *("DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmss10", "cmtt10"),
)
# Capitals, and the small letters that are not just smaller capitals: once a glyph fills the image, c and C are one shape.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijklmnqrty"
SPLITS = {"test": 800, "validation": 200, "train": 797}


class Examples(NamedTuple):
    """Inputs with their labels; `classes[label]` is a label's name."""

    inputs: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def letters(count: int, seed: int = 0) -> Examples:
    """Draw `count` letters, each in a random font and bent, slanted, thickened and blurred at random.

    Args:
        count: how many, at least 1. 10,000 take about two seconds on two CPU cores.
        seed: the same seed draws the same letters, whatever was drawn before.

    Returns:
        Examples of 43 classes: 26 capitals and 17 small letters. No digit is among them.
    """
    expect.whole_number("count", count, advice="Ask for, say, letters(1000).")
    generator = torch.Generator().manual_seed(expect.whole_number("seed", seed, least=0))
    glyphs = _glyphs()  # (fonts, classes, 64, 64)
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    labels = torch.randint(len(LETTERS), (count,), generator=generator)
    images = [_distort(glyphs[fonts[part], labels[part]][:, None], generator) for part in torch.arange(count).split(4096)]
    return Examples(torch.cat(images), labels, tuple(LETTERS))


def digits(split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """Real handwritten digits, enlarged from 8 x 8 to 32 x 32 (bilinear).

    The three splits are fixed, disjoint and balanced: 797 to train on, 200 to choose settings on, 800 to test on.

    Args:
        split: "train", "validation" or "test".
        labels_per_class: keep that many examples of each digit, 1 to 78; None keeps all.
        draw: which random choice of examples; matters only with `labels_per_class`.

    Returns:
        Examples of 10 classes, "0" to "9".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of 'train', 'validation' and 'test', got {split!r}.")
    images, labels = _digits()
    rows = _split_rows()[split]
    if labels_per_class is not None:
        most = int(labels[rows].bincount().min())
        advice = f"That is all of the {split} split; leave labels_per_class out to get all {len(rows)} examples."
        expect.whole_number("labels_per_class", labels_per_class, most=most, advice=advice)
        generator = torch.Generator().manual_seed(expect.whole_number("draw", draw, least=0))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = torch.cat([rows[labels[rows] == digit][:labels_per_class] for digit in range(10)])
    return Examples(images[rows], labels[rows], tuple("0123456789"))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here, so that letters need no scikit-learn

    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.float32) / 16)[:, None]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(raw.target.astype(np.int64))


@cache
def _split_rows() -> dict[str, Tensor]:
    """Row numbers of each split, every digit in proportion."""
    from sklearn.model_selection import train_test_split

    labels = _digits()[1].numpy()
    rows, splits = np.arange(len(labels)), {}
    for name in ("test", "validation"):
        rows, taken = train_test_split(rows, test_size=SPLITS[name], stratify=labels[rows], random_state=0)
        splits[name] = torch.from_numpy(taken)
    return splits | {"train": torch.from_numpy(rows)}


@cache
def _glyphs() -> Tensor:
    """Every letter in every font, cropped, centred, filling 44 of 64 pixels: (fonts, classes, 64, 64)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack([torch.stack([_render(letter, folder / f"{font}.ttf") for letter in LETTERS]) for font in FONTS])


def _render(letter: str, font_file: Path, canvas: int = 64, fill: int = 44) -> Tensor:
    font = ImageFont.truetype(str(font_file), 64)
    large = Image.new("L", (160, 160))
    ImageDraw.Draw(large).text((40, 40), letter, font=font, fill=255)
    glyph = large.crop(large.getbbox())
    scale = fill / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BILINEAR)
    image = Image.new("L", (canvas, canvas))
    image.paste(glyph, ((canvas - glyph.width) // 2, (canvas - glyph.height) // 2))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def _distort(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 1, 64, 64) clean glyphs -> (n, 1, 32, 32) as a hand, a pen and a scanner might leave them."""
    n = len(glyphs)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, slant = uniform(-0.25, 0.25), uniform(-0.35, 0.35)  # radians; shear
    # Letters fill the height of the image, as the digits do: the glyph spans 44 of 64 pixels at zoom 1.
    tall = uniform(0.66, 0.85)
    wide = tall * uniform(0.75, 1.15)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([wide * (cos + slant * sin), wide * (slant * cos - sin), uniform(-0.12, 0.12)], 1),
        torch.stack([tall * sin, tall * cos, uniform(-0.05, 0.05)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 1, 64, 64], align_corners=False)
    # A smooth field of small shifts bends the strokes.
    bend = F.interpolate(uniform(-0.11, 0.11, 2, 4, 4), size=(64, 64), mode="bicubic", align_corners=True)
    images = F.grid_sample(glyphs, grid + bend.movedim(1, -1), align_corners=False)
    # Pens: a maximum filter thickens strokes of a random half of the letters.
    thick = torch.rand(n, generator=generator) < 0.5
    images[thick] = F.max_pool2d(images[thick], 5, stride=1, padding=2)
    images = F.avg_pool2d(images, 2)
    # Scanners: half of the images are seen at 8 x 8 pixels only, a quarter at 16 x 16.
    resolution = torch.rand(n, generator=generator)
    for cells, chosen in ((8, resolution < 0.5), (16, (resolution >= 0.5) & (resolution < 0.75))):
        small = F.adaptive_avg_pool2d(images[chosen], cells)
        images[chosen] = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (images * uniform(0.8, 1.3, 1, 1, 1)).clamp(0, 1)
