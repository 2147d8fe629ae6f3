"""Exercise 8.3: a model as a graph that torch.export has taken, for any batch size."""

import io

import torch
from torch import Tensor, nn
from torch.export import Dim

from grader.checks.export import parity
from grader.experiment import Exercise, Trial, wrong_return
from helpers.export import to_program

exercise = Exercise(__name__, "8.3", to_program)

ERROR, NO_ERROR = "an error", "no error"
LARGE = 1500  # rows, more than anyone would think of as a limit


class _Branch(nn.Module):
    """Goes one way or the other, depending on the numbers that come in: torch.export refuses it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> the same
        if bool(x.mean() > 0):
            return self.body(x)
        return -self.body(x)


def _body(trial: Trial, width: int) -> list[nn.Module]:
    """Layers that depend on the mode."""
    return [parity.norm(trial, width), nn.Dropout(0.5)]


@exercise.experiment("any batch size")
class AnyBatchSize(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        return {
            "model": nn.Sequential(nn.Linear(width, 3)).eval(),
            "example": trial.normal(parity.rows(trial), width),
            "batches": parity.batches(trial, width),
            "large": trial.normal(LARGE, width),
        }

    def measure(self, subject, inputs):
        with parity.quiet():
            program = _loaded(_checked(subject(inputs["model"], inputs["example"]))).module()
        got = parity.outputs(program, inputs["batches"])
        return {"outputs": got, "large": parity.outputs(program, [inputs["large"]])}

    def facts(self, raw, inputs):
        large = parity.whose(raw["large"], inputs["model"], [inputs["large"]])
        return {
            parity.BATCHES: parity.sizes(raw["outputs"]),
            "outputs": parity.whose(raw["outputs"], inputs["model"], inputs["batches"]),
            f"outputs for {LARGE} rows": large or "it does not run",
        }


@exercise.experiment("one row")
class OneRow(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        words, length = trial.integer(5, 9), trial.integer(3, 5)
        model = nn.Sequential(nn.Embedding(words, 4), nn.Flatten(), nn.Linear(4 * length, 3))
        tokens = [torch.randint(words, (n, length), generator=trial.generator) for n in (1, *parity.SIZES)]
        return {"model": model.eval(), "example": tokens[0], "batches": tokens[1:]}

    def measure(self, subject, inputs):
        with parity.quiet():
            program, error = parity.attempt(subject, inputs["model"], inputs["example"], expected=parity.raised_for_one_row)
        return {"outputs": None if error else parity.outputs(_checked(program).module(), inputs["batches"]), "error": error}

    def facts(self, raw, inputs):
        got = raw["outputs"]
        return {
            "an export from one row": ERROR if raw["error"] else NO_ERROR,
            parity.BATCHES: got and parity.sizes(got),
            "outputs": got and parity.whose(got, inputs["model"], inputs["batches"]),
        }

    def notes(self, raw, inputs):
        return {"an export from one row": raw["error"]} if raw["error"] else {}


@exercise.experiment("eval mode")
class EvalMode(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _in_train_mode(trial)

    def measure(self, subject, inputs):
        return {"outputs": _outputs(subject, inputs)}

    def facts(self, raw, inputs):
        return {"outputs": parity.whose(raw["outputs"], inputs["model"], [inputs["example"]])}


@exercise.experiment("modes as before")
class ModesAsBefore(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _in_train_mode(trial)
        width = inputs["example"].shape[1]
        inputs["refused"] = _Branch(nn.Sequential(*_body(trial, width)))
        inputs["model"][0].eval()  # a BatchNorm that is frozen
        inputs["refused"].body[0].eval()
        return inputs

    def measure(self, subject, inputs):
        got, modes = _outputs(subject, inputs), parity.modes(inputs["model"])
        with parity.silent():
            _, error = parity.attempt(subject, inputs["refused"], inputs["example"])
        return {"outputs": got, "modes": modes, "error": error, "refused": parity.modes(inputs["refused"])}

    def facts(self, raw, inputs):
        evaluated = parity.whose(raw["outputs"], inputs["model"], [inputs["example"]]) == parity.MODEL
        return {
            # One that never switched to eval mode has earned nothing by switching nothing back.
            "modes afterwards": parity.modes_now(inputs["model"], raw["modes"]) if evaluated else None,
            "a branch that depends on the data": ERROR if raw["error"] else NO_ERROR,
            "modes after that": parity.modes_now(inputs["refused"], raw["refused"]) if raw["error"] else None,
        }


def _in_train_mode(trial: Trial) -> dict:
    width = trial.integer(3, 5)
    return {"model": nn.Sequential(*_body(trial, width)), "example": trial.normal(parity.rows(trial), width)}


def _outputs(subject, inputs: dict) -> parity.Outputs:
    """For the example itself, which any program takes."""
    with parity.quiet():
        program = _checked(subject(inputs["model"], inputs["example"])).module()
    return parity.outputs(program, [inputs["example"]])


def _checked(program: object) -> torch.export.ExportedProgram:
    if not isinstance(program, torch.export.ExportedProgram):
        raise wrong_return("to_program must return a torch.export.ExportedProgram", program)
    return program


def _loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def _export(model: nn.Module, example: Tensor, dim: object = Dim.DYNAMIC) -> torch.export.ExportedProgram:
    if len(example) == 1:
        example = torch.cat([example, example])
    return torch.export.export(model, (example,), dynamic_shapes=({0: dim},))


@exercise.misconception("the example's batch size only")
def the_examples_batch_size_only(model, example):
    with parity.evaluating(model):
        return torch.export.export(model, (example,))


@exercise.misconception("one row refused")
def one_row_refused(model, example):
    with parity.evaluating(model):
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))


@exercise.misconception("one row baked in")
def one_row_baked_in(model, example):
    with parity.evaluating(model):
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim.AUTO},))


@exercise.misconception("a largest batch")
def a_largest_batch(model, example):
    with parity.evaluating(model):
        return _export(model, example, Dim("batch", min=1, max=1024))


@exercise.misconception("train mode exported")
def train_mode_exported(model, example):
    return _export(model, example)


@exercise.misconception("left in eval mode")
def left_in_eval_mode(model, example):
    return _export(model.eval(), example)


@exercise.misconception("one mode for all modules")
def one_mode_for_all_modules(model, example):
    training = model.training
    try:
        return _export(model.eval(), example)
    finally:
        model.train(training)


@exercise.misconception("not restored after an error")
def not_restored_after_an_error(model, example):
    modes = {module: module.training for module in model.modules()}
    program = _export(model.eval(), example)
    for module, training in modes.items():
        module.training = training
    return program
