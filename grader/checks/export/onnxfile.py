"""Exercise 8.4: a model as one ONNX file that ONNX Runtime runs, for any batch size."""

import copy
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.export import parity
from grader.experiment import Exercise, Trial, WrongReturn
from helpers.export import to_onnx

exercise = Exercise(__name__, "8.4", to_onnx, core=4)

INPUT, OUTPUT = "input", "output"
EXPORTERS = "images", "linear"  # what the exporter calls input and output of `_Images`, if nobody tells it
NAMES = "names of input and output"
NEEDED = "onnx", "onnxscript", "onnxruntime"
ROUNDED = "the model's, with weights in half precision"


class _Images(nn.Linear):
    """A linear layer whose argument has a name of its own."""

    def forward(self, images: Tensor) -> Tensor:  # (n, width) -> (n, classes)
        return super().forward(images)


class _ToOnnx(parity.Exporting):
    """What the experiments of this exercise share."""

    points = 2

    def outputs(self, subject, inputs: dict) -> dict[str, parity.Outputs]:
        """What the file computes, and what it computes in a second run."""
        with _folder() as folder:
            run, _ = _opened(_exported(subject, inputs, folder))
            batches = {"outputs": inputs["batches"], "again": inputs["batches"], "example": [inputs["example"]]}
            return {name: parity.outputs(run, each) for name, each in batches.items()}

    def whose(self, raw: dict, inputs: dict) -> str | None:
        known = {"the softmax of the model's": lambda logits: logits.softmax(1)}
        return parity.whose(raw["outputs"], inputs["model"], inputs["batches"], raw["again"], known)


@exercise.experiment("any batch size", 1, 2)
class AnyBatchSize(_ToOnnx):
    """With whole numbers, so that nothing is rounded in float32, and much if the weights are in 16 bits."""

    widths = 5, 7

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)

        def without_sum(x: Tensor) -> Tensor:
            """Whole numbers whose sum is 0 in each row: what the weights have in common cancels out."""
            x = (2 * x).round()
            return torch.cat([x[:, :-1], -x[:, :-1].sum(1, keepdim=True)], 1)

        return inputs | {"example": without_sum(inputs["example"]), "batches": list(map(without_sum, inputs["batches"]))}

    def draw_models(self, trial, width):
        linear = nn.Linear(width, 3)
        weight = 2049 + 2 * torch.stack([trial.permutation(width) for _ in range(3)]).float()  # odd: no 16 bits hold it
        linear.load_state_dict({"weight": weight, "bias": trial.permutation(3).float()})
        return {"model": nn.Sequential(linear).eval()}

    def measure(self, subject, inputs):
        return self.outputs(subject, inputs)

    def whose(self, raw, inputs):
        whose = super().whose(raw, inputs)
        if whose == "different" and super().whose(raw, inputs | {"model": rounded(inputs["model"])}) == parity.MODEL:
            return ROUNDED
        return whose

    def facts(self, raw, inputs):
        return {
            parity.EXAMPLE: parity.of_example(*raw["example"]),
            parity.BATCHES: parity.sizes(raw["outputs"]),
            "outputs": self.whose(raw, inputs),
        }


@exercise.experiment("one file", 2, 3, 4)
class OneFile(_ToOnnx):
    widths = 36, 48  # small tensors stay in the file in any case: up to 256 bytes, in onnx_ir

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"example": inputs["example"][:1]}

    def draw_models(self, trial, width):
        return {"model": _Images(width, 12).eval()}

    def measure(self, subject, inputs):
        with _folder() as folder, _folder() as elsewhere:
            path = _exported(subject, inputs, folder)
            run, names = _opened(path)
            raw = {"names": names, "outputs": parity.outputs(run, inputs["batches"]), "alone": "opens"}
            try:
                _opened(shutil.copy(path, elsewhere))
            except Exception:  # ONNX Runtime has classes of its own
                raw["alone"] = "does not open"
            return raw

    def facts(self, raw, inputs):
        wrong = [pair for pair in zip(raw["names"], (INPUT, OUTPUT), EXPORTERS, strict=True) if pair[0] != pair[1]]
        exporters = "one or both are the exporter's" if all(name == own for name, _, own in wrong) else "different"
        return {
            f"from an example of one row: {parity.BATCHES}": parity.sizes(raw["outputs"]),
            "a copy of the file in another folder": raw["alone"],
            NAMES: exporters if wrong else "as agreed",
        }

    def notes(self, raw, inputs):
        return {NAMES: " and ".join(raw["names"])}


class _OfModes(_ToOnnx):
    """Draws a model in train mode, a part of which is in eval mode."""

    def draw_models(self, trial, width):
        model = nn.Sequential(parity.body(trial, width), nn.Linear(width, 3))
        model[0][0].eval()  # a BatchNorm that is frozen
        return {"model": rounded(model, evaluated=False)}  # once more changes nothing


@exercise.experiment("eval mode", 1)
class EvalMode(_OfModes):
    def measure(self, subject, inputs):
        return self.outputs(subject, inputs)

    def facts(self, raw, inputs):
        return {"outputs of a model in train mode": self.whose(raw, inputs)}


@exercise.experiment("modes", 5)
class Modes(_OfModes):
    points = 1

    def measure(self, subject, inputs):
        with _folder() as folder:
            _exported(subject, inputs, folder)
        return {"traces": traces.of(inputs["model"])}

    def facts(self, raw, inputs):
        return traces.changes(inputs["model"], raw["traces"])


def rounded(model: nn.Module, evaluated: bool = True) -> nn.Module:
    """A copy of the model, in eval mode if it is to be, whose weights were in half precision in between."""
    twin = copy.deepcopy(model).half().float()
    return twin.eval() if evaluated else twin


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a file that is open
        yield Path(folder)


def _exported(subject, inputs: dict, folder: Path) -> Path:
    """The path of the file that the subject wrote, in a folder of its own."""
    path, printed = folder / "model.onnx", StringIO()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    try:
        with parity.quiet(), redirect_stdout(printed), _operators_read_once():
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


@contextmanager
def _operators_read_once() -> Iterator[None]:
    """Inside the `with`, an export takes torch's table of ONNX operators from an earlier one.

    torch makes it anew for each export, from the source of some 500 functions: two thirds of the time of a small export.
    A torch that keeps the table elsewhere is as slow as it is.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def from_torchlib(*version: int, **named: int) -> ONNXRegistry:
        key = (*version, *named.values())
        if key not in _operators:
            _operators[key] = read(*version, **named)
        registry = copy.copy(_operators[key])  # an export may add operators of its own
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield


_operators: dict = {}  # what was asked for -> torch's table


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


def export_onnx(model: nn.Module, example: Tensor, path: Path, doubled: bool = True, **changes: object) -> None:
    rows = torch.cat([example, example]) if doubled else example
    options = {"dynamic_shapes": ({0: "batch"},), "input_names": [INPUT], "output_names": [OUTPUT], "external_data": False}
    torch.onnx.export(model, (rows,), path, dynamo=True, verbose=False, **options | changes)


exercise.misconceptions_of(
    partial(parity.in_eval_mode, export=export_onnx),
    {
        "the example's batch size only": {"dynamic_shapes": None, "doubled": False},
        "probabilities exported": {"evaluated": lambda model: nn.Sequential(model, nn.Softmax(1)).eval()},
        "weights in a second file": {"external_data": True},
        "names left to the exporter": {"input_names": None, "output_names": None},
        "weights in half precision": {"evaluated": rounded},
        **{key: change for key, change in parity.MODES.items() if key != "not restored after an error"},
    },
)
