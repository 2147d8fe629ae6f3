"""Exercise 5.2 in other styles."""

import copy
import hashlib
import io
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import nn

from grader.checks.batchnorm.moving import (
    differ,
    floating,
    module_by_module,
    not_equal,
    parameters,
    solution,
    tensors_of,
    trainable,
    without_nan,
)


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


def looked_at_the_gradients(model, action):
    action()
    return [name for name, parameter in dict(model.named_parameters()).items() if isinstance(parameter.grad, torch.Tensor)]


def zeros_for_nan(model, action):
    def values():
        return {name: torch.nan_to_num(tensor).tolist() for name, tensor in tensors_of(model).items()}

    before = values()
    action()
    return [name for name, after in values().items() if after != before[name]]


def acting_twice(model, action):
    names = solution(model, action)
    action()
    return names


def in_eval_mode(model, action):
    model.eval()
    return solution(model, action)


def in_train_mode(model, action):
    model.train()
    return solution(model, action)


def with_what_it_did_undone(model, action):
    state = copy.deepcopy(model.state_dict())
    names = solution(model, action)
    model.load_state_dict(state)
    return names


def matrices(model):
    """Parameters of one dimension or more."""
    return {name: tensor for name, tensor in tensors_of(model).items() if tensor.ndim or name in dict(model.named_buffers())}


def buffers_first(model, action):
    names = solution(model, action)
    buffers = dict(model.named_buffers())
    return sorted(names, key=lambda name: name not in buffers)


def in_reverse(model, action):
    return solution(model, action)[::-1]


def under_every_name(model):
    names = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return dict(chain(*names))


def in_float32(before, now):
    return differ(before.float(), now.float())


def above_a_tiny_difference(before, now):
    return differ(before, now) and not bool((now - before).abs().max() < 1e-10)


def nearly_equal_if_a_buffer(model, action):
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    names, now = solution(model, action), dict(model.named_buffers())
    return [n for n in names if n not in before or not torch.allclose(before[n], now[n], equal_nan=True)]


def nans_left_out(before, now):
    numbers = ~(before.isnan() | now.isnan())
    return not torch.equal(before[numbers], now[numbers])


def nans_counted(before, now):
    return before.isnan().sum() != now.isnan().sum() or not torch.equal(before.nan_to_num(), now.nan_to_num())


def differences_added(before, now):
    numbers = ~(before.isnan() & now.isnan())
    return bool((now[numbers] - before[numbers]).abs().sum() != 0)


def other_objects(model, action):
    kept = tensors_of(model)
    moved = solution(model, action)
    return [name for name, tensor in tensors_of(model).items() if name in moved or tensor is not kept[name]]


CORRECT = [against_a_copy_of_the_model, by_fingerprint, in_numpy, saved_to_memory]
REWRITTEN = {
    "parameters only": list_of_parameters,
    "NaN taken for 0": zeros_for_nan,
    "a gradient taken for movement": looked_at_the_gradients,
}
BROKEN = {
    1: [
        acting_twice,
        in_eval_mode,
        in_train_mode,
        with_what_it_did_undone,
        torch.no_grad()(solution),
        torch.inference_mode()(in_numpy),
    ],
    2: [partial(solution, find=trainable), partial(solution, find=matrices)],
    3: [partial(solution, find=parameters), partial(solution, find=floating)],
    4: [buffers_first, in_reverse, partial(solution, find=under_every_name), partial(solution, find=module_by_module)],
    5: [
        partial(solution, differ=in_float32),
        partial(solution, differ=above_a_tiny_difference),
        nearly_equal_if_a_buffer,
    ],
    6: [partial(solution, differ=test) for test in (not_equal, without_nan, nans_left_out, nans_counted, differences_added)],
    7: [partial(solution, afresh=False), other_objects],
}
COMBINED = [
    ({"parameters only", "NaN differs from itself"}, partial(solution, find=parameters, differ=not_equal)),
    ({"state dict only", "totals compared"}, partial(solution, find=nn.Module.state_dict, look=torch.nansum)),
]

EQUIVALENT = {
    "before = {name: tensor.detach().clone() for name, tensor in tensors()} -> "
    "before = {name: tensor.clone() for name, tensor in tensors()}": "a copy with a graph has the same values",
}
