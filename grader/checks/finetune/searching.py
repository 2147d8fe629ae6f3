"""What the check of exercise 4.6 searches with: training with given learning rates, networks, and what was returned."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from grader.checks.networks import with_statistics
from grader.experiment import Trial, WrongReturn, expect_number, wrong_return
from grader.near import near, same

Batches = list[tuple[Tensor, Tensor]]


def in_ratio(lr: float, own: list[float]) -> list[float]:
    """The learning rates of the groups: the largest becomes `lr`, the others follow."""
    return [lr * rate / max(own) for rate in own]


def all_the_same(lr: float, own: list[float]) -> list[float]:
    return [lr] * len(own)


def unchanged(lr: float, own: list[float]) -> list[float]:
    return own


def train_losses(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    lrs: list[float],
    *,
    rates=in_ratio,
    enter=nn.Module.train,
    clear: bool = True,
    after: bool = False,
    loss_of=F.cross_entropy,
) -> Iterator[float]:
    """Train the model, one step for each batch and learning rate, and give the loss of each batch before its step.

    The options are what may go wrong: rates of the groups, modes, gradients cleared, the loss after the step or another.
    """
    own = [group["lr"] for group in optimizer.param_groups]
    enter(model)
    for (inputs, labels), lr in zip(batches, lrs, strict=True):
        for group, rate in zip(optimizer.param_groups, rates(lr, own), strict=True):
            group["lr"] = rate
        loss = loss_of(model(inputs), labels)
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield (loss_of(model(inputs), labels) if after else loss).item()


def geometric(lowest: float, highest: float, n: int) -> list[float]:
    return [lowest * (highest / lowest) ** (k / (n - 1)) for k in range(n)]


def geometric_down(lowest: float, highest: float, n: int) -> list[float]:
    return geometric(lowest, highest, n)[::-1]


def geometric_short(lowest: float, highest: float, n: int) -> list[float]:
    return geometric(lowest, highest, n + 1)[:-1]


def equal_steps(lowest: float, highest: float, n: int) -> list[float]:
    return torch.linspace(lowest, highest, n, dtype=torch.float64).tolist()


class WatchedSGD(SGD):
    """Takes note of whether its steps move what it holds."""

    moved: ClassVar[list[bool]] = []

    def step(self, closure=None):
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in held]
        loss = super().step(closure)
        self.moved.append(any(not same(was, now.detach()) for was, now in zip(before, held, strict=True)))
        return loss


def normalised_network(trial: Trial, width: int) -> nn.Sequential:
    norms = with_statistics(nn.BatchNorm1d(8), trial), with_statistics(nn.BatchNorm1d(8), trial)
    return nn.Sequential(nn.Linear(width, 8), norms[0], nn.Tanh(), nn.Linear(8, 8), norms[1], nn.Tanh(), nn.Linear(8, 3))


def draw_batches(trial: Trial, count: int, width: int) -> Batches:
    """Batches of 12 inputs (12, width) of three classes that can be told apart."""
    labels = [(torch.arange(12) % 3)[trial.permutation(12)] for _ in range(count)]
    return [(2 * torch.eye(width)[y] + 0.5 * trial.normal(12, width), y) for y in labels]


def call_finder(subject, *arguments) -> tuple[list[float], list[float]]:
    """What the subject returns, as two lists of floats."""
    return as_floats(subject(*arguments))


def lists_of(returned) -> Iterator[tuple[str, list]]:
    """What was returned under "lrs" and "losses"."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise wrong_return("find_lr must return two lists, (lrs, losses)", returned)
    for name, values in zip(("lrs", "losses"), returned, strict=True):
        if isinstance(values, str | dict) or not hasattr(values, "__iter__"):
            raise wrong_return(f"{name} must be a list of floats", values)
        yield name, list(values)


def as_floats(returned) -> tuple[list[float], list[float]]:
    lrs, losses = ([expect_number(value, f"each of {name}") for value in values] for name, values in lists_of(returned))
    if len(lrs) != len(losses):
        raise WrongReturn(f"there must be as many lrs as losses, got {len(lrs)} and {len(losses)}.")
    return lrs, losses


def is_sliding_mean(given: list[float], losses: list[float]) -> bool:
    """Whether they are a mean of the losses that slides, given * b + loss * (1 - b), corrected for its start or not."""
    shares = []
    if losses[1] != given[0]:
        shares.append((False, (given[1] - losses[1]) / (given[0] - losses[1])))
    if losses[0] != given[1]:
        shares.append((True, (given[1] - losses[1]) / (losses[0] - given[1])))
    for corrected, share in shares:
        mean, means = 0.0 if corrected else losses[0], []
        for k, loss in enumerate(losses):
            mean = share * mean + (1 - share) * loss
            means.append(mean / (1 - share ** (k + 1)) if corrected and 0 < share < 1 else mean)
        if 0 < share < 1 and near(given, means):
            return True
    return False


def alike(numbers: list[float], known: list[float] | tuple[float, ...]) -> bool:
    """Whether each number is the known one, relative to it: small learning rates count as much as large ones."""
    return len(numbers) == len(known) and near([number / right for number, right in zip(numbers, known, strict=True)], 1)


class Shift(nn.Module):
    """Logits that are the inputs, but for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias
