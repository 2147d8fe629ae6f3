"""Where the numbers in the prose of chapter 05 come from; see `tests/prose.py`."""

import re

from torchvision.models import resnet18

from helpers.data import digits
from helpers.recordings.transfer import recorded


def drifts(printed):
    """Layer -> mean and std of handwritten digits, mean and std of grey ones, against what is stored."""
    rows = re.findall(r"^((?:bn1|layer\S+)) +(\S+) +x(\S+) +(\S+) +x(\S+)$", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def stds(printed):
    values = [row[1] for row in drifts(printed).values()]
    return [min(values), max(values)]


def tens(printed):
    worst, best = re.search(r"twelve tens, mean of the heads: (\S+) to (\S+)$", printed, re.MULTILINE).groups()
    return [float(worst), float(best)]


def before_layer4(printed):
    return max(row[0] for name, row in drifts(printed).items() if not name.startswith("layer4"))


def ones(printed):
    """Their accuracy, and how many of the twelve tens are better."""
    return [float(number) for number in re.search(r"all ones: (\S+); better than that are (\d+) ", printed).groups()]


MEASURED = {
    "A ResNet-18 has {} BatchNorms": lambda _: sum("running_mean" in name for name, _ in resnet18().named_buffers()),
    "it reads {} of 100 handwritten digits": lambda _: 100 * sum(recorded("digits")[10]["probe"]) / 5,
    "at most {} off up to `layer3`": (
        lambda printed: max(r[0] for n, r in drifts(printed).items() if "layer4" not in n),
        0.011,
    ),
    "they are {} to {} times what was stored": (stds, 0.011),
    "On grey paper both are further off, in every layer.": lambda printed: all(
        row[2] > row[0] and row[3] > row[1] for row in drifts(printed).values()
    ),
    "the ResNet {} means, {} variances and {} counters": lambda printed: [
        float(re.search(rf"^ResNet-18: .*(?:\n .*)*?\n +(\d+) {kind}$", printed, re.MULTILINE)[1])
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    ],
    "after 8 batches 0.9 to the power of 8, more than {}": lambda _: int(10 * 0.9**8) / 10,
    "{} with the worst, {} with the best": (tens, 0.01),
    "{} images of the digit 1 do worse": lambda _: int((digits("test").labels == 1).sum()),
    "of the digit 1 do worse ({})": (lambda printed: ones(printed)[0], 0.01),
    "than {} of the 12 samples of ten": (lambda printed: ones(printed)[1], 1),
    "one head and {} test digits": lambda _: len(digits("test").labels) / 2,
}

GIVEN = [
    "a linear probe on 10 labelled digits per class",
    "of 100 handwritten digits",
    "light grey, 0.3 instead of 0",
    "In the data ink is 1 and paper is 0.",
    "by n - 1: torch uses both",
    "before TensorFlow 2",
    "100 labelled images. Only the head trains, for 100 steps",
    "in batches of 32, as a progress bar",
    "batches of 2. A mean over 2 images",
    "with batches of 32 and of 2 on white paper, 100 steps each",
    "With batches of 32 the two are less than a point apart, with batches of 2 about ten",
    "run 16 batches of 2, add up their gradients, each divided by 16",
    "one batch of 32.",
    "With parts of 2 the sum",
    "on numbers with standard deviation 0.01",
    "75.5 % before and 76.7 % after",  # Li et al. 2016, table 2
    "after 8 batches 0.9 to the power of 8",
    "batches of 2 leave the deepest means several percent off, batches of 32 less than one percent",
]
