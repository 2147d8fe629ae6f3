"""Exercise 8.2: a model as TorchScript, compiled where that is possible, recorded where it is not."""

import traceback
import warnings
from functools import partial, partialmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.export import parity
from grader.experiment import Exercise, Trial
from helpers.export import to_torchscript

exercise = Exercise(__name__, "8.2", to_torchscript, core=3)

FAR = 20.0  # numbers that nobody would make up


class _Rows(nn.Linear):
    """A Python loop over the rows."""

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        return torch.stack([F.linear(row, self.weight, self.bias) for row in x])


class _Options(nn.Linear):
    """Keyword arguments of any name, which script cannot compile: an error of its own, which is no RuntimeError."""

    def forward(self, x: Tensor, **options: object) -> Tensor:  # (n, width) -> (n, 3)
        return F.linear(x, self.weight, self.bias)


class _ReadyMade(nn.Linear):
    """Has no source of its own, so script raises an AttributeError."""

    forward = partialmethod(nn.Linear.forward)  # (n, width) -> (n, 3)


class _SumOfHeads(nn.Module):
    """A generator, which script cannot compile: a RuntimeError."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(nn.Linear(width, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        features = self.body(x)
        return sum(head(features) for head in self.heads)


class _OfItsExample(_Options):
    """Runs another way for numbers far from 0, silently, and takes rows apart: a trace knows which example it is of."""

    def forward(self, x: Tensor, **options: object) -> Tensor:  # (n, width) -> (n, 3)
        with warnings.catch_warnings(action="ignore"):
            far = bool(x.mean() > FAR / 2)
        return torch.stack([super(_OfItsExample, self).forward(row) for row in x.unbind()]) * (1 if far else -1)


class _ToNumpy(nn.Sequential):
    """Leaves PyTorch, which neither script nor trace can follow."""

    def forward(self, x: Tensor):  # (n, width) -> an array
        return super().forward(x).detach().numpy()


class _ToTorchScript(parity.Exporting):
    """What the experiments of this exercise share."""

    def export(self, subject, model: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
        kind, wanted = torch.jit.ScriptModule, "to_torchscript must return a torch.jit.ScriptModule"
        with parity.quiet():
            return parity.from_its_file(subject(model, example), kind, wanted, torch.jit.save, torch.jit.load)

    def expected(self, error: Exception) -> bool:
        """Whether torch.jit.script raised it, and not a trace."""
        files = {Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)}
        return ("jit", "_script.py") in files and ("jit", "_trace.py") not in files

    def draw_modes(self, trial: Trial, width: int) -> dict[str, nn.Module]:
        """Models that depend on the mode."""
        return {
            "a model that can be scripted": nn.Sequential(parity.body(trial, width), nn.Linear(width, 3)),
            "a model that can be traced": _SumOfHeads(parity.body(trial, width), width),
        }


@exercise.experiment("both branches", 2)
class BothBranches(_ToTorchScript):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs, side = super().draw(trial), (-1.0, 1.0)[trial.integer(0, 1)]
        example, batches = side * inputs["example"].abs(), [side * x.abs() for x in inputs["batches"]]
        return inputs | {"example": example, "batches": batches, "opposite": [-x for x in batches]}

    def draw_models(self, trial, width):
        return {"model": parity.Branch(nn.Linear(width, 3)).eval()}

    def measure(self, subject, inputs):
        exported = self.export(subject, inputs["model"], inputs["example"])
        return {side: parity.outputs(exported, inputs[side]) for side in ("batches", "opposite")}

    def facts(self, raw, inputs):
        same, other = (parity.whose(raw[side], inputs["model"], inputs[side]) for side in ("batches", "opposite"))
        return {"outputs on the example's side of the branch": same, "outputs on the other side of the branch": other}


@exercise.experiment("any batch size", 2)
class AnyBatchSize(_ToTorchScript):
    def draw_models(self, trial, width):
        return {"model": _Rows(width, 3).eval()}

    def measure(self, subject, inputs):
        return {"outputs": parity.outputs(self.export(subject, inputs["model"], inputs["example"]), inputs["batches"])}

    def facts(self, raw, inputs):
        each = zip(raw["outputs"], inputs["batches"], strict=True)
        right = [len(x) for output, x in each if parity.whose([output], inputs["model"], [x]) == parity.MODEL]
        return {"batch sizes at which outputs are the model's, of 1, 4 and 8": right}


@exercise.experiment("what script cannot compile", 3)
class WhatScriptCannotCompile(_ToTorchScript, parity.EachModel):
    def draw_models(self, trial, width):
        generator, options, ready_made = _SumOfHeads(nn.ReLU(), width), _Options(width, 3), _ReadyMade(width, 3)
        models = {"a generator": generator, "**options": options, "a forward made by functools": ready_made}
        return {"models": {f"a model with {name}": model.eval() for name, model in models.items()}}

    def facts(self, raw, inputs):
        return {
            name: parity.ERROR if raw[name]["error"] else f"outputs are {self.whose(name, raw, inputs) or 'errors'}"
            for name in raw
        }


@exercise.experiment("traced with the example", 3)
class TracedWithTheExample(_ToTorchScript, parity.EachModel):
    points = 1

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"example": inputs["example"] + FAR, "batches": []}

    def draw_models(self, trial, width):
        return {"models": {"a model": _OfItsExample(width, 3).eval()}}

    def facts(self, raw, inputs):
        right = self.whose("a model", raw, inputs) == parity.MODEL
        return {
            "outputs for the example": None if raw["a model"]["error"] else parity.MODEL if right else "different, or an error"
        }


@exercise.experiment("eval mode", 1)
class EvalMode(_ToTorchScript, parity.EvalMode):
    def draw_models(self, trial, width):
        return {"models": self.draw_modes(trial, width)}


@exercise.experiment("refusal", 4)
class Refusal(_ToTorchScript, parity.Refusal):
    refused = "a model that can be neither"

    def draw_models(self, trial, width):
        return {"refused": _ToNumpy(nn.Linear(width, 3)).eval()}


@exercise.experiment("modes as before", 5)
class ModesAsBefore(_ToTorchScript, parity.ModesAsBefore):
    refused = "a model that can be neither"

    def draw_models(self, trial, width):
        return {"models": self.draw_modes(trial, width), "refused": _ToNumpy(parity.body(trial, width))}


def script_or_trace(model: nn.Module, example: Tensor, caught: type[Exception] = Exception) -> torch.jit.ScriptModule:
    try:
        return torch.jit.script(model)
    except caught:
        return torch.jit.trace(model, example)


exercise.misconceptions_of(
    partial(parity.in_eval_mode, export=script_or_trace),
    {
        "always traced": {"export": torch.jit.trace},
        "always scripted": {"export": lambda model, example: torch.jit.script(model)},
        "one kind of error expected": {"caught": RuntimeError},
        "another input traced": {"export": lambda model, example: script_or_trace(model, torch.rand_like(example))},
        **parity.MODES,
    },
)


@exercise.misconception("traced in train mode")
def traced_in_train_mode(model, example):
    return script_or_trace(model, example).eval()
