"""Exercise 5.4 in other styles."""

import types
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks import traces
from grader.checks.batchnorm.freezing import solution
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


CORRECT = [another_class_for_each, eval_before_every_forward, constants_in_forward, Replace]
REWRITTEN = {"requires_grad=False alone": parameters_of_the_norms}
BROKEN = {}
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
