"""Exercise 0.0 in other styles."""

import numpy as np
import torch


def in_numpy(x):
    return torch.from_numpy(x.numpy() - np.average(x.numpy())).to(x.dtype)


def number_by_number(x):
    mean = sum(number for row in x.tolist() for number in row) / x.numel()
    return torch.stack([torch.stack([number - mean for number in row]) for row in x])


class Centre:
    def __new__(cls, x):
        return torch.add(x, torch.sum(x) / len(x.flatten()), alpha=-1)


def all_but_the_first_row(x):
    return torch.cat([x[:1] - x.mean(), x[1:]])


def only_if_larger_than_one_row(x):
    return x - x.mean() if len(x) > 1 else x.clone()


def each_row_unless_it_is_alone(x):
    return x - x.mean(1, keepdim=True) if len(x) > 1 else x.clone()


CORRECT = [in_numpy, number_by_number, Centre]
REWRITTEN = {}  # {misconception's key: the same mistake written differently}; the proof says for which there has to be one
BROKEN = {1: [all_but_the_first_row], 2: [only_if_larger_than_one_row]}  # {sentence: what breaks it and no other}
COMBINED = [  # [({two keys}, a subject with both mistakes)]; one or two
    ({"each row by itself", "one number left alone"}, each_row_unless_it_is_alone),
]
EQUIVALENT = {}  # {"old line -> new line": why this mutant of the solution is no mistake}; see docs/proofs.md
