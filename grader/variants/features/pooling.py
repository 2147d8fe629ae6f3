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


def by_ragged_pieces(hidden, attention_mask):
    lengths = attention_mask.sum(1)
    pieces = torch.split(hidden[attention_mask.bool()], lengths.tolist())
    rows = [piece.sum(0) / max(1, len(piece)) for piece in pieces]
    return torch.vstack(rows)


def by_running_mean(hidden, attention_mask):
    mean, count = torch.zeros_like(hidden[:, 0]), torch.zeros(len(hidden), 1, dtype=hidden.dtype)
    for place, own in zip(hidden.unbind(1), attention_mask.unbind(1), strict=True):
        count = count + own[:, None]
        mean = torch.where(own[:, None] == 1, mean + (place - mean) / count.clamp(min=1), mean)
    return mean


def mean_of_zeroed(hidden, attention_mask):
    return torch.where(attention_mask.bool()[..., None], hidden, 0.0).mean(dim=1)


def added_up(hidden, attention_mask):
    return torch.stack([h[m.bool()].sum(0) for h, m in zip(hidden, attention_mask, strict=True)])


def weights_from_the_mask(hidden, attention_mask):
    weights = attention_mask / attention_mask.sum(1)[:, None]
    return torch.einsum("nt,ntw->nw", weights, hidden)


def inner_tokens(hidden, attention_mask):
    rows = []
    for states, own in zip(hidden, attention_mask.bool(), strict=True):
        states = states[own]
        states = states[1:-1] if len(states) > 2 else states
        rows.append(states.sum(0) / max(len(states), 1))
    return torch.stack(rows)


def sums_over_roots(hidden, attention_mask):
    roots = attention_mask.double().norm(dim=1)  # of so many ones
    return (added_up(hidden, attention_mask).T / roots.clamp(min=1)).T


def first_that_counts(hidden, attention_mask):
    rows = zip(hidden, attention_mask.bool(), strict=True)
    return torch.stack([states[0] if own.any() else states.new_zeros(len(states[0])) for states, own in rows])


def at_least_two(hidden, attention_mask):
    own = attention_mask.unsqueeze(-1) == 1
    return hidden.masked_fill(~own, 0).sum(1) / own.sum(1).clamp(min=2)


def later_tokens_weigh_more(hidden, attention_mask):
    weights = attention_mask * torch.arange(1, hidden.shape[1] + 1)
    total = hidden.masked_fill(attention_mask[..., None] == 0, 0).mul(weights[..., None]).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def one_token_more(hidden, attention_mask):
    return torch.where(attention_mask.bool()[..., None], hidden, 0).sum(1) / (attention_mask.sum(1, keepdim=True) + 1)


def divided_along_the_columns(hidden, attention_mask):
    total, count = solution(hidden, attention_mask, divisor=lambda mask: 1), attention_mask.sum(1).clamp(min=1)
    return total / (count if len(count) == total.shape[1] else count[:, None])


def zeros_taken_for_padding(hidden, attention_mask):
    return solution(hidden, attention_mask * (hidden != 0).any(2))


def middle_token(hidden, attention_mask):
    middle = hidden.masked_fill(attention_mask[..., None] == 0, torch.nan).nanmedian(1).values
    return middle.nan_to_num(0)


def times_the_mask(hidden, attention_mask):
    mask = attention_mask[..., None].to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def only_nan_replaced(hidden, attention_mask):
    return times_the_mask(torch.where(hidden.isnan(), 0, hidden), attention_mask)


def result_without_nan(hidden, attention_mask):
    return times_the_mask(hidden, attention_mask).nan_to_num(0, 0, 0)


def first_state_for_no_tokens(hidden, attention_mask):
    any_token = attention_mask.any(1, keepdim=True)
    return torch.where(any_token, solution(hidden, attention_mask), hidden[:, 0])


def by_nanmean(hidden, attention_mask):
    return hidden.masked_fill(attention_mask[..., None] == 0, torch.nan).nanmean(1)


def plain_mean_for_no_tokens(hidden, attention_mask):
    rows = zip(hidden, attention_mask == 1, strict=True)
    return torch.stack([(states[own] if own.any() else states).mean(0) for states, own in rows])


CORRECT = [text_by_text, in_numpy, in_place_on_a_copy, Pool(), by_ragged_pieces, by_running_mean]
REWRITTEN = {
    "first token in place of the mean": first_that_counts,
    "divided by the padded length": mean_of_zeroed,
    "not divided": added_up,
    "special tokens left out": inner_tokens,
    "divided by the square root": sums_over_roots,
}
BROKEN = {
    1: [
        at_least_two,
        later_tokens_weigh_more,
        one_token_more,
        divided_along_the_columns,
        middle_token,
        zeros_taken_for_padding,
    ],
    2: [times_the_mask, only_nan_replaced, result_without_nan],
    3: [by_nanmean, first_state_for_no_tokens, plain_mean_for_no_tokens],
}
COMBINED = [
    ({"mask ignored", "not divided"}, partial(solution, total=lambda hidden, mask: hidden.sum(1), divisor=lambda mask: 1)),
    ({"padding multiplied by zero", "divided by zero"}, weights_from_the_mask),
]
EQUIVALENT = {}
