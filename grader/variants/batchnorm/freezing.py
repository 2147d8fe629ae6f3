"""Exercise 5.4 in other styles."""

import functools
import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def another_class_for_each(model):
    changed = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            kind = type(module)
            flags = [p.requires_grad for p in module.parameters()]
            changed.append((module, kind, module.training, flags))
            module.eval().requires_grad_(False)
            module.__class__ = type("Frozen", (kind,), {"train": lambda self, mode=True: self})

    def undo():
        for module, kind, mode, flags in changed:
            module.__class__ = kind
            module.train(mode)
            for p, flag in zip(module.parameters(), flags, strict=True):
                p.requires_grad = flag

    return undo


def eval_before_every_forward(model):
    hooks, modes, flags = [], {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        modes[name] = module.training
        hooks.append(module.register_forward_pre_hook(lambda module, args: module.train(False) and None))
        for p in module.parameters():
            flags[p] = p.requires_grad
            p.requires_grad = False

    def undo():
        while hooks:
            hooks.pop().remove()
        for name, mode in modes.items():
            model.get_submodule(name).training = mode
        for p, flag in flags.items():
            p.requires_grad = flag

    return undo


def constants_in_forward(model):
    """Flags and modes stay as they are: forward uses neither."""

    def forward(self, x):
        detached = (t if t is None else t.detach() for t in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.batch_norm(x, *detached, training=False, eps=self.eps)

    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
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
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


class Replace:
    """Other modules in the places of the BatchNorms; a model that is one keeps itself and gets another forward."""

    def __init__(self, model):
        self.places = []
        if isinstance(model, _BatchNorm):
            model.forward = _Affine(model).forward
            self.places.append((model, None, None))
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, _BatchNorm):
                    self.places.append((parent, key, child))
        for parent, key, child in self.places:
            if child is not None:
                parent._modules[key] = _Affine(child)

    def __call__(self):
        for parent, key, child in self.places:
            if child is None:
                del parent.forward
            else:
                parent._modules[key] = child


def watched_from_the_top(model):
    """The model puts its BatchNorms into eval mode each time it runs."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))]
    parameters = [p for m in norms for p in (m.weight, m.bias) if p is not None and p.requires_grad]
    training = {m for m in norms if m.training}

    def calm(*_):
        for m in norms:
            m.training = False

    handle = model.register_forward_pre_hook(calm)
    for p in parameters:
        p.requires_grad_(False)

    def undo(done=False):
        handle.remove()
        for m in norms:
            m.training = m in training
        for p in parameters:
            p.requires_grad_()

    return functools.partial(undo, True)


def train_with_a_memory(model):
    """train() remembers what it was asked for, and undo gives each layer the mode that it would have."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    asked = {norm: norm.training for norm in norms}
    trainable = [p for norm in norms for p in norm.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad = False
    for norm in norms:
        norm.eval()

        def train(mode=True, norm=norm):
            asked[norm] = mode
            return norm

        norm.train = train

    def undo():
        for norm in norms:
            vars(norm).pop("train")
            norm.train(asked[norm])
        for p in trainable:
            p.requires_grad = True

    return undo


def _find(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def _remember(model):
    """A function that gives every BatchNorm its mode and flags back."""
    flags = [(p, p.requires_grad) for m in _find(model) for p in m.parameters()]
    modes = [(m, m.training) for m in _find(model)]

    def back():
        for p, flag in flags:
            p.requires_grad = flag
        for m, mode in modes:
            m.training = mode

    return back


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


def statistics_not_tracked(model):
    undo = _remember(model)
    for m in _find(model):
        m.track_running_stats = False
        m.requires_grad_(False)

    def back():
        undo()
        for m in _find(model):
            m.track_running_stats = True

    return back


def affine_of_images_only(model):
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    modes = [m.training for m in layers]
    for m in layers:
        m.eval()
        m.train = lambda mode=True, m=m: m

    def undo():
        for m, mode in zip(layers, modes, strict=True):
            del m.train
            m.training = mode

    return undo


def by_name_and_all_flags_true(model):
    layers = [m for name, m in model.named_modules() if "bn" in name and isinstance(m, _BatchNorm)]
    modes = [m.training for m in layers]
    for m in layers:
        m.eval().requires_grad_(False)
        m.train = types.MethodType(lambda self, mode=True: self, m)

    def undo():
        for m, mode in zip(layers, modes, strict=True):
            del m.train
            m.train(mode).requires_grad_(True)

    return undo


def eval_once_and_all_flags_true(model):
    was = [(m, m.training) for m in _find(model)]
    for m, _ in was:
        m.eval().requires_grad_(False)

    def undo():
        for m, mode in was:
            m.train(mode)
            m.requires_grad_(True)

    return undo


def momentum_zero_and_forgotten(model):
    undo = parameters_of_the_norms(model)
    for m in _find(model):
        m.momentum = 0.0

    def back():
        undo()
        for m in _find(model):
            m.momentum = 0.1

    return back


CORRECT = [
    *(another_class_for_each, eval_before_every_forward, constants_in_forward, Replace),
    *(watched_from_the_top, train_with_a_memory),
]
REWRITTEN = {
    "requires_grad=False alone": parameters_of_the_norms,
    "statistics that stand still": statistics_not_tracked,
}
COMBINED = [
    ({"affine still trains", "BatchNorm2d only"}, affine_of_images_only),
    ({"found by name", "undo unfreezes everything"}, by_name_and_all_flags_true),
    ({"eval() once", "undo unfreezes everything"}, eval_once_and_all_flags_true),
    ({"statistics that stand still", "undo to the default momentum"}, momentum_zero_and_forgotten),
]

EQUIVALENT = {
    "norm.train = lambda mode=True, norm=norm: norm -> "
    "norm.train = lambda mode=False, norm=norm: norm": "the argument is not read",
}
