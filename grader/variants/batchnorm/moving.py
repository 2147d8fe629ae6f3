"""Exercise 5.2 in other styles."""

import copy
import hashlib
import io
from itertools import chain

import numpy as np
import torch


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


class Watch:
    """A class, whose comparison is an assertion of torch's own tests."""

    def __call__(self, model, action):
        self.model = model
        before = self.look()
        action()
        after = self.look()
        return [name for name in after if self.differs(before[name], after[name])]

    def look(self):
        everything = {}
        for name, parameter in self.model.named_parameters():
            everything[name] = parameter.data.clone()
        for name, buffer in self.model.named_buffers():
            everything[name] = buffer.clone()
        return everything

    def differs(self, one, other):
        try:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return True
        return False


def module_by_module(model, action):
    def tensors(kind):
        for path, module in model.named_modules():
            for key, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield f"{path}.{key}".lstrip("."), tensor

    old = {name: repr(tensor.tolist()) for kind in ("_parameters", "_buffers") for name, tensor in tensors(kind)}
    action()
    return list(
        dict.fromkeys(
            name for kind in ("_parameters", "_buffers") for name, tensor in tensors(kind) if repr(tensor.tolist()) != old[name]
        )
    )


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


def _same(one, other):
    return np.array_equal(one.detach().numpy(), other.detach().numpy(), equal_nan=True)


def everything(model):
    return [*model.named_parameters(), *model.named_buffers()]


def list_of_parameters(model, action):
    before = copy.deepcopy(list(model.parameters()))
    action()
    names = []
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        if not _same(old, parameter):
            names.append(name)
    return names


def statistics_by_attribute(model, action):
    def read():
        tensors = [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]
        for name, module in model.named_modules():
            for key in ("running_mean", "running_var"):
                if getattr(module, key, None) is not None:
                    tensors.append((f"{name}.{key}", getattr(module, key).clone()))
        return tensors

    before = read()
    action()
    return [name for (name, was), (_, now) in zip(before, read(), strict=True) if not _same(was, now)]


def naive_state_dict(model, action):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    action()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]


def sums(model, action):
    before = [tensor.sum().item() for _, tensor in everything(model)]
    action()
    return [name for (name, tensor), old in zip(everything(model), before, strict=True) if tensor.sum().item() != old]


def naive_allclose(model, action):
    before = {name: tensor.detach().clone() for name, tensor in everything(model)}
    action()
    return [name for name, tensor in everything(model) if not torch.allclose(before[name], tensor)]


def parameters_that_are_not_equal(model, action):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    action()
    return [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]


def state_dict_without_clones(model, action):
    before = model.state_dict()
    action()
    return [name for name, tensor in model.state_dict().items() if not _same(before[name], tensor)]


CORRECT = [against_a_copy_of_the_model, by_fingerprint, in_numpy, Watch(), module_by_module, saved_to_memory]
REWRITTEN = {
    "parameters only": list_of_parameters,
    "running mean and variance only": statistics_by_attribute,
}
COMBINED = [
    ({"state dict only", "order of the state dict", "NaN differs from itself"}, naive_state_dict),
    ({"totals compared", "NaN differs from itself"}, sums),
    ({"nearly equal is equal", "NaN differs from itself"}, naive_allclose),
    ({"parameters only", "NaN differs from itself"}, parameters_that_are_not_equal),
    ({"no copies", "state dict only"}, state_dict_without_clones),
]

EQUIVALENT = {
    "before = {name: tensor.detach().clone() for name, tensor in tensors()} -> "
    "before = {name: tensor.clone() for name, tensor in tensors()}": "a copy with a graph has the same values",
}
