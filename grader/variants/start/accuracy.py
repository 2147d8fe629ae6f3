"""Exercise 0.1, in other styles."""

import torch
from torch.nn import functional as F


def by_loop(logits, labels):
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        right += row.index(max(row)) == label
    return right / len(labels)


def by_topk(logits, labels):
    _, winners = torch.topk(logits, k=1)
    return torch.count_nonzero(winners.squeeze(-1).eq(labels)) / labels.numel()


def by_margin(logits, labels):
    own = logits.gather(1, labels.unsqueeze(1))
    beaten = F.one_hot(labels, logits.shape[1]).bool() | (own > logits)
    return float(beaten.all(dim=1).double().mean())


def percentage_again(logits, labels):
    wins = 0
    for row, label in zip(logits, labels, strict=True):
        if int(row.argsort()[-1]) == int(label):
            wins += 1
    return round(100 * wins / len(labels), 6)


def confidence_again(logits, labels):
    exponentials = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return (1 / exponentials.sum(dim=1)).mean().item()


def count_again(logits, labels):
    return sum(int(torch.argmax(row)) == int(label) for row, label in zip(logits, labels, strict=True))


def probability_again(logits, labels):
    shares = [row.exp()[label] / row.exp().sum() for row, label in zip(logits, labels, strict=True)]
    return sum(map(float, shares)) / len(shares)


def percentage_of_confidence(logits, labels):
    return 100 * torch.softmax(logits, 1).amax(1).mean()


def count_of_label_probabilities(logits, labels):
    return F.softmax(logits, -1).gather(1, labels[:, None]).sum()


CORRECT = [by_loop, by_topk, by_margin]
REWRITTEN = {
    "percentage": percentage_again,
    "confidence": confidence_again,
    "count": count_again,
    "probability of the label": probability_again,
}
COMBINED = [
    ({"percentage", "confidence"}, percentage_of_confidence),
    ({"count", "probability of the label"}, count_of_label_probabilities),
]
EQUIVALENT = {
    "winners = logits.argmax(dim=1) -> winners = logits.argmax(dim=-1)": "of two axes, the last is the second",
    "return (winners == labels).float().mean().item() -> "
    "return (winners == labels).float().mean()": "a tensor with one number in it will do",
}
