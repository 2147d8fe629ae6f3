"""One training loop for every chapter, and the few things around it: seeds, device, accuracy, history.

    for each step:  loss = cross_entropy(model(inputs), labels);  one step of AdamW;  one step of the schedule

Source of the optimizer: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from helpers import expect
from helpers.data import Examples
from helpers.features import extract, take
from helpers.modes import kept_modes
from helpers.progress import progress_bar
from helpers.stopping import EarlyStopping


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
    lr: list[float] = field(default_factory=list)  # the highest of all groups
    accuracy: dict[int, float] = field(default_factory=dict)  # steps made -> accuracy on the validation examples
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
    groups: Iterable[dict] | None = None,
    before_step: Callable[[int, Optimizer, LRScheduler], None] | None = None,
    every: int | None = None,
    early_stopping: EarlyStopping | None = None,
) -> History:
    """Train the parameters of `model` that require gradients, in place.

    AdamW on random batches without replacement within an epoch; the learning rate rises over the first tenth of the
    steps and falls to zero along a cosine. Modules are in the modes of `train_mode`, so the statistics of a frozen
    BatchNorm do not move.

    Args:
        model: maps n inputs to (n, classes) logits. Moved to `device`; afterwards it is back on its own device
            and in the train and eval modes it came with.
        train: what to learn from.
        steps: updates to make, at least 1.
        lr: the highest learning rate; with `groups`, that of groups without their own.
        batch_size: examples per step; at most all of `train`.
        validation: measured after the last step, if given.
        device: None takes `best_device()`.
        seed: of the batches and of dropout; the global random states are left as `seed_everything` makes them.
        progress: show a progress bar.
        groups: of parameters, for the optimizer, as `helpers.finetune.parameter_groups` makes them; the schedule
            multiplies each group's own learning rate. None makes one of all that require gradients, with `lr` and
            `weight_decay`.
        before_step: called before every step with its number, from 0, the optimizer and the scheduler, such as
            `helpers.finetune.GradualUnfreezing`.
        every: measure `validation` after each so many steps too.
        early_stopping: of this model. It is told each accuracy measured and may end the run; the model is left in
            its best state.

    Raises:
        ValueError: nothing to train, no steps, no examples, or arguments that do not fit each other.
    """
    parameters = _check_trainable(model, train)
    expect.whole_number("steps", steps)
    expect.whole_number("batch_size", batch_size)
    expect.positive("lr", lr, advice="1e-3 is where to start with AdamW.")
    groups = [{"params": parameters}] if groups is None else _check_groups(model, groups)
    _check_measuring(model, validation, every, early_stopping)
    device = torch.device(device or best_device())
    history, started = History(), time.perf_counter()
    seed_everything(seed)
    with _moved_to(device, model):
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        scheduler = _warmup_and_cosine(optimizer, steps)
        train_mode(model)
        batches = _batches(len(train.labels), batch_size)
        bar = progress_bar(range(steps), "training", show=progress)
        for step in bar:
            if before_step is not None:
                before_step(step, optimizer, scheduler)
            rows = next(batches)
            loss = F.cross_entropy(model(take(train.inputs, rows, device)), train.labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.loss.append(loss.item())
            history.lr.append(max(scheduler.get_last_lr()))
            scheduler.step()
            bar.set_postfix(loss=f"{history.loss[-1]:.3f}", refresh=False)
            done = step + 1
            if validation is not None and (done == steps or (every is not None and done % every == 0)):
                history.accuracy[done] = evaluate(model, validation)
                if early_stopping is not None and early_stopping.step(history.accuracy[done]):
                    break
        if early_stopping is not None:
            early_stopping.restore()
    history.seconds = time.perf_counter() - started
    return history


def _check_trainable(model: nn.Module, train: Examples) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    parameters = [parameter for parameter in expect.module("model", model).parameters() if parameter.requires_grad]
    if not parameters:
        count = sum(1 for _ in model.parameters())
        raise ValueError(
            f"nothing to train: all {count} parameters are frozen. Unfreeze the head: model.fc.requires_grad_(True)."
        )
    if len(train.labels) == 0:
        raise ValueError("train must hold at least 1 example, got none. Look at how it was selected.")
    return parameters


@contextmanager
def _moved_to(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Inside the `with` the model is on the device; then it is where it was, and each module in the mode it was in."""
    home = next(parameter for parameter in model.parameters() if parameter.requires_grad).device
    with kept_modes(model):
        try:
            model.to(device)  # if memory runs out in the middle, the rest comes back too
            yield
        finally:
            model.to(home)


def _warmup_and_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A schedule that rises over the first tenth of the steps and falls to zero along a cosine."""
    warmup = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * max(0, step - warmup) / (steps - warmup + 1))),
    )


def train_mode(model: nn.Module) -> None:
    """Put `model` into train mode, in place, and what is frozen in it into eval mode: see `frozen_modules`.

    A part that is wholly frozen then computes what it computes in eval mode: its BatchNorm uses the stored statistics
    and keeps them, its dropout is off. So training a head on a frozen backbone is training it on `extract`ed features.
    """
    model.train()
    for module in frozen_modules(model):
        module.training = False


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of `model` that have nothing to train.

    A module with parameters of its own is frozen when all of these are. One without follows what it holds: it is
    frozen when all parameters inside are. One without any inside (dropout, BatchNorm with affine=False) follows the
    nearest module around it that has some, and a module used in two places is frozen when both say so.
    """
    training: set[nn.Module] = set()
    _collect_training(model, True, training)
    return set(model.modules()) - training


def _collect_training(module: nn.Module, training: bool, collected: set[nn.Module]) -> None:
    """Add the modules in `module` that are not frozen; `training` is what the nearest one around with parameters says."""
    own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    inside = [parameter.requires_grad for parameter in module.parameters()]
    training = any(inside) if inside else training
    if training and (any(own) or not own):
        collected.add(module)
    for child in module.children():
        _collect_training(child, training, collected)


def _check_groups(model: nn.Module, groups: Iterable[dict]) -> list[dict]:
    """Copies, because an optimizer writes into the groups that it is given."""
    groups = list(groups)
    for group in groups:
        if not isinstance(group, dict) or "params" not in group:
            raise ValueError(f'groups must be dicts with "params", got {expect.describe(group)}. See parameter_groups.')
    groups = [dict(group, params=_listed(group["params"])) for group in groups]
    known = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(parameter) not in known for group in groups for parameter in group["params"])
    if strangers or not groups:
        got = f"{strangers} that are not in it" if groups else "no group"
        raise ValueError(f"groups must hold parameters of the model, got {got}. Make them after its modules have changed.")
    return groups


def _listed(params: Tensor | Iterable) -> list[Tensor]:
    """Parameters as AdamW takes them: one, several, or pairs (name, parameter)."""
    params = [params] if isinstance(params, Tensor) else list(params)
    return [param[1] if isinstance(param, tuple) else param for param in params]


def _check_measuring(model: nn.Module, validation, every: int | None, early_stopping: EarlyStopping | None) -> None:
    if every is not None:
        expect.whole_number("every", every)
    if validation is None and (every is not None or early_stopping is not None):
        raise ValueError("every and early_stopping need something to measure, got no validation. Pass validation=examples.")
    if early_stopping is not None and every is None:
        raise ValueError("early_stopping must know when to measure, got no `every`. Pass every=20, say.")
    if early_stopping is not None and getattr(early_stopping, "model", model) is not model:
        raise ValueError(
            "early_stopping must belong to the model that trains, got that of another: EarlyStopping(model, patience)."
        )


def _batches(count: int, batch_size: int):
    """Endless batches of row numbers, a new random order for each pass; a short rest goes into the next pass.

    They are on the CPU, from where they index tensors of every device.
    """
    queue = torch.randperm(count, device="cpu")
    batch_size = min(batch_size, count)
    while True:
        if len(queue) < batch_size:
            queue = torch.randperm(count, device="cpu")
        rows, queue = queue[:batch_size], queue[batch_size:]
        yield rows
