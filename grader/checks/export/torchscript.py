"""Exercise 8.2: a model as TorchScript, compiled where that is possible, recorded where it is not."""

import io

import torch
from torch import Tensor, nn

from grader.checks.export import parity
from grader.experiment import Exercise, Trial, wrong_return
from helpers.export import to_torchscript

exercise = Exercise(__name__, "8.2", to_torchscript)

ERROR, NO_ERROR = "an error", "no error"


class _Branch(nn.Module):
    """One layer or the other, depending on the numbers that come in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.above, self.below = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        if bool(x.mean() > 0):
            return self.above(x)
        return self.below(x)


class _Rows(nn.Module):
    """A Python loop over the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        return torch.stack([self.layer(row) for row in x])


class _SumOfHeads(nn.Module):
    """A generator, which script cannot compile: a RuntimeError."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(nn.Linear(width, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        features = self.body(x)
        return sum(head(features) for head in self.heads)


class _Options(nn.Module):
    """Keyword arguments of any name, which script cannot compile: an error of its own, which is no RuntimeError."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 3)

    def forward(self, x: Tensor, **options: object) -> Tensor:  # (n, width) -> (n, 3)
        return self.layer(x)


class _ToNumpy(nn.Module):
    """Leaves PyTorch, which neither script nor trace can follow."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor):  # (n, width) -> an array
        return self.body(x).detach().numpy()


def _body(trial: Trial, width: int) -> list[nn.Module]:
    """Layers that depend on the mode."""
    return [parity.norm(trial, width), nn.Dropout(0.5)]


def _scriptable(trial: Trial, width: int) -> nn.Sequential:
    return nn.Sequential(*_body(trial, width), nn.Linear(width, 3))


def _traceable(trial: Trial, width: int) -> _SumOfHeads:
    return _SumOfHeads(nn.Sequential(*_body(trial, width)), width)


@exercise.experiment("both branches")
class BothBranches(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width, side = trial.integer(3, 5), (-1.0, 1.0)[trial.integer(0, 1)]
        return {
            "model": _Branch(width).eval(),
            "example": side * trial.normal(parity.rows(trial), width).abs(),
            "batches": [side * x.abs() for x in parity.batches(trial, width)],
        }

    def measure(self, subject, inputs):
        loaded = _loaded(_script_module(subject, inputs["model"], inputs["example"]))
        other = [-x for x in inputs["batches"]]
        return {"same": parity.outputs(loaded, inputs["batches"]), "other": parity.outputs(loaded, other)}

    def facts(self, raw, inputs):
        model, batches = inputs["model"], inputs["batches"]
        return {
            "outputs on the example's side of the branch": parity.whose(raw["same"], model, batches),
            "outputs on the other side of the branch": parity.whose(raw["other"], model, [-x for x in batches]),
        }


@exercise.experiment("any batch size")
class AnyBatchSize(parity.Exporting):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        return {
            "model": _Rows(width).eval(),
            "example": trial.normal(parity.rows(trial), width),
            "batches": parity.batches(trial, width),
        }

    def measure(self, subject, inputs):
        exported = _script_module(subject, inputs["model"], inputs["example"])
        return {"outputs": parity.outputs(exported, inputs["batches"])}

    def facts(self, raw, inputs):
        each = zip(raw["outputs"], inputs["batches"], strict=True)
        right = [len(x) for output, x in each if parity.whose([output], inputs["model"], [x]) == parity.MODEL]
        return {"batch sizes at which outputs are the model's, of 1, 4 and 8": right}


@exercise.experiment("what script cannot compile")
class WhatScriptCannotCompile(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        return {
            "a generator": _SumOfHeads(nn.ReLU(), width).eval(),
            "**options": _Options(width).eval(),
            "example": trial.normal(parity.rows(trial), width),
            "batches": parity.batches(trial, width),
        }

    def measure(self, subject, inputs):
        raw = {}
        for what in ("a generator", "**options"):
            with parity.quiet():
                exported, error = parity.attempt(subject, inputs[what], inputs["example"], expected=parity.raised_by_script)
            got = None if error else parity.outputs(_loaded(_checked(exported)), inputs["batches"])
            raw[what] = {"outputs": got, "error": error}
        return raw

    def facts(self, raw, inputs):
        return {f"a model with {what}": self._fact(raw[what], inputs[what], inputs["batches"]) for what in raw}

    def _fact(self, raw: dict, model: nn.Module, batches: list[Tensor]) -> str:
        return ERROR if raw["error"] else f"outputs are {parity.whose(raw['outputs'], model, batches) or 'errors'}"

    def notes(self, raw, inputs):
        return {f"a model with {what}": raw[what]["error"] for what in raw if raw[what]["error"]}


@exercise.experiment("eval mode")
class EvalMode(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        return {
            "scripted": _scriptable(trial, width),
            "traced": _traceable(trial, width),
            "example": trial.normal(parity.rows(trial), width),
            "batches": parity.batches(trial, width),
        }

    def measure(self, subject, inputs):
        return {how: _outputs_and_modes(subject, inputs, how)[0] for how in ("scripted", "traced")}

    def facts(self, raw, inputs):
        return {
            f"outputs of a model that can be {how}": got and parity.whose(got, inputs[how], inputs["batches"])
            for how, got in raw.items()
        }


@exercise.experiment("modes as before")
class ModesAsBefore(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        models = {
            "scripted": _scriptable(trial, width),
            "traced": _traceable(trial, width),
            "neither": _ToNumpy(nn.Sequential(*_body(trial, width))),
        }
        for model in models.values():
            next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d)).eval()  # as one that is frozen
        return models | {"example": trial.normal(parity.rows(trial), width), "batches": parity.batches(trial, width)}

    def measure(self, subject, inputs):
        raw = {}
        for how in ("scripted", "traced"):
            got, modes = _outputs_and_modes(subject, inputs, how)
            raw[how] = {"outputs": got, "modes": modes}
        with parity.silent():
            _, error = parity.attempt(subject, inputs["neither"], inputs["example"])
        return raw | {"neither": {"error": error, "modes": parity.modes(inputs["neither"])}}

    def facts(self, raw, inputs):
        facts = {}
        for how in ("scripted", "traced"):
            got = raw[how]["outputs"]
            there = got is not None and parity.whose(got, inputs[how], inputs["batches"]) == parity.MODEL
            # One that never switched to eval mode has earned nothing by switching nothing back.
            facts[f"modes after a model was {how}"] = parity.modes_now(inputs[how], raw[how]["modes"]) if there else None
        failed = raw["neither"]["error"] != ""
        after = parity.modes_now(inputs["neither"], raw["neither"]["modes"])
        return facts | {
            "a model that can be neither": ERROR if failed else NO_ERROR,
            "modes after that": after if failed else None,
        }


def _script_module(subject, model: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    with parity.quiet():
        return _checked(subject(model, example))


def _checked(exported: object) -> torch.jit.ScriptModule:
    if not isinstance(exported, torch.jit.ScriptModule):
        raise wrong_return("to_torchscript must return a torch.jit.ScriptModule", exported)
    return exported


def _loaded(exported: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    with parity.quiet():
        torch.jit.save(exported, file)
        file.seek(0)
        return torch.jit.load(file)


def _outputs_and_modes(subject, inputs: dict, how: str) -> tuple[parity.Outputs | None, dict[str, bool]]:
    """Outputs, None if a model that has to be traced was refused; and the model's modes afterwards."""
    model = inputs[how]
    with parity.quiet():
        if how == "traced":
            exported, error = parity.attempt(subject, model, inputs["example"], expected=parity.raised_by_script)
        else:
            exported, error = subject(model, inputs["example"]), ""
    modes = parity.modes(model)
    return None if error else parity.outputs(_checked(exported), inputs["batches"]), modes


def _script_or_trace(model: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    try:
        return torch.jit.script(model)
    except Exception:
        return torch.jit.trace(model, example)


@exercise.misconception("always traced")
def always_traced(model, example):
    with parity.evaluating(model):
        return torch.jit.trace(model, example)


@exercise.misconception("always scripted")
def always_scripted(model, example):
    with parity.evaluating(model):
        return torch.jit.script(model)


@exercise.misconception("one kind of error expected")
def one_kind_of_error_expected(model, example):
    with parity.evaluating(model):
        try:
            return torch.jit.script(model)
        except RuntimeError:
            return torch.jit.trace(model, example)


@exercise.misconception("train mode exported")
def train_mode_exported(model, example):
    return _script_or_trace(model, example)


@exercise.misconception("traced in train mode")
def traced_in_train_mode(model, example):
    exported = _script_or_trace(model, example)
    exported.eval()
    return exported


@exercise.misconception("left in eval mode")
def left_in_eval_mode(model, example):
    return _script_or_trace(model.eval(), example)


@exercise.misconception("one mode for all modules")
def one_mode_for_all_modules(model, example):
    training = model.training
    try:
        return _script_or_trace(model.eval(), example)
    finally:
        model.train(training)


@exercise.misconception("not restored after an error")
def not_restored_after_an_error(model, example):
    modes = {module: module.training for module in model.modules()}
    exported = _script_or_trace(model.eval(), example)
    for module, training in modes.items():
        module.training = training
    return exported
