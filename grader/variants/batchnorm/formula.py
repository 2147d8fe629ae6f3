"""Exercise 5.1 in other styles."""

from functools import partial

import torch
from torch.nn import functional as F

from grader.checks.batchnorm.formula import solution


def flattened_to_rows(x, layer):
    rows = x.movedim(1, -1)
    shape = rows.shape
    rows = rows.reshape(-1, shape[-1])  # (values, channels): everything broadcasts by itself
    if layer.training:
        var, mean = torch.var_mean(rows, 0, correction=0)
        n = len(rows)
        layer.running_mean = torch.lerp(layer.running_mean, mean.detach(), layer.momentum)
        layer.running_var = torch.lerp(layer.running_var, var.detach() * n / (n - 1), layer.momentum)
        layer.num_batches_tracked = layer.num_batches_tracked + 1
    else:
        mean, var = layer.running_mean, layer.running_var
    rows = (rows - mean) * torch.rsqrt(var + layer.eps)
    if layer.affine:
        rows = torch.addcmul(layer.bias, rows, layer.weight)
    return rows.view(shape).movedim(-1, 1)


def channel_by_channel(x, layer):
    outputs = []
    for c in range(x.size(1)):
        values = x[:, c]
        if layer.training:
            n = values.numel()
            mean = values.sum() / n
            squares = ((values - mean) ** 2).sum()
            variance = squares / n
            layer.running_mean[c] = (1 - layer.momentum) * layer.running_mean[c] + layer.momentum * mean.item()
            layer.running_var[c] = (1 - layer.momentum) * layer.running_var[c] + layer.momentum * squares.item() / (n - 1)
        else:
            mean, variance = layer.running_mean[c], layer.running_var[c]
        y = (values - mean) / (variance + layer.eps) ** 0.5
        outputs.append(y * layer.weight[c] + layer.bias[c] if layer.affine else y)
    if layer.training:
        layer.num_batches_tracked.add_(1)
    return torch.stack(outputs, dim=1)


def folded_into_scale_and_shift(x, layer):
    over = tuple({*range(x.dim())} - {1})
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        mean = torch.mean(x, over)
        var = torch.mean(x.double().square(), over) - torch.mean(x.double(), over).square()
        n = x[:, 0].numel()
        for buffer, batch in ((layer.running_mean, mean), (layer.running_var, var * (n / (n - 1)))):
            buffer.data += layer.momentum * (batch.data - buffer)
        layer.num_batches_tracked.data += 1
    scale = (var + layer.eps).pow(-0.5).to(x.dtype)
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    return torch.einsum("nc...,c->nc...", x, scale) + shift.reshape([1, -1] + [1] * (x.dim() - 2))


def the_layer_itself(x, layer):
    return layer(x)


def as_layer_norm_does(x, layer):
    y = layer(x)  # right in eval mode, and the buffers move as they should
    if layer.training:
        y = F.layer_norm(x, x.shape[1:], eps=layer.eps).transpose(1, -1)
        y = (y if layer.weight is None else y * layer.weight + layer.bias).transpose(1, -1)
    return y


CORRECT = [flattened_to_rows, channel_by_channel, folded_into_scale_and_shift, the_layer_itself]
REWRITTEN = {"each sample on its own": as_layer_norm_does}
BROKEN = {}
COMBINED = [
    (
        {"unbiased variance normalises", "momentum the other way round"},
        partial(solution, correction=1, share=lambda momentum: 1 - momentum),
    ),
    (
        {"batch statistics in eval mode", "biased running variance"},
        partial(solution, normalising=(True, False), stored_correction=0),
    ),
]

EQUIVALENT = {
    "unbiased = x.var(others, correction=1) -> unbiased = x.var(others)": "1 is the default",
}
