"""Which parameters train: frozen and unfrozen by the names of parts, or by stages from the end; and what that takes."""

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers import backbones, expect
from helpers.training import frozen_modules


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
    changed = [(name, parameter) for name, parameter in chosen(model, parts) if parameter.requires_grad]
    for _, parameter in changed:
        parameter.requires_grad_(False).grad = None
    return [name for name, _ in changed]


def unfreeze(model: nn.Module, parts: nn.Module | str | Iterable[nn.Module | str] | None = None) -> list[str]:
    """Set `requires_grad` to True for every parameter in `parts`, in place; the reverse of `freeze`.

    An optimizer trains what it was given: parameters that it lacks join it with `unfreeze_into`.

    Returns:
        The names of the parameters that were frozen before.
    """
    changed = [(name, parameter) for name, parameter in chosen(model, parts) if not parameter.requires_grad]
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
    names = [name for name, _ in chosen(model, parts)]
    freeze(model, [name for name, _ in model.named_parameters() if name not in names])  # the gradients of `parts` stay
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
    parts = list(by_stage(model, stages).values())
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
    for name, parameters in by_stage(model, stages).items():
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


def chosen(model: nn.Module, parts) -> list[tuple[str, nn.Parameter]]:
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
            members = [parameters[part]] if part in parameters else list(modules[part].parameters()) if part in modules else []
            if not members:
                names = [*(name for name, module in modules.items() if any(True for _ in module.parameters())), *parameters]
                raise ValueError(
                    f"not a part of {type(model).__name__} with parameters: {part!r}. Choose from {_close(part, names)}."
                )
            ids.update(map(id, members))
        else:
            raise TypeError(f"parts must be modules of the model or names, got {expect.describe(part)}.")
    return [(name, parameter) for name, parameter in everything if id(parameter) in ids]


def by_stage(model: nn.Module, stages: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
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


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]
