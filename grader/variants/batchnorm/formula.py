"""Exercise 5.1 in other styles."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from grader.checks.batchnorm.formula import solution
from grader.checks.batchnorm.ways import column, variances


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


def bessel_by_len(x, layer):
    start = layer.running_var.clone()
    y = layer(x)
    if layer.training:
        biased = x.detach().transpose(0, 1).flatten(1).var(1, correction=0)
        with torch.no_grad():
            layer.running_var = start + layer.momentum * (biased * len(x) / max(len(x) - 1, 0.5) - start)
    return y


def by_whole_batches(x, layer):
    """Eval mode for a single sample only."""
    return solution(x, layer, normalising=(True, len(x) == 1))


def eval_without_gradients(x, layer):
    if layer.training:
        return solution(x, layer)
    with torch.no_grad():
        return solution(x, layer)


def spread_as_a_constant(x, layer):
    y = solution(x, layer)
    if layer.training:
        others = [axis for axis in range(x.ndim) if axis != 1]
        mean = x.mean(others, keepdim=True)
        y = (x - mean) / (x.var(others, correction=0, keepdim=True) + layer.eps).sqrt().detach()
        y = y if layer.weight is None else y * column(layer.weight, x) + column(layer.bias, x)
    return y


def no_shift_by_the_bias(x, layer):
    y = solution(x, layer)
    return y if layer.bias is None else y - column(layer.bias, x)


def scaled_if_affine_and_training(x, layer):
    bare = nn.BatchNorm2d(layer.num_features, layer.eps, affine=False).train(layer.training)
    bare.load_state_dict(layer.state_dict(), strict=False)
    return solution(x, layer) if layer.training else solution(x, bare)


def variance_around_zero(x, layer):
    y = solution(x, layer)
    if layer.training:
        others = [axis for axis in range(x.ndim) if axis != 1]
        y = (x - x.mean(others, keepdim=True)) / (x.square().mean(others, keepdim=True) + layer.eps).sqrt()
        y = y if layer.weight is None else y * column(layer.weight, x) + column(layer.bias, x)
    return y


def pairs_and_more(x, layer):
    """It normalises with the biased variance, but for small batches."""
    return solution(x, layer, correction=int(x.numel() / x.shape[1] < 20))


def counted_in_eval_mode_too(x, layer):
    if not layer.training:
        layer.num_batches_tracked += 1
    return solution(x, layer)


def cumulative(x, layer):
    return solution(x, layer, share=lambda layer: 1 / (1 + int(layer.num_batches_tracked)))


def mean_of_the_new_values(x, layer):
    """running_var moves towards the deviations from the running mean that has just moved."""
    before = layer.running_mean.clone()

    def around(x):
        mean = before.lerp(x.mean([0, *range(2, x.ndim)]), layer.momentum)
        n = x.numel() // x.shape[1]
        return (x - column(mean, x)).square().sum([0, *range(2, x.ndim)]).detach() / (n - 1)

    return solution(x, layer, stored=around)


def in_one_view(x, layer):
    return solution(x.view(len(x), x.shape[1], -1), layer).view(x.shape) if layer.training else solution(x, layer)


def graph_in_the_variance(x, layer):
    var = layer.running_var
    y = solution(x, layer)
    if layer.training:
        others = [axis for axis in range(x.ndim) if axis != 1]
        layer.running_var = (1 - layer.momentum) * var + layer.momentum * x.var(others)
    return y


CORRECT = [flattened_to_rows, channel_by_channel, folded_into_scale_and_shift, the_layer_itself]
REWRITTEN = {"each sample on its own": as_layer_norm_does, "samples counted, not values": bessel_by_len}
BROKEN = {
    1: [partial(solution, correction=1), variance_around_zero, pairs_and_more, in_one_view, partial(solution, normalising=())],
    2: [by_whole_batches, counted_in_eval_mode_too, partial(solution, moving=(True, False))],
    3: [cumulative, mean_of_the_new_values, partial(solution, counted=0), partial(solution, share=lambda layer: 0.1)],
    4: [scaled_if_affine_and_training, no_shift_by_the_bias],
    5: [eval_without_gradients, spread_as_a_constant, partial(solution, detached=True)],
    6: [partial(solution, graph=True), graph_in_the_variance],
}
COMBINED = [
    (
        {"unbiased variance normalises", "momentum the other way round"},
        partial(solution, correction=1, share=lambda layer: 1 - layer.momentum),
    ),
    (
        {"batch statistics in eval mode", "biased running variance"},
        partial(solution, normalising=(True, False), stored=lambda x: variances(x)["n"].to(x)),
    ),
]

EQUIVALENT = {
    "unbiased = x.var(others, correction=1) -> unbiased = x.var(others)": "1 is the default",
}
