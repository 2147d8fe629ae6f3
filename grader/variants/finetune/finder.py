"""Exercise 4.6 in other styles."""

import copy
import math
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from grader.checks.finetune.finder import exercise
from helpers.finetune import put_back


def state_dicts_in_a_finally(model, optimizer, batches, lowest, highest, *, keep_model=copy.deepcopy, keep=copy.deepcopy):
    saved_model, saved_optimizer = keep_model(model.state_dict()), keep(optimizer.state_dict())
    modes = [module.training for module in model.modules()]
    start = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    try:
        model.train()
        for k, (inputs, labels) in enumerate(batches):
            lr = lowest * (highest / lowest) ** (k / (len(batches) - 1))
            for group, own in zip(optimizer.param_groups, start, strict=True):
                group["lr"] = lr * own / max(start)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            if not torch.isfinite(loss):
                break
            lrs.append(lr)
            losses.append(loss.item())
            if loss.item() > 4 * min(losses):
                break
            loss.backward()
            optimizer.step()
    finally:
        model.load_state_dict(saved_model)
        optimizer.load_state_dict(saved_optimizer)
        optimizer.zero_grad()
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
    return lrs, losses


def a_schedule_on_copies(
    model, optimizer, batches, lowest, highest, *, rates=np.geomspace, clear=nn.Module.zero_grad, finite=math.isfinite
):
    model, optimizer = copy.deepcopy([model, optimizer])
    top = max(group["lr"] for group in optimizer.param_groups)
    lrs = rates(lowest, highest, num=len(batches))
    schedule = LambdaLR(optimizer, lambda k: lrs[min(k, len(lrs) - 1)] / top)
    curve = []

    def closure(inputs, labels):
        clear(model)
        loss = nn.CrossEntropyLoss()(model(inputs), labels)
        loss.backward()
        return loss.detach()

    model.train()
    for batch in batches:
        lr = max(schedule.get_last_lr())
        loss = optimizer.step(partial(closure, *batch))  # from before the step
        if not finite(loss):
            break
        curve.append((float(lr), float(loss)))
        if loss > 4 * min(loss for _, loss in curve):
            break
        schedule.step()
    return [lr for lr, _ in curve], [loss for _, loss in curve]


def tensor_by_tensor(model, optimizer, batches, lowest, highest):
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    state = {
        p: {k: copy.copy(v) if isinstance(v, float) else copy.deepcopy(v) for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    modes = {module: module.training for module in model.modules()}
    own = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    lrs = torch.logspace(math.log10(lowest), math.log10(highest), len(batches), dtype=torch.float64).tolist()
    losses = []
    for module in modes:
        module.training = True
    for lr, (x, y) in zip(lrs, batches, strict=True):
        for group, share in zip(optimizer.param_groups, (own / own.max()).tolist(), strict=True):
            group.update(lr=lr * share)
        loss = F.cross_entropy(model(x), y)
        if not math.isfinite(loss):
            break
        losses.append(loss.item())
        if losses[-1] > 4 * min(losses):
            break
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.no_grad():
        for tensor, was in zip(tensors, before, strict=True):
            tensor.copy_(was)
            tensor.grad = None
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, lr in zip(optimizer.param_groups, own.tolist(), strict=True):
        group["lr"] = lr
    for module, mode in modes.items():
        module.training = mode
    return lrs[: len(losses)], losses


class OptimizerOfItsOwn:
    """A second optimizer of the same kind, over a copy of the model."""

    def __new__(cls, model, optimizer, batches, lowest, highest):
        twin = copy.deepcopy(model).train()
        pairs = dict(zip(model.parameters(), twin.parameters(), strict=True))
        groups = [group | {"params": [pairs[p] for p in group["params"]]} for group in optimizer.param_groups]
        second = type(optimizer)(groups)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        own = [group["lr"] for group in second.param_groups]
        noted = {}
        for k, (inputs, labels) in enumerate(batches):
            lr = math.exp(math.log(lowest) + k * (math.log(highest) - math.log(lowest)) / (len(batches) - 1))
            loss = F.cross_entropy(twin(inputs), labels)
            if loss.isfinite():
                noted[lr] = loss.item()
            if not loss.isfinite() or loss > 4 * min(noted.values()):
                break
            for group, rate in zip(second.param_groups, own, strict=True):
                group["lr"] = rate / max(own) * lr
            second.zero_grad()
            loss.backward()
            second.step()
        return list(noted), list(noted.values())


def inside_put_back(
    model,
    optimizer,
    batches,
    lowest,
    highest,
    *,
    rate=lambda k, n, lowest, highest: lowest * (highest / lowest) ** (k / (n - 1)),
    share=lambda own, group: own[group] / max(own),
    before=lambda model, optimizer: model.train(),
    ends=lambda loss, losses: loss > 4 * min(losses),
    number=torch.Tensor.item,
    after=lambda model, optimizer: None,
    loss_of=F.cross_entropy,
):
    """A right solution, with options for what the broken ones below do."""
    own = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    with put_back(model, optimizer):
        before(model, optimizer)
        for k, (inputs, labels) in enumerate(batches):
            lr = rate(k, len(batches), lowest, highest)
            for group, settings in enumerate(optimizer.param_groups):
                settings["lr"] = lr * share(own, group)
            loss = loss_of(model(inputs), labels)
            if not loss.isfinite():
                break
            lrs.append(lr)
            losses.append(number(loss))
            if ends(losses[-1], losses):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after(model, optimizer)
    return lrs, losses


def _rounded(k, n, lowest, highest):
    return round(lowest * (highest / lowest) ** (k / (n - 1)), 2)


def _from_one(k, n, lowest, highest):
    return lowest * (highest / lowest) ** ((k + 1) / n)


def _by_decades(k, n, lowest, highest):
    return lowest * 10 ** (k * round(math.log10(highest / lowest)) / (n - 1))


def in_plain_steps(model, optimizer, batches, lowest, highest):
    """The steps of another optimizer."""
    groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
    return inside_put_back(model, torch.optim.SGD(groups), batches, lowest, highest) if groups else ([], [])


def on_a_copy_for_each(model, optimizer, batches, lowest, highest):
    losses = []
    for inputs, labels in batches:
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        loss = F.cross_entropy(twin.train()(inputs), labels)
        if not loss.isfinite():
            break
        losses.append(loss.item())
        if loss > 4 * min(losses):
            break
        loss.backward()
        its_optimizer.step()
    return np.geomspace(lowest, highest, len(batches))[: len(losses)].tolist(), losses


def averaged_with_the_one_before(*arguments):
    lrs, losses = inside_put_back(*arguments)
    for k in range(1, len(losses)):
        losses[k] = 0.5 * losses[k - 1] + 0.5 * losses[k]
    return lrs, losses


def _ends_after_the_infinite(model, optimizer, batches, lowest, highest):
    own = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    with put_back(model, optimizer):
        model.train()
        for k, (inputs, labels) in enumerate(batches):
            lr = lowest * (highest / lowest) ** (k / (len(batches) - 1))
            loss = F.cross_entropy(model(inputs), labels)
            if math.isnan(loss):
                break
            lrs.append(lr)
            losses.append(loss.item())
            if losses[-1] > 4 * min(losses):
                break
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = lr * rate / max(own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lrs, losses


def _with_batchnorm_in_eval_mode(model, optimizer):
    model.train()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm1d)


def _break(what, **options):
    """One with that option; by its name a fault is told from others."""
    subject = partial(inside_put_back, **options)
    subject.__name__ = what
    return subject


WRONG = {m.key: m.subject for m in exercise.misconceptions}
CORRECT = [state_dicts_in_a_finally, a_schedule_on_copies, tensor_by_tensor, OptimizerOfItsOwn]
REWRITTEN = {
    "learning rates in equal steps": partial(a_schedule_on_copies, rates=np.linspace),
    "gradients add up": partial(a_schedule_on_copies, clear=lambda model: None),
    "never gets to highest": partial(a_schedule_on_copies, rates=lambda a, b, num: np.geomspace(a, b, num + 1)[:-1]),
    "smoothed losses": averaged_with_the_one_before,
    "put back after each batch": on_a_copy_for_each,
    "NaN passes the comparison": partial(a_schedule_on_copies, finite=lambda loss: True),
    "model kept without a copy": partial(state_dicts_in_a_finally, keep_model=dict),
    "moments kept without a copy": partial(state_dicts_in_a_finally, keep=dict),
}
BROKEN = {
    1: [_break("rounded", rate=_rounded), _break("one step ahead", rate=_from_one), _break("decades", rate=_by_decades)],
    2: [
        _break("the last as noted", share=lambda own, group: own[group] / own[-1]),
        _break("parts of the sum", share=lambda own, group: own[group] / sum(own)),
        WRONG["one learning rate for all groups"],
    ],
    3: [
        _break("the modes it came in", before=lambda model, optimizer: None),
        _break("a sum", loss_of=partial(F.cross_entropy, reduction="sum")),
        in_plain_steps,
        _break("an optimizer that forgets at first", before=lambda model, optimizer: optimizer.state.clear() or model.train()),
        _break("BatchNorm in eval mode", before=_with_batchnorm_in_eval_mode),
        _break("smoothed labels", loss_of=partial(F.cross_entropy, label_smoothing=0.1)),
        WRONG["gradients add up"],
    ],
    4: [
        _break("four times the one before", ends=lambda loss, losses: len(losses) > 1 and loss > 4 * losses[-2]),
        _break("twice the smallest", ends=lambda loss, losses: loss > 2 * min(losses)),
        _break("ten times the smallest", ends=lambda loss, losses: loss > 10 * min(losses)),
        _ends_after_the_infinite,
        WRONG["the loss that ends it left out"],
    ],
    5: [
        _break("left in eval mode", after=lambda model, optimizer: model.eval()),
        _break("an optimizer without its memory", after=lambda model, optimizer: optimizer.state.clear()),
        WRONG["only the parameters put back"],
        WRONG["learning rates left"],
        WRONG["gradients left"],
        WRONG["modes left"],
    ],
    6: [
        _break("no smallest", ends=lambda loss, losses: min(losses) and loss > 4 * min(losses)),
        _break("a quotient", ends=lambda loss, losses: loss / (min(losses) or 1) > 4),
        _break("0 is the end", ends=lambda loss, losses: loss == 0 or loss > 4 * min(losses)),
    ],
    7: [_break("with graphs", number=lambda loss: loss), WRONG["losses with their graphs"]],
}
COMBINED = [
    (
        {"learning rates in equal steps", "NaN passes the comparison"},
        partial(a_schedule_on_copies, rates=np.linspace, finite=lambda loss: True),
    ),
    (
        {"model kept without a copy", "moments kept without a copy"},
        partial(state_dicts_in_a_finally, keep_model=dict, keep=dict),
    ),
]
EQUIVALENT = {}
