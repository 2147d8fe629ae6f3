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
    optimizer = torch.optim.AdamW([{"params": everything}], lr=lr)
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


def _known(optimizer, groups=slice(None)):
    return {id(parameter) for group in optimizer.param_groups[groups] for parameter in group["params"]}


def _join(optimizer, parameters, lr, *, groups=slice(None), **settings):
    """A right solution, with settings of the new group and the groups that it looks for known parameters in."""
    new = {id(p): p.requires_grad_(True) for p in parameters}
    for known in _known(optimizer, groups) & new.keys():
        del new[known]
    if new:
        optimizer.add_param_group({"params": [*new.values()], "lr": lr} | settings)


def unfreezes_the_weights(optimizer, parameters, lr):
    parameters = list(parameters)
    frozen = [parameter for parameter in parameters if not parameter.requires_grad and parameter.ndim < 2]
    _join(optimizer, parameters, lr)
    for bias in frozen:
        bias.requires_grad_(False)


def goes_through_them_twice(optimizer, parameters, lr):
    for parameter in parameters:
        parameter.requires_grad = True
    _join(optimizer, parameters, lr)


def looks_at_the_last_group_alone(optimizer, parameters, lr):
    parameters = list(parameters)
    with contextlib.suppress(ValueError):
        _join(optimizer, parameters, lr, groups=slice(-1, None))


def the_first_new_one_alone(optimizer, parameters, lr):
    parameters = [parameter.requires_grad_(True) for parameter in parameters]
    _join(optimizer, [p for p in parameters if id(p) not in _known(optimizer)][:1], lr)


def at_the_lr_of_the_last_group(optimizer, parameters, lr):
    _join(optimizer, parameters, optimizer.param_groups[-1]["lr"])


def without_momentum(optimizer, parameters, lr):
    _join(optimizer, parameters, lr, momentum=0.0)


def into_a_group_with_that_lr(optimizer, parameters, lr):
    fitting = [group for group in optimizer.param_groups if group["lr"] == lr]
    if not fitting:
        return _join(optimizer, parameters, lr)
    known = _known(optimizer)
    for parameter in dict.fromkeys(parameters):
        parameter.requires_grad_(True)
        if id(parameter) not in known:
            fitting[0]["params"].append(parameter)


def slows_the_groups_that_it_finds(optimizer, parameters, lr):
    parameters = list(parameters)
    given = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        if any(id(parameter) in given for parameter in group["params"]):
            group["lr"] = lr
    _join(optimizer, parameters, lr)


def takes_them_over(optimizer, parameters, lr):
    parameters = list(dict.fromkeys(parameters))
    if any(id(parameter) not in _known(optimizer) for parameter in parameters):
        given = set(map(id, parameters))
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in given]
    _join(optimizer, parameters, lr)


def clears_gradients(optimizer, parameters, lr):
    optimizer.zero_grad()
    _join(optimizer, parameters, lr)


def changes_the_default(optimizer, parameters, lr):
    optimizer.defaults["lr"] = lr
    _join(optimizer, parameters, lr)


def forgets_what_was_remembered(optimizer, parameters, lr):
    _join(optimizer, parameters, lr)
    optimizer.state = type(optimizer.state)(dict)


def by_list_membership(optimizer, parameters, lr):
    known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = [parameter.requires_grad_(True) for parameter in parameters]
    _join(optimizer, [parameter for parameter in parameters if parameter not in known], lr)


def each_as_often_as_it_comes(optimizer, parameters, lr):
    new = [p for p in map(torch.Tensor.requires_grad_, parameters) if id(p) not in _known(optimizer)]
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


def a_group_in_any_case(optimizer, parameters, lr):
    new = [p for p in map(torch.Tensor.requires_grad_, dict.fromkeys(parameters)) if id(p) not in _known(optimizer)]
    optimizer.add_param_group({"params": new, "lr": lr})


def a_group_for_an_empty_list(optimizer, parameters, lr):
    parameters = list(parameters)
    _join(optimizer, parameters, lr)
    if not parameters:
        optimizer.add_param_group({"params": [], "lr": lr})


CORRECT = [a_group_for_each, written_into_the_groups, Unfreezer(), through_the_default]
REWRITTEN = {"the optimizer never hears of it": built_and_forgotten}
BROKEN = {
    1: [unfreezes_the_weights, goes_through_them_twice],
    2: [
        at_the_lr_of_the_last_group,
        without_momentum,
        into_a_group_with_that_lr,
        looks_at_the_last_group_alone,
        the_first_new_one_alone,
        built_and_forgotten,
    ],
    3: [slows_the_groups_that_it_finds, takes_them_over],
    4: [clears_gradients, changes_the_default, forgets_what_was_remembered],
    5: [by_list_membership, each_as_often_as_it_comes],
    6: [a_group_in_any_case, a_group_for_an_empty_list],
}
COMBINED = [
    ({"the optimizer's default learning rate", "in the group twice"}, default_lr_and_twice),
    ({"moments cleared", "an empty group"}, an_empty_group_and_no_moments),
]
EQUIVALENT = {}
