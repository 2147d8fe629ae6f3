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


CORRECT = [in_numpy, number_by_number, Centre]
REWRITTEN = {}  # {misconception's key: the same mistake written differently}; the proof says for which there has to be one
BROKEN = {}
COMBINED = []  # [({two keys}, a subject with both mistakes)]; one or two, once there are two experiments
EQUIVALENT = {}  # {"old line -> new line": why this mutant of the solution is no mistake}; see docs/proofs.md
