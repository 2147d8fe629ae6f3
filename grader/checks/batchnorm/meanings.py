"""Exercise 5.3: what of a BatchNorm is frozen, found out by experiment."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.features.counting import SharedList
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from helpers import expect
from helpers.batchnorm import what_is_frozen

exercise = Exercise(__name__, "5.3", what_is_frozen)

_KEYS = "affine", "statistics", "normalisation"


def _trained(layer: nn.Module, trial: Trial) -> nn.Module:
    """Give a layer values that are not those of a fresh one."""
    n = layer.num_features
    layer.running_mean.copy_(trial.normal(n))
    layer.running_var.copy_(0.5 + trial.normal(n).square())
    layer.num_batches_tracked.fill_(trial.integer(5, 50))
    with torch.no_grad():
        layer.weight.copy_(1.5 + trial.normal(n).abs())
        layer.bias.copy_(2 + trial.normal(n).abs())
    return layer


class _Stuck(nn.BatchNorm2d):
    """Stays in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.training = False

    def train(self, mode: bool = True) -> "_Stuck":
        return self


class _StoredAsConstants(nn.BatchNorm2d):
    """Normalises with the stored statistics in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _WithoutMomentum(nn.BatchNorm2d):
    """Moves its running statistics by nothing; no counter counts, so that it is no matter whether that is one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.0, self.eps)


class _BatchInTraining(nn.BatchNorm2d):
    """Normalises with the batch's statistics in train mode, and moves none."""

    def forward(self, x: Tensor) -> Tensor:
        stored = (None, None) if self.training else (self.running_mean, self.running_var)
        return F.batch_norm(x, *stored, self.weight, self.bias, self.training, 0.0, self.eps)


class _DetachedAffine(nn.BatchNorm2d):
    """Trains neither weight nor bias, although they require gradients."""

    def forward(self, x: Tensor) -> Tensor:
        moving = self.training, self.momentum, self.eps
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight.detach(), self.bias.detach(), *moving)


class _Untrainable(nn.BatchNorm2d):
    """Has a switch of its own, as a layer of Keras has, and does as Keras does since TensorFlow 2."""

    trainable = False

    def forward(self, x: Tensor) -> Tensor:
        if self.trainable:
            return super().forward(x)
        weight, bias = self.weight.detach(), self.bias.detach()
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


def _into_eval_mode(layer: nn.Module, _) -> None:
    layer.eval()


def _with_a_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(_into_eval_mode)
    return layer


def _untracked(layer: nn.Module) -> nn.Module:
    layer.track_running_stats = False
    return layer


def _with_old_gradients(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return layer


class _Counting(nn.BatchNorm1d):
    """Remembers every call, also of its copies."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.calls = SharedList()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x)


class _Kinds(Experiment):
    """An experiment on layers of several kinds."""

    def layers(self, trial: Trial, channels: int) -> dict[str, nn.Module]:
        raise NotImplementedError

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(2, 4)
        layers = self.layers(trial, channels)
        x = 4 + 3 * trial.normal(2 * trial.integer(3, 4), channels, 3, 2)
        return {"layers": layers, "x": x}

    def measure(self, subject, inputs):
        return {what: _answer(subject(layer, inputs["x"].clone())) for what, layer in inputs["layers"].items()}

    def facts(self, raw, inputs):
        return {what: " + ".join(key for key in _KEYS if answer[key]) or "nothing" for what, answer in raw.items()}


@exercise.experiment("four recipes")
class FourRecipes(_Kinds):
    points = 2

    def layers(self, trial, channels):
        return {
            "a BatchNorm as it comes": _trained(nn.BatchNorm2d(channels), trial),
            "requires_grad_(False)": _trained(nn.BatchNorm2d(channels), trial).requires_grad_(False),
            "eval mode that train() does not undo": _trained(_Stuck(channels), trial),
            "both": _trained(_Stuck(channels), trial).requires_grad_(False),
        }


@exercise.experiment("still and used")
class StillAndUsed(_Kinds):
    points = 2

    def layers(self, trial, channels):
        return {
            "momentum 0": _trained(_WithoutMomentum(channels), trial),
            "track_running_stats off": _untracked(_trained(nn.BatchNorm2d(channels), trial)),
            "Keras before TensorFlow 2": _trained(_BatchInTraining(channels), trial).requires_grad_(False),
        }


@exercise.experiment("whatever the attributes say")
class WhateverTheAttributesSay(_Kinds):
    points = 2

    def layers(self, trial, channels):
        return {
            "a forward that ignores the mode": _trained(_StoredAsConstants(channels), trial),
            "a hook that calls eval()": _with_a_hook(_trained(nn.BatchNorm2d(channels), trial)),
            "weights that are detached in forward": _trained(_DetachedAffine(channels), trial),
            "a switch of its own, Keras since TensorFlow 2": _trained(_Untrainable(channels), trial),
        }


@exercise.experiment("found in eval mode")
class FoundInEvalMode(_Kinds):
    def layers(self, trial, channels):
        return {
            "a BatchNorm in eval mode": _trained(nn.BatchNorm2d(channels), trial).eval(),
            "requires_grad_(False), and in eval mode": _trained(nn.BatchNorm2d(channels), trial).requires_grad_(False).eval(),
        }


@exercise.experiment("old gradients")
class OldGradients(_Kinds):
    def layers(self, trial, channels):
        return {
            "requires_grad_(False) with old gradients": _with_old_gradients(
                _trained(nn.BatchNorm2d(channels), trial)
            ).requires_grad_(False),
            "requires_grad_(False) without": _trained(nn.BatchNorm2d(channels), trial).requires_grad_(False),
            "a BatchNorm with old gradients": _with_old_gradients(_trained(nn.BatchNorm2d(channels), trial)),
        }


@exercise.experiment("left as found")
class LeftAsFound(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layers = [_trained(_Counting(channels), trial).eval(), _with_old_gradients(_trained(_Counting(channels), trial))]
        layers[1].bias.requires_grad_(False)
        return {"layers": layers, "x": 4 + 3 * trial.normal(trial.integer(6, 8), channels)}

    def measure(self, subject, inputs):
        for layer in inputs["layers"]:
            _answer(subject(layer, inputs["x"].clone()))
        tried = all(layer.calls for layer in inputs["layers"])
        return {"tried": tried, "states": [_state(layer) for layer in inputs["layers"]]}

    def facts(self, raw, inputs):
        def all_same(kind: str) -> str:
            pairs = zip(raw["states"], map(_state, inputs["layers"]), strict=True)
            return "as found" if all(_same(now[kind], was[kind]) for now, was in pairs) else "changed"

        return {
            "a batch went through the layer": "yes" if raw["tried"] else "no",
            "parameters": all_same("parameters"),
            "running statistics and counter": all_same("buffers"),
            "mode": all_same("mode"),
            "gradients": all_same("gradients"),
            "requires_grad": all_same("flags"),
        }


def _state(layer: nn.Module) -> dict:
    parameters = list(layer.parameters())
    return {
        "parameters": [parameter.detach().clone() for parameter in parameters],
        "buffers": [buffer.clone() for buffer in layer.buffers()],
        "mode": [layer.training],
        "gradients": [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters],
        "flags": [parameter.requires_grad for parameter in parameters],
    }


def _same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(one, other, strict=True)
    )


def _answer(value: object) -> dict[str, bool]:
    """The answer as three bools, or a sentence about its form."""
    if not isinstance(value, dict):
        raise wrong_return(f"the answer must be a dict with {', '.join(_KEYS)}", value)
    if set(value) != set(_KEYS):
        raise WrongReturn(f"the answer must have the keys {', '.join(_KEYS)}, got {', '.join(map(str, value)) or 'none'}.")
    answer = {}
    for key in _KEYS:
        item = value[key]
        if isinstance(item, np.bool_) or (isinstance(item, Tensor) and item.numel() == 1):
            item = item.item()
        if not isinstance(item, bool):
            raise WrongReturn(f"answer[{key!r}] must be True or False, got {expect.describe(value[key])}.")
        answer[key] = item
    return answer


def _statistics(layer: nn.Module) -> list[Tensor]:
    return [layer.running_mean, layer.running_var]


def _company(x: Tensor) -> Tensor:
    """The first half of x in other company."""
    half = len(x) // 2
    return torch.cat([x[:half], 9 - 2 * x[half:]])


def _trial_run(layer: nn.Module, x: Tensor) -> dict[str, bool]:
    """What happens to a copy of the layer, in the mode it is in."""
    layer = copy.deepcopy(layer)
    before = [tensor.clone() for tensor in _statistics(layer)]
    half = len(x) // 2
    output = layer(x)
    moved = any(not torch.equal(*pair) for pair in zip(before, _statistics(layer), strict=True))
    in_company = layer(_company(x))
    return {
        "affine": not output.requires_grad,
        "statistics": not moved,
        "normalisation": torch.allclose(output[:half], in_company[:half], atol=1e-4),
    }


@exercise.misconception("the mode read off")
def the_mode_read_off(layer, x):
    trained = copy.deepcopy(layer).train()
    return what_is_frozen(layer, x) | {"statistics": not trained.training, "normalisation": not trained.training}


@exercise.misconception("requires_grad read off")
def requires_grad_read_off(layer, x):
    return what_is_frozen(layer, x) | {"affine": not (layer.weight.requires_grad or layer.bias.requires_grad)}


@exercise.misconception("settings read off")
def settings_read_off(layer, x):
    trained = copy.deepcopy(layer).train()
    used = not trained.training
    tracked = getattr(layer, "track_running_stats", True) and getattr(layer, "momentum", 0.1) != 0
    return what_is_frozen(layer, x) | {"statistics": used or not tracked, "normalisation": used}


@exercise.misconception("measured in eval mode")
def measured_in_eval_mode(layer, x):
    return _trial_run(copy.deepcopy(layer).eval(), x)


@exercise.misconception("measured in the mode it was found in")
def measured_in_the_mode_it_was_found_in(layer, x):
    return _trial_run(layer, x)


@exercise.misconception("no copies")
def no_copies(layer, x):
    trained = copy.deepcopy(layer).train()
    before = _statistics(trained)
    trained(x)
    after = _statistics(trained)
    still = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return what_is_frozen(layer, x) | {"statistics": still}


@exercise.misconception("still taken for used")
def still_taken_for_used(layer, x):
    answer = what_is_frozen(layer, x)
    return answer | {"normalisation": answer["statistics"]}


@exercise.misconception("no gradient under no_grad")
def no_gradient_under_no_grad(layer, x):
    with torch.no_grad():
        return _trial_run(copy.deepcopy(layer).train(), x)


@exercise.misconception("an old gradient taken for a new one")
def an_old_gradient_taken_for_a_new_one(layer, x):
    gradients = [parameter.grad for parameter in (layer.weight, layer.bias)]
    answer = what_is_frozen(layer, x)
    return answer | {"affine": answer["affine"] and all(gradient is None for gradient in gradients)}


@exercise.misconception("left as the test leaves it")
def left_as_the_test_leaves_it(layer, x):
    answer = what_is_frozen(layer, x)
    output = layer.train()(x)
    if output.requires_grad:
        output.square().sum().backward()
    return answer


@exercise.misconception("gradients left behind")
def gradients_left_behind(layer, x):
    answer = what_is_frozen(layer, x)
    tested = copy.deepcopy(layer).train()
    output = tested(x)
    if output.requires_grad:
        output.square().sum().backward()
        for own, parameter in zip(layer.parameters(), tested.parameters(), strict=True):
            if parameter.grad is not None:
                own.grad = parameter.grad if own.grad is None else own.grad + parameter.grad
    return answer
