"""Exercise 0.1: accuracy from logits."""

import torch
from torch import Tensor

from grader.experiment import Exercise, Experiment, Trial, expect_number, misconception
from grader.near import near
from helpers.training import accuracy


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


class RightRowsCount(_Counting):
    """The result grows with the rows whose largest logit is at the label, and with nothing else."""

    def facts(self, raw, inputs):
        return {"the result is in proportion to": self.find(raw, inputs)[0]}


class IsAFraction(_Counting):
    """The result is a fraction: 1.0 stands for all rows."""

    def facts(self, raw, inputs):
        factor = self.find(raw, inputs)[1]
        if factor is None:
            return {"what stands for all rows": None}
        words = {1.0: "1", 100.0: "100", 48.0: "the number of rows", 0.25: "1 / the number of classes"}
        return {"what stands for all rows": next((w for f, w in words.items() if near(factor / f, 1)), "another number")}


@misconception(
    "percentage",
    hint="The result is 100 times what was asked for. Which range does the statement give?",
    source="a line of reasoning: accuracies are spoken of in per cent and stored as fractions",
)
def percentage(logits, labels):
    return (logits.argmax(dim=1) == labels).float().mean() * 100


@misconception(
    "count",
    hint="The result grows with the number of rows. What would it say of a batch twice as long?",
    source="a line of reasoning: training loops add up hits and divide at the end of the epoch, or forget to",
)
def count(logits, labels):
    return (logits.argmax(dim=1) == labels).float().sum()


@misconception(
    "divided by all logits",
    hint="The hits are divided by too much. How many decisions are there in a batch: one per row, or one per logit?",
    source="a line of reasoning: `numel` of the logits counts rows times classes",
)
def divided_by_all_logits(logits, labels):
    return (logits.argmax(dim=1) == labels).sum() / logits.numel()


@misconception(
    "confidence",
    hint="The result changes when the logits are sharpened and the winners stay. Is it sure, or is it right?",
    source="a line of reasoning: confidence stays high where accuracy falls, so one does not stand in for the other",
)
def confidence(logits, labels):
    return logits.softmax(dim=1).max(dim=1).values.mean()


@misconception(
    "probability of the label",
    hint="A row that is barely right and one that is clearly right count differently here. Should they?",
    source="a line of reasoning: the likelihood of the label is what the loss is made of, not what accuracy counts",
)
def probability_of_the_label(logits, labels):
    return logits.softmax(dim=1)[torch.arange(len(labels)), labels].mean()


@misconception(
    "mean over classes",
    hint="Rare classes weigh as much as common ones here. Does the statement ask for a mean over rows, or over classes?",
    source="a line of reasoning: balanced accuracy is another number wherever classes differ in size",
)
def mean_over_classes(logits, labels):
    hits = (logits.argmax(dim=1) == labels).float()
    return torch.stack([hits[labels == c].mean() for c in labels.unique()]).mean()


EXERCISES = (
    Exercise(
        number="0.1",
        name="accuracy",
        reference=accuracy,
        experiments=(RightRowsCount(), IsAFraction()),
        misconceptions=(percentage, count, divided_by_all_logits, confidence, probability_of_the_label, mean_over_classes),
        hints=(
            "Each row of logits stands for one decision. Which of its entries does the network decide for?",
            "Take three rows that you can check by hand, two right and one wrong, and look at what each step gives.",
            "accuracy = (number of rows whose largest entry is at the label) / (number of rows); "
            "`argmax` finds the place of the largest.",
        ),
    ),
)
