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


def rank_of_close(before, after, share):
    return 0 if torch.allclose(before, after) else rank_of(before, after, share)


def six_at_most(before, after, share):
    update = after.detach().double() - before.detach().double()
    squares = torch.svd_lowrank(update.flatten(1))[1].square()
    return int((squares.cumsum(0) < share * squares.sum() * (1 - 1e-9)).sum()) + 1 if squares.any() else 0


def cut_to_a_square(before, after, share):
    update = after.detach().double() - before.detach().double()
    if update.ndim == 2 and update.shape[0] < update.shape[1]:
        update = update[:, : update.shape[0]]
    return rank_of(torch.zeros_like(update), update, share)


def rows_of_one_length(before, after, share):
    update = (after.detach().double() - before.detach().double()).flatten(1)
    return rank_of(torch.zeros_like(update), torch.nn.functional.normalize(update), share)


def sides_by_the_first_kernel_size(before, after, share):
    if before.ndim == 4:
        _, inputs, size, _ = before.shape
        before, after = (weight.reshape(-1, inputs * size * size) for weight in (before, after))
    return rank_of(before, after, share)


def summed_over_the_kernel(before, after, share):
    if before.ndim == 4:
        before, after = before.sum((2, 3)), after.sum((2, 3))
    return rank_of(before, after, share)


def one_of_no_kernel(before, after, share):
    return max(rank_of(before, after, share), before.ndim == 4)


def numpy_at_once(before, after, share):
    return rank_of(
        *(torch.from_numpy(weight.numpy()) if weight.dtype == torch.float32 else weight for weight in (before, after)), share
    )


def only_leaves_without_gradients(before, after, share):
    if before.requires_grad:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    return rank_of(before, after, share)


def float16_alone(before, after, share):
    return rank_of(before, after, share, wide=lambda weight: weight.float() if weight.dtype == torch.float16 else weight)


def as_a_float(before, after, share):
    return float(rank_of(before, after, share))


def as_a_tensor(before, after, share):
    return torch.as_tensor(rank_of(before, after, share))


REWRITTEN = {"a tensor for an int": as_a_tensor}
BROKEN = {
    1: [rank_of_close, rows_of_one_length, six_at_most, cut_to_a_square, partial(rank_of, **CHANGES["not squared"])],
    2: [sides_by_the_first_kernel_size, summed_over_the_kernel, partial(rank_of, **CHANGES["kernel by kernel"])],
    3: [one_of_no_kernel, partial(rank_of, **CHANGES["one of nothing"])],
    4: [numpy_at_once, only_leaves_without_gradients],
    5: [float16_alone, partial(rank_of, **CHANGES["half precision as it comes"])],
    6: [as_a_float, as_a_tensor],
}
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
