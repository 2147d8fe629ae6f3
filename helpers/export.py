"""A model as a file that other programs run, and the proof that the file computes what the model computes.

    to_torchscript(model, example)     TorchScript: legacy, for programs that load nothing else
    to_program(model, example)         torch.export: a graph of torch operators, with a dynamic batch
    to_onnx(model, example, path)      ONNX: a file for ONNX Runtime, TensorRT and others; `OnnxSession(path)` runs it
    parity(model, exported, inputs)    whether what was exported computes what the model computes: see helpers.parity

`example` is a tensor (n, ...) or a tuple of such tensors, the first dimension the batch; it may have one row.
Every exporter works on a copy in eval mode: the model is not touched, and what was exported is a snapshot that later
training does not change. What cannot be exported raises `ExportFailed`.

Source: PyTorch's documentation of torch.export and torch.onnx.
"""

import copy
import importlib.util
import inspect
import io
import linecache
import logging
import re
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers import expect
from helpers.parity import Inputs, first_line, fresh, rows_of, tensors_of

ONE_FILE = 1_900_000_000  # bytes of weights; protobuf, the format of the file, ends at 2 GB


class ExportFailed(RuntimeError):
    """A model that a format cannot hold, or a format that cannot be had here; the message says what to do."""


def to_torchscript(model: nn.Module, example: Inputs, freeze_branches: bool = False) -> torch.jit.ScriptModule:
    """The model as TorchScript: compiled from its source (script), or recorded while it runs (trace) if that fails.

    A script keeps `if` and `for` and knows a part of Python only. A trace takes any Python and keeps the tensor
    operations that this one run made: a branch that asks a tensor is frozen the way it went.

    TorchScript is legacy. torch's documentation calls it deprecated since 2.5, and torch 2.14 says so in a FutureWarning
    at each call; that warning is not passed on. In its place: `to_program` for what leaves Python, `torch.compile` for speed
    within it. `module.save(path)` writes a file that C++ loads without Python.

    Args:
        model: any model.
        example: inputs to try it on, and to record if it has to be traced.
        freeze_branches: accept a trace that freezes branches, of which you know that they always go the same way.

    Raises:
        ExportFailed: script cannot compile the model, and a trace of it would freeze a branch or cannot be made.
    """
    snapshot, inputs = _prepared(model, example)
    with _torchscript_warnings() as caught, torch.no_grad():
        try:
            script = torch.jit.script(snapshot)
            script(*fresh(inputs))  # some of what script gets wrong shows only in a run
            return script
        except Exception as error:  # of many kinds: what the compiler meets in the model's source
            refused = error
        try:
            trace = torch.jit.trace(snapshot, fresh(inputs))
        except Exception as error:
            raise ExportFailed(
                f"{type(model).__name__} can be neither scripted ({first_line(refused)}) nor traced "
                f"({first_line(error)}). Use to_program."
            ) from error
        tracer_warnings = [warning for warning in caught if issubclass(warning.category, torch.jit.TracerWarning)]
    frozen = [warning for warning in tracer_warnings if not re.search("Output nr|nondeterministic", str(warning.message))]
    if len(tracer_warnings) > len(frozen):
        raise ExportFailed(
            "a trace must compute what the model computes, got another output from a second run of it. "
            "Look for dropout that ignores eval mode: F.dropout(x, p, self.training)."
        )
    if frozen and not freeze_branches:
        line = linecache.getline(frozen[0].filename, frozen[0].lineno).strip() or f"line {frozen[0].lineno}"
        raise ExportFailed(
            f"a trace would freeze `{line}` ({Path(frozen[0].filename).name}) as it went for the example. "
            "Compute both sides and choose with torch.where, or pass freeze_branches=True if it always goes that way."
        ) from refused
    return trace


def to_program(model: nn.Module, example: Inputs, axes: Mapping[int, str] | None = None) -> torch.export.ExportedProgram:
    """The model as a graph of torch operators with its weights: `program.module()` runs it, for any number of rows.

    torch.export takes a size of 0 or 1 for a constant. So an example of one row is doubled first; the program
    takes one row all the same. `torch.export.save(program, path)` writes it, `torch.export.load(path)` reads it.

    Args:
        model: any model whose `forward` does not branch on the values of tensors.
        example: inputs of the right shapes and dtypes; their values do not matter. The program keeps a copy of them:
            of a slice as it is, `torch.export.save` would write all of the memory that it is a slice of.
        axes: further dimensions that may vary, in every input that has them: {1: "tokens"}. Sizes above 1.

    Raises:
        ExportFailed: the graph would depend on values of tensors, or the model's code fixes the batch size.
    """
    snapshot, inputs = _prepared(model, example)
    batch = torch.export.Dim("batch", min=1)
    further = dict.fromkeys(axes or {}, torch.export.Dim.DYNAMIC)
    shapes = tuple({0: batch, **{axis: dim for axis, dim in further.items() if axis < x.ndim}} for x in inputs)
    if short := [axis for axis in further for x in inputs if axis < x.ndim and x.shape[axis] < 2]:
        raise ValueError(f"example must have a size of at least 2 along axis {short[0]}, got 1: torch.export keeps a 1.")
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(snapshot, fresh(inputs), dynamic_shapes=_as_arguments(model, shapes))
    except Exception as error:  # torch.export has no common class for what it refuses
        raise ExportFailed(_refusal(error)) from error


def to_onnx(model: nn.Module, example: Inputs, path: str | Path, axes: Mapping[int, str] | None = None) -> Path:
    """Write the model as one ONNX file with a dynamic batch, through `to_program` and torch's dynamo exporter.

    A single input is called "input" and a single output "output", whatever `forward` calls them. Several inputs are named
    as in `forward`, several outputs "output_0", "output_1", ...; the batch dimension is "batch".
    The file appears when it is whole. A model above 2 GB, the limit of the format, has its weights in `path`.data beside it.

    Args:
        model, example, axes: as for `to_program`.
        path: of the file, "model.onnx"; its folder is made.

    Returns:
        `path`.

    Raises:
        ExportFailed: torch.export refuses the model, ONNX has no operator for it, or onnx and onnxscript are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportFailed(f"ONNX files need {' and '.join(missing)}. Install: pip install {' '.join(missing)}")
    program, path = to_program(model, example, axes), Path(path)
    names = {0: "batch", **(axes or {})}
    shapes = tuple({axis: name for axis, name in names.items() if axis < x.ndim} for x in tensors_of("example", example))
    inputs, outputs = list(program.graph_signature.user_inputs), len(program.graph_signature.user_outputs)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx") as folder:
        try:
            with quiet():
                torch.onnx.export(
                    program,
                    (),
                    Path(folder) / path.name,
                    dynamo=True,
                    verbose=False,
                    input_names=["input"] if len(inputs) == 1 else inputs,
                    output_names=["output"] if outputs == 1 else [f"output_{index}" for index in range(outputs)],
                    dynamic_shapes=_as_arguments(model, shapes),
                    external_data=size > ONE_FILE,
                )
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:  # the exporter wraps what went wrong in a screenful
                cause = cause.__cause__
            raise ExportFailed(f"{type(model).__name__} cannot become ONNX: {first_line(cause)}. Try to_program.") from error
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # what it points to first
            file.replace(path.parent / file.name)
    return path


class OnnxSession:
    """An ONNX file in ONNX Runtime: `session(x)`, or `session(a, b)` in the order of `inputs`, gives a tensor.

    Inputs on the CPU are not copied. The output, or a tuple of them, is on the CPU.

    Args:
        path: an ONNX file.
        threads: of one operator; None takes one for each core.
        device: "cpu", or "cuda" where onnxruntime-gpu is installed.

    Raises:
        ExportFailed: onnxruntime is not installed, or has no CUDA.
    """

    def __init__(self, path: str | Path, threads: int | None = None, device: str = "cpu") -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ExportFailed("an ONNX file needs onnxruntime to run. Install: pip install onnxruntime")
        import onnxruntime

        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in onnxruntime.get_available_providers():
            raise ExportFailed(f"onnxruntime here has no {provider}. Install onnxruntime-gpu, or take device='cpu'.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised too
        options.intra_op_num_threads = 0 if threads is None else expect.whole_number("threads", threads)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(tensors) != len(self.inputs):
            raise ValueError(f"the file takes {len(self.inputs)} inputs, {self.inputs}, got {len(tensors)}. Pass each.")
        arrays = {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        outputs = tuple(torch.from_numpy(array) for array in self._session.run(None, arrays))
        return outputs[0] if len(outputs) == 1 else outputs


def snapshot_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode with nothing to train.

    Raises:
        ExportFailed: the model keeps a tensor of an earlier forward, with its graph, which cannot be copied.
    """
    for name, module in expect.module("model", model).named_modules():
        kept = [key for key, value in vars(module).items() if isinstance(value, Tensor) and not value.is_leaf]
        if kept:
            where = f"{name}.{kept[0]}" if name else kept[0]
            raise ExportFailed(f"a model to export must be copied, and {where} keeps a graph. Detach what forward stores.")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _prepared(model: nn.Module, example: Inputs) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model in eval mode, and inputs of at least two rows, on which it has run."""
    snapshot, rows = snapshot_of(model), tensors_of("example", example)
    inputs, stage = rows, "as given"
    try:
        with torch.no_grad():
            snapshot(*fresh(rows))
            if len(rows[0]) == 1:
                inputs, stage = rows_of(rows, 2), "doubled"
                snapshot(*fresh(inputs))
    except Exception as error:
        if stage == "doubled":
            raise ExportFailed(_fixed("the batch size", 1)) from error
        raise ValueError(
            f"example must be what the model takes, got {first_line(error)}. A model that takes texts or files prepares "
            "them in Python: export what comes after, as text_backbone().encoder."
        ) from error
    return snapshot, inputs


def _as_arguments(model: nn.Module, shapes: tuple) -> tuple:
    """Shapes of positional arguments as torch.export wants them: those that `*args` takes are a tuple in it."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    return (*shapes[:named], shapes[named:]) if named < len(shapes) else shapes


def _refusal(error: Exception) -> str:
    """What torch.export says on a screenful, in one sentence."""
    text = str(error)
    if fixed := re.search(r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return _fixed("the batch size" if fixed[1] == "batch" else fixed[1], int(fixed[2]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _inside_torch(frame.filename)]
    where = f"`{frames[-1].line}` in {frames[-1].name}" if frames else "the model's code"
    if "data-dependent" in text.lower():
        return (
            f"torch.export cannot follow {where}: it depends on the values of a tensor. "
            "Compute both sides and choose with torch.where, or use torch.cond."
        )
    return f"torch.export cannot follow {where} ({first_line(error)}). Write it with torch's functions on tensors."


def _fixed(what: str, size: int) -> str:
    return (
        f"the model's code fixes {what} to {size}, as of the example. "
        "Where a number, len(x) or a loop over rows says so, take x.shape[0], -1 or x.flatten(1)."
    )


def _inside_torch(filename: str) -> bool:
    return filename == __file__ or Path(torch.__file__).parent in Path(filename).parents


@contextmanager
def _no_output() -> Iterator[None]:
    """Nothing on stdout, on stderr, or in a log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def quiet() -> Iterator[None]:
    """No output and no warnings: exporters report on their own insides."""
    with _no_output(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _torchscript_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """No output; collects warnings, and passes on at the end those that neither a trace nor a deprecation makes.

    Deprecations are TorchScript's own and, since script reads every attribute, those of attributes nobody asked for.
    """
    with _no_output(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    for warning in caught:
        message = str(warning.message)
        if not issubclass(warning.category, torch.jit.TracerWarning) and not re.search("deprecated|not supported in", message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
