"""What the checks of exports share: whose outputs these are, at which batch sizes, and what became of the model's modes."""

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grader.experiment import Experiment, Trial, expect_tensor
from grader.near import near

MODEL, OTHERS = "the model's in eval mode", "different"
SIZES = 1, 4, 8
BATCHES = "batch sizes at which it runs, of 1, 4 and 8"
MODES = "modes of the modules afterwards"

Outputs = list[Tensor | None]  # of one batch after another; None where it did not run


class Exporting(Experiment):
    """What the experiments that export share."""

    seconds = 60.0  # the first export of a process imports for seconds before it starts
    on_fake_gpu = False  # exporters take tensors apart, and TorchScript kills the process with those of the fake GPU


def rows(trial: Trial) -> int:
    """Rows of an example, a number that is not among `SIZES`."""
    return (2, 3, 5, 6)[trial.integer(0, 3)]


def batches(trial: Trial, width: int) -> list[Tensor]:
    """Inputs (n, width), n from `SIZES`."""
    return [trial.normal(n, width) for n in SIZES]


def norm(trial: Trial, width: int) -> nn.BatchNorm1d:
    """A BatchNorm whose statistics are not those of a fresh layer."""
    layer = nn.BatchNorm1d(width)
    layer.running_mean.copy_(trial.normal(width))
    layer.running_var.copy_(0.5 + trial.normal(width).square())
    return layer


def outputs(exported: Callable[..., Any], inputs: list[Tensor]) -> Outputs:
    """What the export answers to each batch, None where it raises."""
    answers: Outputs = []
    with torch.no_grad():
        for x in inputs:
            try:
                answer = exported(x.clone())
            except Exception:  # a size that is not the example's: every format has an error of its own
                answers.append(None)
            else:
                answers.append(expect_tensor(answer, ("batch", "classes"), "what the export computes").detach().clone())
    return answers


def sizes(got: Outputs) -> list[int]:
    """The batch sizes at which it ran."""
    return [n for n, output in zip(SIZES, got, strict=True) if output is not None]


def whose(got: Outputs, model: nn.Module, inputs: list[Tensor], **also: Callable[[Tensor], Tensor]) -> str | None:
    """Whose outputs they are: the model's in eval mode, one of `also`, or others; None if it never ran."""
    ran = [(x, output) for x, output in zip(inputs, got, strict=True) if output is not None]
    if not ran:
        return None
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        if all(_alike(output, evaluated(x)) for x, output in ran):
            return MODEL
        for name, function in also.items():
            if all(_alike(output, function(evaluated(x))) for x, output in ran):
                return name
    return OTHERS


def _alike(got: Tensor, wanted: Tensor) -> bool:
    return near(got, wanted, scale=float(wanted.abs().max()))


def modes(model: nn.Module) -> dict[str, bool]:
    """Which modules are in train mode, by name."""
    return {name: module.training for name, module in model.named_modules()}


def modes_now(before: nn.Module, now: dict[str, bool]) -> str:
    """What became of the modes of a model that had some modules in train mode and some in eval mode."""
    if now == modes(before):
        return "as before"
    return {True: "all train", False: "all eval"}[now[""]] if len(set(now.values())) == 1 else "some others than before"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside, every module's own mode afterwards: what a right solution does."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


def attempt(
    export: Callable[..., Any], *arguments: Any, expected: Callable[[Exception], bool] = lambda _: True
) -> tuple[Any, str]:
    """What an export that may fail returns, and "", or None and the error in a line. An error that is not expected goes on."""
    try:
        return export(*arguments), ""
    except Exception as error:
        if str(error).startswith("Exercise") or not expected(error):  # the stub's, or a bug: the learner wants to see its line
            raise
        text = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {text[:120]}{' …' if len(text) > 120 else ''}"


def raised_by_script(error: Exception) -> bool:
    """Whether torch.jit.script raised it, and not a trace."""
    files = {Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)}
    return ("jit", "_script.py") in files and ("jit", "_trace.py") not in files


def raised_for_one_row(error: Exception) -> bool:
    """Whether PyTorch raised it because it takes the batch of one row for a constant."""
    return "specialized" in str(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what PyTorch itself has to say of any export: its log, and that TorchScript is deprecated."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
            yield
    finally:
        logging.disable(before)


@contextmanager
def silent() -> Iterator[None]:
    """`quiet`, and no prints or warnings at all, for an export that is meant to fail: PyTorch prints the graph it gave up."""
    with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield
