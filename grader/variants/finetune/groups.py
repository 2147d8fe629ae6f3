"""Exercise 4.2 in other styles."""

import bisect
import itertools
import math
import re
from collections import defaultdict
from functools import partial
from operator import truediv

import torch
from torch import nn

from grader.checks.finetune.groups import solution


def stage_by_stage(model, lr, factor, weight_decay, stages, rate=lambda lr, factor, k: lr / factor**k):
    members = {stage: [] for stage in stages}
    current = stages[0]
    for name, parameter in model.named_parameters():
        for stage in stages:
            if name == stage or name.startswith(f"{stage}."):
                current = stage
        members[current].append(parameter)
    groups = []
    for k, stage in enumerate(reversed(stages)):
        trainable = [parameter for parameter in members[stage] if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
        vectors = [parameter for parameter in trainable if parameter.dim() < 2]
        groups.append({"params": matrices, "lr": rate(lr, factor, k), "weight_decay": weight_decay})
        groups.append({"params": vectors, "lr": rate(lr, factor, k), "weight_decay": 0})
    return groups  # some may be empty, which AdamW takes


def one_group_each(model, lr, factor, weight_decay, stages):
    names = [name for name, _ in model.named_parameters()]
    begins = [min(i for i, name in enumerate(names) if name.startswith(stage + ".")) for stage in stages]
    for position, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            stage = max(bisect.bisect_right(begins, position) - 1, 0)
            yield {
                "params": parameter,
                "lr": lr * math.exp((stage + 1 - len(stages)) * math.log(factor)),
                "weight_decay": (parameter.ndim > 1) * weight_decay,
            }


def from_the_head_down(model, lr, factor, weight_decay, stages):
    first, groups, left = {}, [], list(stages)
    for name, _ in model.named_parameters():
        for stage in stages:
            if f"{name}.".startswith(f"{stage}."):
                first.setdefault(stage, name)
    for name, parameter in list(model.named_parameters())[::-1]:
        if parameter.requires_grad:
            decay = 0.0 if len(parameter.shape) <= 1 else weight_decay
            groups.append({"params": [(name, parameter)], "lr": lr, "weight_decay": decay, "name": name})
        if len(left) > 1 and name == first[left[-1]]:
            left.pop()
            lr /= factor
    return groups


class ByModules:
    """Walks over modules instead of names; a parameter seen before is left out."""

    def __call__(self, model, lr, factor, weight_decay, stages):
        listed, groups, stage = set(), defaultdict(set), 0
        for path, module in model.named_modules():
            stage = stages.index(path) if path in stages else stage
            for parameter in module.parameters(recurse=False):
                if parameter not in listed and parameter.requires_grad:
                    groups[stage, parameter.ndim in (0, 1)].add(parameter)
                listed.add(parameter)
        rates = torch.logspace(1 - len(stages), 0, len(stages), base=factor, dtype=torch.float64) * lr
        return tuple(
            {"params": sorted(params, key=id), "lr": rates[i].item(), "weight_decay": 0.0 if spared else weight_decay}
            for (i, spared), params in groups.items()
        )


def named_modules_alone(model, lr, factor, weight_decay, stages):
    groups, listed = [], set()
    for i, stage in enumerate(stages):
        for parameter in model.get_submodule(stage).parameters():
            if parameter.requires_grad and parameter not in listed:
                listed.add(parameter)
                rate = lr * (1 / factor) ** (len(stages) - 1 - i)
                groups.append({"params": parameter, "lr": rate, "weight_decay": weight_decay if parameter.dim() > 1 else 0})
    return groups


def modules_alone_with_decay(model, lr, factor, weight_decay, stages):
    groups = named_modules_alone(model, lr, factor, weight_decay, stages)
    return [group | {"weight_decay": weight_decay} for group in groups]


def weights_and_biases(model, lr, factor, weight_decay, stages):
    """Two groups for each stage: what is called `bias`, and all else."""
    biases = {id(module.bias) for module in model.modules() if getattr(module, "bias", None) is not None}
    groups = stage_by_stage(model, lr, factor, weight_decay, stages)
    return [
        {**group, "params": [parameter], "weight_decay": 0 if id(parameter) in biases else weight_decay}
        for group in groups
        for parameter in group["params"]
    ]


def one_lr_for_all(model, lr, factor, weight_decay, stages):
    return [{"params": model.parameters(), "lr": lr, "weight_decay": weight_decay}]


class Dated:
    """An order of all parameters first, in a table of their own; settings are put together at the end."""

    def __init__(self, take_twice=False, last_place=False):
        self.take_twice, self.last_place = take_twice, last_place

    def __call__(self, model, lr, factor, weight_decay, stages):
        table, current = [], stages[0]
        waiting = list(stages)
        for name, parameter in model.named_parameters(remove_duplicate=not (self.take_twice or self.last_place)):
            while begun := next((stage for stage in waiting if name[: len(stage) + 1] == f"{stage}."), None):
                waiting.remove(begun)
                current = begun
            table.append((parameter, current))
        if self.last_place:
            table = list(dict(table).items())
        falling = itertools.accumulate(itertools.repeat(factor, len(stages) - 1), truediv, initial=lr)
        rates = dict(zip(reversed(stages), falling, strict=True))
        return [
            {"params": [parameter], "lr": rates[stage], "weight_decay": (0.0, weight_decay)[len(parameter.size()) >= 2]}
            for parameter, stage in table
            if parameter.requires_grad
        ]


def always_2_6(model, lr, factor, weight_decay, stages):
    return stage_by_stage(model, lr, 2.6, weight_decay, stages)


def evenly_down(model, lr, factor, weight_decay, stages):
    return solution(model, lr, factor, weight_decay, stages, rate=lambda lr, factor, depth: lr * (1 - depth / len(stages)))


def between_two_rates(model, lr, factor, weight_decay, stages):
    lowest, n = lr / factor ** (len(stages) - 1), len(stages)
    shares = [i / (n - 1) for i in range(n)]
    rates = [lowest ** (1 - share) * lr**share for share in shares]
    return solution(model, lr, factor, weight_decay, stages, rate=lambda lr, factor, depth: rates[n - 1 - depth])


def until_its_module_begins(model, lr, factor, weight_decay, stages):
    """From the head down: what stands between two stages goes with the one after it."""
    groups, stage = [], len(stages) - 1
    for name, parameter in reversed(list(model.named_parameters())):
        stage = next((i for i, begin in enumerate(stages) if name.startswith(f"{begin}.")), stage)
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.append({"params": [parameter], "lr": lr / factor ** (len(stages) - 1 - stage), "weight_decay": decay})
    return groups


def the_rest_with_the_head(model, lr, factor, weight_decay, stages):
    groups = named_modules_alone(model, lr, factor, weight_decay, stages)
    held = {group["params"] for group in groups}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in held]
    for decay in (0.0, weight_decay):
        some = [parameter for parameter in rest if (parameter.ndim > 1) == (decay > 0)]
        groups.append({"params": some, "lr": lr, "weight_decay": decay})
    return groups


def begins_anew_after_the_last(model, lr, factor, weight_decay, stages):
    groups = stage_by_stage(model, lr, factor, weight_decay, stages)
    inside = set(model.get_submodule(stages[-1]).parameters())
    after = [p for group in groups[:2] for p in group["params"] if p not in inside]
    for group in groups[:2]:
        group["params"] = [parameter for parameter in group["params"] if parameter in inside]
    return [*groups, *({"params": p, "lr": lr * factor, "weight_decay": weight_decay if p.ndim > 1 else 0.0} for p in after)]


def biases_and_norms_by_type(model, lr, factor, weight_decay, stages):
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm) for p in m.parameters()}

    def spared(name, parameter):
        return name.endswith("bias") or parameter in norms

    return solution(model, lr, factor, weight_decay, stages, spared=spared)


def one_row_is_a_vector(model, lr, factor, weight_decay, stages):
    return solution(model, lr, factor, weight_decay, stages, spared=lambda name, p: p.squeeze().ndim < 2)


def vectors_but_not_numbers(model, lr, factor, weight_decay, stages):
    return solution(model, lr, factor, weight_decay, stages, spared=lambda name, parameter: parameter.ndim == 1)


def biases_forgotten(model, lr, factor, weight_decay, stages):
    def wanted(parameter):
        return parameter.requires_grad and parameter not in biases

    biases = {parameter for name, parameter in model.named_parameters() if name.endswith(".bias")}
    return solution(model, lr, factor, weight_decay, stages, wanted=wanted)


def half_frozen_is_frozen(model, lr, factor, weight_decay, stages):
    names = [stage for stage in stages if not all(p.requires_grad for p in model.get_submodule(stage).parameters())]
    frozen = {parameter for name in names for parameter in model.get_submodule(name).parameters()}
    return solution(model, lr, factor, weight_decay, stages, wanted=lambda parameter: parameter not in frozen)


def frozen_ones_too(model, lr, factor, weight_decay, stages):
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    groups = stage_by_stage(model.requires_grad_(True), lr, factor, weight_decay, stages)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return groups


def frozen_ones_are_passed_over(model, lr, factor, weight_decay, stages):
    """A frozen stage is never seen to begin, so what comes after it goes on with the stage before."""
    stage, groups = 0, []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stage = next((i for i, begin in enumerate(stages) if f"{name}.".startswith(f"{begin}.")), stage)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.append({"params": [parameter], "lr": lr / factor ** (len(stages) - 1 - stage), "weight_decay": decay})
    return groups


def last_that_begins_so(model, lr, factor, weight_decay, stages):
    groups, stage = [], 0
    for name, parameter in model.named_parameters():
        for i, begin in enumerate(stages):
            stage = i if name.startswith(begin) else stage
        if parameter.requires_grad:
            rate = lr * factor ** (stage + 1 - len(stages))
            groups.append({"params": [parameter], "lr": rate, "weight_decay": weight_decay * (parameter.ndim > 1)})
    return groups


def somewhere_in_the_name(model, lr, factor, weight_decay, stages):
    groups, stage = {}, 0
    for name, parameter in model.named_parameters():
        stage = max((i for i, begin in enumerate(stages) if re.match(begin, name)), default=stage)
        if parameter.requires_grad:
            groups.setdefault((stage, parameter.ndim > 1), []).append(parameter)
    settings = ((lr / factor ** (len(stages) - 1 - i), weight_decay if decays else 0.0) for i, decays in groups)
    return [{"params": p, "lr": r, "weight_decay": d} for p, (r, d) in zip(groups.values(), settings, strict=True)]


def the_head_by_default(model, lr, factor, weight_decay, stages):
    groups = stage_by_stage(model, lr, factor, weight_decay, stages)
    return [{key: value for key, value in group.items() if key != "lr" or value != lr} for group in groups]


def decay_by_default(model, lr, factor, weight_decay, stages):
    groups = stage_by_stage(model, lr, factor, weight_decay, stages)
    return [{key: value for key, value in group.items() if key != "weight_decay" or value == 0} for group in groups]


CORRECT = [stage_by_stage, one_group_each, from_the_head_down, ByModules(), Dated()]
REWRITTEN = {
    "only what the stages hold": named_modules_alone,
    "biases alone spared": weights_and_biases,
    "factor times depth": partial(stage_by_stage, rate=lambda lr, factor, k: lr / (factor * k or 1)),
    "multiplied by the factor": partial(stage_by_stage, rate=lambda lr, factor, k: lr * math.prod([factor] * k)),
}
BROKEN = {
    1: [always_2_6, evenly_down, between_two_rates],
    2: [until_its_module_begins, the_rest_with_the_head, begins_anew_after_the_last],
    3: [biases_and_norms_by_type, one_row_is_a_vector, vectors_but_not_numbers],
    4: [biases_forgotten, half_frozen_is_frozen, frozen_ones_too, frozen_ones_are_passed_over],
    5: [Dated(take_twice=True), Dated(last_place=True)],
    6: [last_that_begins_so, somewhere_in_the_name],
    7: [the_head_by_default, decay_by_default],
}
COMBINED = [
    ({"only what the stages hold", "decay on everything"}, modules_alone_with_decay),
    ({"decay on everything", "frozen parameters put in"}, one_lr_for_all),
]
EQUIVALENT = {}
