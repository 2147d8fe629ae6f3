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
from grader.experiment import Exercise, Trial, WrongReturn, misconception
from helpers.export import to_onnx

INPUT, OUTPUT = "input", "output"
NEEDED = "onnx", "onnxscript", "onnxruntime"


class AnyBatchSize(parity.Exporting):
    """ONNX Runtime computes from the file what the model computes, for any number of rows."""

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


class OneFile(parity.Exporting):
    """The file at `path` is all that another program needs, and its input and output have the agreed names."""

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


class EvalMode(parity.Exporting):
    """From a model in train mode and a single row, the file computes as in eval mode; the model has its modes back."""

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


@misconception(
    "the example's batch size only",
    hint="It runs for as many rows as the example has, and for no others. Print the shape of the session's input: what is a "
    "name there, and what is a number?",
    source="the documentation of torch.onnx.export: without dynamic_shapes all sizes are static",
)
def the_examples_batch_size_only(model, example, path):
    with parity.evaluating(model):
        torch.onnx.export(
            model, (example,), path, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False
        )


@misconception(
    "train mode exported",
    hint="Run the file twice on the same input: are the outputs equal? In which mode was the model when it was exported?",
    source="measured here: the exporter warns of a model in train mode, and writes a Dropout that is on into the file",
)
def train_mode_exported(model, example, path):
    _export(model, example, path)


@misconception(
    "left in eval mode",
    hint="Training goes on after an export. Look at `training` of every module before your function and after "
    "it: what changed?",
    source="seen in public teaching code: model.eval() before the export, and no train() after it",
)
def left_in_eval_mode(model, example, path):
    _export(model.eval(), example, path)


@misconception(
    "one mode for all modules",
    hint="A BatchNorm that was frozen in eval mode trains again. How many modes can a model of many modules be in at once?",
    source="a line of reasoning: was_training = model.training, then model.train(was_training), which sets all modules alike",
)
def one_mode_for_all_modules(model, example, path):
    training = model.training
    _export(model.eval(), example, path)
    model.train(training)


@misconception(
    "probabilities exported",
    hint="Every row of outputs adds up to 1. Does the model say that, and what would its user do who expects "
    "the model's numbers?",
    source="seen in public teaching code: a Softmax appended before the export, and another one in the program "
    "that loads the file",
)
def probabilities_exported(model, example, path):
    with parity.evaluating(model):
        _export(nn.Sequential(model, nn.Softmax(1)).eval(), example, path)


@misconception(
    "weights in a second file",
    hint="The file opens where it was written, and a copy of it in another folder does not. List the folder "
    "after an export: what "
    "else is there, and how large is each?",
    source="the documentation of torch.onnx.export: external_data=True is the default",
)
def weights_in_a_second_file(model, example, path):
    with parity.evaluating(model):
        _export(model, example, path, external_data=True)


@misconception(
    "names left to the exporter",
    hint="A program that runs the file asks for an output by its name. Which name did yours get, and who chose it?",
    source="measured here: the output of a last nn.Linear is called linear, that of another layer something else",
)
def names_left_to_the_exporter(model, example, path):
    with parity.evaluating(model):
        _export(model, example, path, input_names=None, output_names=None)


EXERCISE = Exercise(
    number="8.4",
    name="to_onnx",
    reference=to_onnx,
    experiments=(AnyBatchSize(), OneFile(), EvalMode()),
    misconceptions=(
        *(the_examples_batch_size_only, train_mode_exported, left_in_eval_mode, one_mode_for_all_modules),
        *(probabilities_exported, weights_in_a_second_file, names_left_to_the_exporter),
    ),
    hints=(
        "What does somebody need to run your model who has the file, ONNX Runtime, and not your code?",
        "Open the file in an onnxruntime.InferenceSession, and print name and shape of get_inputs() and "
        "get_outputs(). Then move "
        "the file to another folder, open it there, and run it twice on the same input.",
        "torch.onnx.export(model, (x,), path, dynamo=True, ...) takes dynamic_shapes, input_names, output_names and "
        "external_data; before it model.eval(), and after it, in `finally`, every module's own mode.",
    ),
)
