"""Train for a while, and have the model and the optimizer as they were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


@contextmanager
def put_back(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """After the `with`, `model` and `optimizer` are what they were before it, whatever trained them, in place.

        with put_back(model, optimizer):
            train(model, optimizer)

    Put back are parameters, buffers (those too that a state dict leaves out), gradients, `requires_grad` and modes of the
    model; of the optimizer its groups, their settings, and its state. All of them stay the same objects, so that whoever
    holds them still does. An exception ends the block like its end does, and is passed on. Random states go on.

    Args:
        model: any model; its modules, parameters and buffers must not be replaced inside.
        optimizer: any optimizer over its parameters. Inside, parameters may join it.
    """
    values = {tensor: tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())}
    gradients = {p: (p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    groups = optimizer.param_groups
    settings = [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in groups]
    members = [list(group["params"]) for group in groups]
    memory = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        for parameter, (trains, gradient) in gradients.items():
            parameter.requires_grad_(trains).grad = gradient
        for module, training in modes.items():
            module.training = training
        del groups[len(settings) :]
        for group, params, kept in zip(groups, members, settings, strict=True):
            group.clear()
            group.update(params=params, **kept)
        optimizer.state.clear()
        optimizer.state.update(memory)
