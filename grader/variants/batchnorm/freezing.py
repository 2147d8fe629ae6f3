"""Exercise 5.4 in other styles."""

import types
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks import traces
from grader.checks.batchnorm.freezes import (
    from_the_top,
    named_after_norms,
    never_to_be_undone,
    of_these_classes,
    solution,
    with_the_default_eps,
    without_momentum,
)
from grader.checks.batchnorm.freezing import everything_put_back
from grader.checks.batchnorm.layers import norms


def _remembered(layers):
    """A function that gives each layer its modes and flags back."""
    snapshots = [{kind: traces.of(layer)[kind] for kind in ("modes", "flags")} for layer in layers]
    return lambda: list(map(traces.put_back, layers, snapshots))


def another_class_for_each(model):
    layers = norms(model)
    classes, put_back = [type(layer) for layer in layers], _remembered(layers)
    for layer in layers:
        layer.eval().requires_grad_(False)
        layer.__class__ = type("Frozen", (type(layer),), {"train": lambda self, mode=True: self})

    def undo():
        for layer, kind in zip(layers, classes, strict=True):
            layer.__class__ = kind
        put_back()

    return undo


def eval_before_every_forward(model):
    layers = norms(model)
    put_back = _remembered(layers)
    hooks = [layer.register_forward_pre_hook(lambda layer, args: layer.train(False) and None) for layer in layers]
    for layer in layers:
        layer.requires_grad_(False)

    def undo():
        while hooks:
            hooks.pop().remove()
        put_back()

    return undo


def constants_in_forward(model):
    """Flags and modes stay as they are: forward uses neither."""

    def forward(self, x):
        detached = (t if t is None else t.detach() for t in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.batch_norm(x, *detached, training=False, eps=self.eps)

    layers = norms(model)
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)

    def undo():
        for layer in layers:
            layer.__dict__.pop("forward")

    return undo


class _Affine(nn.Module):
    """A frozen BatchNorm as one multiplication and one addition."""

    def __init__(self, norm):
        super().__init__()
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
            shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


class Replace:
    """Other modules in the places of the BatchNorms; a model that is one keeps itself and gets another forward."""

    def __init__(self, model):
        self.places = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if isinstance(child, _BatchNorm)
        ]
        for parent, key, child in self.places:
            parent._modules[key] = _Affine(child)
        self.alone = model if isinstance(model, _BatchNorm) else None
        if self.alone:
            model.forward = _Affine(model).forward

    def __call__(self):
        for parent, key, child in self.places:
            parent._modules[key] = child
        if self.alone:
            del self.alone.forward


def parameters_of_the_norms(model):
    frozen = []
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            for p in m.parameters(recurse=False):
                if p.requires_grad:
                    frozen.append(p)
                    p.requires_grad = False

    def undo():
        while frozen:
            frozen.pop().requires_grad = True

    return undo


def follows_its_batches(layer):
    """The stored statistics normalise, and move."""

    def forward(x):
        y = F.batch_norm(x, layer.running_mean.clone(), layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        with torch.no_grad():
            layer.running_mean.lerp_(x.transpose(0, 1).flatten(1).mean(1), 0.1 * layer.training)
        return y

    layer.forward = forward
    return lambda: delattr(layer, "forward")


def four_tensors_and_no_eps(model):
    undo = solution(model)

    def forward(layer, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = (x - layer.running_mean.view(shape)) * layer.running_var.view(shape).add(1e-5).rsqrt()
        return y if layer.weight is None else y * layer.weight.view(shape) + layer.bias.view(shape)

    for layer in norms(model):
        layer.forward = types.MethodType(forward, layer)
    return lambda: ([delattr(layer, "forward") for layer in norms(model)], undo())


def only_the_weights(model):
    undo = solution(model)
    for layer in norms(model):
        if layer.affine:
            layer.bias.requires_grad_(True)
    return undo


def down_to_the_second_level(model):
    return [module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and name.count(".") < 2]


def model_left_out(model):
    return [layer for layer in norms(model) if layer is not model]


def eval_until_the_next_train(layer):
    layer.training = False
    layer.train = lambda mode=True: layer
    return lambda: delattr(layer, "train")


def flags_saved_at_every_place(model):
    saved = []
    for _, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            for parameter in module.parameters():
                saved.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(False)
    let_go = solution(model, flagged=lambda model, layers: [])

    def undo():
        let_go()
        for parameter, flag in saved:
            parameter.requires_grad_(flag)

    return undo


def flags_never_put_back(model):
    undo = solution(model, flagged=lambda model, layers: [])
    for layer in norms(model):
        layer.requires_grad_(False)
    return undo


def all_in_eval_mode_at_first(model):
    undo = solution(model)
    model.eval()
    return undo


def statistics_made_new(model):
    undo = solution(model)
    return lambda: (undo(), [layer.reset_running_stats() for layer in norms(model)])


def parameters_put_back(model):
    values, let_go = [parameter.detach().clone() for parameter in model.parameters()], solution(model)

    @torch.no_grad()
    def undo():
        let_go()
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)

    return undo


def whole_model_in_turn(model):
    """It freezes each module that has a BatchNorm below it or is one."""
    modules = [module for module in model.modules() if norms(module)]
    flags = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    let_go = solution(model)
    for parameter in flags:
        parameter.requires_grad_(False)

    def undo():
        let_go()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    return undo


CORRECT = [another_class_for_each, eval_before_every_forward, constants_in_forward, Replace]
REWRITTEN = {
    "another eps": four_tensors_and_no_eps,
    "requires_grad=False alone": parameters_of_the_norms,
    "the whole model frozen": whole_model_in_turn,
}
BROKEN = {
    1: [partial(solution, fix=fix) for fix in (without_momentum, with_the_default_eps)]
    + [partial(solution, fixed=lambda model, layers: [model], fix=from_the_top)],
    2: [only_the_weights, partial(solution, fix=follows_its_batches), partial(solution, flagged=lambda model, layers: [])],
    3: [partial(solution, find=find) for find in (down_to_the_second_level, of_these_classes)],
    4: [
        whole_model_in_turn,
        all_in_eval_mode_at_first,
        partial(solution, find=named_after_norms),
        partial(solution, fixed=lambda model, layers: model.modules()),
    ],
    5: [
        flags_never_put_back,
        partial(solution, fix=never_to_be_undone),
        partial(solution, finish=lambda layer: layer.requires_grad_(True)),
        partial(solution, finish=lambda layer: setattr(layer, "momentum", 0.1)),
    ],
    6: [partial(solution, fix=eval_until_the_next_train), partial(solution, finish=nn.Module.train)],
    7: [partial(solution, find=model_left_out), flags_saved_at_every_place],
    8: [everything_put_back, parameters_put_back, statistics_made_new],
}
COMBINED = [
    (
        {"affine still trains", "undo unfreezes everything"},
        partial(solution, flagged=lambda model, layers: [], finish=lambda layer: layer.requires_grad_(True)),
    ),
    (
        {"the whole model frozen", "undo to the default momentum"},
        partial(solution, flagged=lambda model, layers: [model], finish=lambda layer: setattr(layer, "momentum", 0.1)),
    ),
]

EQUIVALENT = {
    "norm.train = lambda mode=True, norm=norm: norm -> "
    "norm.train = lambda mode=False, norm=norm: norm": "the argument is not read",
}
