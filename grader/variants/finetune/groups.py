"""Exercise 4.2 in other styles."""

import bisect
import itertools
import math
import operator
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
        seen, groups, stage = set(), defaultdict(set), 0
        for path, module in model.named_modules():
            stage = stages.index(path) if path in stages else stage
            for parameter in module.parameters(recurse=False):
                if parameter not in seen and parameter.requires_grad:
                    groups[stage, parameter.ndim in (0, 1)].add(parameter)
                seen.add(parameter)
        rates = torch.logspace(1 - len(stages), 0, len(stages), base=factor, dtype=torch.float64) * lr
        return tuple(
            {"params": sorted(found, key=id), "lr": rates[i].item(), "weight_decay": 0.0 if spared else weight_decay}
            for (i, spared), found in groups.items()
        )


def with_itertools(model, lr, factor, weight_decay, stages):
    heads = [tuple(stage.split(".")) for stage in stages]
    paths = [tuple(name.split(".")) for name, _ in model.named_parameters()]
    marks = [sum(i for i, head in enumerate(heads) if path[: len(head)] == head) for path in paths]
    rates = list(itertools.accumulate(itertools.repeat(factor, len(stages) - 1), operator.truediv, initial=lr))
    rows = zip(itertools.accumulate(marks, max), model.parameters(), strict=True)
    keyed = [(rates[~stage], (0, weight_decay)[p.ndim > 1], p) for stage, p in rows if p.requires_grad]
    ordered = sorted(keyed, key=lambda row: row[:2])
    return [
        {"params": (p for _, _, p in rows), "lr": rate, "weight_decay": decay}
        for (rate, decay), rows in (
            (key, list(rows)) for key, rows in itertools.groupby(ordered, key=operator.itemgetter(0, 1))
        )
    ]


def built_up_in_an_optimizer(model, lr, factor, weight_decay, stages):
    owner, stage = {}, stages[0]
    for key, _ in model.named_parameters():
        stage = max((s for s in stages if (key + ".").startswith(s + ".")), key=len, default=stage)
        owner[key] = stage
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    for stage, depth in zip(stages, range(len(stages))[::-1], strict=True):
        for flat in (True, False):
            params = [p for key, p in model.named_parameters() if owner[key] == stage and (p.ndim < 2) is flat]
            params = list(filter(lambda p: p.requires_grad, params))
            if params:
                rate = lr * pow(1 / factor, depth)
                optimizer.add_param_group({"params": params, "lr": rate, "weight_decay": 0.0 if flat else weight_decay})
    return [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups[1:]]


def starts_at_the_first_name(model, lr, factor, weight_decay, stages):
    stage, groups = None, []
    for name, parameter in model.named_parameters():
        for i, begin in enumerate(stages):
            if name.startswith(f"{begin}."):
                stage = i
        if stage is None or not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim >= 2 else 0
        groups.append({"params": [parameter], "lr": lr / factor ** (len(stages) - stage - 1), "weight_decay": decay})
    return groups


def named_modules_alone(model, lr, factor, weight_decay, stages):
    groups, seen = [], set()
    for i, stage in enumerate(stages):
        for parameter in model.get_submodule(stage).parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                rate = lr * (1 / factor) ** (len(stages) - 1 - i)
                groups.append({"params": parameter, "lr": rate, "weight_decay": weight_decay if parameter.dim() > 1 else 0})
    return groups


def spared_by_name(model, lr, factor, weight_decay, stages):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for group in stage_by_stage(model, lr, factor, weight_decay, stages):
        for parameter in group["params"]:
            spared = names[parameter].endswith(".bias") or names[parameter].split(".")[-2].startswith("bn")
            groups.append({"params": [parameter], "lr": group["lr"], "weight_decay": 0.0 if spared else weight_decay})
    return groups


def by_modules_of_each_stage(model, lr, factor, weight_decay, stages):
    stage, groups = 0, []
    for path, module in model.named_modules():
        if path in stages:
            stage = stages.index(path)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                decay = weight_decay if parameter.ndim > 1 else 0.0
                groups.append({"params": [parameter], "lr": lr * factor ** (stage + 1 - len(stages)), "weight_decay": decay})
    return groups


def stem_forgotten_and_decay_for_all(model, lr, factor, weight_decay, stages):
    groups = starts_at_the_first_name(model, lr, factor, weight_decay, stages)
    return [group | {"weight_decay": weight_decay} for group in groups]


def from_the_stem_and_only_named(model, lr, factor, weight_decay, stages):
    groups = named_modules_alone(model, lr, factor, weight_decay, stages)
    lowest = min(group["lr"] for group in groups)
    return [{**group, "lr": lr * lowest / group["lr"]} for group in groups]


def head_divided_and_names(model, lr, factor, weight_decay, stages):
    return spared_by_name(model, lr / factor, factor, weight_decay, stages)


def scale_and_twice(model, lr, factor, weight_decay, stages):
    groups = by_modules_of_each_stage(model, 1.0, factor, weight_decay, stages)
    return [{**group, "lr": lr, "lr_scale": group["lr"]} for group in groups]


def one_lr_for_all(model, lr, factor, weight_decay, stages):
    return [{"params": model.parameters(), "lr": lr, "weight_decay": weight_decay}]


CORRECT = [stage_by_stage, one_group_each, from_the_head_down, ByModules(), with_itertools, built_up_in_an_optimizer]
REWRITTEN = {
    "forgotten stem": starts_at_the_first_name,
    "only what the stages hold": named_modules_alone,
}
COMBINED = [
    ({"forgotten stem", "decay on everything"}, stem_forgotten_and_decay_for_all),
    ({"order turned round", "only what the stages hold"}, from_the_stem_and_only_named),
    ({"head divided too", "norms by the letters bn"}, head_divided_and_names),
    ({"lr_scale", "a parameter twice"}, scale_and_twice),
    ({"decay on everything"}, one_lr_for_all),
]
EQUIVALENT = {}
