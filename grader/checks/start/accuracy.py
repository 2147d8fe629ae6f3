"""Exercise 0.1: accuracy from logits."""

import torch
from torch import Tensor

from grader.experiment import Exercise, Experiment, Trial, expect_number
from grader.near import near
from helpers.training import accuracy

exercise = Exercise(__name__, "0.1", accuracy)


class _Counting(Experiment):
    """Draws three batches of 48 rows on which no two ways of counting agree, nor stay in proportion."""

    sizes = (24, 12, 8, 4)  # rows of each class
    right = ((18, 9, 2, 1), (20, 3, 6, 4), (7, 10, 1, 3))  # of which so many are right, in each batch

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

    def measure(self, subject, inputs):
        return {"results": [expect_number(subject(*batch), "the accuracy") for batch in inputs["batches"]]}

    def find(self, raw: dict, inputs: dict) -> tuple[str, float | None]:
        """The quantity that the three results are in proportion to, and the factor."""
        results = torch.tensor(raw["results"], dtype=torch.float64)
        for name, quantity in QUANTITIES.items():
            ratios = results / torch.stack([quantity(*batch) for batch in inputs["batches"]]).double()
            if near(ratios / ratios[0], 1):
                return name, ratios[0].item()
        return "something else", None


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


QUANTITIES = {
    "the rows that are right": lambda logits, labels: _hits(logits, labels).mean(),
    "the rows that are wrong": lambda logits, labels: 1 - _hits(logits, labels).mean(),
    "the accuracies of the classes": lambda z, y: torch.stack([_hits(z, y)[y == c].mean() for c in range(4)]).mean(),
    "the largest probability of each row": lambda logits, labels: logits.softmax(1).amax(1).mean(),
    "the probability of the label": lambda z, y: z.softmax(1).gather(1, y[:, None]).mean(),
}


@exercise.experiment("right rows count")
class RightRowsCount(_Counting):
    def facts(self, raw, inputs):
        return {"the result is in proportion to": self.find(raw, inputs)[0]}


@exercise.experiment("is afraction")
class IsAFraction(_Counting):
    def facts(self, raw, inputs):
        factor = self.find(raw, inputs)[1]
        if factor is None:
            return {"what stands for all rows": None}
        words = {1.0: "1", 100.0: "100", 48.0: "the number of rows", 0.25: "1 / the number of classes"}
        return {"what stands for all rows": next((w for f, w in words.items() if near(factor / f, 1)), "another number")}


@exercise.misconception("percentage")
def percentage(logits, labels):
    return (logits.argmax(dim=1) == labels).float().mean() * 100


@exercise.misconception("count")
def count(logits, labels):
    return (logits.argmax(dim=1) == labels).float().sum()


@exercise.misconception("divided by all logits")
def divided_by_all_logits(logits, labels):
    return (logits.argmax(dim=1) == labels).sum() / logits.numel()


@exercise.misconception("confidence")
def confidence(logits, labels):
    return logits.softmax(dim=1).max(dim=1).values.mean()


@exercise.misconception("probability of the label")
def probability_of_the_label(logits, labels):
    return logits.softmax(dim=1)[torch.arange(len(labels)), labels].mean()


@exercise.misconception("mean over classes")
def mean_over_classes(logits, labels):
    hits = (logits.argmax(dim=1) == labels).float()
    return torch.stack([hits[labels == c].mean() for c in labels.unique()]).mean()
