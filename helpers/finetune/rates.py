"""At what learning rate each stage trains, and from when on.

    lr of the k-th stage from the end = lr / factor**k                  k = 0 for the head

Source: Howard & Ruder 2018 (ULMFiT), section 3.2 for discriminative learning rates, 3.3 for gradual unfreezing.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from helpers import expect
from helpers.finetune.parts import by_stage, freeze, unfreeze
from helpers.schedules import join, lr_now
from helpers.training import train_mode


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
    parts = by_stage(model, stages)
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
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = [parameter for parameter in parameters if id(parameter) not in optimized]
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
