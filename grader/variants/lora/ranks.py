"""Exercise 6.7 in other styles."""

import numpy as np
import torch
from torch.nn import functional as F


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


def sum_of_singular_values(before, after, share):
    singular = np.linalg.svd(_change(before, after).numpy(), compute_uv=False)
    running, needed = 0.0, share * np.linalg.norm(_change(before, after), "nuc")
    for rank, value in enumerate(singular):
        if running >= needed:
            return rank
        running += value
    return len(singular)


def ratio_of_norms(before, after, share):
    update = _change(before, after)
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    rank = 0
    while torch.dist((u[:, :rank] * s[:rank]) @ v[:rank], torch.zeros_like(update)) < share * torch.linalg.matrix_norm(update):
        rank += 1
    return rank


def eigenvalues_squared(before, after, share):
    update = _change(before, after)
    side = update @ update.mT if update.size(0) < update.size(1) else update.mT @ update
    values = sorted(torch.linalg.eigvalsh(side).tolist(), reverse=True)
    kept = 0
    while sum(value**2 for value in values[:kept]) < share * sum(value**2 for value in values):
        kept += 1
    return kept


def until_the_error_is_small(before, after, share):
    update = _change(before, after)
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    for kept in range(len(s) + 1):
        approximation = u[:, :kept] @ torch.diag(s[:kept]) @ v[:kept]
        if torch.linalg.norm(update - approximation) <= (1 - share) * torch.linalg.norm(update):
            return kept


def first_position(before, after, share):
    energy = torch.linalg.svdvals(_change(before, after)) ** 2
    return int(torch.argmax((torch.cumsum(energy, dim=0) / energy.sum() >= share).to(torch.uint8)))


def checked_before_adding(before, after, share):
    energy = np.square(np.linalg.svd(_change(before, after).numpy(), compute_uv=False)).tolist()
    so_far = 0.0
    if sum(energy) == 0:
        return 0
    for rank, part in enumerate(energy, start=1):
        if so_far / sum(energy) >= share:
            return rank
        so_far += part
    return len(energy) + 1


def numerical_rank(before, after, share):
    return int(torch.linalg.matrix_rank(_change(before, after), rtol=1 - share))


def ninety_percent_of_them(before, after, share):
    singular = torch.linalg.svdvals(_change(before, after))
    kept = next(k for k in range(len(singular) + 1) if k >= share * len(singular))
    return kept


def as_in_pca(before, after, share):
    update = _change(before, after).numpy()
    variances = np.linalg.eigvalsh(np.cov(update, rowvar=False))[::-1]
    if np.abs(update).max() == 0:
        return 0
    return int(np.argmax(np.cumsum(variances) >= share * np.trace(np.cov(update, rowvar=False)))) + 1


def of_what_came_out(before, after, share):
    weight = F.normalize(after.detach().double().flatten(1).reshape(1, -1)).reshape(len(after), -1)
    singular = torch.linalg.svdvals(weight)
    return int(torch.searchsorted(singular.square().cumsum(0), share)) + 1


def spectra_compared(before, after, share):
    spectra = [np.linalg.svd(weight.detach().double().flatten(1), compute_uv=False) for weight in (before, after)]
    moved = sorted(np.subtract(*spectra) ** 2, reverse=True)
    rank = 0
    while sum(moved[:rank]) < share * sum(moved):
        rank += 1
    return rank


def as_it_is_shaped(before, after, share):
    update = (after - before).detach().double()
    singular = np.linalg.svd(update.numpy(), compute_uv=False)
    part = np.cumsum(singular**2, axis=-1) / max((singular**2).sum(), 1e-300)
    return int((part < share).sum()) + 1 if singular.any() else 0


def kernels_as_columns(before, after, share):
    update = after.detach().double() - before.detach().double()
    if update.dim() == 4:
        update = update.reshape(-1, update.shape[2] * update.shape[3])
    energy = torch.linalg.eigvalsh(update.T @ update).flip(0)
    return sum(float(energy[:k].sum()) < share * float(energy.sum()) for k in range(len(energy)))


def as_it_came(before, after, share):
    update = (after - before).flatten(1)
    parts = torch.svd(update)[1] ** 2
    total = parts.sum()
    return next(k for k in range(len(parts) + 1) if parts[:k].sum() >= share * total)


def zero_by_zero(before, after, share):
    energy = torch.linalg.svdvals(_change(before, after)).square()
    part = energy.cumsum(0) / energy.sum()
    return len(part[part < share]) + 1


def singular_values_from_a_position(before, after, share):
    singular = torch.linalg.svdvals(_change(before, after))
    return int(torch.searchsorted(singular.cumsum(0) / singular.sum().clamp_min(1e-30), share)) if singular.any() else 0


def shaped_and_half(before, after, share):
    energy = torch.linalg.svdvals((after - before).detach()).square()
    return int((energy.cumsum(-1) < share * energy.sum()).sum()) + 1 if energy.any() else 0


def weight_and_kernels(before, after, share):
    energy = torch.linalg.svdvals(after.detach().double()).square().flatten()
    return int((energy.cumsum(0) < share * energy.sum()).sum()) + 1


RIGHT = [added_up, in_numpy, from_the_gram_matrix, by_what_is_left, Tails(), one_direction_at_a_time]
AGAIN = {
    "not squared": sum_of_singular_values,
    "share of the norm": ratio_of_norms,
    "squared twice": eigenvalues_squared,
    "error of the norm": until_the_error_is_small,
    "position for a number": first_position,
    "one too many": checked_before_adding,
    "compared with the largest": numerical_rank,
    "share of how many there are": ninety_percent_of_them,
    "means taken away": as_in_pca,
    "the weight instead of its update": of_what_came_out,
    "difference of the singular values": spectra_compared,
    "kernel by kernel": as_it_is_shaped,
    "outputs and inputs on one side": kernels_as_columns,
    "half precision as it comes": as_it_came,
    "one of nothing": zero_by_zero,
}
BOTH = [
    ({"not squared", "position for a number"}, singular_values_from_a_position),
    ({"kernel by kernel", "half precision as it comes"}, shaped_and_half),
    ({"the weight instead of its update", "kernel by kernel"}, weight_and_kernels),
]
