"""Exercise 8.3: a model as a graph that torch.export has taken, for any batch size."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.export import Dim

from grader.checks.export import parity
from grader.experiment import Exercise, Trial
from helpers.export import to_program

exercise = Exercise(__name__, "8.3", to_program, core=3)

LARGE = 1500  # rows, more than anyone would think of as a limit
ONE_ROW = "an export from one row"


class _ToProgram(parity.Exporting):
    """What the experiments of this exercise share."""

    def export(self, subject, model: nn.Module, example: Tensor) -> nn.Module:
        kind, wanted = torch.export.ExportedProgram, "to_program must return a torch.export.ExportedProgram"
        with parity.quiet():
            program = subject(model, example)
            return parity.from_its_file(program, kind, wanted, torch.export.save, torch.export.load).module()


@exercise.experiment("any batch size", 1, 2)
class AnyBatchSize(_ToProgram):
    points = 2

    def draw_models(self, trial, width):
        return {"model": nn.Sequential(nn.Linear(width, 3)).eval(), "large": trial.normal(LARGE, width)}

    def measure(self, subject, inputs):
        exported = self.export(subject, inputs["model"], inputs["example"])
        batches = {"outputs": inputs["batches"], "large": [inputs["large"]], "example": [inputs["example"]]}
        return {name: parity.outputs(exported, each) for name, each in batches.items()}

    def facts(self, raw, inputs):
        large = parity.whose(raw["large"], inputs["model"], [inputs["large"]])
        return {
            parity.EXAMPLE: parity.of_example(*raw["example"]),
            parity.BATCHES: parity.sizes(raw["outputs"]),
            "outputs": parity.whose(raw["outputs"], inputs["model"], inputs["batches"]),
            f"outputs for {LARGE} rows": large or "it does not run",
        }


@exercise.experiment("one row", 3)
class OneRow(_ToProgram, parity.EachModel):
    def draw(self, trial: Trial) -> dict:
        words, length = trial.integer(5, 9), trial.integer(3, 5)
        model = nn.Sequential(nn.Embedding(words, 4), nn.Flatten(), nn.Linear(8 * length, 3))
        example, *batches = (torch.randint(words, (n, 2, length), generator=trial.generator) for n in (1, *parity.SIZES))
        return {"models": {ONE_ROW: model.eval()}, "example": example, "batches": batches}

    def expected(self, error: Exception) -> bool:
        """Whether PyTorch raised it because it takes the batch of one row for a constant."""
        return "specialized" in str(error)

    def facts(self, raw, inputs):
        return {
            ONE_ROW: parity.ERROR if raw[ONE_ROW]["error"] else parity.NO_ERROR,
            parity.BATCHES: None if raw[ONE_ROW]["error"] else parity.sizes(raw[ONE_ROW]["outputs"][1:]),
            "outputs": self.whose(ONE_ROW, raw, inputs),
        }


@exercise.experiment("eval mode", 1)
class EvalMode(_ToProgram, parity.EvalMode):
    def draw_models(self, trial, width):
        return {"models": {"a model in train mode": parity.body(trial, width)}}


@exercise.experiment("refusal", 4)
class Refusal(_ToProgram, parity.Refusal):
    refused = "a branch that depends on the data"

    def draw_models(self, trial, width):
        return {"refused": parity.Branch(nn.Linear(width, 3)).eval()}


@exercise.experiment("modes as before", 5)
class ModesAsBefore(_ToProgram, parity.ModesAsBefore):
    refused = "a branch that depends on the data"

    def draw_models(self, trial, width):
        body = parity.body(trial, width)
        return {"models": {"a model in train mode": body}, "refused": parity.Branch(parity.body(trial, width))}


def _export(model: nn.Module, example: Tensor, dim: object = Dim.DYNAMIC, doubled: bool = True) -> torch.export.ExportedProgram:
    if doubled:
        example = torch.cat([example, example])
    return torch.export.export(model, (example,), dynamic_shapes=({0: dim},))


exercise.misconceptions_of(
    partial(parity.in_eval_mode, export=_export),
    {
        "the example's batch size only": {"dim": None, "doubled": False},
        "one row refused": {"dim": Dim("batch"), "doubled": False},
        "one row baked in": {"dim": Dim.AUTO, "doubled": False},
        "a largest batch": {"dim": Dim("batch", min=1, max=1024)},
        **parity.MODES,
    },
)
