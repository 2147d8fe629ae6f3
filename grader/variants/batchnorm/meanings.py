"""Exercise 5.3 in other styles."""

import copy
import pickle

import torch
from torch.func import functional_call


def in_place_and_put_back(layer, x):
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    modes = [module.training for module in layer.modules()]
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.train()
    for parameter in layer.parameters():
        parameter.grad = None
    out = layer(x)
    if out.requires_grad:
        out.pow(2).sum().backward()
    answer = {
        "affine": layer.weight.grad is None and layer.bias.grad is None,
        "statistics": torch.equal(layer.running_mean, state["running_mean"])
        and torch.equal(layer.running_var, state["running_var"]),
    }
    with torch.no_grad():
        answer["normalisation"] = not torch.allclose(layer(x + 7), layer(x), atol=1e-3)  # a batch's own mean takes the 7 away
    layer.load_state_dict(state)
    for module, mode in zip(layer.modules(), modes, strict=True):
        module.training = mode
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient
    return answer


def other_stored_statistics(layer, x):
    """Whether the output depends on the stored statistics, asked of them."""
    clone, changed = (copy.deepcopy(layer) for _ in range(2))
    changed.running_mean += 5
    was = clone.running_mean.tolist() + clone.running_var.tolist()
    one, other = clone.train()(x), changed.train()(x)
    return {
        "affine": one.grad_fn is None,
        "statistics": was == clone.running_mean.tolist() + clone.running_var.tolist(),
        "normalisation": bool(((one - other).abs() > 1e-3).any()),
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


def by_formula(layer, x):
    layer_copy = copy.deepcopy(layer)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    shape = (1, -1) + (1,) * (x.dim() - 2)
    layer_copy.train(True)
    y = layer_copy(x)
    with torch.no_grad():
        scaled = (x - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + layer.eps)
        stored = scaled * layer.weight.reshape(shape) + layer.bias.reshape(shape)
        off = torch.dist(y, stored, p=float("inf"))
    after = layer_copy.running_mean, layer_copy.running_var
    affine = True
    if y.requires_grad:
        y.mean().backward()
        affine = layer_copy.weight.grad is None and layer_copy.bias.grad is None
    return {
        "affine": affine,
        "statistics": torch.equal(after[0], mean) & torch.equal(after[1], var),
        "normalisation": off < 1e-3,  # a tensor
    }


def functional(layer, x):
    training = {module: module.training for module in layer.modules()}
    layer.train()
    tensors = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    half = (x.shape[0] + 1) // 2
    whole = functional_call(layer, (tensors, buffers), (x,))
    spare = {name: b.clone() for name, b in buffers.items()}
    parts = [functional_call(layer, (tensors, spare), (part,)) for part in x.split(half)]
    for module, mode in training.items():
        module.training = mode
    stays = [torch.equal(b, layer.get_buffer(name)) for name, b in buffers.items() if name.startswith("running")]
    return {
        "affine": not whole.requires_grad,
        "statistics": all(stays),
        "normalisation": torch.equal(whole, torch.cat(parts)),
    }


def against_eval_mode(layer, x):
    a, b = copy.deepcopy(layer), copy.deepcopy(layer)
    a.train()
    b.eval()
    u, v = a(x), b(x)
    drift = (a.running_mean - layer.running_mean).norm() + (a.running_var - layer.running_var).norm()
    moves = drift.item() > 0
    return {"affine": u.requires_grad is False, "statistics": not moves, "normalisation": (u - v).std().item() < 1e-4}


def _half_in_company(layer, x, other):
    half = len(x) // 2
    return layer(x)[:half], layer(torch.cat([x[:half], other[half:]]))[:half]


def mode_of_the_copy(layer, x):
    answer = against_eval_mode(layer, x)
    clone = copy.deepcopy(layer)
    clone.train()
    if clone.training:
        answer.update(statistics=False, normalisation=False)
    else:
        answer.update(statistics=True, normalisation=True)
    return answer


def what_torch_goes_by(layer, x):
    clone = copy.deepcopy(layer)
    clone.train()
    normalises_stored = clone.training is False
    moves = clone.training and clone.track_running_stats and clone.momentum > 0
    return {"affine": not clone(x).requires_grad, "statistics": not moves, "normalisation": normalises_stored}


def as_it_came(layer, x):
    clone = pickle.loads(pickle.dumps(layer))
    before = clone.running_mean.clone()
    one, two = _half_in_company(clone, x, x.flip(0) * 3)
    return {
        "affine": not one.requires_grad,
        "statistics": bool((before == clone.running_mean).all()),
        "normalisation": bool((one - two).abs().max() < 1e-3),
    }


def statistics_decide(layer, x):
    clone = copy.deepcopy(layer).train()
    out = clone(x)
    still = torch.equal(clone.running_mean, layer.running_mean)
    return dict.fromkeys(("statistics", "normalisation"), still) | {"affine": not out.requires_grad}


def on_the_layer_itself(layer, x):
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer.train()
    one, two = _half_in_company(layer, x, 2 * x)
    answer = {
        "affine": not one.requires_grad,
        "statistics": torch.equal(mean, layer.running_mean) and torch.equal(var, layer.running_var),
        "normalisation": torch.allclose(one, two, atol=1e-4),
    }
    if one.requires_grad:
        (one.sum() + two.sum()).backward()
    return answer


def flags_and_nothing_put_back(layer, x):
    answer = on_the_layer_itself(layer, x)
    answer["affine"] = not layer.weight.requires_grad
    return answer


def settings_as_it_came(layer, x):
    answer = as_it_came(layer, x)
    answer["affine"] = not layer.bias.requires_grad
    return answer


def old_gradients_and_still(layer, x):
    answer = statistics_decide(layer, x)
    if layer.weight.grad is not None:
        answer["affine"] = False
    return answer


CORRECT = [
    *(in_place_and_put_back, other_stored_statistics, GradientsBetweenRows(), by_formula, functional),
    against_eval_mode,
]
REWRITTEN = {
    "the mode read off": mode_of_the_copy,
    "settings read off": what_torch_goes_by,
}
COMBINED = [
    ({"requires_grad read off", "left as the test leaves it"}, flags_and_nothing_put_back),
    ({"requires_grad read off", "measured in the mode it was found in"}, settings_as_it_came),
    ({"still taken for used", "an old gradient taken for a new one"}, old_gradients_and_still),
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
