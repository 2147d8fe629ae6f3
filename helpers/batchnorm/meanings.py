"""What exactly is frozen of a BatchNorm, found by trying."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helpers import expect
from helpers.batchnorm.layer import check_initialised, same, tensors_of
from helpers.batchnorm.statistics import Pool, compare


def what_is_frozen(layer: nn.Module, x: Tensor) -> dict[str, bool]:
    """Which meanings of "frozen" hold for `layer`, found by experiment: train mode, one forward and one backward pass.

    How the layer was frozen makes no difference. Afterwards it is as it was: values, gradients, flags and modes. The
    statistics are running_mean and running_var: with a momentum of 0 they stand still, though the counter counts on.

    Args:
        layer: a BatchNorm, or what has its `running_mean` and `running_var`. One without parameters counts as frozen in
            "affine"; one that stores no statistics as frozen in "statistics" and as not frozen in "normalisation".
        x: (n, channels, ...), at least 2 values per channel, with other statistics than the stored ones.

    Returns:
        {"affine": bool, "statistics": bool, "normalisation": bool}.

    Raises:
        TypeError: `layer` is no normalisation with running statistics.
        ValueError: the stored statistics are those of x within 1%, so the output would not show which are used.
    """
    if not hasattr(expect.module("layer", layer), "running_mean"):
        raise TypeError(f"layer must be a BatchNorm, got {expect.describe(layer)}. Pass one of the model's layers.")
    check_initialised({"layer": layer})
    stores = layer.running_mean is not None
    channels = len(layer.running_mean) if stores else layer.num_features
    x = expect.tensor("x", x, ("n", channels, "...")).detach()
    if x.numel() < 2 * channels:
        raise ValueError(f"x must give at least 2 values per channel, got shape {tuple(x.shape)}. Use a larger batch.")
    if stores:
        pool = Pool("x")
        pool.add(x)
        difference = compare(layer, pool)
        if difference.mean_shift < 0.01 and difference.std_ratio < 1.01:
            raise ValueError(
                "x must have other statistics than those stored, got the same within 1%, so the output would not show "
                "which of them normalise. Shift it: x + 1."
            )
    with _restored(layer), torch.no_grad():
        if getattr(layer, "weight", None) is not None:
            layer.weight.data.fill_(1)  # a weight of 0, with which some residual branches start, would hide everything
        before = {name: getattr(layer, name).clone() for name in ("running_mean", "running_var") if stores}
        wanted = layer.eval()(x)
        layer.train()
        with torch.enable_grad():
            got = layer(x.clone().requires_grad_())
            parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            scales = torch.linspace(1, 2, got.numel(), dtype=got.dtype, device=got.device).view_as(got)
            loss = (got.square() * scales).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else []
        return {
            "affine": all(gradient is None or not gradient.any() for gradient in gradients),
            "statistics": all(same(tensor, getattr(layer, name)) for name, tensor in before.items()),
            "normalisation": stores and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5),
        }


@contextmanager
def _restored(layer: nn.Module) -> Iterator[None]:
    """After the `with`, every value, flag and mode of `layer` is as before, whatever happens."""
    modes = [(module.__dict__, module.__dict__.get("training")) for module in layer.modules()]
    tensors = [(tensor, tensor.detach().clone(), tensor.requires_grad) for _, tensor in tensors_of(layer)]
    buffers = [(module._buffers, dict(module._buffers)) for module in layer.modules()]
    try:
        yield
    finally:
        for attributes, mode in modes:
            attributes["training"] = mode  # past a property, as `freeze` makes one
        for own, kept in buffers:
            own.update(kept)
        for tensor, value, flag in tensors:
            tensor.data.copy_(value)
            tensor.requires_grad_(flag)
