"""Exercise 6.2 in other styles."""

import math
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import torch
from torch import nn

from grader.checks.lora.costs import CHANGES, cost_of


def _sides(layer):
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1], layer.out_channels
    return layer.in_features, layer.out_features


def by_kind_of_layer(layers, rank, optimizer, sides=_sides):
    weights, full, adapter, gradients = [], 0, 0, 0
    for layer in layers:
        if any(layer.weight is weight for weight in weights):
            continue
        weights.append(layer.weight)
        inputs, outputs = sides(layer)
        full += math.prod(_sides(layer))
        adapter += rank * inputs + rank * outputs
        gradients += rank * (inputs + outputs) * torch.finfo(layer.weight.dtype).bits // 8
    state = gradients if optimizer == "momentum" else 2 * gradients if optimizer == "adamw" else 0
    return {"full": full, "adapter": adapter, "gradient_bytes": gradients, "optimizer_bytes": state}


def really_trained(layers, rank, optimizer):
    """Makes the adapters, takes one step with each, and weighs what is there."""
    weights = list(dict.fromkeys(layer.weight for layer in layers))
    adapters = []
    for weight in weights:
        matrix = weight.detach().flatten(1)
        adapters += [matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(len(matrix), rank)]
    for adapter in adapters:
        adapter.requires_grad_()
        adapter.sum().backward()
    made = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adamw": torch.optim.AdamW,
    }[optimizer](adapters)
    made.step()
    kept = [value for state in made.state.values() for name, value in state.items() if name != "step" and value is not None]
    return {
        "full": sum(weight.nelement() for weight in weights),
        "adapter": sum(adapter.nelement() for adapter in adapters),
        "gradient_bytes": sum(adapter.grad.nbytes for adapter in adapters),
        "optimizer_bytes": sum(value.nbytes for value in kept),
    }


class Tallied:
    """Adds up in a Counter, with the shape as NumPy sees it."""

    memory = (("sgd", 0), ("momentum", 1), ("adamw", 2))

    def __call__(self, layers, rank, optimizer):
        tally = Counter({"full": 0, "adapter": 0, "gradient_bytes": 0, "optimizer_bytes": 0})
        for weight in {hash(layer.weight): layer.weight for layer in layers}.values():
            shape = np.array(weight.shape)
            n = rank * (shape[0] + shape[1:].prod())
            size = n * weight.dtype.itemsize
            tally.update(full=shape.prod(), adapter=n, gradient_bytes=size, optimizer_bytes=size * dict(self.memory)[optimizer])
        return tally


def by_dtype(layers, rank, optimizer):
    shapes = defaultdict(list)
    for parameter in nn.ParameterList([layer.weight for layer in layers]).parameters():  # without duplicates
        shapes[parameter.dtype].append((parameter.shape[0], math.prod(parameter.shape[1:])))
    numbers = {dtype: sum(rank * m + rank * n for m, n in pairs) for dtype, pairs in shapes.items()}
    gradient = sum(torch.empty((), dtype=dtype).element_size() * count for dtype, count in numbers.items())
    return {
        "full": sum(m * n for pairs in shapes.values() for m, n in pairs),
        "adapter": sum(numbers.values()),
        "gradient_bytes": gradient,
        "optimizer_bytes": gradient * {"adamw": 2, "momentum": 1}.get(optimizer, 0),
    }


def _channels_or_features(layer):
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    return getattr(layer, f"in_{kind}"), getattr(layer, f"out_{kind}")


def _every_channel(layer):
    inputs, outputs = _channels_or_features(layer)
    return inputs * math.prod(getattr(layer, "kernel_size", ())), outputs


def what_requires_grad(layers, rank, optimizer):
    full = {parameter: parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.requires_grad}
    return {**by_dtype(layers, rank, optimizer), "full": sum(full.values())}


def each_time_it_comes(layers, rank, optimizer):
    each = [by_kind_of_layer([layer], rank, optimizer) for layer in layers]
    return {key: sum(part[key] for part in each) for key in ("full", "adapter", "gradient_bytes", "optimizer_bytes")}


def with_the_bias_in_a(layers, rank, optimizer):
    """A base with a bias gets adapters with biases."""
    total = dict(by_kind_of_layer(layers, rank, optimizer))
    total["adapter"] += sum(len(layer.bias) for layer in layers if layer.bias is not None)
    return total


def by_out_and_in(layers, rank, optimizer):
    """Reads a convolution's weight from the wrong end."""
    return by_kind_of_layer(layers, rank, optimizer, sides=lambda layer: layer.weight.flatten(0, -2).shape)


def in_float32_or_float64(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    halves = [layer for layer in layers if layer.weight.dtype not in (torch.float32, torch.float64)]
    more = by_kind_of_layer(halves, rank, optimizer)
    return {key: counts[key] + (more[key] if key.endswith("bytes") else 0) for key in counts}


def a_and_b_with_their_gradients(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    return counts | {"gradient_bytes": 2 * counts["gradient_bytes"]}


def gradients_of_biases(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    return counts | {"gradient_bytes": counts["gradient_bytes"] + biases}


def gradients_kept_by_the_optimizer(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    return counts | {"optimizer_bytes": counts["optimizer_bytes"] + counts["gradient_bytes"]}


def step_counts_too(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    steps = 8 * len({id(layer.weight) for layer in layers}) if optimizer == "adamw" else 0
    return counts | {"optimizer_bytes": counts["optimizer_bytes"] + steps}


def momentum_unknown(layers, rank, optimizer):
    return by_kind_of_layer(layers, rank, "sgd" if optimizer == "momentum" else optimizer)


def the_mean(layers, rank, optimizer):
    counts = by_kind_of_layer(layers, rank, optimizer)
    weights = {id(layer.weight) for layer in layers}
    return {key: value // max(1, len(weights)) for key, value in counts.items()}


def known_by_their_shape(layers, rank, optimizer):
    return by_kind_of_layer(list({layer.weight.shape: layer for layer in layers}.values()), rank, optimizer)


def neighbours_compared(layers, rank, optimizer):
    different = [layer for i, layer in enumerate(layers) if i == 0 or layer.weight is not layers[i - 1].weight]
    return each_time_it_comes(different, rank, optimizer)


def full_once_and_adapters_each_time(layers, rank, optimizer):
    each, once = each_time_it_comes(layers, rank, optimizer), by_kind_of_layer(layers, rank, optimizer)
    return each | {"full": once["full"]}


CORRECT = [by_kind_of_layer, really_trained, Tallied(), by_dtype]
REWRITTEN = {
    "groups ignored": partial(by_kind_of_layer, sides=_every_channel),
    "channels alone": partial(by_kind_of_layer, sides=_channels_or_features),
    "trainable parameters only": what_requires_grad,
    "counted twice": each_time_it_comes,
}
BROKEN = {
    1: [what_requires_grad, *(partial(cost_of, **CHANGES[key]) for key in ("biases counted", "weight without its groups"))],
    2: [with_the_bias_in_a, by_out_and_in, partial(by_kind_of_layer, sides=_channels_or_features)],
    3: [in_float32_or_float64, a_and_b_with_their_gradients, gradients_of_biases],
    4: [gradients_kept_by_the_optimizer, step_counts_too, momentum_unknown, partial(cost_of, **CHANGES["moments in float32"])],
    5: [the_mean, known_by_their_shape, lambda layers, rank, optimizer: cost_of(layers[:1], rank, optimizer)],
    6: [each_time_it_comes, neighbours_compared, full_once_and_adapters_each_time],
}
COMBINED = [
    ({first, second}, partial(cost_of, **CHANGES[first], **CHANGES[second]))
    for first, second in (("channels alone", "biases counted"), ("one moment for AdamW", "counted twice"))
]
EQUIVALENT = {}
