"""Exercise 5.3 in other styles."""

import copy
import pickle
from functools import partial

import torch

from grader.checks.batchnorm.meanings import by_flags, by_old_gradients_too, solution
from grader.checks.traces import kept


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


CORRECT = [in_place_and_put_back, asked_of_the_stored_statistics, GradientsBetweenRows(), against_eval_mode]
REWRITTEN = {"settings read off": what_torch_goes_by}
BROKEN = {}
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
    "tested.zero_grad() -> pass": "`copy.deepcopy` of a parameter leaves its gradient behind",
    "tested.zero_grad() -> tested": "`copy.deepcopy` of a parameter leaves its gradient behind",
    "half = len(x) // 2 -> half = len(x) // 3": "a third of the batch shows it too",
    "moving = not (torch.equal(tested.running_mean, stored[0]) and torch.equal(tested.running_var, … -> "
    "moving = not (torch.equal(stored[0], tested.running_mean) and torch.equal(tested.running_var, …": "equality has no order",
    "… stored[0]) and torch.equal(tested.running_var, stored[1])) -> "
    "… stored[0]) and torch.equal(stored[1], tested.running_var))": "equality has no order",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x, 2 * x[half:] + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] - 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:]]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 / x[half:] + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], x[half:] + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 3 * x[half:] + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 1 * x[half:] + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 * x + 1]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 2]))": "any other company does",
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 1])) -> "
    "in_other_company = tested(torch.cat([x[:half], 2 * x[half:] + 0]))": "any other company does",
    "output.square().sum().backward() -> output.sum().backward()": "whether there is a gradient is looked at, not which",
    "… in_other_company[:half], atol=0.0001)} -> "
    "… in_other_company[:half])}": "torch's own tolerance is above this rounding too",
    "… 'normalisation': torch.allclose(output[:half], in_other_company[:half], atol=0.0001)} -> "
    "… 'normalisation': torch.allclose(in_other_company[:half], output[:half], atol=0.0001)}": "order makes no difference",
    "… in_other_company[:half], atol=0.0001)} -> "
    "… in_other_company[:half], atol=0.0002)}": "twice the tolerance is still far below the difference",
}
