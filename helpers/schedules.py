"""Schedules of torch and a group that comes later: where it is on the schedule now, and how the schedule learns of it.

`helpers.finetune.unfreeze_into` is what to call; this is how it does it. A scheduler keeps the initial learning rate of
each group in a list of its own, and what it does from step to step depends on its kind.
"""

import math
from bisect import bisect_right

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

# Schedules under which a group's learning rate is its initial one times something that all groups share.
_PROPORTIONAL = (
    *(lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR, lr_scheduler.StepLR, lr_scheduler.MultiStepLR),
    *(lr_scheduler.ExponentialLR, lr_scheduler.LinearLR, lr_scheduler.ConstantLR, lr_scheduler.PolynomialLR),
)
_COSINE = (lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts)  # the same if eta_min is 0


def lr_now(scheduler: LRScheduler, optimizer: Optimizer, lr: float) -> float:
    """What a group of initial learning rate `lr` would have now, had it been there from the start."""
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must belong to this optimizer, got that of another. Build it as Scheduler(optimizer, ...).")
    leaves = _leaves(scheduler)
    for leaf in leaves:
        _check_leaf(leaf, len(optimizer.param_groups))
    if type(scheduler) is lr_scheduler.ReduceLROnPlateau:
        return lr
    if any(leaf.eta_min != 0 for leaf in leaves if type(leaf) in _COSINE):  # not proportional
        active = scheduler
        if type(scheduler) is lr_scheduler.SequentialLR:
            active = scheduler._schedulers[bisect_right(scheduler._milestones, scheduler.last_epoch)]
        multiplies = any(type(leaf) is lr_scheduler.MultiplicativeLR for leaf in leaves)  # goes on from where another ended
        if active not in leaves or (multiplies and active is not scheduler):
            raise ValueError(
                f"a group cannot join {type(scheduler).__name__} while a cosine in it has eta_min above 0. Set eta_min=0, "
                "or build the optimizer with all its groups at the start."
            )
        if type(active) in _COSINE:
            restarts = type(active) is lr_scheduler.CosineAnnealingWarmRestarts
            phase = active.T_cur / active.T_i if restarts else active.last_epoch / active.T_max
            return active.eta_min + (lr - active.eta_min) * (1 + math.cos(math.pi * phase)) / 2
    group = max(optimizer.param_groups, key=lambda group: float(group["initial_lr"]))
    if not group["initial_lr"] > 0:
        raise ValueError("an initial lr must be above 0 to read the schedule from, got 0 in all groups of the optimizer.")
    return lr * (float(group["lr"]) / float(group["initial_lr"]))


def join(scheduler: LRScheduler, optimizer: Optimizer, lr: float) -> None:
    """Make the optimizer's last group known to the scheduler, `lr` being its initial learning rate."""
    optimizer.param_groups[-1]["initial_lr"] = lr
    for leaf in _leaves(scheduler):
        if hasattr(leaf, "base_lrs"):
            leaf.base_lrs.append(lr)
        for attribute in ("lr_lambdas", "min_lrs"):
            values = getattr(leaf, attribute, None)
            if values is not None:
                values.append(values[0])
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what get_last_lr() shows until the next step


def _leaves(scheduler: LRScheduler) -> list[LRScheduler]:
    """The schedulers that a SequentialLR or ChainedScheduler consists of, however nested; any other is its own."""
    if type(scheduler) in (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler):
        return [leaf for member in scheduler._schedulers for leaf in _leaves(member)]
    return [scheduler]


def _check_leaf(leaf: LRScheduler, groups: int) -> None:
    name = type(leaf).__name__
    if type(leaf) not in (*_PROPORTIONAL, *_COSINE, lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"a group cannot join {name}, which sets learning rates in its own way. Build the optimizer with all its groups "
            "at the start, or use LambdaLR."
        )
    known = getattr(leaf, "base_lrs", None)
    if known is not None and len(known) != groups:
        raise ValueError(
            f"{name} must know all {groups} groups of the optimizer, got {len(known)}. "
            "Let each new group join with unfreeze_into(..., scheduler=scheduler)."
        )
    for attribute in ("lr_lambdas", "min_lrs"):
        values = getattr(leaf, attribute, [None])
        if any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(
                f"{name} must treat all groups alike, got different {attribute}: which would the new group follow? Give it one."
            )
