"""Exercise 8.4: a model as one ONNX file that ONNX Runtime runs, for any batch size."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from grader.checks.export import parity
from grader.experiment import Exercise, Trial, WrongReturn
from helpers.export import to_onnx

exercise = Exercise(__name__, "8.4", to_onnx)

INPUT, OUTPUT = "input", "output"
NEEDED = "onnx", "onnxscript", "onnxruntime"


@exercise.experiment("any batch size")
class AnyBatchSize(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        return {
            "model": nn.Sequential(nn.Linear(width, 3)).eval(),
            "example": trial.normal(parity.rows(trial), width),
            "batches": parity.batches(trial, width),
        }

    def measure(self, subject, inputs):
        with _folder() as folder:
            run, _ = _opened(_exported(subject, inputs, folder))
            return {"outputs": parity.outputs(run, inputs["batches"])}

    def facts(self, raw, inputs):
        return {parity.BATCHES: parity.sizes(raw["outputs"]), "outputs": _whose(raw, inputs)}


@exercise.experiment("one file")
class OneFile(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(36, 48)  # small tensors stay in the file in any case: up to 256 bytes, in onnx_ir
        return {"model": nn.Sequential(nn.Linear(width, 12)).eval(), "example": trial.normal(parity.rows(trial), width)}

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
            "name of the input": _name(given, INPUT),
            "name of the output": _name(answer, OUTPUT),
        }

    def notes(self, raw, inputs):
        return dict(zip(("name of the input", "name of the output"), raw["names"], strict=True))


@exercise.experiment("eval mode")
class EvalMode(parity.Exporting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        model = nn.Sequential(nn.Dropout(0.5), parity.norm(trial, width), nn.Linear(width, 3))
        model[1].eval()  # a BatchNorm that is frozen
        return {"model": model, "example": trial.normal(1, width), "batches": parity.batches(trial, width)}

    def measure(self, subject, inputs):
        with _folder() as folder:
            run, _ = _opened(_exported(subject, inputs, folder))
            return {"outputs": parity.outputs(run, inputs["batches"]), "modes": parity.modes(inputs["model"])}

    def facts(self, raw, inputs):
        return {"outputs": _whose(raw, inputs), "modes afterwards": parity.modes_now(inputs["model"], raw["modes"])}


def _whose(raw: dict, inputs: dict) -> str | None:
    softmax = {"the softmax of the model's": lambda logits: logits.softmax(1)}
    return parity.whose(raw["outputs"], inputs["model"], inputs["batches"], **softmax)


def _name(got: str, wanted: str) -> str:
    return wanted if got == wanted else "another"


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


def _export(model: nn.Module, example: Tensor, path: Path, **changes: object) -> None:
    options = {"dynamic_shapes": ({0: "batch"},), "input_names": [INPUT], "output_names": [OUTPUT], "external_data": False}
    rows = torch.cat([example, example])
    torch.onnx.export(model, (rows,), path, dynamo=True, verbose=False, **options | changes)


@exercise.misconception("the example's batch size only")
def the_examples_batch_size_only(model, example, path):
    with parity.evaluating(model):
        torch.onnx.export(
            model, (example,), path, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False
        )


@exercise.misconception("train mode exported")
def train_mode_exported(model, example, path):
    _export(model, example, path)


@exercise.misconception("left in eval mode")
def left_in_eval_mode(model, example, path):
    _export(model.eval(), example, path)


@exercise.misconception("one mode for all modules")
def one_mode_for_all_modules(model, example, path):
    training = model.training
    _export(model.eval(), example, path)
    model.train(training)


@exercise.misconception("probabilities exported")
def probabilities_exported(model, example, path):
    with parity.evaluating(model):
        _export(nn.Sequential(model, nn.Softmax(1)).eval(), example, path)


@exercise.misconception("weights in a second file")
def weights_in_a_second_file(model, example, path):
    with parity.evaluating(model):
        _export(model, example, path, external_data=True)


@exercise.misconception("names left to the exporter")
def names_left_to_the_exporter(model, example, path):
    with parity.evaluating(model):
        _export(model, example, path, input_names=None, output_names=None)
