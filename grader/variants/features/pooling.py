"""Exercise 2.7 in other styles."""

from functools import partial

import numpy as np
import torch

from grader.checks.features.pooling import solution


def text_by_text(hidden, attention_mask):
    rows = []
    for states, own in zip(hidden, attention_mask, strict=True):
        kept = states[own == 1]
        rows.append(kept.mean(dim=0) if len(kept) else torch.zeros(states.shape[-1]))
    return torch.stack(rows)


def in_numpy(hidden, attention_mask):
    h, m = hidden.detach().numpy(), attention_mask.numpy().astype(bool)[:, :, None]
    total = np.add.reduce(h, axis=1, where=np.broadcast_to(m, h.shape))
    return torch.tensor(total / np.maximum(m.sum(1), 1), dtype=hidden.dtype)


def in_place_on_a_copy(hidden, attention_mask):
    copy = hidden.double().clone()
    copy[attention_mask == 0] = 0.0
    weights = attention_mask / attention_mask.sum(-1, keepdim=True).clamp(1)
    return torch.einsum("ntw,nt->nw", copy, weights.to(copy))


class Pool:
    """A class with `__call__`; rows are gathered in one list and added where they belong."""

    def __call__(self, hidden, attention_mask):
        row, column = attention_mask.nonzero(as_tuple=True)
        with torch.inference_mode():
            total = torch.zeros(hidden.shape[0], hidden.shape[2]).index_add_(0, row, hidden[row, column])
            return total.div(torch.bincount(row, minlength=len(hidden)).clamp(min=1)[:, None])


def mean_of_zeroed(hidden, attention_mask):
    return torch.where(attention_mask.bool()[..., None], hidden, 0.0).mean(dim=1)


def added_up(hidden, attention_mask):
    return torch.stack([h[m.bool()].sum(0) for h, m in zip(hidden, attention_mask, strict=True)])


def weights_from_the_mask(hidden, attention_mask):
    weights = attention_mask / attention_mask.sum(1)[:, None]
    return torch.einsum("nt,ntw->nw", weights, hidden)


def first_that_counts(hidden, attention_mask):
    rows = zip(hidden, attention_mask.bool(), strict=True)
    return torch.stack([states[0] if own.any() else states.new_zeros(len(states[0])) for states, own in rows])


CORRECT = [text_by_text, in_numpy, in_place_on_a_copy, Pool()]
REWRITTEN = {
    "first token in place of the mean": first_that_counts,
    "divided by the padded length": mean_of_zeroed,
    "not divided": added_up,
}
BROKEN = {}
COMBINED = [
    ({"mask ignored", "not divided"}, partial(solution, total=lambda hidden, mask: hidden.sum(1), divisor=lambda mask: 1)),
    ({"padding multiplied by zero", "divided by zero"}, weights_from_the_mask),
]
EQUIVALENT = {}
