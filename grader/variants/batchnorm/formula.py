"""Exercise 5.1 in other styles."""

import torch
from torch.nn import functional as F


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
    spare = "c" + "..."
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
    return torch.einsum(f"n{spare},c->n{spare}", x, scale) + shift.reshape([1, -1] + [1] * (x.dim() - 2))


class ByItsOwnState:
    """A callable that reads and writes the layer through its state dict."""

    def __call__(self, x, layer):
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        shape = torch.Size([1, x.shape[1], *(1 for _ in x.shape[2:])])
        if layer.training:
            dims = [d for d, _ in enumerate(x.shape) if d != 1]
            mean = x.mean(dims, keepdim=True)
            centred = x - mean
            var = centred.pow(2).mean(dims, keepdim=True)
            with torch.no_grad():
                state["running_mean"] += layer.momentum * (mean.view(-1) - state["running_mean"])
                unbiased = x.transpose(0, 1).reshape(x.shape[1], -1).var(1)
                state["running_var"] += layer.momentum * (unbiased - state["running_var"])
            state["num_batches_tracked"] += 1
            layer.load_state_dict(state)
        else:
            centred, var = x - state["running_mean"].view(shape), state["running_var"].view(shape)
        y = centred.div(var.add(layer.eps).sqrt())
        for operation, parameter in ((torch.mul, layer.weight), (torch.add, layer.bias)):
            if parameter is not None:
                y = operation(y, parameter.view(shape))
        return y


by_its_own_state = ByItsOwnState()


def the_layer_itself(x, layer):
    return layer(x)


def the_function_behind_the_layer(x, layer):
    if layer.training:
        layer.num_batches_tracked.copy_(layer.num_batches_tracked + 1)
    options = {"training": layer.training, "momentum": layer.momentum, "eps": layer.eps}
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, **options)


def _shaped(v, x):
    return v[(None, slice(None), *[None] * (x.ndim - 2))]


def _finish(x, layer, mean, var):
    y = (x - _shaped(mean, x)) * torch.rsqrt(_shaped(var, x) + layer.eps)
    return y if layer.weight is None else y * _shaped(layer.weight, x) + _shaped(layer.bias, x)


def _batch(x, **how):
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, **how)


def _store(layer, mean, var, old, new):
    layer.running_mean = old * layer.running_mean + new * mean.detach()
    layer.running_var = old * layer.running_var + new * var.detach()
    layer.num_batches_tracked += 1


def as_layer_norm_does(x, layer):
    if not layer.training:
        return _finish(x, layer, layer.running_mean, layer.running_var)
    mean, var = _batch(x)
    _store(layer, mean, var, 1 - layer.momentum, layer.momentum)
    y = F.layer_norm(x, x.shape[1:], eps=layer.eps)
    return y if layer.weight is None else y * _shaped(layer.weight, x) + _shaped(layer.bias, x)


def biased_and_backwards(x, layer):
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        mean, var = _batch(x, correction=0)
        _store(layer, mean, var, layer.momentum, 1 - layer.momentum)
    return _finish(x, layer, mean, var)


def unbiased_and_backwards(x, layer):
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        mean, var = _batch(x)
        _store(layer, mean, var, layer.momentum, 1 - layer.momentum)
    return _finish(x, layer, mean, var)


def batch_statistics_always_and_biased_stored(x, layer):
    mean, var = _batch(x, correction=0)
    if layer.training:
        _store(layer, mean, var, 1 - layer.momentum, layer.momentum)
    return _finish(x, layer, mean, var)


def all_with_a_graph_and_the_biased_variance(x, layer):
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        mean, var = _batch(x, correction=0)
        layer.running_mean = layer.running_mean + layer.momentum * (mean - layer.running_mean)
        layer.running_var = layer.running_var + layer.momentum * (var - layer.running_var)
        layer.num_batches_tracked += 1
    return _finish(x, layer, mean, var)


CORRECT = [
    *(flattened_to_rows, channel_by_channel, folded_into_scale_and_shift, by_its_own_state),
    *(the_layer_itself, the_function_behind_the_layer),
]
REWRITTEN = {
    "each sample on its own": as_layer_norm_does,
}
COMBINED = [
    ({"biased running variance", "momentum the other way round"}, biased_and_backwards),
    ({"unbiased variance normalises", "momentum the other way round"}, unbiased_and_backwards),
    ({"batch statistics in eval mode", "biased running variance"}, batch_statistics_always_and_biased_stored),
    ({"graph kept in the buffers", "biased running variance"}, all_with_a_graph_and_the_biased_variance),
]

EQUIVALENT = {
    "unbiased = x.var(others, correction=1) -> unbiased = x.var(others)": "1 is the default",
}
