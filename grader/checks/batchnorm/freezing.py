"""Exercise 5.4: freeze every BatchNorm of a network so that train() does not undo it, and undo it exactly."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks.batchnorm.layers import classes_put_back, norms
from grader.checks.networks import with_statistics
from grader.checks.traces import kept
from grader.experiment import Exercise, Experiment, Trial, wrong_return
from grader.near import near, which
from helpers.batchnorm import freeze

exercise = Exercise(__name__, "5.4", freeze)

Undo = Callable[[], object]


class _Freezing(Experiment):
    """Draws a small network in train mode, and passes `look` the subject as `freeze`, and the inputs by their names."""

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        top, deeper = (with_statistics(nn.BatchNorm2d(channels, eps=0.1), trial) for _ in range(2))  # an eps that matters
        layer1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 1), bn=deeper))
        layers = OrderedDict(conv=nn.Conv2d(1, channels, 2), bn=top, relu=nn.ReLU(), layer1=layer1)
        return {"model": nn.Sequential(layers), "x": 3 + 2 * trial.normal(trial.integer(4, 6), 1, 4, 4)}

    def measure(self, subject, inputs):
        def freeze(model: nn.Module) -> Undo:
            undo = subject(model)
            if isinstance(undo, nn.Module) or not callable(undo):
                raise wrong_return("freeze must return a function without arguments", undo)
            return undo

        with classes_put_back():
            return self.look(freeze, **inputs)


def _backward(output: Tensor) -> None:
    if output.requires_grad:
        # Weighted, because the plain sum of a normalised batch is constant.
        weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
        (output.square() * weights).sum().backward()


def _arrives(parameter: nn.Parameter) -> bool:
    """Whether it got any gradient: what keeps one away leaves None or exact zeros, no rounding."""
    return parameter.grad is not None and bool(parameter.grad.any())


def _affine(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the BatchNorms of the network that is drawn."""
    return [*model.bn.parameters(), *model.layer1.bn.parameters()]


@exercise.experiment("whatever train says")
class WhateverTrainSays(_Freezing):
    points = 2

    def look(self, freeze, model, x):
        with torch.no_grad():
            freeze(model)
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
            default = copy.deepcopy(model)
            default.bn.eps = default.layer1.bn.eps = nn.BatchNorm2d(1).eps
            known["what eval mode computes, with the default eps"] = default(x)
            model.layer1.train()
            known["what layer1 computes in train mode"] = model(x)
            known["what train mode computes"] = model.train()(x)
        return {when: which(output, known) for when, output in raw.items()}


@exercise.experiment("nothing moves")
class NothingMoves(_Freezing):
    points = 2

    def look(self, freeze, model, x):
        freeze(model)
        with torch.no_grad():
            before = model.eval()(x)
            model.train()
            for step in range(3):
                model(x + step)
            after = model.eval()(x)
        _backward(model.train()(x))
        return {"before": before, "after": after, "gradients": any(map(_arrives, _affine(model)))}

    def facts(self, raw, inputs):
        return {
            "the running statistics, after passes in train mode": "as before" if near(raw["before"], raw["after"]) else "moved",
            "gradients of weight and bias": "some" if raw["gradients"] else "none",
        }


class _Subclass(nn.BatchNorm2d):
    """As many networks define one for themselves."""


class _Branches(nn.ModuleDict):
    """Layers side by side: each maps its own input to its own output."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: branch(inputs[name]) for name, branch in self.items()}


@exercise.experiment("every BatchNorm")
class EveryBatchNorm(_Freezing):
    points = 2

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)

        def norm(kind: type[_BatchNorm] = nn.BatchNorm2d, **options: bool) -> nn.Module:
            return with_statistics(kind(c, **options), trial)

        shared = norm()
        branches = {
            "bn_one": norm(nn.BatchNorm1d),
            "bn_two": norm(),
            "bn_three": norm(nn.BatchNorm3d),
            "bn_sync": norm(nn.SyncBatchNorm),
            "bn_own": norm(_Subclass),
            "bn_plain": norm(affine=False),
            "block": nn.Sequential(OrderedDict(downsample=nn.Sequential(nn.Conv2d(c, c, 1), norm()))),
            "first": nn.Sequential(OrderedDict(bn=shared)),
            "second": nn.Sequential(OrderedDict(bn=shared)),
        }
        sizes = {"bn_one": (), "bn_three": (2, 2, 2)}
        x = {name: 3 + 2 * trial.normal(6, c, *sizes.get(name, (3, 2))) for name in branches}
        return {"model": _Branches(branches), "x": x, "alone": norm()}

    def look(self, freeze, model, x, alone):
        with torch.no_grad():
            freeze(model)
            outputs = model.train()(x)
            freeze(alone)
            return outputs | {"alone": alone.train()(x["bn_two"])}

    def facts(self, raw, inputs):
        with torch.no_grad():
            frozen = inputs["model"].eval()(inputs["x"]) | {"alone": inputs["alone"].eval()(inputs["x"]["bn_two"])}
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
            "alone": "a model that is a BatchNorm itself",
        }
        return {words: "frozen" if near(raw[name], frozen[name]) else "not frozen" for name, words in names.items()}


@exercise.experiment("all else")
class AllElse(_Freezing):
    def draw(self, trial: Trial) -> dict:
        c = 2 * trial.integer(1, 2)
        layers = OrderedDict(conv=nn.Conv2d(1, c, 2), bn=with_statistics(nn.BatchNorm2d(c), trial), norm=nn.GroupNorm(2, c))
        layers["conv"].bias.requires_grad_(False)
        dropout = nn.Sequential(OrderedDict(bn=with_statistics(nn.BatchNorm2d(1), trial), dropout=nn.Dropout(0.5)))
        stranger = with_statistics(nn.BatchNorm2d(1), trial)
        return super().draw(trial) | {"model": nn.Sequential(layers), "dropout": dropout, "stranger": stranger}

    def look(self, freeze, model, dropout, stranger, x):
        freeze(model)
        _backward(model.train()(x))
        freeze(dropout)
        with torch.no_grad():
            return {
                "trains": all(map(_arrives, (model.conv.weight, *model.norm.parameters()))),
                "stays": any(map(_arrives, (model.conv.bias, *model.bn.parameters()))),
                "dropped": [[dropout.train(mode)(x) for _ in range(2)] for mode in (True, False)],
                "stranger": [stranger.train(mode)(x) for mode in (False, True)],
            }

    def facts(self, raw, inputs):
        with torch.no_grad():
            stranger = [inputs["stranger"].train(mode)(inputs["x"]) for mode in (False, True)]
        in_train, in_eval = ("off" if near(*pair) else "at work" for pair in raw["dropped"])
        return {
            "dropout in train mode": in_train,
            "dropout in eval mode": in_eval,
            "gradients of the convolution and of another norm": "as before" if raw["trains"] else "missing",
            "gradients of the BatchNorm, and of a bias that was frozen before": "some" if raw["stays"] else "none",
            "a BatchNorm of another model": "as before" if all(map(near, raw["stranger"], stranger)) else "changed as well",
        }


@exercise.experiment("trains again")
class TrainsAgain(_Freezing):
    points = 2

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)
        branches = {
            "bn_train": with_statistics(nn.BatchNorm2d(c, momentum=0.4), trial),
            "bn_eval": with_statistics(nn.BatchNorm2d(c, momentum=0.7), trial).eval(),
        }
        return {"model": _Branches(branches), "x": {name: 3 + 2 * trial.normal(6, c, 3, 2) for name in branches}}

    def look(self, freeze, model, x):
        with torch.no_grad():
            with kept(model, "buffers"):  # what moves while it is frozen is another experiment's question
                undo = freeze(model)
                frozen = model(x)
                undo()
            with kept(model, "buffers"):
                at_once = model(x)
            with kept(model, "buffers"):
                undo = freeze(model)
                model.train()(x)
                undo()
            again = model.train()(x)
            return {"frozen": frozen, "at once": at_once, "again": again, "after": model.eval()(x)}

    def facts(self, raw, inputs):
        model, x = inputs["model"], inputs["x"]
        with torch.no_grad():
            stored, batch, moved = model.eval()(x), model.train()(x), model.eval()(x)

        def uses(name: str, when: str) -> str:
            return which(raw[when][name], {"its batch": batch[name], "its stored statistics": stored[name]})

        def both(outputs: dict[str, Tensor]) -> Tensor:
            return torch.stack([outputs["bn_train"], outputs["bn_eval"]])

        known = {"its batch": both(batch), "its stored statistics": both(stored)}
        pace = {"as before": both(moved), "not": both(stored)}
        return {
            "before undo, one that was in train mode uses": uses("bn_train", "frozen"),
            "right after undo, one that was in train mode uses": uses("bn_train", "at once"),
            "right after undo, one that was in eval mode uses": uses("bn_eval", "at once"),
            "after undo and train(), each uses": which(both(raw["again"]), known),
            "after undo and train(), the running statistics move": which(both(raw["after"]), pace, "at another pace"),
        }


@exercise.experiment("flags as before")
class FlagsAsBefore(_Freezing):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["model"].bn.weight.requires_grad_(False)
        return inputs

    def look(self, freeze, model, x):
        undo = freeze(model)
        _backward(model(x))
        meanwhile = any(map(_arrives, _affine(model)))
        model.zero_grad()
        with torch.no_grad():
            model.conv.weight += 1
        undo()
        _backward(model.train()(x))
        weight, *others = _affine(model)
        return {
            "meanwhile": meanwhile,
            "trained": all(map(_arrives, others)),
            "frozen": _arrives(weight),
            "learned": model.conv.weight.detach().clone(),
        }

    def facts(self, raw, inputs):
        learned = near(raw["learned"], inputs["model"].conv.weight + 1)
        return {
            "weights and biases before undo": "train" if raw["meanwhile"] else "do not train",
            "weights and biases that trained before freeze": "train" if raw["trained"] else "do not all train",
            "a weight that was frozen before freeze": "trains" if raw["frozen"] else "does not train",
            "what a convolution learned in between": "is kept" if learned else "is lost",
        }


def _stuck(module: nn.Module) -> Undo:
    """Put one module into eval mode for good; the function ends that."""
    mode = module.training
    module.training = False
    module.train = lambda mode=True: module

    def let_go() -> None:
        del module.train
        module.training = mode

    return let_go


def solution(
    model: nn.Module,
    *,
    find: Callable[[nn.Module], list[nn.Module]] = norms,
    flagged: Callable[[nn.Module, list[nn.Module]], Iterable[nn.Module]] = lambda model, layers: layers,
    fixed: Callable[[nn.Module, list[nn.Module]], Iterable[nn.Module]] = lambda model, layers: layers,
    fix: Callable[[nn.Module], Undo] = _stuck,
    finish: Callable[[nn.Module], object] = lambda layer: None,
) -> Undo:
    """Right if left alone; each of the misconceptions changes a piece.

    `find` names the layers that are meant, `flagged` the modules whose parameters get no gradient, `fixed` those that stay
    in eval mode. `fix` sees to that for one of them and returns the function that ends it; `finish` is undo's last step.
    """
    layers = find(model)
    flags = {parameter: parameter.requires_grad for module in flagged(model, layers) for parameter in module.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    ends = [fix(module) for module in list(fixed(model, layers))]

    def undo() -> None:
        for end in ends:
            end()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for layer in layers:
            finish(layer)

    return undo


def _called_bn(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "bn" in name and isinstance(module, _BatchNorm)]


def _in_eval_mode_once(layer: nn.Module) -> Undo:
    mode = layer.training
    layer.eval()
    return lambda: layer.train(mode)


def _without_momentum(layer: nn.Module) -> Undo:
    momentum, layer.momentum = layer.momentum, 0.0
    return lambda: setattr(layer, "momentum", momentum)


def _from_the_top(model: nn.Module) -> Undo:
    """Give the model alone a train() that leaves its BatchNorms in eval mode."""
    modes = {layer: layer.training for layer in norms(model)}
    train_all = type(model).train

    def train(mode: bool = True) -> nn.Module:
        train_all(model, mode)
        for layer in modes:
            layer.training = False
        return model

    def let_go() -> None:
        del model.train
        for layer, mode in modes.items():
            layer.training = mode

    model.train = train
    train(model.training)
    return let_go


def _with_the_default_eps(layer: nn.Module) -> Undo:
    layer.forward = lambda x: F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return lambda: delattr(layer, "forward")


def _never_to_be_undone(layer: nn.Module) -> Undo:
    _stuck(layer)
    return lambda: None


exercise.misconceptions_of(
    solution,
    {
        "eval() once": {"fix": _in_eval_mode_once},
        "requires_grad=False alone": {"fixed": lambda model, layers: []},
        "statistics that stand still": {"fix": _without_momentum},
        "BatchNorm2d only": {"find": lambda model: [layer for layer in norms(model) if isinstance(layer, nn.BatchNorm2d)]},
        "found by name": {"find": _called_bn},
        "the whole model in eval mode": {"fixed": lambda model, layers: model.modules()},
        "the whole model frozen": {"flagged": lambda model, layers: [model]},
        "only the model's own train()": {"fixed": lambda model, layers: [model], "fix": _from_the_top},
        "affine still trains": {"flagged": lambda model, layers: []},
        "another eps": {"fix": _with_the_default_eps},
        "undo unfreezes everything": {"finish": lambda layer: layer.requires_grad_(True)},
        "undo to the default momentum": {"finish": lambda layer: setattr(layer, "momentum", 0.1)},
        "stuck in eval mode after undo": {"fix": _never_to_be_undone},
    },
)
