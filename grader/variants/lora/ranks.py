"""Exercise 6.7 in other styles."""

from functools import partial

import numpy as np
import torch

from grader.checks.lora.ranks import CHANGES, rank_of


def in_numpy(before, after, share):
    was, now = (weight.detach().to(torch.float64).numpy() for weight in (before, after))
    energy = np.linalg.svd((now - was).reshape(now.shape[0], -1), compute_uv=False) ** 2
    if energy.sum() == 0:
        return 0
    return np.searchsorted(np.cumsum(energy) / energy.sum(), share) + 1


@torch.no_grad()
def from_the_gram_matrix(before, after, share):
    update = torch.sub(after, before).double().flatten(start_dim=1)
    if update.shape[0] > update.shape[1]:
        update = update.T
    energy = torch.linalg.eigvalsh(update @ update.T).clamp_min(0).flip(0)
    enough = energy.cumsum(0) >= share * energy.sum()
    return int(enough.int().argmax() + 1) if energy.sum() > 0 else 0


def by_what_is_left(before, after, share):
    update = (after.double() - before.double()).detach()
    update = update.view(update.size(0), -1).numpy()
    left, singular, right = np.linalg.svd(update, full_matrices=False)
    for rank in range(len(singular) + 1):
        rest = update - left[:, :rank] * singular[:rank] @ right[:rank]
        if np.linalg.norm(rest) ** 2 <= (1 - share) * np.linalg.norm(update) ** 2:
            return rank


def one_direction_at_a_time(before, after, share):
    rest = (after.detach().double() - before.detach().double()).flatten(1)
    total, rank = rest.norm().item() ** 2, 0
    while total and rest.square().sum() > (1 - share) * total:
        vector = torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -1]
        rest = rest - torch.outer(rest @ vector, vector)
        rank += 1
    return rank


CORRECT = [in_numpy, from_the_gram_matrix, by_what_is_left, one_direction_at_a_time]
REWRITTEN = {}
BROKEN = {}
COMBINED = [
    ({first, second}, partial(rank_of, **CHANGES[first], **CHANGES[second]))
    for first, second in (
        ("not squared", "half precision as it comes"),
        ("the weight instead of its update", "kernel by kernel"),
    )
]
EQUIVALENT = {
    "update = after.detach().double() - before.detach().double() -> "
    "update = after.detach() - before.detach().double()": "if one of the two is float64, so is the difference",
    "update = after.detach().double() - before.detach().double() -> "
    "update = after.double() - before.detach().double()": "`int` leaves the graph behind",
    "update = after.detach().double() - before.detach().double() -> "
    "update = after.detach().double() - before.detach()": "if one of the two is float64, so is the difference",
    "update = after.detach().double() - before.detach().double() -> "
    "update = after.detach().double() - before.double()": "`int` leaves the graph behind",
    "too_few = squares.cumsum(0) < share * total -> "
    "too_few = squares.cumsum(0) <= share * total": "a tie is left out by the statement",
    "too_few = squares.cumsum(0) < share * total -> too_few = squares.cumsum(-1) < share * total": "a vector has one axis",
}
