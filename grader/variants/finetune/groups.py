"""Exercise 4.2 in other styles."""

import bisect
import math
from collections import defaultdict

import torch


def stage_by_stage(model, lr, factor, weight_decay, stages):
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
        groups.append({"params": matrices, "lr": lr / factor**k, "weight_decay": weight_decay})
        groups.append({"params": vectors, "lr": lr / factor**k, "weight_decay": 0})
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


def one_lr_for_all(model, lr, factor, weight_decay, stages):
    return [{"params": model.parameters(), "lr": lr, "weight_decay": weight_decay}]


CORRECT = [stage_by_stage, one_group_each, from_the_head_down, ByModules()]
REWRITTEN = {"only what the stages hold": named_modules_alone}
BROKEN = {}
COMBINED = [
    ({"only what the stages hold", "decay on everything"}, modules_alone_with_decay),
    ({"decay on everything"}, one_lr_for_all),
]
EQUIVALENT = {}
