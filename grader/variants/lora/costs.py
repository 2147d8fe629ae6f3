"""Exercise 6.2 in other styles."""

import math
from collections import Counter, defaultdict
from functools import reduce

import numpy as np
import torch
from torch import nn


def by_kind_of_layer(layers, rank, optimizer):
    seen, full, adapter, gradients = [], 0, 0, 0
    for layer in layers:
        if any(layer.weight is weight for weight in seen):
            continue
        seen.append(layer.weight)
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            outputs = layer.out_channels
        else:
            inputs, outputs = layer.in_features, layer.out_features
        full += inputs * outputs
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


def thin_layers_on_meta(layers, rank, optimizer):
    times = ["sgd", "momentum", "adamw"].index(optimizer)
    full, parameters, places = 0, [], set()
    for layer in layers:
        weight = layer.weight
        if weight.data_ptr() in places:
            continue
        places.add(weight.data_ptr())
        full += weight.numel()
        rows = weight.size(0)
        for sides in ((weight[0].numel(), rank), (rank, rows)):
            parameters += nn.Linear(*sides, bias=False, device="meta", dtype=weight.dtype).parameters()
    size = sum(parameter.numel() * parameter.itemsize for parameter in parameters)
    return {
        "gradient_bytes": size,
        "optimizer_bytes": times * size,
        "full": full,
        "adapter": sum(parameter.numel() for parameter in parameters),
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


def folded(layers, rank, optimizer):
    state = 2.0 if optimizer == "adamw" else float(optimizer == "momentum")

    def add(so_far, layer):
        total, weights = so_far
        weight = layer.weight
        if id(weight) in weights:
            return so_far
        numbers = rank * weight.shape[0] + rank * weight.numel() / weight.shape[0]
        size = numbers * weight.element_size()
        return total + torch.tensor([weight.numel(), numbers, size, state * size]), weights | {id(weight)}

    total, _ = reduce(add, layers, (torch.zeros(4), frozenset()))
    return dict(zip(("full", "adapter", "gradient_bytes", "optimizer_bytes"), total, strict=True))


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


def _report(full, numbers, gradient, state):
    return {"full": full, "adapter": numbers, "gradient_bytes": gradient, "optimizer_bytes": state}


def _weights(layers):
    return list(dict.fromkeys(layer.weight for layer in layers))


def _states(optimizer):
    return ("sgd", "momentum", "adamw").index(optimizer)


def by_the_first_two_dimensions(layers, rank, optimizer):
    result = _report(0, 0, 0, 0)
    for weight in _weights(layers):
        out, in_, *_ = weight.shape
        a, b = torch.empty(rank, in_, dtype=weight.dtype), torch.empty(out, rank, dtype=weight.dtype)
        result["full"] += weight.nelement()
        for matrix in (a, b):
            result["adapter"] += matrix.nelement()
            result["gradient_bytes"] += matrix.nbytes
            result["optimizer_bytes"] += _states(optimizer) * matrix.nbytes
    return result


def every_channel_reads_all(layers, rank, optimizer):
    unique = {layer.weight: layer for layer in layers}
    full = n = gradient = 0
    for weight, layer in unique.items():
        inputs = layer.in_features if hasattr(layer, "in_features") else layer.in_channels * math.prod(layer.kernel_size)
        full += weight.numel()
        n += (inputs + weight.shape[0]) * rank
        gradient += (inputs + weight.shape[0]) * rank * weight.itemsize
    return _report(full, n, gradient, gradient * _states(optimizer))


def features_or_channels(layers, rank, optimizer):
    unique = {id(layer.weight): layer for layer in layers}
    n, gradient = 0, 0
    for layer in unique.values():
        kind = "features" if isinstance(layer, nn.Linear) else "channels"
        sides = getattr(layer, f"in_{kind}") + getattr(layer, f"out_{kind}")
        n += rank * sides
        gradient += rank * sides * layer.weight.element_size()
    return _report(sum(layer.weight.numel() for layer in unique.values()), n, gradient, _states(optimizer) * gradient)


def the_whole_layer(layers, rank, optimizer):
    full = sum(
        layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
        for layer in {id(layer.weight): layer for layer in layers}.values()
    )
    return really_trained(layers, rank, optimizer) | {"full": full}


def what_requires_grad(layers, rank, optimizer):
    full = {parameter: parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.requires_grad}
    return {**by_dtype(layers, rank, optimizer), "full": sum(full.values())}


def each_time_it_comes(layers, rank, optimizer):
    each = [by_kind_of_layer([layer], rank, optimizer) for layer in layers]
    return {key: sum(part[key] for part in each) for key in ("full", "adapter", "gradient_bytes", "optimizer_bytes")}


def a_set_of_layers(layers, rank, optimizer):
    result = Counter()
    for layer in set(layers):
        result.update(thin_layers_on_meta([layer], rank, optimizer))
    return result


def channels_and_biases(layers, rank, optimizer):
    return features_or_channels(layers, rank, optimizer) | {
        "full": sum(p.numel() for p in {p for layer in layers for p in layer.parameters()})
    }


def one_matrix_at_four_bytes(layers, rank, optimizer):
    n = sum(rank * weight[0].numel() for weight in _weights(layers))
    return _report(sum(weight.numel() for weight in _weights(layers)), n, 4 * n, 4 * n * _states(optimizer))


def one_moment_each_time(layers, rank, optimizer):
    return each_time_it_comes(layers, rank, optimizer if optimizer != "adamw" else "momentum")


def nothing_is_frozen(layers, rank, optimizer):
    size = sum(weight.nbytes for weight in _weights(layers))
    return by_dtype(layers, rank, optimizer) | {"gradient_bytes": size, "optimizer_bytes": size * _states(optimizer)}


CORRECT = [by_kind_of_layer, really_trained, thin_layers_on_meta, Tallied(), folded, by_dtype]
REWRITTEN = {
    "kernel forgotten": by_the_first_two_dimensions,
    "groups ignored": every_channel_reads_all,
    "channels alone": features_or_channels,
    "biases counted": the_whole_layer,
    "trainable parameters only": what_requires_grad,
    "counted twice": each_time_it_comes,
    "told apart by their modules": a_set_of_layers,
}
COMBINED = [
    ({"channels alone", "biases counted"}, channels_and_biases),
    ({"one matrix alone", "four bytes each"}, one_matrix_at_four_bytes),
    ({"one moment for AdamW", "counted twice"}, one_moment_each_time),
    ({"gradients of the full weight", "state of the full weight"}, nothing_is_frozen),
]
EQUIVALENT = {}
