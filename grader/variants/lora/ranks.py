"""Exercise 6.7 in other styles."""

import numpy as np
import torch


def added_up(before, after, share):
    update = after.detach().float() - before.detach().float()
    _, singular, _ = torch.linalg.svd(update.reshape(len(update), -1), full_matrices=False)
    needed = share * float((singular**2).sum())
    total, rank = 0.0, 0
    for value in singular.tolist():
        if total >= needed:
            break
        total += value * value
        rank += 1
    return rank


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


class Tails:
    """Sums from the small end: how many of the tails are more than may be missing."""

    def __call__(self, before, after, share):
        update = torch.stack([-before.detach().float(), after.detach().float()]).sum(0)
        squares = torch.svd(update.flatten(1), compute_uv=False).S.pow(2)
        tails = squares.flip(0).cumsum(0).flip(0)
        return sum(tail > (1 - share) * tails[0] for tail in tails)


def one_direction_at_a_time(before, after, share):
    rest = (after.detach().double() - before.detach().double()).flatten(1)
    total, rank = rest.norm().item() ** 2, 0
    while total and rest.square().sum() > (1 - share) * total:
        vector = torch.linalg.eigh(rest.T @ rest).eigenvectors[:, -1]
        rest = rest - torch.outer(rest @ vector, vector)
        rank += 1
    return rank


def _change(before, after):
    return torch.flatten(after.detach().to(torch.float64) - before.detach().to(torch.float64), 1)


def singular_values_from_a_position(before, after, share):
    singular = torch.linalg.svdvals(_change(before, after))
    return int(torch.searchsorted(singular.cumsum(0) / singular.sum().clamp_min(1e-30), share)) if singular.any() else 0


def shaped_and_half(before, after, share):
    energy = torch.linalg.svdvals((after - before).detach()).square()
    return int((energy.cumsum(-1) < share * energy.sum()).sum()) + 1 if energy.any() else 0


def weight_and_kernels(before, after, share):
    energy = torch.linalg.svdvals(after.detach().double()).square().flatten()
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1


CORRECT = [added_up, in_numpy, from_the_gram_matrix, by_what_is_left, Tails(), one_direction_at_a_time]
REWRITTEN = {}
COMBINED = [
    ({"not squared", "position for a number"}, singular_values_from_a_position),
    ({"kernel by kernel", "half precision as it comes"}, shaped_and_half),
    ({"the weight instead of its update", "kernel by kernel"}, weight_and_kernels),
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
