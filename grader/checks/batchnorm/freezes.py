"""A freeze in pieces, right and wrong, for exercise 5.4."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks.batchnorm.layers import norms

Undo = Callable[[], object]


def stuck(module: nn.Module) -> Undo:
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
    fix: Callable[[nn.Module], Undo] = stuck,
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


def called_bn(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "bn" in name and isinstance(module, _BatchNorm)]


def among_the_children(model: nn.Module) -> list[nn.Module]:
    return [module for module in (model, *model.children()) if isinstance(module, _BatchNorm)]


def named_after_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "Norm" in type(module).__name__ or isinstance(module, _BatchNorm)]


def of_these_classes(model: nn.Module) -> list[nn.Module]:
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    return [module for module in model.modules() if isinstance(module, kinds)]


def in_eval_mode_once(layer: nn.Module) -> Undo:
    mode = layer.training
    layer.eval()
    return lambda: layer.train(mode)


def without_momentum(layer: nn.Module) -> Undo:
    momentum, layer.momentum = layer.momentum, 0.0
    return lambda: setattr(layer, "momentum", momentum)


def from_the_top(model: nn.Module) -> Undo:
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
    for layer in modes:
        layer.training = False
    return let_go


def with_the_default_eps(layer: nn.Module) -> Undo:
    layer.forward = lambda x: F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return lambda: delattr(layer, "forward")


def never_to_be_undone(layer: nn.Module) -> Undo:
    stuck(layer)
    return lambda: None
