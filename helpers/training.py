"""One training loop for every chapter, and the few things around it: seeds, device, accuracy, history.

    for each step:  loss = cross_entropy(model(inputs), labels);  one step of AdamW;  one step of the schedule

Source of the optimizer: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from helpers import expect
from helpers.data import Examples
from helpers.features import extract, take


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random generators, on the CPU and every GPU."""
    random.seed(expect.whole_number("seed", seed, least=0))
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def best_device() -> torch.device:
    """The fastest device there is: a CUDA GPU, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch inside the `with`: on tiny tensors more of them only wait for each other.

    On a machine that is busy with something else, that wait can be ten times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is at the label: from 0.0 to 1.0.

    Args:
        logits: (n, classes), n >= 1.
        labels: (n,), whole numbers from 0 to classes - 1.
    """
    n, _ = expect.tensor("logits", logits, ("n", "classes")).shape
    expect.tensor("labels", labels, (n,))
    return (logits.argmax(dim=1) == labels).float().mean().item()


def evaluate(model: nn.Module, examples: Examples) -> float:
    """Accuracy of `model` on `examples`; the model is left as it was found, train and eval modes included."""
    return accuracy(extract(model, examples.inputs), examples.labels)


@dataclass
class History:
    """What a run of `fit` leaves behind: one entry per step, plus accuracies where they were measured."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)  # step -> accuracy on the validation examples
    seconds: float = 0.0

    def plot(self, ax) -> None:
        """Draw loss against step into a matplotlib `ax`, as a mean over 20 steps with the raw values behind it."""
        window = min(20, len(self.loss))
        smooth = np.convolve(self.loss, np.ones(window) / window, mode="valid")
        ax.plot(self.loss, color="0.75", linewidth=0.8, label="each batch")
        ax.plot(range(window - 1, len(self.loss)), smooth, color="C0", label=f"mean of {window}")
        ax.set(xlabel="step", ylabel="cross-entropy (nats)")
        ax.legend(frameon=False)


def fit(
    model: nn.Module,
    train: Examples,
    *,
    steps: int,
    lr: float,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    validation: Examples | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train the parameters of `model` that require gradients, in place.

    AdamW on random batches without replacement within an epoch; the learning rate rises over the first tenth of the
    steps and falls to zero along a cosine. A module whose own parameters are all frozen stays in eval mode,
    so the statistics of a frozen BatchNorm do not move; every other module is in train mode.

    Args:
        model: maps n inputs to (n, classes) logits. Moved to `device`; afterwards it is back on its own device
            and in the train and eval modes it came with.
        train: what to learn from.
        steps: updates to make, at least 1.
        lr: the highest learning rate.
        batch_size: examples per step; at most all of `train`.
        validation: measured after the last step, if given.
        device: None takes `best_device()`.
        seed: of the batches and of dropout; the global random states are left as `seed_everything` makes them.
        progress: show a progress bar.

    Raises:
        ValueError: nothing to train, no steps, or no examples.
    """
    parameters = [parameter for parameter in expect.module("model", model).parameters() if parameter.requires_grad]
    if not parameters:
        count = sum(1 for _ in model.parameters())
        raise ValueError(
            f"nothing to train: all {count} parameters are frozen. Unfreeze the head: model.fc.requires_grad_(True)."
        )
    if len(train.labels) == 0:
        raise ValueError("train must hold at least 1 example, got none. Look at how it was selected.")
    expect.whole_number("steps", steps)
    expect.whole_number("batch_size", batch_size)
    expect.positive("lr", lr, advice="1e-3 is where to start with AdamW.")
    device = torch.device(device or best_device())
    home = parameters[0].device
    modes = {module: module.training for module in model.modules()}
    seed_everything(seed)
    model.to(device)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    warmup = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * max(0, step - warmup) / (steps - warmup + 1))),
    )
    history = History()
    started = time.perf_counter()
    try:
        _train_mode(model)
        batches = _batches(len(train.labels), batch_size)
        bar = tqdm(range(steps), desc="training", disable=not progress, leave=False)
        for _ in bar:
            rows = next(batches)
            loss = F.cross_entropy(model(take(train.inputs, rows, device)), train.labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.loss.append(loss.item())
            history.lr.append(scheduler.get_last_lr()[0])
            scheduler.step()
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", refresh=False)
        if validation is not None:
            history.accuracy[steps] = evaluate(model, validation)
    finally:
        model.to(home)
        for module, training in modes.items():
            module.training = training
    history.seconds = time.perf_counter() - started
    return history


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.training = False


def _batches(count: int, batch_size: int):
    """Endless batches of row numbers, a new random order for each pass; a short rest goes into the next pass."""
    queue = torch.randperm(count)
    batch_size = min(batch_size, count)
    while True:
        if len(queue) < batch_size:
            queue = torch.randperm(count)
        rows, queue = queue[:batch_size], queue[batch_size:]
        yield rows
