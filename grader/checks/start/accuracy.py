"""Exercise 0.1: accuracy from logits. Read this one before you write an exercise: its comments say why it is as it is.

What the parts are called stands in `grader/experiment.py`, what is proven of them in `grader/proof.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grader.experiment import Exercise, Experiment, Trial, expect_number
from grader.near import near, which
from helpers.training import accuracy

# A module of checks that has this variable is an exercise. The reference is a tested function of `helpers`.
# Both sentences of its statement are core; there is no fine print.
exercise = Exercise(__name__, "0.1", accuracy, core=2)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).amax(1)


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, labels[:, None]).squeeze(1)


def _over_classes(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([_hits(logits, labels)[labels == c].mean() for c in labels.unique()])


# What a result can be known as: the right quantity, and what mistakes compute in its place.
QUANTITIES = {
    "the rows that are right": lambda logits, labels: _hits(logits, labels).mean(),
    "the rows that are wrong": lambda logits, labels: 1 - _hits(logits, labels).mean(),
    "the accuracies of the classes": lambda logits, labels: _over_classes(logits, labels).mean(),
    "the largest probability of each row": lambda logits, labels: _confidence(logits, labels).mean(),
    "the probability of the label": lambda logits, labels: _probability(logits, labels).mean(),
}


class _Counting(Experiment):
    """Draws three batches of 48 rows on which no two ways of counting agree, nor stay in proportion."""

    # The logits are random, these counts are not: with every seed, each two of the quantities have to differ.
    sizes = (24, 12, 8, 4)  # rows of each class
    right = ((18, 9, 2, 1), (20, 3, 6, 4), (7, 10, 1, 3))  # of which so many are right, in each batch

    # Chance comes from `trial` alone, so that a seed can be drawn again: `facts` gets fresh inputs, whatever the subject
    # did to the first ones. It is drawn on the CPU, where it is the same on every machine; the grader moves it to a GPU.
    def draw(self, trial: Trial) -> dict:
        labels = torch.arange(4).repeat_interleave(torch.tensor(self.sizes))
        batches = []
        for number, counts in enumerate(self.right):
            hit = torch.cat([torch.arange(size) < count for size, count in zip(self.sizes, counts, strict=True)])
            logits = (0.3 + 0.3 * number) * trial.normal(48, 4)
            winner = torch.where(hit, labels, (labels + 1) % 4)
            logits[torch.arange(48), winner] = logits.max(1).values + 0.5
            order = trial.permutation(48)
            batches.append((logits[order], labels[order]))
        return {"batches": batches}

    # Only here does the subject run. It is a learner's code: `expect_number` makes a sentence of what is no number.
    # Tensors, numbers, strings, lists and dicts may come back, since they are recorded; no judgement yet.
    def measure(self, subject, inputs):
        return {"results": [expect_number(subject(*batch), "the accuracy") for batch in inputs["batches"]]}

    def find(self, raw: dict, inputs: dict) -> tuple[str, float | None]:
        """The quantity that the three results are in proportion to, and the factor."""
        results = torch.tensor(raw["results"], dtype=torch.float64)
        known = {
            name: torch.stack([quantity(*batch) for batch in inputs["batches"]]).double()
            for name, quantity in QUANTITIES.items()
        }
        name = which(results / results[0], {name: values / values[0] for name, values in known.items()})
        return name, (results[0] / known[name][0]).item() if name in known else None


# The key in quotes is what truth tables and records know the experiment by, so it stays. The claim that a learner reads
# stands under it in `grader/words/start.toml`, and may be rewritten. The number is that of the sentence it speaks of.
@exercise.experiment("right rows count", 1)
class RightRowsCount(_Counting):
    # Facts are compared with those that were recorded of the reference, with another seed. So they are words that stay
    # the same whatever was drawn, not 0.6875. They say what was seen, not whether it is right: other facts, other mistake.
    def facts(self, raw, inputs):
        return {"the result is in proportion to": self.find(raw, inputs)[0]}


@exercise.experiment("is a fraction", 2)
class IsAFraction(_Counting):
    # None is "not observable here": without a quantity there is no factor. It does not pass, and it explains nothing.
    def facts(self, raw, inputs):
        _, factor = self.find(raw, inputs)
        known = {"1": 1.0, "100": 100.0, "the number of rows": 48.0, "1 / the number of classes": 0.25}
        return {"what stands for all rows": None if factor is None else which(factor, known, "another number")}


# The batches above have one size and ordinary logits. Mistakes that depend on either are seen here, one-element cases among
# them. Who gets the batches above wrong shows nothing: None again, so that a name is never given for what it does here.
@exercise.experiment("any batch", 1, 2)
class AnyBatch(_Counting):
    shapes = ((1, 5), (2, 2), (7, 3), (5, 9), (30, 300))  # rows, classes

    def draw(self, trial):
        batches, others = super().draw(trial)["batches"], {}
        for rows, classes in self.shapes:
            labels = trial.permutation(rows) % classes
            logits = trial.normal(rows, classes)
            # A winner that is 256 off stands for the label to those who count classes in 8 bits.
            winner = torch.where(torch.arange(rows) > rows // 3, (labels + (256 if classes > 256 else 1)) % classes, labels)
            logits[torch.arange(rows), winner] = logits.max(1).values + 0.5
            others[f"{rows} x {classes}"] = (logits, labels)
        logits = batches[0][0]
        labels = logits.argmax(1)  # all rows are right, so that mistakes cannot make up for each other
        others["all below 0"] = logits - logits.max() - 1, labels
        others["close together"] = 20 + logits / 256, labels
        others["in the thousands"] = 2000 * logits, labels
        return {"batches": batches, "others": others}

    def measure(self, subject, inputs):
        others = {kind: expect_number(subject(*batch), "the accuracy") for kind, batch in inputs["others"].items()}
        return super().measure(subject, inputs) | {"others": others}

    def facts(self, raw, inputs):
        usual = near(raw["results"], [_hits(*batch).mean() for batch in inputs["batches"]])
        right = [kind for kind, batch in inputs["others"].items() if near(raw["others"][kind], _hits(*batch).mean())]
        return {"batches whose accuracy is right": right if usual else None}


def solution(
    logits: Tensor,
    labels: Tensor,
    *,
    score: Callable[[Tensor, Tensor], Tensor] = _hits,
    divisor: Callable[[Tensor], float] = len,
) -> Tensor:
    """Right if left alone; each of the misconceptions changes a piece."""
    return score(logits, labels).sum() / divisor(logits)


# Misconceptions are run as learners' code is, and their facts are recorded. Each has to show some that no other shows, or
# a wrong hint would be given: the first three differ from the reference in what stands for all rows, the other two in the
# quantity. Their hints and sources stand under these keys, in the same file of words.
exercise.misconceptions_of(
    solution,
    {
        "percentage": {"divisor": lambda logits: len(logits) / 100},
        "count": {"divisor": lambda logits: 1},
        "divided by all logits": {"divisor": Tensor.numel},
        "confidence": {"score": _confidence},
        "probability of the label": {"score": _probability},
    },
)


# What is no right solution with a piece changed is a function of its own.
@exercise.misconception("mean over classes")
def mean_over_classes(logits, labels):
    return _over_classes(logits, labels).mean()
