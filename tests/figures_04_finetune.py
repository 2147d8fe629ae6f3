"""Where the numbers in the prose of chapter 04 come from; see `tests/prose.py`."""

import math
import re
from statistics import mean

import torch

from helpers.backbones import classifier, glyphnet
from helpers.data import digits
from helpers.recordings import studies, transfer
from helpers.recordings.strategies import FIVE, recorded

TEN = recorded("digits")[10]


def mean_of(way, part):
    return mean(getattr(scores, part) for scores in TEN[way])


def ahead(way, other_way, part):
    pairs = zip(TEN[way], TEN[other_way], strict=True)
    return sum(getattr(first, part) > getattr(second, part) for first, second in pairs)


def adams_first_step(gradient):
    """How far the first step of torch's Adam moves a weight with that gradient, in per cent of its learning rate."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.full_like(weight, gradient)
    torch.optim.Adam([weight], lr=1.0).step()
    return -100 * weight.item()


def parameters(printed):
    """Trainable of all, as the cell prints them for "everything"."""
    return [int(n.replace(",", "")) for n in re.findall(r"^total +([\d,]+) +([\d,]+)$", printed, re.MULTILINE)[2]]


MEASURED = {
    "a linear probe gets {} of the handwritten digits and {} of the printed ones, and the network knows {} of the letters": (
        lambda _: [
            *(mean(studies.studied("the probe alone")[part]) for part in ("inside", "outside")),
            mean_of("head only", "source"),
        ]
    ),
    "trains {} of {}. The {} that are missing": lambda printed: [*parameters(printed), 32.0],
    "at 1e-8 the step is {} % of the rate, at 1e-10 it is {} %": lambda _: [adams_first_step(1e-8), adams_first_step(1e-10)],
    "all five means lie within {} of each other": lambda _: (
        max(mean_of(way, "inside") for way in FIVE) - min(mean_of(way, "inside") for way in FIVE)
    ),
    "LP-FT beats the head alone in {} of {} draws": lambda _: [ahead("LP-FT", "head only", "inside"), len(TEN["LP-FT"])],
    "last, {} behind the frozen backbone": lambda _: mean_of("head only", "outside") - mean_of("everything", "outside"),
    "and everything from a random head is last": lambda _: (
        min(FIVE, key=lambda way: mean_of(way, "outside")) == min(FIVE, key=lambda way: mean_of(way, "source")) == "everything"
    ),
    "all four signs are the same": lambda _: (
        mean_of("everything", "inside") > mean_of("head only", "inside")
        and mean_of("everything", "outside") < mean_of("head only", "outside")
        and all(mean_of("LP-FT", part) > mean_of("everything", part) for part in ("inside", "outside"))
    ),
    # AdamW multiplies each weight by 1 - lr * weight_decay in each step; the largest rate of the study is 1e-3.
    "at most {} % in all {}": lambda _: [100 * (1 - math.prod([1 - 1e-3 * 0.3] * 200)), 200],
    "a head of {} parameters learns all {} errors by heart": lambda _: [
        sum(parameter.numel() for parameter in classifier(glyphnet(), 10).head.parameters()),
        0.3 * len(digits("train", labels_per_class=20).labels),
    ],
    "stopped runs chose on {} clean validation images": lambda _: len(digits("validation").labels),
    "the best on the {} validation images": lambda _: len(digits("validation").labels),
    "{} steps of {}, five draws": lambda _: list(transfer.TASKS["digits"][-2:]),
}

GIVEN = [
    "10 labelled examples of each",
    "on these 100 images",
    "small as Adam's `eps` of 1e-8 escape",
    "A head trains for 30 steps",
    # Kumar et al. 2022, table 1 and abstract
    "fine-tuning is 2 % ahead of the probe inside the distribution and 7 % behind outside; LP-FT is 1 % ahead of "
    "fine-tuning inside and 10 % outside",
    "question of the beginning: 100 images",
    "(200 labels to choose with are a luxury, if 100 are all you train on.)",
    "one stage more every 50 steps",
    "with 10 labels per class",
    "(5 draws each",
    "with 2, 10 and 50 labelled images per class",
    "With 2 labels per class",
    "With 50, every way",
    "With 50 labels LP-FT",
    "On the 100 clean images",
    "20 images per class, and three labels in ten",
    "trains on 30 copies of each image",
    "200 steps do not get it far enough",
    "came from the same 100 images",
    "Three tries of 100 steps",
    "rounded to 3e-3",
    "not done after 100 steps",
]
