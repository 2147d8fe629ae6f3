"""Exercise 4.3 in other styles."""

import contextlib
import itertools
from operator import itemgetter

import torch


def a_set_of_parameters(optimizer, parameters, lr):
    seen = set(itertools.chain.from_iterable(map(itemgetter("params"), optimizer.param_groups)))
    new = []
    for parameter in parameters:
        parameter.requires_grad = True
        if parameter not in seen:  # a set asks for the hash first, and a tensor's hash is its identity
            new.append(parameter)
            seen.add(parameter)
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


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
        if not any(parameter is other for other in there):
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


def one_after_the_other(optimizer, parameters, lr):
    """The first new one opens a group, the others join it."""
    group = None
    for parameter in iter(parameters):
        parameter.requires_grad_(True)
        if id(parameter) in [id(other) for g in optimizer.param_groups for other in g["params"]]:
            continue
        if group is None:
            optimizer.add_param_group({"params": parameter, "lr": lr})
            group = optimizer.param_groups[-1]
        else:
            group["params"].append(parameter)


def another_of_its_class(optimizer, parameters, lr):
    parameters = tuple(parameters)
    torch.nn.ParameterList(parameters).requires_grad_(True)
    groups = [{"params": [*group["params"]], "lr": group["lr"]} for group in optimizer.param_groups]
    rebuilt = optimizer.__class__(groups)
    rebuilt.param_groups.append({**rebuilt.param_groups[0], "params": list(parameters), "lr": lr})
    return rebuilt


def built_and_forgotten(optimizer, parameters, lr):
    everything = list(parameters)
    for parameter in everything:
        parameter.requires_grad = True
    optimizer = torch.optim.AdamW(everything, lr=lr)
    optimizer.param_groups[0]["initial_lr"] = lr


def in_a_list(optimizer, parameters, lr):
    known = []
    for group in optimizer.param_groups:
        known += group["params"]
    new = []
    for parameter in parameters:
        parameter.requires_grad = True
        if parameter not in known and parameter not in new:
            new += [parameter]
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


def always_a_group(optimizer, parameters, lr):
    optimizer.add_param_group({"params": [], "lr": lr})
    for parameter in parameters:
        parameter.requires_grad_()
        if id(parameter) not in (id(p) for group in optimizer.param_groups for p in group["params"]):
            optimizer.param_groups[-1]["params"].append(parameter)


def cleared_and_overwritten(optimizer, parameters, lr):
    one = {id(parameter): parameter.requires_grad_(True) for parameter in parameters}
    everything = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.__init__(list((everything | one).values()), lr=lr, **_settings(optimizer))


def _settings(optimizer):
    return {"momentum": optimizer.defaults["momentum"]} if "momentum" in optimizer.defaults else {}


def default_lr_and_twice(optimizer, parameters, lr):
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter.requires_grad_(True) for parameter in parameters if id(parameter) not in known]
    if new:
        optimizer.add_param_group({"params": new})


def by_value_and_one_lr(optimizer, parameters, lr):
    in_a_list(optimizer, parameters, lr)
    for group in optimizer.param_groups:
        group.update(lr=lr)


def cleared_and_an_empty_group(optimizer, parameters, lr):
    always_a_group(optimizer, parameters, lr)
    optimizer.state.clear()


CORRECT = [
    *(a_set_of_parameters, a_group_for_each, written_into_the_groups, Unfreezer(), through_the_default, one_after_the_other),
]
REWRITTEN = {
    "a new optimizer": another_of_its_class,
    "the optimizer never hears of it": built_and_forgotten,
}
COMBINED = [
    ({"one learning rate for all groups", "moments cleared"}, cleared_and_overwritten),
    ({"the optimizer's default learning rate", "in the group twice"}, default_lr_and_twice),
    ({"compared by value", "one learning rate for all groups"}, by_value_and_one_lr),
    ({"moments cleared", "an empty group"}, cleared_and_an_empty_group),
]
EQUIVALENT = {}
