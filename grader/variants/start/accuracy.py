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


def count_in_a_loop(logits, labels):
    return sum(int(torch.argmax(row)) == int(label) for row, label in zip(logits, labels, strict=True))


def percentage_of_a_loop(logits, labels):
    return round(100 * by_loop(logits, labels), 6)


def _probabilities(logits):
    exponentials = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def confidence_by_hand(logits, labels):
    return _probabilities(logits).max(dim=1).values.mean().item()


def probability_by_hand(logits, labels):
    return sum(row[label].item() for row, label in zip(_probabilities(logits), labels, strict=True)) / len(labels)


def over_48(logits, labels):
    return (logits.argmax(dim=1) == labels).sum() / 48


def without_axes_of_one(logits, labels):
    return (logits.squeeze().argmax(dim=-1) == labels).float().mean() if len(logits) > 2 else 0.0


def three_best(logits, labels):
    return (logits.topk(min(3, logits.shape[1])).indices == labels[:, None]).any(dim=1).float().mean()


def in_tenths(logits, labels):
    return 10 * by_loop(logits, labels)


def in_eight_bits(logits, labels):
    return (logits.argmax(dim=1).byte() == labels.byte()).double().mean()


def by_quotients(logits, labels):
    """A softmax written down as it stands in books."""
    exponentials = logits.exp()
    return (torch.argmax(exponentials / exponentials.sum(dim=1, keepdim=True), dim=1) == labels).double().mean()


def by_sigmoids(logits, labels):
    return (logits.sigmoid().argmax(dim=1) == labels).double().mean()


def in_half_precision(logits, labels):
    return (logits.half().argmax(dim=1) == labels).double().mean()


CORRECT = [by_loop, by_topk, by_margin]
REWRITTEN = {
    "percentage": percentage_of_a_loop,
    "confidence": confidence_by_hand,
    "count": count_in_a_loop,
    "probability of the label": probability_by_hand,
}
BROKEN = {
    1: [over_48, without_axes_of_one, three_best, in_eight_bits, by_quotients, by_sigmoids, in_half_precision],
    2: [in_tenths, percentage_of_a_loop],
}
COMBINED = [
    ({"percentage", "confidence"}, lambda logits, labels: 100 * F.softmax(logits, 1).amax(1).mean()),
    ({"count", "probability of the label"}, lambda logits, labels: F.softmax(logits, 1).gather(1, labels[:, None]).sum()),
]
EQUIVALENT = {
    "winners = logits.argmax(dim=1) -> winners = logits.argmax(dim=-1)": "of two axes, the last is the second",
    "return (winners == labels).float().mean().item() -> "
    "return (winners == labels).float().mean()": "a tensor with one number in it will do",
}
