"""Fine-tuning: which parameters train, each stage at what learning rate, from when on, and until when.

    lr of the k-th stage from the end = lr / factor**k                  k = 0 for the head

A parameter is frozen when `requires_grad` is False; whether the buffers of a frozen part move is a matter of modes, see
`helpers.training.train_mode`. `model.fc.requires_grad = True` does neither: it sets an attribute on a module, and no
parameter notices.

Stages are names of modules from stem to head. A stage goes on until the next begins, in the order of
`model.named_parameters()`; what comes before the first belongs to the first. A parameter that is used in two places
is one parameter, at the first of its places.

Sources: Howard & Ruder 2018, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), section 3.2 for
discriminative learning rates and 3.3 for gradual unfreezing; Kumar et al. 2022, "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", for LP-FT; Smith 2017, "Cyclical Learning Rates for Training Neural
Networks", section 3.3, for the range test.
"""

import copy
import difflib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from helpers import backbones, expect
from helpers.data import Examples
from helpers.features import drop_head, extract, linear_probe
from helpers.schedules import join, lr_now
from helpers.training import History, fit, frozen_modules, train_mode

# --- what trains --------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, parts: nn.Module | str | Iterable[nn.Module | str] | None = None) -> list[str]:
    """Set `requires_grad` to False and drop the gradient of every parameter in `parts`, in place.

    The gradient goes because an optimizer that holds the parameter would go on moving it by what is left there.
    Buffers and modes are not touched.

    Args:
        model: any model.
        parts: a module of the model, a name of a module or parameter ("fc", "layer4", "fc.bias"), or several of those;
            None takes the whole model.

    Returns:
        The names of the parameters that were trainable before, so that `unfreeze(model, freeze(model, parts))`
        leaves every flag as it was.

    Raises:
        ValueError: a part is not in the model, or a name holds no parameter; nothing has changed then.
    """
    changed = [(name, parameter) for name, parameter in _chosen(model, parts) if parameter.requires_grad]
    for _, parameter in changed:
        parameter.requires_grad_(False).grad = None
    return [name for name, _ in changed]


def unfreeze(model: nn.Module, parts: nn.Module | str | Iterable[nn.Module | str] | None = None) -> list[str]:
    """Set `requires_grad` to True for every parameter in `parts`, in place; the reverse of `freeze`.

    An optimizer trains what it was given: parameters that it lacks join it with `unfreeze_into`.

    Returns:
        The names of the parameters that were frozen before.
    """
    changed = [(name, parameter) for name, parameter in _chosen(model, parts) if not parameter.requires_grad]
    for _, parameter in changed:
        parameter.requires_grad_(True)
    return [name for name, _ in changed]


def train_only(model: nn.Module, parts: nn.Module | str | Iterable[nn.Module | str]) -> list[str]:
    """Make exactly the parameters in `parts` trainable and freeze all others, in place.

    Args:
        model: any model.
        parts: as for `freeze`. A parameter that is shared by a part and the rest of the model trains.

    Returns:
        The names of the parameters that are trainable now: worth an assertion.
    """
    names = [name for name, _ in _chosen(model, parts)]
    freeze(model)
    unfreeze(model, names)
    return names


def train_last(model: nn.Module, count: int, stages: Sequence[str] | None = None) -> list[str]:
    """Make the last `count` stages trainable and freeze all others, in place. The head is a stage.

    A list of the stages' names would do less: a norm between two of them, such as `bn1` after `conv1` in a ResNet, is
    in neither module, and `train_only` would leave it frozen.

    Args:
        model: any model.
        count: from 0, which freezes everything, to the number of stages, which freezes nothing.
        stages: from stem to head; None takes `helpers.backbones.stages(model)`.

    Returns:
        The names of the parameters that are trainable now.
    """
    parts = list(_by_stage(model, stages).values())
    expect.whole_number("count", count, least=0, most=len(parts), advice="That is how many stages there are.")
    chosen = {id(parameter) for part in parts[len(parts) - count :] for parameter in part}
    freeze(model)
    return unfreeze(model, [name for name, parameter in model.named_parameters() if id(parameter) in chosen])


class Report(NamedTuple):
    """How much of a model trains, and what that takes. `str(report)` is a table."""

    stages: dict[str, tuple[int, int]]  # name -> (trainable, all)
    gradient_bytes: int
    adamw_bytes: int
    moving: list[str]  # frozen BatchNorms in train mode

    @property
    def trainable(self) -> int:
        return sum(trainable for trainable, _ in self.stages.values())

    @property
    def all(self) -> int:
        return sum(count for _, count in self.stages.values())

    def __str__(self) -> str:
        rows = [(name, f"{trainable:,}", f"{count:,}") for name, (trainable, count) in self.stages.items()]
        rows = [("stage", "trainable", "all"), *rows, ("total", f"{self.trainable:,}", f"{self.all:,}")]
        rows = [(_shortened(name, 50), *numbers) for name, *numbers in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
        lines.append(f"{self.gradient_bytes:,} bytes of gradients, {self.adamw_bytes:,} bytes of AdamW state")
        if self.moving:
            more = f" and {len(self.moving) - 1} more" if len(self.moving) > 1 else ""
            lines.append(f"statistics will move: {_shortened(self.moving[0], 28)}{more}, frozen but in train mode")
        return "\n".join(lines)


def report(model: nn.Module, stages: Sequence[str] | None = None) -> Report:
    """Trainable and all parameters by stage, the bytes that training them takes, and BatchNorms that only look frozen.

    Gradients take as much as the trainable parameters. AdamW keeps two numbers for each of them, in its dtype, and a
    step count for each tensor. Activations, which often take more, depend on the batch and are not counted.

    Args:
        model: any model; not changed.
        stages: None takes `helpers.backbones.stages(model)`.
    """
    counts, gradients, adamw = {}, 0, 0
    for name, parameters in _by_stage(model, stages).items():
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        counts[name] = sum(p.numel() for p in trainable), sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in trainable)
        gradients += size
        adamw += 2 * size + len(trainable) * (8 if torch.get_default_dtype() == torch.float64 else 4)
    frozen = frozen_modules(model)
    moving = [
        name or "model"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module in frozen and module.training and module.track_running_stats and module.running_mean is not None)
    ]
    return Report(counts, gradients, adamw, moving)


# --- learning rates -----------------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module,
    lr: float | tuple[float, float],
    factor: float = 2.6,
    weight_decay: float = 0.01,
    stages: Sequence[str] | None = None,
) -> list[dict]:
    """Groups for an optimizer: the nearer to the stem, the lower the learning rate.

        lr of the k-th stage from the end = lr / factor**k                  k = 0 for the last

    A "layer decay" of d is factor = 1 / d. Biases, norms and whatever else has at most one dimension get no weight decay.

    Args:
        model: any model; not changed.
        lr: of the last stage. Or a pair (lowest, highest): the first stage gets the one, the last the other, those
            between a geometric sequence; this implies the factor, and `factor` is not used.
        factor: how many times lower each stage is than the next; 2.6 in ULMFiT.
        weight_decay: of the parameters with two dimensions or more.
        stages: from stem to head; None takes `helpers.backbones.stages(model)`. A stage counts as one even when all of it
            is frozen.

    Returns:
        From stem to head, one or two dicts for each stage that has trainable parameters: "params", "lr",
        "weight_decay" and "name", the stage's. Every trainable parameter is in exactly one; there is none of the frozen.
        The learning rates are real ones: each scheduler of `torch.optim.lr_scheduler` that starts from the groups'
        own keeps their ratios. `OneCycleLR` does not look at them: give it max_lr=[group["lr"] for group in groups].

    Raises:
        ValueError: a stage is not in the model, or a number is out of range.
    """
    parts = _by_stage(model, stages)
    rates = _rates(lr, factor, len(parts))
    _not_negative("weight_decay", weight_decay)
    groups = []
    for (name, parameters), rate in zip(parts.items(), rates, strict=True):
        by_decay: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_decay.setdefault(float(weight_decay) if parameter.ndim > 1 else 0.0, []).append(parameter)
        groups += [{"params": params, "lr": rate, "weight_decay": decay, "name": name} for decay, params in by_decay.items()]
    return groups


def unfreeze_into(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    lr: float,
    *,
    weight_decay: float | None = None,
    scheduler: LRScheduler | None = None,
) -> list[nn.Parameter]:
    """Make `parameters` trainable and let those that `optimizer` lacks join it as one new group, in place.

    Everything else in the optimizer stays, its state included. `optimizer.add_param_group` alone does not tell a
    scheduler, which then fails at its next step or leaves the new group out. With `scheduler`, the new group's learning
    rate is from here on what it would be if the group had been there from the start, with `lr` as its initial one.
    Modes are not touched: `train_mode(model)` lets the statistics of a BatchNorm that trains now move.

    Args:
        optimizer: any but LBFGS, which has one group only.
        parameters: `model.layer4.parameters()`, for example. Compared by identity: two of equal values are two.
        lr: the learning rate of the new group, before the schedule. `ReduceLROnPlateau` does not know where it
            started; with it, `lr` is the learning rate now.
        weight_decay: of the new group; None takes the optimizer's default.
        scheduler: the optimizer's, if it has one: LambdaLR, MultiplicativeLR, StepLR, MultiStepLR, ExponentialLR,
            LinearLR, ConstantLR, PolynomialLR, CosineAnnealingLR, CosineAnnealingWarmRestarts, SequentialLR,
            ChainedScheduler or ReduceLROnPlateau.

    Returns:
        The parameters that joined, in the order given; none if the optimizer had them all, and then no group is added.

    Raises:
        TypeError: something in `parameters` is not an nn.Parameter.
        ValueError: a scheduler that a group cannot join, or a number out of range. Nothing has changed then.
    """
    parameters = _distinct(parameters)
    expect.positive("lr", lr)
    if weight_decay is not None:
        _not_negative("weight_decay", weight_decay)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in parameters if id(parameter) not in held]
    if new:
        now = lr if scheduler is None else lr_now(scheduler, optimizer, lr)
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        optimizer.add_param_group({"params": new, "lr": now, **decay})
        if scheduler is not None:
            join(scheduler, optimizer, lr)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return new


class GradualUnfreezing:
    """Train the head first, then one stage more at equal intervals, until all of the model trains.

        schedule = GradualUnfreezing(model, lr=1e-3, steps=300)
        fit(model, train, steps=300, lr=1e-3, groups=schedule.groups, before_step=schedule)

    With n stages, the k-th from the end, the head being the 0-th, joins before step k * steps // n, with the learning
    rate that `parameter_groups` gives it, and follows the scheduler as if it had been there from the start. Until then
    its BatchNorm stays in eval mode. Making a schedule freezes all stages but the last, in place.

    Args:
        model: ends with all its parameters trainable, whatever was frozen before.
        lr, factor, weight_decay, stages: as for `parameter_groups`.
        steps: of the whole run, at least one for each stage.

    Raises:
        ValueError: as `parameter_groups`, or fewer steps than stages.

    Source: Howard & Ruder 2018, section 3.3, where an interval is an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | tuple[float, float],
        steps: int,
        factor: float = 2.6,
        weight_decay: float = 0.01,
        stages: Sequence[str] | None = None,
    ) -> None:
        frozen = unfreeze(model)
        try:
            groups = parameter_groups(model, lr, factor, weight_decay, stages)
            names = list(dict.fromkeys(group["name"] for group in reversed(groups)))  # from head to stem
            advice = f"There are {len(names)} stages, each needs one."
            expect.whole_number("steps", steps, least=max(1, len(names)), advice=advice)
        except Exception:
            freeze(model, frozen)
            raise
        self.model = model
        self.starts = {name: k * steps // len(names) for k, name in enumerate(names)}  # stage -> the step it joins before
        self._groups = groups
        self._only_the_head()

    @property
    def groups(self) -> list[dict]:
        """What the optimizer starts with: the groups of the last stage."""
        return [dict(group) for group in self._groups if self.starts[group["name"]] == 0]

    def __call__(self, step: int, optimizer: Optimizer, scheduler: LRScheduler | None = None) -> None:
        """Before step `step`, from 0: let the stage whose turn it is join `optimizer`."""
        if step == 0:
            self._only_the_head()  # a second run starts like the first
        due = [group for group in self._groups if self.starts[group["name"]] == step]
        for group in due:
            if unfreeze_into(optimizer, group["params"], group["lr"], weight_decay=group["weight_decay"], scheduler=scheduler):
                optimizer.param_groups[-1]["name"] = group["name"]
        if due:
            train_mode(self.model)

    def _only_the_head(self) -> None:
        freeze(self.model)
        for group in self.groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)


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

    All of it happens on copies of the model and of the optimizer, its state included; both of yours, and the global
    random states, are afterwards bit-identical to before. Training is as `fit` does it: cross-entropy, `train_mode`.
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
        model, optimizer = copy.deepcopy((model, optimizer))  # together, so that the one still holds the other's parameters
        train_mode(model)
        top = expect.positive("the optimizer's lr", max(float(group["lr"]) for group in optimizer.param_groups))
        shares = [float(group["lr"]) / top for group in optimizer.param_groups]
        device = next(model.parameters()).device
        found = LearningRates([], [])
        for lr, (inputs, labels) in zip(np.geomspace(lowest, highest, len(batches)).tolist(), batches, strict=True):
            logits = model(inputs.to(device) if isinstance(inputs, Tensor) else inputs)
            loss = F.cross_entropy(logits, labels.to(device))
            if not loss.isfinite():
                break
            found.lrs.append(lr)
            found.losses.append(loss.item())
            if loss.item() > 4 * min(found.losses):
                break
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = lr * share
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found


# --- the head first -----------------------------------------------------------------------------------------------


def probe_head(model: nn.Module, head: str, inputs: Tensor | Sequence, labels: Tensor, penalty: float = 1e-3) -> None:
    """Give the head the weights of a linear probe on the features before it, in place.

    The head stays the same nn.Linear with the same Parameter objects, so an optimizer that holds them still does.
    Nothing else of the model changes: other weights, buffers, flags and modes.

    Args:
        model: any model whose last step is the nn.Linear called `head`.
        head: its name, "fc".
        inputs, labels: (n, ...) or a list of n, and (n,), as for `extract` and `linear_probe`.
        penalty: as for `linear_probe`.

    Raises:
        ValueError: `head` is not an nn.Linear of the model, not its last step, has no bias or a shared weight; or as
            `linear_probe`.
    """
    backbone = drop_head(model, head)
    layer = model.get_submodule(head)
    if layer.bias is None:
        raise ValueError(f"{head} must have a bias, as a linear probe does, got one without. Replace it: nn.Linear(...).")
    for name, module in model.named_modules():
        if module is not layer and any(p is layer.weight or p is layer.bias for p in module.parameters(recurse=False)):
            raise ValueError(f"{head} must share no parameters, got some that {name} has. Replace it: nn.Linear(...).")
    features = extract(backbone, inputs)
    if features.shape[1:] != (layer.in_features,):
        raise ValueError(
            f"{head} must be the last step of {type(model).__name__}, "
            f"got features of {features[0].numel()} numbers instead of {layer.in_features}."
        )
    probe = linear_probe(features, labels.to(features.device), layer.out_features, penalty)
    with torch.no_grad():
        layer.weight.copy_(probe.weight)
        layer.bias.copy_(probe.bias)


def lp_ft(model: nn.Module, head: str, train: Examples, *, steps: int, lr: float, penalty: float = 1e-3, **settings) -> History:
    """Linear probe, then fine-tune: the head becomes the probe on `train`, then all parameters train, in place.

    A random head sends large gradients into the backbone and changes its features before it fits; a probe does not.

    Args:
        model, head, penalty: as for `probe_head`.
        train: what both steps learn from.
        steps, lr, settings: as for `fit`.

    Source: Kumar et al. 2022.
    """
    probe_head(model, head, train.inputs, train.labels, penalty)
    unfreeze(model)
    return fit(model, train, steps=steps, lr=lr, **settings)


# --- until when ---------------------------------------------------------------------------------------------------


class EarlyStopping:
    """Keep the best state of `model` so far, and say when to stop waiting for a better one.

        stopping = EarlyStopping(model, patience=3)
        fit(model, train, ..., validation=validation, every=20, early_stopping=stopping)

    A state is a copy of all parameters and buffers. `best = model.state_dict()` is none: its tensors are the
    model's own and train on.

    Args:
        model: any model.
        patience: stop when that many scores in a row were not better than the best before them.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model = expect.module("model", model)
        self.patience = expect.whole_number("patience", patience)
        self.best: float | None = None
        self.waited = 0
        self._state: dict[str, Tensor] = {}

    def step(self, score: float) -> bool:
        """Take note of a score, higher is better; True means stop. NaN is never an improvement."""
        if not math.isnan(score) and (self.best is None or score > self.best):
            self.best, self.waited = float(score), 0
            self._state = {name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self) -> None:
        """Put the best state back into the model, in place: the same Parameter objects get their old values.

        Raises:
            ValueError: there was no score yet, or parameters or buffers of the model were added, removed or reshaped since.
        """
        if self.best is None:
            raise ValueError("no state to restore: step(score) must come first, with a number.")
        tensors = _tensors(self.model)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        kept = {name: tensor.shape for name, tensor in self._state.items()}
        if shapes != kept:
            changed = sorted(name for name in shapes.keys() | kept.keys() if shapes.get(name) != kept.get(name))
            raise ValueError(f"the model must be as it was at step(score), but these differ: {changed[:3]}.")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self._state[name])


# --- inside -------------------------------------------------------------------------------------------------------


def _chosen(model: nn.Module, parts) -> list[tuple[str, nn.Parameter]]:
    """The parameters in `parts`, by name, each once, in the model's order."""
    everything = list(expect.module("model", model).named_parameters())
    if parts is None:
        return everything
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter has several names
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    ids = set()
    for part in parts if isinstance(parts, Iterable) and not isinstance(parts, str | nn.Module | Tensor) else [parts]:
        if isinstance(part, nn.Module):
            if not any(part is module for module in model.modules()):
                raise ValueError(f"not a part of this {type(model).__name__}: a {type(part).__name__}. Pass its name instead.")
            ids.update(id(parameter) for parameter in part.parameters())
        elif isinstance(part, str):
            found = [parameters[part]] if part in parameters else list(modules[part].parameters()) if part in modules else []
            if not found:
                names = [*(name for name, module in modules.items() if any(True for _ in module.parameters())), *parameters]
                raise ValueError(
                    f"not a part of {type(model).__name__} with parameters: {part!r}. Choose from {_close(part, names)}."
                )
            ids.update(map(id, found))
        else:
            raise TypeError(f"parts must be modules of the model or names, got {expect.describe(part)}.")
    return [(name, parameter) for name, parameter in everything if id(parameter) in ids]


def _by_stage(model: nn.Module, stages: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
    """All parameters of the model by stage, in the order of the stages; a network of one piece is one stage, "model"."""
    modules = dict(expect.module("model", model).named_modules(remove_duplicate=False))
    if stages is None:
        stages = backbones.stages(model)
    stages = (stages,) if isinstance(stages, str) else tuple(stages)
    for number, stage in enumerate(stages):
        if not stage or stage not in modules:
            raise ValueError(f"not a module of {type(model).__name__}: {stage!r}. Choose from {_close(stage, modules)}.")
        if stage in stages[:number]:
            raise ValueError(f"stages must name each module once, got {stage!r} twice.")
    parts: dict[str, list[nn.Parameter]] = {stage: [] for stage in stages or ("model",)}
    waiting, current = list(stages), next(iter(parts))
    for name, parameter in model.named_parameters():
        begun = [stage for stage in waiting if name.startswith(f"{stage}.")]
        if begun:
            current = begun[-1]
            waiting = [stage for stage in waiting if stage not in begun]
        parts[current].append(parameter)
    return parts


def _close(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are spelt like `name`; if none is, those of the topmost modules."""
    names = [name for name in dict.fromkeys(names) if name]
    return difflib.get_close_matches(str(name), names, n=5) or [name for name in names if "." not in name]


def _rates(lr, factor: float, count: int) -> list[float]:
    """Learning rates of `count` stages, from stem to head."""
    if not isinstance(lr, tuple | list):
        lr, factor = expect.positive("lr", lr), expect.positive("factor", factor, advice="2.6 in ULMFiT; 1 for one lr.")
        return [lr / factor**k for k in reversed(range(count))]
    if len(lr) != 2:
        raise ValueError(f"lr must be a number or a pair (lowest, highest), got {len(lr)} numbers.")
    lowest, highest = (expect.positive("lr", value) for value in lr)
    if lowest > highest:
        raise ValueError(f"lr must be a pair (lowest, highest), got {lowest} before {highest}. Swap them.")
    shares = [k / max(1, count - 1) for k in reversed(range(count))]
    return [highest ** (1 - share) * lowest**share for share in shares]


def _not_negative(name: str, value: float) -> None:
    if value != 0:
        expect.positive(name, value, advice="0 means none.")


def _distinct(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    parameters = [parameters] if isinstance(parameters, Tensor | nn.Module) else list(parameters)
    for parameter in parameters:
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(
                f"parameters must be nn.Parameters, got {expect.describe(parameter)}. Pass model.parameters(), for example."
            )
    return list({id(parameter): parameter for parameter in parameters}.values())


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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that a state dict leaves out included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]
