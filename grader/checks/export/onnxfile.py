"""Exercise 8.4: a model as one ONNX file that ONNX Runtime runs, for any batch size."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.export import parity
from grader.experiment import Exercise, Trial, WrongReturn
from helpers.export import to_onnx

exercise = Exercise(__name__, "8.4", to_onnx)

INPUT, OUTPUT = "input", "output"
NEEDED = "onnx", "onnxscript", "onnxruntime"


class _ToOnnx(parity.Exporting):
    """What the experiments of this exercise share."""

    points = 2

    def outputs(self, subject, inputs: dict) -> parity.Outputs:
        with _folder() as folder:
            run, _ = _opened(_exported(subject, inputs, folder))
            return parity.outputs(run, inputs["batches"])

    def whose(self, raw: dict, inputs: dict) -> str | None:
        softmax = {"the softmax of the model's": lambda logits: logits.softmax(1)}
        return parity.whose(raw["outputs"], inputs["model"], inputs["batches"], **softmax)


@exercise.experiment("any batch size")
class AnyBatchSize(_ToOnnx):
    def draw_models(self, trial, width):
        return {"model": nn.Sequential(nn.Linear(width, 3)).eval()}

    def measure(self, subject, inputs):
        return {"outputs": self.outputs(subject, inputs)}

    def facts(self, raw, inputs):
        return {parity.BATCHES: parity.sizes(raw["outputs"]), "outputs": self.whose(raw, inputs)}


@exercise.experiment("one file")
class OneFile(_ToOnnx):
    widths = 36, 48  # small tensors stay in the file in any case: up to 256 bytes, in onnx_ir

    def draw_models(self, trial, width):
        return {"model": nn.Sequential(nn.Linear(width, 12)).eval()}

    def measure(self, subject, inputs):
        with _folder() as folder, _folder() as elsewhere:
            path = _exported(subject, inputs, folder)
            _, names = _opened(path)
            try:
                _opened(shutil.copy(path, elsewhere))
            except Exception:  # ONNX Runtime has classes of its own
                return {"names": names, "alone": "does not open"}
            return {"names": names, "alone": "opens"}

    def facts(self, raw, inputs):
        given, answer = raw["names"]
        return {
            "a copy of the file in another folder": raw["alone"],
            "name of the input": INPUT if given == INPUT else "another",
            "name of the output": OUTPUT if answer == OUTPUT else "another",
        }

    def notes(self, raw, inputs):
        return dict(zip(("name of the input", "name of the output"), raw["names"], strict=True))


@exercise.experiment("eval mode")
class EvalMode(_ToOnnx):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"example": inputs["example"][:1]}

    def draw_models(self, trial, width):
        model = nn.Sequential(parity.body(trial, width), nn.Linear(width, 3))
        model[0][0].eval()  # a BatchNorm that is frozen
        return {"model": model}

    def measure(self, subject, inputs):
        return {"outputs": self.outputs(subject, inputs), "traces": traces.of(inputs["model"])}

    def facts(self, raw, inputs):
        return {"outputs": self.whose(raw, inputs)} | traces.changes(inputs["model"], raw["traces"], "modes")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a file that is open
        yield Path(folder)


def _exported(subject, inputs: dict, folder: Path) -> Path:
    """The path of the file that the subject wrote, in a folder of its own."""
    path, printed = folder / "model.onnx", StringIO()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    try:
        with parity.quiet(), redirect_stdout(printed):
            subject(inputs["model"], inputs["example"], path)
    except Exception as error:
        if not missing or str(error).startswith("Exercise"):
            raise
    finally:  # but for the exporter's own report
        print("".join(line for line in printed.getvalue().splitlines(True) if not line.startswith("[torch.onnx]")), end="")
    if missing:
        raise WrongReturn(
            f"this check runs your file in ONNX Runtime and needs {', '.join(NEEDED)}, got an environment without "
            f"{' and '.join(missing)}. Install what is missing, pip install {' '.join(missing)}, and restart the kernel."
        )
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise WrongReturn(f"to_onnx must write a file at `path`, here {path.name} in an empty folder, got {there}.")
    return path


def _opened(path: str | Path) -> tuple[Callable[[Tensor], Tensor], tuple[str, str]]:
    """What runs the file, and the names of its input and output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # it raises what it logs
    # What the file says, not what this runtime makes of it: its optimiser removes a Dropout, on or off, between two nodes.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]
    for what, found in zip(("input", "output"), names, strict=True):
        if len(found) != 1:
            raise WrongReturn(f"the file must have one {what}, got {len(found)}: {', '.join(found)}.")
    (given,), (answer,) = names
    return lambda x: torch.from_numpy(session.run([answer], {given: x.cpu().numpy()})[0]), (given, answer)


def _export(model: nn.Module, example: Tensor, path: Path, doubled: bool = True, **changes: object) -> None:
    rows = torch.cat([example, example]) if doubled else example
    options = {"dynamic_shapes": ({0: "batch"},), "input_names": [INPUT], "output_names": [OUTPUT], "external_data": False}
    torch.onnx.export(model, (rows,), path, dynamo=True, verbose=False, **options | changes)


exercise.misconceptions_of(
    partial(parity.in_eval_mode, export=_export),
    {
        "the example's batch size only": {"dynamic_shapes": None, "doubled": False},
        "probabilities exported": {"evaluated": lambda model: nn.Sequential(model, nn.Softmax(1)).eval()},
        "weights in a second file": {"external_data": True},
        "names left to the exporter": {"input_names": None, "output_names": None},
        **{key: change for key, change in parity.MODES.items() if key != "not restored after an error"},
    },
)
