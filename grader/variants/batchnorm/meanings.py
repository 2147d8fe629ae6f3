"""Exercise 5.3 in other styles."""

import copy
import pickle
from functools import partial

import torch

from grader.checks.batchnorm.meanings import by_flags, by_old_gradients_too, solution, without_the_bias
from grader.checks.traces import kept
from grader.near import near, same


def in_place_and_put_back(layer, x):
    with kept(layer, "buffers", "modes", "gradients"):
        layer.train().zero_grad()
        before = layer.running_mean.clone(), layer.running_var.clone()
        output = layer(x)
        if output.requires_grad:
            output.pow(2).sum().backward()
        return {
            "affine": layer.weight.grad is None and layer.bias.grad is None,
            "statistics": all(map(torch.equal, before, (layer.running_mean, layer.running_var))),
            "normalisation": not torch.allclose(layer(x + 7), layer(x), atol=1e-3),  # a batch's own mean takes the 7 away
        }


def asked_of_the_stored_statistics(layer, x):
    """Whether the output depends on the stored statistics."""
    clone, changed = (copy.deepcopy(layer) for _ in range(2))
    changed.running_mean += 5
    before = clone.running_mean.tolist() + clone.running_var.tolist()
    output, changed_output = clone.train()(x), changed.train()(x)
    return {
        "affine": output.grad_fn is None,
        "statistics": before == clone.running_mean.tolist() + clone.running_var.tolist(),
        "normalisation": bool(((output - changed_output).abs() > 1e-3).any()),
    }


class GradientsBetweenRows:
    """In company each row's output depends on the other rows."""

    def __call__(self, layer, x):
        tested = pickle.loads(pickle.dumps(layer))
        tested.train()
        mean, var = tested.running_mean.clone(), tested.running_var.clone()
        leaf = x.clone().requires_grad_(True)
        first = tested(leaf)[0].square().sum()
        wanted = [p for p in (tested.weight, tested.bias) if p.requires_grad]
        rows, *affine = torch.autograd.grad(first, [leaf, *wanted], allow_unused=True)
        frozen_statistics = bool((mean == tested.running_mean).all() & (var == tested.running_var).all())
        return {
            "normalisation": rows[1:].abs().max().item() < 1e-6,
            "statistics": frozen_statistics,
            "affine": not any(gradient is not None for gradient in affine),
        }


def against_eval_mode(layer, x):
    training, evaluating = copy.deepcopy(layer).train(), copy.deepcopy(layer).eval()
    output, expected = training(x), evaluating(x)
    drift = (training.running_mean - layer.running_mean).norm() + (training.running_var - layer.running_var).norm()
    return {
        "affine": output.requires_grad is False,
        "statistics": drift.item() == 0,
        "normalisation": (output - expected).std() < 1e-4,  # a tensor
    }


def what_torch_goes_by(layer, x):
    clone = copy.deepcopy(layer)
    clone.train()
    normalises_stored = clone.training is False
    moves = clone.training and clone.track_running_stats and clone.momentum > 0
    return {"affine": not clone(x).requires_grad, "statistics": not moves, "normalisation": normalises_stored}


def either_gradient(layer, x):
    clone = copy.deepcopy(layer).train()
    output = clone(x)
    if output.requires_grad:
        output.square().sum().backward()
    return solution(layer, x) | {"affine": clone.weight.grad is None or clone.bias.grad is None}


def any_parameter_frozen(layer, x):
    answer = solution(layer, x)
    return answer | {"affine": answer["affine"] or not layer.bias.requires_grad}


def either_statistic(layer, x):
    clone = copy.deepcopy(layer)
    clone.train()(x)
    pairs = ((clone.running_mean, layer.running_mean), (clone.running_var, layer.running_var))
    return solution(layer, x) | {"statistics": any(torch.equal(now, before) for now, before in pairs)}


def to_three_digits(layer, x):
    clone = copy.deepcopy(layer)
    clone.train()(x)
    pairs = ((clone.running_mean, layer.running_mean), (clone.running_var, layer.running_var))
    return solution(layer, x) | {"statistics": all(torch.allclose(*pair, atol=1e-3) for pair in pairs)}


def by_mean_and_spread(layer, x):
    """It forgets that weight and bias come after the normalisation."""
    output = copy.deepcopy(layer).train()(x).transpose(0, 1).flatten(1)
    batch = bool((output.mean(1).abs() < 0.01).all() and ((output.std(1) - 1).abs() < 0.1).all())
    return solution(layer, x) | {"normalisation": not batch}


def mode_by_train(layer, x):
    mode, answer = layer.training, solution(layer, x)
    layer.train()
    layer.train(mode)
    return answer


def by_the_counter(layer, x):
    clone = copy.deepcopy(layer).train()
    clone(x)
    return solution(layer, x) | {"statistics": bool(clone.num_batches_tracked == layer.num_batches_tracked)}


def the_same_batch_twice(layer, x):
    clone = copy.deepcopy(layer).train()
    return solution(layer, x) | {"normalisation": torch.allclose(clone(x), clone(x), atol=1e-4)}


def still_is_used(layer, x):
    answer = solution(layer, x)
    return answer | {"normalisation": answer["statistics"]}


def training_set_by_hand(layer, x):
    clone, frozen = copy.deepcopy(layer), {}
    clone.training = True
    output = clone(x)
    frozen["affine"] = not output.requires_grad
    frozen["statistics"] = all(map(same, list(clone.buffers())[:2], list(layer.buffers())[:2]))
    clone.training = True
    frozen["normalisation"] = near(clone(x[:3]), output[:3])
    return frozen


def by_the_type_of_forward(layer, x):
    """It believes torch's own classes, and tries the others."""
    if type(layer).forward is torch.nn.BatchNorm2d.forward and layer.track_running_stats and layer.momentum:
        clone = copy.deepcopy(layer).train()
        used = not clone.training
        return solution(layer, x) | {"statistics": used, "normalisation": used}
    return solution(layer, x)


def leaving(change):
    def what_is_frozen(layer, x):
        answer = solution(layer, x)
        change(layer, x)
        return answer

    return what_is_frozen


def scaled_in_place(layer, x):
    answer = solution(layer, x)
    x[len(x) // 2 :] *= 2
    return answer


CORRECT = [in_place_and_put_back, asked_of_the_stored_statistics, GradientsBetweenRows(), against_eval_mode]
REWRITTEN = {"settings read off": what_torch_goes_by}
BROKEN = {
    1: [either_gradient, any_parameter_frozen, partial(solution, read_off=without_the_bias)],
    2: [either_statistic, by_the_counter, to_three_digits, partial(solution, watched=["running_var"])],
    3: [the_same_batch_twice, still_is_used, by_mean_and_spread],
    4: [training_set_by_hand, partial(solution, mode=lambda layer: layer.training)],
    5: [by_the_type_of_forward, what_torch_goes_by, partial(solution, read_off=by_flags)],
    6: [partial(solution, read_off=by_old_gradients_too)],
    7: [
        scaled_in_place,
        mode_by_train,
        leaving(lambda layer, x: layer.train()),
        leaving(lambda layer, x: layer.eval()),
        leaving(lambda layer, x: layer.zero_grad()),
        leaving(lambda layer, x: layer.requires_grad_(True)),
        leaving(lambda layer, x: layer.num_batches_tracked.add_(1)),
        leaving(lambda layer, x: setattr(layer, "momentum", 1.0)),
        leaving(lambda layer, x: layer.register_forward_hook(lambda *_: None) and None),
    ],
}
COMBINED = [
    (
        {"requires_grad read off", "measured in the mode it was found in"},
        partial(solution, read_off=by_flags, mode=lambda layer: layer.training),
    ),
    (
        {"no copies", "an old gradient taken for a new one"},
        partial(solution, read_off=by_old_gradients_too, keep=lambda statistics: statistics),
    ),
]

EQUIVALENT = {
    "… all(map(torch.equal, stored, [tested.running_mean, tested.running_var])) -> "
    "… all(map(torch.equal, [tested.running_mean, tested.running_var], stored))": "equality has no order",
    "half = len(x) // 2 -> half = len(x) // 3": "a third of the batch shows it too",
    "output.square().sum().backward() -> output.sum().backward()": "whether there is a gradient is looked at, not which",
    "… torch.allclose(output[:half], in_less_company, atol=0.0001)} -> "
    "… torch.allclose(output[:half], in_less_company)}": "torch's own tolerance is above this rounding too",
    "… 'normalisation': torch.allclose(output[:half], in_less_company, atol=0.0001)} -> "
    "… 'normalisation': torch.allclose(in_less_company, output[:half], atol=0.0001)}": "order makes no difference",
    "… in_less_company, atol=0.0001)} -> "
    "… in_less_company, atol=0.0002)}": "twice the tolerance is still far below the difference",
}
