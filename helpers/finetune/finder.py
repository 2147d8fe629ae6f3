"""The learning rate range test: a search that leaves no trace.

Source: Smith 2017, section 3.3.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from helpers import expect
from helpers.finetune.restore import put_back
from helpers.training import train_mode


class LearningRates(NamedTuple):
    """What `find_lr` saw: the loss before a step with each learning rate."""

    lrs: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """The learning rate at which the smoothed loss falls most steeply.

        Smoothed: each loss is the mean of itself and of up to two on either side. Steepest: the smallest
        difference between the loss after and the loss before, which is the slope against log(lr), as the steps are
        equal there. The step made with the i-th learning rate shows in the loss after it, so noise aside this
        is a rate at which training moves fast and does not yet diverge; a tenth of it is a safe choice too.

        Raises:
            ValueError: the loss never fell.
        """
        losses = np.array(self.losses)
        smooth = np.array([losses[max(0, i - 2) : i + 3].mean() for i in range(len(losses))])
        slopes = np.gradient(smooth) if len(smooth) > 1 else np.zeros(1)
        if not slopes.min() < 0:
            raise ValueError(
                f"the loss must fall somewhere to suggest a learning rate, got {len(losses)} losses that never do. "
                "Start lower, or look at what is frozen."
            )
        return self.lrs[int(slopes.argmin())]


def find_lr(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor | list, Tensor]],
    lowest: float = 1e-6,
    highest: float = 1.0,
) -> LearningRates:
    """The loss of each batch while the learning rate rises geometrically, one step for each batch.

    It happens inside `put_back`: the model, the optimizer, its state included, and the global random states are
    afterwards bit-identical to before. Training is as `fit` does it: cross-entropy, `train_mode`.
    It stops after a loss that is above 4 times the smallest so far, and before one that is not finite.

    Args:
        model: maps n inputs to (n, classes) logits.
        optimizer: over parameters of `model`, one whose step needs no closure. Its groups keep the ratios of their
            learning rates; the group with the highest gets the value tried.
        batches: at least two pairs (inputs, labels), all held in memory; about 100 make a curve.
        lowest, highest: the learning rates of the first and the last batch.

    Returns:
        `lrs` and `losses`, one for each batch that was used, and `suggestion`.

    Raises:
        ValueError: fewer than two batches, `lowest` is not below `highest`, or an optimizer of another model.

    Source: Smith 2017, section 3.3.
    """
    expect.positive("lowest", lowest)
    if not lowest < expect.positive("highest", highest):
        raise ValueError(f"lowest must be below highest, got {lowest} and {highest}. 1e-6 and 1.0 suit most models.")
    strangers = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in model.parameters()}
    if strangers:
        raise ValueError(
            f"optimizer must hold parameters of the model, got {len(strangers)} that are not in it. "
            "Build it after its modules have changed."
        )
    with _random_states_kept():
        batches = list(batches)
        if len(batches) < 2:
            raise ValueError(f"batches must be at least 2 pairs (inputs, labels), got {len(batches)}. About 100 make a curve.")
        top = expect.positive("the optimizer's lr", max(float(group["lr"]) for group in optimizer.param_groups))
        shares = [float(group["lr"]) / top for group in optimizer.param_groups]
        device = next(model.parameters()).device
        curve = LearningRates([], [])
        with put_back(model, optimizer):
            train_mode(model)
            for lr, (inputs, labels) in zip(np.geomspace(lowest, highest, len(batches)).tolist(), batches, strict=True):
                logits = model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
                loss = F.cross_entropy(logits, labels.to(device))
                if not loss.isfinite():
                    break
                curve.lrs.append(lr)
                curve.losses.append(loss.item())
                if loss.item() > 4 * min(curve.losses):
                    break
                for group, share in zip(optimizer.param_groups, shares, strict=True):
                    group["lr"] = lr * share
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return curve


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Whatever is drawn inside the `with`, from Python, NumPy or torch, the global random states come out as they went in."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu is not None:
            torch.cuda.set_rng_state_all(gpu)
