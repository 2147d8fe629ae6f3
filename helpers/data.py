"""Labelled examples for every chapter, each as `Examples(inputs, labels, classes)`.

    letters(count, seed)                            rendered letters: what glyphnet was pre-trained on
    digits(split, labels_per_class, draw)           real handwritten digits
    printed_digits(count, seed)                     digits rendered as the letters are: another domain, the same classes
    jitter(examples, copies, seed)                  copies of images, each shifted, turned and stretched at random
    docstrings(split, labels_per_class, draw)       what the standard library's functions say of themselves, by topic
    word_order(split, labels_per_class, draw)       the same texts, half of them with their words in random order
    image_folder(folder, split, ...)                your own photographs
    text_table(file, split, ...)                    your own texts
    pets(split, ...)                                Oxford-IIIT Pets, downloaded

`split` is "train", "validation" or "test", fixed and disjoint; `labels_per_class` keeps that many labelled examples of
each class, and `draw` says which. Only the pets need a network: the letters are drawn with fonts that matplotlib ships,
the digits come with scikit-learn, the docstrings with Python.

Sources: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository, as
`sklearn.datasets.load_digits` gives it (the 1,797 images of its test half, 8 x 8, 17 grey levels);
Parkhi et al. 2012, "Cats and Dogs".
"""

import csv
from collections.abc import Callable
from functools import cache, wraps
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
DIGITS = "0123456789"


class Examples(NamedTuple):
    """Inputs with their labels, (n,) int64; `classes[label]` is a label's name.

    Inputs of letters and digits are one tensor (n, 1, 32, 32), float32, ink 1 on paper 0; others are a list: of texts,
    or of paths of images. Tensors are on the CPU, whatever torch's default device is. Every backbone of
    `helpers.backbones` takes what its kind of data comes as.
    """

    inputs: Tensor | list
    labels: Tensor
    classes: tuple[str, ...]


def _on_the_cpu(function: Callable) -> Callable:
    """The function, with the CPU for torch's default device while it runs."""

    @wraps(function)
    def run(*args, **kwargs):
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


@_on_the_cpu
def letters(count: int, seed: int = 0) -> Examples:
    """Draw `count` letters, each in a random font and bent, slanted, thickened and blurred at random.

    Args:
        count: how many, at least 1. 10,000 take about two seconds on two CPU cores.
        seed: the same seed draws the same letters, whatever was drawn before.

    Returns:
        Examples of 43 classes: 26 capitals and 17 small letters. No digit is among them.
    """
    return _rendered(LETTERS, count, seed, "letters")


@_on_the_cpu
def printed_digits(count: int, seed: int = 0) -> Examples:
    """Draw `count` digits as `letters` draws letters: the classes of `digits` in another domain.

    For measuring what a model that learned from handwriting does out of its distribution. glyphnet has seen neither.

    Args:
        count: how many, at least 1.
        seed: the same seed draws the same digits, whatever was drawn before.

    Returns:
        Examples of 10 classes, "0" to "9".
    """
    return _rendered(DIGITS, count, seed, "printed_digits")


@_on_the_cpu
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
    images, labels = _digits()
    rows = _choose(_digit_splits(), labels, split, labels_per_class, draw)
    return Examples(images[rows], labels[rows], tuple(DIGITS))


@_on_the_cpu
def jitter(examples: Examples, copies: int, seed: int = 0) -> Examples:
    """Augmentation ahead of training: copies of images, each turned by up to 11 degrees, slanted by up to 0.2, stretched by
    0.87 to 1.11 and shifted by up to 5 % of the image, with the labels of their originals.

    Args:
        examples: their inputs are one tensor (n, channels, height, width), on any device.
        copies: of each image, at least 1; the originals themselves are not among them.
        seed: the same seed makes the same copies.

    Returns:
        copies * n examples.
    """
    expect.tensor("inputs", examples.inputs, ("n", "channels", "height", "width"))
    expect.whole_number("copies", copies)
    generator = torch.Generator().manual_seed(expect.whole_number("seed", seed, least=0))
    images = examples.inputs.repeat(copies, 1, 1, 1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, slant, zoom = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.9, 1.15)  # radians; shear; above 1 is smaller
    rows = [
        torch.stack([zoom * angle.cos(), zoom * (slant - angle.sin()), uniform(-0.1, 0.1)], 1),
        torch.stack([zoom * angle.sin(), zoom * angle.cos(), uniform(-0.1, 0.1)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False).to(images.device)
    return examples._replace(inputs=F.grid_sample(images, grid, align_corners=False), labels=examples.labels.repeat(copies))


@_on_the_cpu
def docstrings(split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """First paragraphs of docstrings of Python's standard library, by topic.

    1,538 to train on, 216 to choose settings on, 360 to test on (the last two balanced), from different modules: what
    one module says again and again in nearly the same words is in one split only. `helpers.docstrings` says which
    modules, and how far this depends on the version of Python.

    Args:
        split: "train", "validation" or "test".
        labels_per_class: keep that many examples of each topic, at most 204 in "train"; None keeps all.
        draw: which random choice of examples; matters only with `labels_per_class`.

    Returns:
        Examples of 6 classes, with a list of texts as inputs.
    """
    texts, labels, splits, classes = _docstrings()
    rows = _choose(splits, labels, split, labels_per_class, draw)
    return Examples([texts[row] for row in rows], labels[rows], classes)


@_on_the_cpu
def word_order(split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """Docstrings as they were written, and docstrings with their words in random order.

    Both classes have the same kind of words, so what tells them apart is order alone. The texts and splits are those of
    `docstrings` without texts of fewer than five words; a text is in one of the two classes, in the same order always.

    Args:
        split, labels_per_class, draw: as for `docstrings`; at most 699 of each class in "train".

    Returns:
        Examples of 2 classes, with a list of texts as inputs.
    """
    texts, labels, splits = _word_order()
    rows = _choose(splits, labels, split, labels_per_class, draw)
    return Examples([texts[row] for row in rows], labels[rows], ("as written", "shuffled"))


@_on_the_cpu
def image_folder(folder: str | Path, split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """Your own images: one folder per class, its name the class's name.

        photos/cat/001.jpg   photos/cat/002.jpg   photos/dog/a.png   ...

    A fifth of each class becomes the test split, a tenth validation, the rest is to train on, by a fixed random choice.
    Near-copies (frames of one film, several scans of one page) may fall on both sides of it: keep one of each.

    Args:
        folder: where the folders of the classes are.
        split, labels_per_class, draw: as for `digits`.

    Returns:
        Examples with a list of paths as inputs; a backbone opens them when it needs them.

    Raises:
        ValueError: fewer than two classes, or a class with fewer than 4 images.
    """
    from torchvision.datasets import ImageFolder  # here: importing torchvision takes as long as importing torch

    root = Path(folder)
    if not root.is_dir() or len([path for path in root.iterdir() if path.is_dir()]) < 2:
        raise ValueError(f"{root} must hold a folder of images for each of two or more classes: {root}/cat, {root}/dog.")
    images = ImageFolder(root, allow_empty=True)
    labels = torch.tensor(images.targets, dtype=torch.int64)
    rows = _choose(_own_splits(labels, tuple(images.classes)), labels, split, labels_per_class, draw)
    return Examples([Path(images.samples[row][0]) for row in rows], labels[rows], tuple(images.classes))


@_on_the_cpu
def text_table(file: str | Path, split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """Your own texts: a CSV file (UTF-8) with the columns `text` and `label`.

    Split as by `image_folder`; texts that occur twice are kept once. Classes are in alphabetical order.

    Args:
        file: the CSV file; other columns are left alone.
        split, labels_per_class, draw: as for `digits`.

    Raises:
        ValueError: a column is missing, a text has two labels, fewer than two classes, or one with fewer than 4 texts.
    """
    with Path(file).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        if not {"text", "label"} <= set(columns):
            raise ValueError(f"{file} must have the columns 'text' and 'label', got {columns}. Name them in its first line.")
        table: dict[str, str] = {}
        for row in reader:
            text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
            if table.setdefault(text, label) != label or not text or not label:
                raise ValueError(
                    f"line {reader.line_num} of {file} must have a text and one label, got text {text[:40]!r} with label "
                    f"{label!r} and, in an earlier line, {table[text]!r}. Correct it or take it out."
                )
    classes = tuple(sorted(set(table.values())))
    if len(classes) < 2:
        raise ValueError(f"{file} must have texts of two or more labels, got {list(classes)}.")
    labels = torch.tensor([classes.index(label) for label in table.values()])
    rows, texts = _choose(_own_splits(labels, classes), labels, split, labels_per_class, draw), list(table)
    return Examples([texts[row] for row in rows], labels[rows], classes)


@_on_the_cpu
def pets(split: str = "train", labels_per_class: int | None = None, draw: int = 0) -> Examples:
    """Photographs of 37 breeds of cats and dogs, about 200 each, downloaded once (800 MB) by torchvision.

    The authors' test half is the test split; a fifth of their training half is validation.

    Returns:
        Examples of 37 classes with a list of paths as inputs.

    Raises:
        DownloadFailed: the files are not there and cannot be had.
    """
    from helpers.hub import oxford_pets

    folder = oxford_pets()
    photos, halves = [], []
    for half in ("trainval", "test"):
        lines = (folder / "annotations" / f"{half}.txt").read_text(encoding="utf-8").splitlines()
        photos += [line.split()[:2] for line in lines]  # "Abyssinian_100 1 1 1": name, number of the breed, ...
        halves += [half] * len(lines)
    labels = torch.tensor([int(number) - 1 for _, number in photos])
    names = {int(number) - 1: name.rpartition("_")[0] for name, number in photos}
    first = halves.count("trainval")
    splits = _stratified(labels[:first], {"validation": 0.2}) | {"test": torch.arange(first, len(labels))}
    rows = _choose(splits, labels, split, labels_per_class, draw)
    paths = [folder / "images" / f"{photos[row][0]}.jpg" for row in rows]
    return Examples(paths, labels[rows], tuple(names[label] for label in sorted(names)))


def _choose(splits: dict[str, Tensor], labels: Tensor, split: str, labels_per_class: int | None, draw: int) -> Tensor:
    """Row numbers of a split, or of that many examples of each class in it, class after class."""
    if split not in splits:
        raise ValueError(f"split must be one of 'train', 'validation' and 'test', got {split!r}.")
    rows = splits[split]
    if labels_per_class is None:
        return rows
    classes = int(labels.max()) + 1
    most = int(labels[rows].bincount(minlength=classes).min())
    advice = f"That is all of the {split} split; leave labels_per_class out to get all {len(rows)} examples."
    expect.whole_number("labels_per_class", labels_per_class, most=most, advice=advice)
    generator = torch.Generator().manual_seed(expect.whole_number("draw", draw, least=0))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return torch.cat([rows[labels[rows] == label][:labels_per_class] for label in range(classes)])


def _stratified(labels: Tensor, sizes: dict[str, int | float]) -> dict[str, Tensor]:
    """Row numbers by split, every class in proportion; what `sizes` (counts or fractions) leaves over is "train"."""
    from sklearn.model_selection import train_test_split  # here, so that letters need no scikit-learn

    rows, splits = np.arange(len(labels)), {}
    for name, size in sizes.items():
        size = size if isinstance(size, int) else max(len(labels.unique()), round(size * len(labels)))
        rows, taken = train_test_split(rows, test_size=size, stratify=labels[rows], random_state=0)
        splits[name] = torch.from_numpy(taken)
    return splits | {"train": torch.from_numpy(rows)}


def _own_splits(labels: Tensor, classes: tuple[str, ...]) -> dict[str, Tensor]:
    counts = labels.bincount(minlength=len(classes))
    if counts.min() < 4:
        few = classes[int(counts.argmin())]
        raise ValueError(
            f"every class must have at least 4 examples, got {int(counts.min())} of {few!r}. Add some, or drop it."
        )
    return _stratified(labels, {"test": 0.2, "validation": 0.1})


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.float32) / 16)[:, None]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(raw.target.astype(np.int64))


@cache
def _digit_splits() -> dict[str, Tensor]:
    return _stratified(_digits()[1], {"test": 800, "validation": 200})


@cache
def _docstrings() -> tuple[list[str], Tensor, dict[str, Tensor], tuple[str, ...]]:
    from helpers.docstrings import TOPICS, listed

    rows, classes = listed(), tuple(TOPICS)
    labels = torch.tensor([classes.index(row.topic) for row in rows])
    names = ("train", "validation", "test")
    splits = {name: torch.tensor([number for number, row in enumerate(rows) if row.split == name]) for name in names}
    return [row.text for row in rows], labels, splits, classes


@cache
def _word_order() -> tuple[list[str], Tensor, dict[str, Tensor]]:
    texts, _, splits, _ = _docstrings()
    generator, kept, labels, rows = torch.Generator().manual_seed(0), [], [], {name: [] for name in splits}
    for name, numbers in splits.items():
        for number in numbers.tolist():
            words = texts[number].split()
            if len(words) < 5:
                continue
            labels.append(len(rows[name]) % 2)
            rows[name].append(len(kept))
            order = torch.arange(len(words))
            while labels[-1] and torch.equal(order, torch.arange(len(words))):
                order = torch.randperm(len(words), generator=generator)
            kept.append(" ".join(words[place] for place in order))
    return kept, torch.tensor(labels), {name: torch.tensor(numbers) for name, numbers in rows.items()}


def _rendered(characters: str, count: int, seed: int, name: str) -> Examples:
    expect.whole_number("count", count, advice=f"Ask for, say, {name}(1000).")
    generator = torch.Generator().manual_seed(expect.whole_number("seed", seed, least=0))
    glyphs = _glyphs(characters)  # (fonts, classes, 64, 64)
    fonts = torch.randint(len(FONTS), (count,), generator=generator)
    labels = torch.randint(len(characters), (count,), generator=generator)
    images = [_distort(glyphs[fonts[part], labels[part]][:, None], generator) for part in torch.arange(count).split(4096)]
    return Examples(torch.cat(images), labels, tuple(characters))


@cache
def _glyphs(characters: str) -> Tensor:
    """Every character in every font, cropped, centred, filling 44 of 64 pixels: (fonts, classes, 64, 64)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack(
        [torch.stack([_render(character, folder / f"{font}.ttf") for character in characters]) for font in FONTS]
    )


def _render(character: str, font_file: Path, canvas: int = 64, fill: int = 44) -> Tensor:
    font = ImageFont.truetype(str(font_file), 64)
    large = Image.new("L", (160, 160))
    ImageDraw.Draw(large).text((40, 40), character, font=font, fill=255)
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
