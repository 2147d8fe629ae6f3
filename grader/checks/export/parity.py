"""What the checks of exports share: models to export, what their exports compute, and mistakes about modes."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.experiment import Experiment, Trial, expect_tensor, wrong_return
from grader.near import near

MODEL = "the model's in eval mode"
SIZES = 1, 4, 8
BATCHES = "batch sizes at which it runs, of 1, 4 and 8"
EXAMPLE = "the example that it was exported with"
ERROR, NO_ERROR = "an error", "no error"
RANDOM = "other ones in each run"

Outputs = list[Tensor | None]  # of one batch after another; None where it did not run


class Branch(nn.Module):
    """Goes one way or the other, depending on the numbers that come in: a trace freezes it, torch.export refuses it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> what `body` gives
        if bool(x.mean() > 0):
            return self.body(x)
        return -self.body(x)


def body(trial: Trial, width: int) -> nn.Sequential:
    """Layers that depend on the mode; they are in train mode."""
    return nn.Sequential(with_statistics(nn.BatchNorm1d(width), trial), nn.Dropout(0.5))


class Exporting(Experiment):
    """Draws models, an example (n, width) to export them with, and batches of other sizes to run the exports on."""

    seconds = 60.0  # the first export of a process imports for seconds before it starts
    on_fake_gpu = False  # exporters take tensors apart, and TorchScript kills the process with those of the fake GPU
    widths: ClassVar[tuple[int, int]] = (3, 5)  # the least and the largest

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(*self.widths)
        return {
            **self.draw_models(trial, width),
            "example": trial.normal((2, 3, 5, 6)[trial.integer(0, 3)], width),  # a number of rows that is not in SIZES
            "batches": [trial.normal(n, width) for n in SIZES],
        }

    def draw_models(self, trial: Trial, width: int) -> dict:
        """The inputs that are models."""
        raise NotImplementedError

    def export(self, subject, model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
        """What the subject made of the model, saved, loaded and ready to run."""
        raise NotImplementedError

    def expected(self, error: Exception) -> bool:
        """Whether an error is one that some models are exported for; any other one goes on to the learner."""
        return False


class EachModel(Exporting):
    """Exports each of several models, `inputs["models"]`."""

    points = 2

    def measure(self, subject, inputs):
        raw = {}
        for name, model in inputs["models"].items():
            exported, error = attempt(self.export, subject, model, inputs["example"], expected=self.expected)
            batches = [] if error else [inputs["example"], *inputs["batches"]]
            raw[name] = {
                "outputs": outputs(exported, batches),
                "again": outputs(exported, batches),
                "error": error,
                "traces": traces.of(model),
            }
        return raw

    def whose(self, name: str, raw: dict, inputs: dict) -> str | None:
        batches = [inputs["example"], *inputs["batches"]]
        return whose(raw[name]["outputs"], inputs["models"][name], batches, again=raw[name]["again"])

    def notes(self, raw, inputs):
        return {name: export["error"] for name, export in raw.items() if export["error"]}


class EvalMode(EachModel):
    """Whose outputs they are if models come in train mode."""

    def facts(self, raw, inputs):
        return {f"outputs of {name}": self.whose(name, raw, inputs) for name in raw}


class Refusal(Exporting):
    """Whether the export of `inputs["refused"]`, which cannot be exported, is an error."""

    refused: ClassVar[str]  # what that model is

    def measure(self, subject, inputs):
        with silent():
            _, error = attempt(subject, inputs["refused"], inputs["example"])
        return {"error": error}

    def facts(self, raw, inputs):
        return {self.refused: ERROR if raw["error"] else NO_ERROR}


class ModesAsBefore(EachModel):
    """What becomes of models that have a frozen BatchNorm, and of their modes; `inputs["refused"]` cannot be exported."""

    refused: ClassVar[str]  # what that model is

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        for model in (*inputs["models"].values(), inputs["refused"]):
            next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d)).eval()
        return inputs

    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        with silent():
            _, error = attempt(subject, inputs["refused"], inputs["example"])
        return raw | {"refused": {"error": error, "traces": traces.of(inputs["refused"])}}

    def facts(self, raw, inputs):
        facts = {}
        for name, model in inputs["models"].items():
            # One that never switched to eval mode has earned nothing by switching nothing back.
            evaluated = self.whose(name, raw, inputs) == MODEL
            facts |= self._switched(name, model, raw[name], evaluated)
        failed = raw["refused"]["error"] != ""
        return facts | self._switched(self.refused, inputs["refused"], raw["refused"], failed)

    def _switched(self, name: str, model: nn.Module, raw: dict, observable: bool) -> dict[str, str | None]:
        facts = traces.changes(model, raw["traces"])
        return {f"{name}: {fact}": value if observable else None for fact, value in facts.items()}


def from_its_file(exported: object, kind: type, wanted: str, save: Callable, load: Callable) -> Any:
    """The export as its file gives it back, or a sentence about what came if it is not of that kind."""
    if not isinstance(exported, kind):
        raise wrong_return(wanted, exported)
    file = io.BytesIO()
    save(exported, file)
    file.seek(0)
    return load(file)


def outputs(exported: Callable[[Tensor], Any], inputs: list[Tensor]) -> Outputs:
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


def sizes(answers: Outputs) -> list[int]:
    """The batch sizes at which it ran."""
    return [n for n, output in zip(SIZES, answers, strict=True) if output is not None]


def of_example(answer: Tensor | None) -> str:
    """Whether an export runs on the example: one that does not is fixed to something else than its batch size."""
    return "does not run" if answer is None else "runs"


def whose(
    answers: Outputs,
    model: nn.Module,
    inputs: list[Tensor],
    again: Outputs | None = None,
    also: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> str | None:
    """Whose outputs they are: the model's, what one of `also` makes of those, or different; None if it never ran.

    `again` are the outputs of a second run: "other ones in each run" are nobody's.
    """
    ran = [(x, output) for x, output in zip(inputs, answers, strict=False) if output is not None]
    if not ran:
        return None
    if again and any(not near(second, first) for first, second in zip(answers, again, strict=True) if first is not None):
        return RANDOM
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, function in {MODEL: lambda logits: logits, **dict(also)}.items():
            if all(near(output, function(evaluated(x))) for x, output in ran):
                return name
    return "different"


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


def in_eval_mode(model, *arguments, export, evaluated=nn.Module.eval, keeping=traces.kept, **options):
    """A right solution around a right `export(model, ...)`, in pieces that a misconception replaces."""
    with keeping(model):
        return export(evaluated(model), *arguments, **options)


@contextmanager
def one_mode_kept(model: nn.Module) -> Iterator[None]:
    training = model.training
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def kept_unless_it_raises(model: nn.Module) -> Iterator[None]:
    modes = {"modes": traces.of(model)["modes"]}
    yield
    traces.put_back(model, modes)


# Misconceptions of every exporter, as changes of `in_eval_mode`.
MODES = {
    "train mode exported": {"evaluated": lambda model: model},
    "left in eval mode": {"keeping": nullcontext},
    "one mode for all modules": {"keeping": one_mode_kept},
    "not restored after an error": {"keeping": kept_unless_it_raises},
}


# What breaks the modes in other ways.
def only_the_root(model: nn.Module) -> nn.Module:
    """`model` in eval mode, its parts as they were."""
    model.training = False
    return model


@contextmanager
def children_kept(model: nn.Module) -> Iterator[None]:
    """Puts back the modes of the model and of its children, not those below."""
    modes = [(module, module.training) for module in (model, *model.children())]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
