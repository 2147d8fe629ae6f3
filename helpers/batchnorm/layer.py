"""What a BatchNorm computes in either mode, what training moves of it, and what is frozen.

    y = gamma * (x - mean) / sqrt(var + eps) + beta

Source: Ioffe & Szegedy 2015, section 3.1.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from helpers import expect

MEANINGS = ("affine", "statistics", "normalisation")


def batch_norm(x: Tensor, layer: _BatchNorm) -> Tensor:
    """What `layer(x)` computes, in plain arithmetic: any mode, and its buffers move as torch moves them.

    Train mode divides by the biased variance of the batch and moves running_var towards the unbiased one:

        running = (1 - momentum) * running + momentum * batch        momentum None: 1 / num_batches_tracked

    Args:
        x: (n, channels, ...).
        layer: any BatchNorm. In train mode its buffers move, in place, if it tracks statistics.

    Raises:
        ValueError: the batch has to normalise, and gives one value per channel.
    """
    expect.tensor("x", x, ("n", layer.num_features, "..."))
    pooled_dims = [0, *range(2, x.ndim)]
    mean, var = layer.running_mean, layer.running_var
    if layer.training or mean is None:
        n = x.numel() // x.shape[1]
        if n < 2:
            raise ValueError(f"x must give at least 2 values per channel, got shape {tuple(x.shape)}. Use a larger batch.")
        mean, var = x.mean(pooled_dims), x.var(pooled_dims, correction=0)
        if layer.training and layer.track_running_stats:
            layer.num_batches_tracked += 1
            rate = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
            for running, now in ((layer.running_mean, mean), (layer.running_var, var * n / (n - 1))):
                running.copy_((1 - rate) * running + rate * now.detach())
    shape = [1, -1] + [1] * (x.ndim - 2)
    y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + layer.eps)
    if layer.weight is not None:
        y = y * layer.weight.view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


def moved(model: nn.Module, action: Callable[[], object]) -> list[str]:
    """Call `action()` and name the parameters and buffers of `model` whose values it changed.

    In the order of named_parameters, then named_buffers, which includes buffers that a state dict leaves out. What two
    modules share is named once. NaN equals NaN. A tensor that came, went, or has another shape or dtype counts.
    """
    before = {name: None if is_lazy(tensor) else tensor.detach().clone() for name, tensor in tensors_of(model)}
    action()
    after = {name: None if is_lazy(tensor) else tensor.detach() for name, tensor in tensors_of(model)}
    names = [*after, *(name for name in before if name not in after)]
    return [name for name in names if name not in before or name not in after or not same(before[name], after[name])]


def layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm of `model` once, by its name; "" is the model itself."""
    named = expect.module("model", model).named_modules()
    layers = {name: module for name, module in named if isinstance(module, _BatchNorm)}
    if not layers:
        raise ValueError(
            f"model must have a BatchNorm, got {expect.describe(model)} without one. Leave other norms as they are."
        )
    check_initialised(layers)
    return layers


def check_initialised(layers: dict[str, nn.Module]) -> None:
    lazy = [name for name, layer in layers.items() if any(is_lazy(tensor) for _, tensor in tensors_of(layer))]
    if lazy:
        raise ValueError(
            f"BatchNorms must know their channels, got a lazy one that does not: {lazy[0] or 'the model'}. "
            "Run a batch through the model first."
        )


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def same(first: Tensor | None, second: Tensor | None) -> bool:
    """Equal in shape, dtype and values; NaN equals NaN."""
    if first is None or second is None:
        return first is second
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    return bool(((first == second) | ((first != first) & (second != second))).all())  # only NaN is not itself


def widened(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()
