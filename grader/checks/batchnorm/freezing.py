"""Exercise 5.4: freeze every BatchNorm of a network so that train() does not undo it, and undo it exactly."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from grader.experiment import Exercise, Experiment, Trial, wrong_return
from grader.near import near
from helpers.batchnorm import freeze

exercise = Exercise(__name__, "5.4", freeze)

_SHARED = nn.Module, _NormBase, _BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


def _trained(layer: nn.Module, trial: Trial) -> nn.Module:
    """Give a BatchNorm values that are not those of a fresh one."""
    n = layer.num_features
    layer.running_mean.copy_(trial.normal(n))
    layer.running_var.copy_(0.5 + trial.normal(n).square())
    layer.num_batches_tracked.fill_(trial.integer(5, 50))
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(1 + trial.normal(n).abs())
            layer.bias.copy_(trial.normal(n))
    return layer


def _network(trial: Trial, channels: int) -> nn.Sequential:
    """A small network in train mode, with one BatchNorm at the top and one deeper; their eps is that of other frameworks."""
    norms = [_trained(nn.BatchNorm2d(channels, eps=0.1), trial) for _ in range(2)]
    layer1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 1), bn=norms[1]))
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, channels, 2), bn=norms[0], relu=nn.ReLU(), layer1=layer1))


def _images(trial: Trial) -> Tensor:
    return 3 + 2 * trial.normal(trial.integer(4, 6), 1, 4, 4)


@exercise.experiment("whatever train says")
class WhateverTrainSays(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _network(trial, trial.integer(3, 5)), "x": _images(trial)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        with _classes_put_back(), torch.no_grad():
            _frozen(subject, model)
            outputs = {"right after freeze": model(x)}
            model.eval()
            outputs["after model.train()"] = model.train()(x)
            model.layer1.train()
            outputs["after model.layer1.train()"] = model(x)
        return outputs

    def facts(self, raw, inputs):
        model, x = inputs["model"], inputs["x"]
        with torch.no_grad():
            known = {"what eval mode computes": model.eval()(x)}
            other = copy.deepcopy(model)
            other.bn.eps = other.layer1.bn.eps = nn.BatchNorm2d(1).eps
            known["what eval mode computes, with the default eps"] = other(x)
            model.layer1.train()
            known["what layer1 computes in train mode"] = model(x)
            known["what train mode computes"] = model.train()(x)
        return {when: _which(output, known) for when, output in raw.items()}


@exercise.experiment("nothing moves")
class NothingMoves(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _network(trial, trial.integer(3, 5)), "x": _images(trial)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        with _classes_put_back():
            _frozen(subject, model)
            with torch.no_grad():
                before = model.eval()(x)
                model.train()
                for step in range(3):
                    model(x + step)
                after = model.eval()(x)
            _backward(model.train()(x))
            gradients = [p.grad for layer in (model.bn, model.layer1.bn) for p in layer.parameters()]
        return {"before": before, "after": after, "gradients": [_arrives(gradient) for gradient in gradients]}

    def facts(self, raw, inputs):
        return {
            "the running statistics, after passes in train mode": "as before" if near(raw["before"], raw["after"]) else "moved",
            "gradients of weight and bias": "some" if any(raw["gradients"]) else "none",
        }


class _Subclass(nn.BatchNorm2d):
    """As many networks define one for themselves."""


class _Branches(nn.Module):
    """Layers side by side: each maps its own input to its own output."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: branch(inputs[name]) for name, branch in self.named_children()}


@exercise.experiment("every batch norm")
class EveryBatchNorm(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)
        shared = _trained(nn.BatchNorm2d(c), trial)
        block = nn.Sequential(OrderedDict(downsample=nn.Sequential(nn.Conv2d(c, c, 1), _trained(nn.BatchNorm2d(c), trial))))
        model = _Branches(
            bn_one=_trained(nn.BatchNorm1d(c), trial),
            bn_two=_trained(nn.BatchNorm2d(c), trial),
            bn_three=_trained(nn.BatchNorm3d(c), trial),
            bn_sync=_trained(nn.SyncBatchNorm(c), trial),
            bn_own=_trained(_Subclass(c), trial),
            bn_plain=_trained(nn.BatchNorm2d(c, affine=False), trial),
            block=block,
            first=nn.Sequential(OrderedDict(bn=shared)),
            second=nn.Sequential(OrderedDict(bn=shared)),
        )
        sizes = {"bn_one": (), "bn_three": (2, 2, 2)}
        x = {name: 3 + 2 * trial.normal(6, c, *sizes.get(name, (3, 2))) for name, _ in model.named_children()}
        return {"model": model, "x": x, "norm": _trained(nn.BatchNorm2d(c), trial), "image": x["bn_two"]}

    def measure(self, subject, inputs):
        with _classes_put_back(), torch.no_grad():
            _frozen(subject, inputs["model"])
            outputs = inputs["model"].train()(inputs["x"])
            _frozen(subject, inputs["norm"])
            return {"outputs": outputs, "alone": inputs["norm"].train()(inputs["image"])}

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = inputs["model"].eval()(inputs["x"])
            alone = inputs["norm"].eval()(inputs["image"])
        names = {
            "bn_one": "BatchNorm1d",
            "bn_two": "BatchNorm2d",
            "bn_three": "BatchNorm3d",
            "bn_sync": "SyncBatchNorm",
            "bn_own": "a subclass of BatchNorm2d",
            "bn_plain": "BatchNorm2d without weight and bias",
            "block": "block.downsample.1",
            "first": "one that two blocks share, in the first",
            "second": "one that two blocks share, in the second",
        }
        facts = {words: _frozen_or_not(raw["outputs"][name], wanted[name]) for name, words in names.items()}
        return facts | {"a model that is a BatchNorm itself": _frozen_or_not(raw["alone"], alone)}


@exercise.experiment("all else")
class AllElse(Experiment):
    def draw(self, trial: Trial) -> dict:
        c = 2 * trial.integer(1, 2)
        layers = OrderedDict(conv=nn.Conv2d(1, c, 2), bn=_trained(nn.BatchNorm2d(c), trial), norm=nn.GroupNorm(2, c))
        layers["conv"].bias.requires_grad_(False)
        dropout = nn.Sequential(OrderedDict(bn=_trained(nn.BatchNorm2d(1), trial), dropout=nn.Dropout(0.5)))
        other = _trained(nn.BatchNorm2d(1), trial)
        return {"model": nn.Sequential(layers), "dropout": dropout, "other": other, "x": _images(trial)}

    def measure(self, subject, inputs):
        model, dropout, other, x = inputs["model"], inputs["dropout"], inputs["other"], inputs["x"]
        with _classes_put_back():
            _frozen(subject, model)
            _backward(model.train()(x))
            _frozen(subject, dropout)
            with torch.no_grad():
                others = [other.eval()(x), other.train()(x)]
                dropped = [[dropout.train(mode)(x) for _ in range(2)] for mode in (True, False)]
        trains = [_arrives(model.get_parameter(name).grad) for name in ("conv.weight", "norm.weight", "norm.bias")]
        stays = [_arrives(p.grad) for p in (model.conv.bias, *model.bn.parameters())]
        return {"trains": trains, "stays": stays, "dropped": dropped, "others": others}

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = [inputs["other"].train(mode)(inputs["x"]) for mode in (False, True)]
        in_train, in_eval = ("off" if near(*pair) else "at work" for pair in raw["dropped"])
        return {
            "dropout in train mode": in_train,
            "dropout in eval mode": in_eval,
            "gradients of the convolution and of another norm": "as before" if all(raw["trains"]) else "missing",
            "gradients of the BatchNorm, and of a bias that was frozen before": "some" if any(raw["stays"]) else "none",
            "a BatchNorm of another model": "as before" if all(map(near, raw["others"], wanted)) else "changed as well",
        }


@exercise.experiment("trains again")
class TrainsAgain(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)
        model = _Branches(
            bn_train=_trained(nn.BatchNorm2d(c, momentum=0.4), trial),
            bn_eval=_trained(nn.BatchNorm2d(c, momentum=0.7), trial).eval(),
        )
        x = {name: 3 + 2 * trial.normal(6, c, 3, 2) for name, _ in model.named_children()}
        return {"model": model, "x": x}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        with _classes_put_back(), torch.no_grad():
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            undo = _frozen(subject, model)
            frozen = model(x)
            undo()
            _put_back(model, before)  # what moved while it was frozen is another experiment's question
            at_once = model(x)
            _put_back(model, before)
            undo = _frozen(subject, model)
            model.train()(x)
            undo()
            _put_back(model, before)
            again = model.train()(x)
            return {"frozen": frozen, "at once": at_once, "again": again, "after": model.eval()(x)}

    def facts(self, raw, inputs):
        model, x = inputs["model"], inputs["x"]
        with torch.no_grad():
            stored = model.eval()(x)
            batch = model.train()(x)
            moved = model.eval()(x)

        def uses(name: str, when: str) -> str:
            return _which(raw[when][name], {"its batch": batch[name], "its stored statistics": stored[name]})

        both = {uses(name, "again") for name in moved}
        pace = {_which(raw["after"][name], {"as before": moved[name], "not": stored[name]}) for name in moved}
        return {
            "before undo, one that was in train mode uses": uses("bn_train", "frozen"),
            "right after undo, one that was in train mode uses": uses("bn_train", "at once"),
            "right after undo, one that was in eval mode uses": uses("bn_eval", "at once"),
            "after undo and train(), each uses": both.pop() if len(both) == 1 else "something else",
            "after undo and train(), the running statistics move": pace.pop() if len(pace) == 1 else "otherwise",
        }


@exercise.experiment("flags as before")
class FlagsAsBefore(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = _network(trial, trial.integer(3, 5))
        model.bn.weight.requires_grad_(False)
        return {"model": model, "x": _images(trial)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        with _classes_put_back():
            undo = _frozen(subject, model)
            _backward(model(x))
            meanwhile = [_arrives(p.grad) for layer in (model.bn, model.layer1.bn) for p in layer.parameters()]
            model.zero_grad()
            with torch.no_grad():
                model.conv.weight += 1
            undo()
            _backward(model.train()(x))
        return {
            "meanwhile": meanwhile,
            "trained": [_arrives(p.grad) for p in (model.bn.bias, model.layer1.bn.weight, model.layer1.bn.bias)],
            "frozen": _arrives(model.bn.weight.grad),
            "learned": model.conv.weight.detach().clone(),
        }

    def facts(self, raw, inputs):
        return {
            "weights and biases before undo": "train" if any(raw["meanwhile"]) else "do not train",
            "weights and biases that trained before freeze": "train" if all(raw["trained"]) else "do not all train",
            "a weight that was frozen before freeze": "trains" if raw["frozen"] else "does not train",
            "what a convolution learned in between": "is kept"
            if near(raw["learned"], inputs["model"].conv.weight + 1)
            else "is lost",
        }


def _frozen(subject, model: nn.Module) -> Callable[[], object]:
    """Freeze the model and pass on the function that undoes it, or a sentence about what came in its place."""
    undo = subject(model)
    if isinstance(undo, nn.Module) or not callable(undo):
        raise wrong_return("freeze must return a function without arguments", undo)
    return undo


@contextmanager
def _classes_put_back() -> Iterator[None]:
    """Afterwards torch's own classes are as they were: a subject that patches one would change every later model."""
    before = [dict(vars(kind)) for kind in _SHARED]
    try:
        yield
    finally:
        for kind, attributes in zip(_SHARED, before, strict=True):
            for name, value in dict(vars(kind)).items():
                if name not in attributes:
                    delattr(kind, name)
                elif value is not attributes[name]:
                    setattr(kind, name, attributes[name])


def _put_back(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in buffers:  # an undo that forgets to put a layer back leaves others
            buffer.copy_(buffers[name])


def _backward(output: Tensor) -> None:
    if output.requires_grad:
        # Weighted, because the plain sum of a normalised batch is constant.
        weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
        (output.square() * weights).sum().backward()


def _arrives(gradient: Tensor | None) -> bool:
    """Whether there is any gradient: what keeps one away leaves None or exact zeros, no rounding."""
    return gradient is not None and bool(gradient.any())


def _which(output: Tensor, known: dict[str, Tensor]) -> str:
    return next((name for name, expected in known.items() if near(output, expected)), "something else")


def _frozen_or_not(output: Tensor, wanted: Tensor) -> str:
    return "frozen" if near(output, wanted) else "not frozen"


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _flags(model: nn.Module) -> Callable[[], None]:
    """Freeze the parameters of `model`; the function puts their flags back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)

    def undo() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    return undo


def _stuck(module: nn.Module) -> Callable[[], None]:
    """Put one module into eval mode for good; the function ends that."""
    mode = module.training
    module.training = False
    module.train = lambda mode=True: module

    def undo() -> None:
        del module.train
        module.training = mode

    return undo


def _all(undos: list[Callable[[], object]]) -> Callable[[], None]:
    def undo() -> None:
        for one in undos:
            one()

    return undo


def _freeze(layers: list[_BatchNorm]) -> Callable[[], None]:
    """Freeze exactly these layers."""
    return _all([*map(_flags, layers), *map(_stuck, layers)])


@exercise.misconception("eval() once")
def eval_once(model):
    layers = _norms(model)
    modes = {layer: layer.training for layer in layers}
    flags = [_flags(layer) for layer in layers]
    for layer in layers:
        layer.eval()
    return _all([*flags, *(lambda layer=layer, mode=mode: layer.train(mode) for layer, mode in modes.items())])


@exercise.misconception("requires_grad=False alone")
def requires_grad_false_alone(model):
    return _all(list(map(_flags, _norms(model))))


@exercise.misconception("statistics that stand still")
def statistics_that_stand_still(model):
    layers = _norms(model)
    momenta = {layer: layer.momentum for layer in layers}
    flags = [_flags(layer) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    return _all([*flags, *(lambda layer=layer, m=m: setattr(layer, "momentum", m) for layer, m in momenta.items())])


@exercise.misconception("BatchNorm2d only")
def batchnorm2d_only(model):
    return _freeze([layer for layer in _norms(model) if isinstance(layer, nn.BatchNorm2d)])


@exercise.misconception("found by name")
def found_by_name(model):
    return _freeze([m for name, m in model.named_modules() if "bn" in name and isinstance(m, _BatchNorm)])


@exercise.misconception("the whole model in eval mode")
def the_whole_model_in_eval_mode(model):
    return _all([*map(_flags, _norms(model)), *map(_stuck, model.modules())])


@exercise.misconception("the whole model frozen")
def the_whole_model_frozen(model):
    return _all([_flags(model), *map(_stuck, _norms(model))])


@exercise.misconception("only the model's own train()")
def only_the_models_own_train(model):
    layers = _norms(model)
    modes = {layer: layer.training for layer in layers}
    flags = [_flags(layer) for layer in layers]
    own = type(model).train

    def train(mode: bool = True) -> nn.Module:
        own(model, mode)
        for layer in layers:
            layer.training = False
        return model

    def undo() -> None:
        del model.train
        for layer, mode in modes.items():
            layer.training = mode

    model.train = train
    train(model.training)
    return _all([*flags, undo])


@exercise.misconception("affine still trains")
def affine_still_trains(model):
    return _all(list(map(_stuck, _norms(model))))


@exercise.misconception("another eps")
def another_eps(model):
    layers = _norms(model)
    flags = [_flags(layer) for layer in layers]
    for layer in layers:
        layer.forward = lambda x, own=layer: F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias)
    return _all([*flags, *(lambda layer=layer: delattr(layer, "forward") for layer in layers)])


@exercise.misconception("undo unfreezes everything")
def undo_unfreezes_everything(model):
    layers = _norms(model)
    undo = _freeze(layers)
    return _all([undo, *(lambda layer=layer: layer.requires_grad_(True) for layer in layers)])


@exercise.misconception("undo to the default momentum")
def undo_to_the_default_momentum(model):
    layers = _norms(model)
    undo = _freeze(layers)
    return _all([undo, *(lambda layer=layer: setattr(layer, "momentum", 0.1) for layer in layers)])


@exercise.misconception("stuck in eval mode after undo")
def stuck_in_eval_mode_after_undo(model):
    undo = [_flags(layer) for layer in _norms(model)]
    for layer in _norms(model):
        _stuck(layer)
    return _all(undo)
