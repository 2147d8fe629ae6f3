"""Exercise 5.2 in other styles."""

import copy
import hashlib
import io
from functools import partial
from itertools import chain

import numpy as np
import torch

from grader.checks.batchnorm.moving import not_equal, parameters, saved, solution


def against_a_copy_of_the_model(model, action):
    old = copy.deepcopy(model)
    action()

    def differ(pair):
        (_, was), (_, now) = pair
        return not torch.allclose(was, now, rtol=0, atol=0, equal_nan=True)

    parameters = filter(differ, zip(old.named_parameters(), model.named_parameters(), strict=True))
    buffers = filter(differ, zip(old.named_buffers(), model.named_buffers(), strict=True))
    return [name for (name, _), _ in (*parameters, *buffers)]


def by_fingerprint(model, action):
    def fingerprints():
        return {
            name: hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).digest()
            for name, tensor in chain(model.named_parameters(), model.named_buffers())
        }

    before = fingerprints()
    action()
    return [name for name, digest in fingerprints().items() if digest != before[name]]


def in_numpy(model, action):
    kinds = model.named_parameters, model.named_buffers
    before = [{name: np.array(tensor.tolist()) for name, tensor in kind()} for kind in kinds]
    action()
    moved = []
    for kind, old in zip(kinds, before, strict=True):
        for name, tensor in kind():
            if not np.array_equal(old[name], np.array(tensor.tolist()), equal_nan=True):
                moved.append(name)
    return tuple(moved)


def saved_to_memory(model, action):
    file = io.BytesIO()
    torch.save([list(model.named_parameters()), list(model.named_buffers())], file)
    action()
    file.seek(0)
    names = []
    for old, new in zip(torch.load(file), (model.named_parameters(), model.named_buffers()), strict=True):
        old = dict(old)
        names += [name for name, t in new if not ((t == old[name]) | (t.isnan() & old[name].isnan())).all()]
    return names


def list_of_parameters(model, action):
    before = copy.deepcopy(list(model.parameters()))
    action()
    names = []
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        if not np.array_equal(old.detach().numpy(), parameter.detach().numpy(), equal_nan=True):
            names.append(name)
    return names


CORRECT = [against_a_copy_of_the_model, by_fingerprint, in_numpy, saved_to_memory]
REWRITTEN = {"parameters only": list_of_parameters}
BROKEN = {}
COMBINED = [
    ({"parameters only", "NaN differs from itself"}, partial(solution, find=parameters, differ=not_equal)),
    ({"state dict only", "totals compared"}, partial(solution, find=saved, look=torch.nansum)),
]

EQUIVALENT = {
    "before = {name: tensor.detach().clone() for name, tensor in tensors()} -> "
    "before = {name: tensor.clone() for name, tensor in tensors()}": "a copy with a graph has the same values",
}
