"""Exercise 4.3 in other styles."""

import contextlib

import torch


def a_group_for_each(optimizer, parameters, lr):
    for parameter in parameters:
        parameter.requires_grad_()
        with contextlib.suppress(ValueError):  # torch refuses what it has, one at a time
            optimizer.add_param_group({"params": [parameter], "lr": lr})


def written_into_the_groups(optimizer, parameters, lr):
    fresh = []
    for parameter in parameters:
        parameter.requires_grad = True
        there = sum((group["params"] for group in optimizer.param_groups), fresh)
        if not any(parameter is present for present in there):
            fresh = [*fresh, parameter]
    if len(fresh) > 0:
        optimizer.param_groups.append({**optimizer.defaults, "params": fresh, "lr": lr})
    return fresh


class Unfreezer:
    """Joins a group that has the same settings, where there is one."""

    def __call__(self, optimizer, parameters, lr):
        wanted = {**optimizer.defaults, "lr": lr}
        unique = {id(parameter): parameter for parameter in parameters}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                known = unique.pop(id(parameter), None)
                if known is not None:
                    known.requires_grad_(True)
        if not unique:
            return optimizer
        for parameter in unique.values():
            parameter.requires_grad_(True)
        for group in optimizer.param_groups:
            if {key: value for key, value in group.items() if key != "params"} == wanted:
                group["params"].extend(unique.values())
                return optimizer
        optimizer.add_param_group(wanted | {"params": list(unique.values())})
        return optimizer


def through_the_default(optimizer, parameters, lr):
    remaining = list(dict.fromkeys(parameters))
    torch.nn.ParameterList(remaining).requires_grad_(True)
    indices = {parameter.data_ptr() for group in optimizer.param_groups for parameter in group["params"]}
    remaining = [parameter for parameter in remaining if parameter.data_ptr() not in indices]
    default = optimizer.defaults["lr"]
    optimizer.defaults["lr"] = lr
    try:
        if remaining:
            optimizer.add_param_group({"params": remaining})
    finally:
        optimizer.defaults["lr"] = default


def built_and_forgotten(optimizer, parameters, lr):
    everything = list(parameters)
    for parameter in everything:
        parameter.requires_grad = True
    optimizer = torch.optim.AdamW(everything, lr=lr)
    optimizer.param_groups[0]["initial_lr"] = lr


def default_lr_and_twice(optimizer, parameters, lr):
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter.requires_grad_(True) for parameter in parameters if id(parameter) not in known]
    if new:
        optimizer.add_param_group({"params": new})


def an_empty_group_and_no_moments(optimizer, parameters, lr):
    optimizer.add_param_group({"params": [], "lr": lr})
    a_group_for_each(optimizer, parameters, lr)
    optimizer.state.clear()


CORRECT = [a_group_for_each, written_into_the_groups, Unfreezer(), through_the_default]
REWRITTEN = {"the optimizer never hears of it": built_and_forgotten}
BROKEN = {}
COMBINED = [
    ({"the optimizer's default learning rate", "in the group twice"}, default_lr_and_twice),
    ({"moments cleared", "an empty group"}, an_empty_group_and_no_moments),
]
EQUIVALENT = {}
