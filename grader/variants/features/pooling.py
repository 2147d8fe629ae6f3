"""Exercise 2.7 in other styles."""

import numpy as np
import torch


def text_by_text(hidden, attention_mask):
    rows = []
    for states, own in zip(hidden, attention_mask, strict=True):
        kept = states[own == 1]
        rows.append(kept.mean(dim=0) if len(kept) else torch.zeros(states.shape[-1]))
    return torch.stack(rows)


def by_where(hidden, attention_mask):
    mask = attention_mask.bool().unsqueeze(2)
    kept = torch.where(mask, hidden, torch.zeros_like(hidden))
    return kept.sum(dim=1) / torch.clamp(mask.sum(dim=1), min=1e-9)


def in_numpy(hidden, attention_mask):
    h, m = hidden.detach().numpy(), attention_mask.numpy().astype(bool)[:, :, None]
    total = np.add.reduce(h, axis=1, where=np.broadcast_to(m, h.shape))
    return torch.tensor(total / np.maximum(m.sum(1), 1), dtype=hidden.dtype)


def by_lengths(hidden, attention_mask):
    pooled = hidden.new_zeros(hidden.size(0), hidden.size(2))
    for i, length in enumerate(attention_mask.count_nonzero(1).tolist()):
        for position in range(length):
            pooled[i] += hidden[i, position] / length
    return pooled


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


def product_and_padded_length(hidden, attention_mask):
    return (hidden * attention_mask[..., None]).mean(1)


def sum_of_all(hidden, attention_mask):
    return hidden.sum(1)


def first_that_counts(hidden, attention_mask):
    rows = zip(hidden, attention_mask.bool(), strict=True)
    return torch.stack([states[0] if own.any() else states.new_zeros(len(states[0])) for states, own in rows])


CORRECT = [text_by_text, by_where, in_numpy, by_lengths, in_place_on_a_copy, Pool()]
REWRITTEN = {
    "first token in place of the mean": first_that_counts,
    "divided by the padded length": mean_of_zeroed,
    "not divided": added_up,
}
COMBINED = [
    ({"padding multiplied by zero", "divided by zero"}, weights_from_the_mask),
    ({"padding multiplied by zero", "divided by the padded length"}, product_and_padded_length),
    ({"mask ignored", "not divided"}, sum_of_all),
]
EQUIVALENT = {}
