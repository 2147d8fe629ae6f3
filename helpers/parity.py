"""Whether an export computes what its model computes, and if not, where and why.

    error = max |got - wanted| / max |wanted|        for each batch size, over all numbers of one output

By the largest output, not by each one: rounding is proportional to what was added up, so an output that happens to be
near 0 has a large error of its own in every right export.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from helpers import expect
from helpers.modes import eval_mode

Inputs = Tensor | tuple[Tensor, ...]

# The largest |difference| / |output| to expect of right exports, which add the same numbers in another order:
# some hundred roundings of float64 and float32; of the 16-bit formats a few, as sums inside are kept in float32.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class BatchParity:
    """One batch size: where an export and the model lie furthest apart. `problem` says what else is wrong, or is ""."""

    batch: int
    error: float = float("inf")  # |difference| / largest |output of the model|
    absolute: float = float("inf")
    output: int = 0  # which, of a model that gives several
    index: tuple[int, ...] = ()  # row first
    wanted: float = float("nan")
    got: float = float("nan")
    problem: str = ""


@dataclass(frozen=True)
class Parity:
    """Whether an export computes what its model computes in eval mode. `print(report)` shows a table."""

    exported: str
    dtype: torch.dtype
    tolerance: float
    reason: str  # of the tolerance
    rows: tuple[BatchParity, ...]
    diagnosis: str = ""  # what is wrong with the export as a whole, as far as it can be told

    @property
    def worst(self) -> BatchParity:
        return max(self.rows, key=lambda row: row.error)

    @property
    def error(self) -> float:
        """The largest relative error of all batch sizes; infinite where outputs cannot be compared."""
        return self.worst.error

    @property
    def ok(self) -> bool:
        return not self.diagnosis and all(not row.problem and row.error <= self.tolerance for row in self.rows)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        verdict = "computes what the model computes" if self.ok else "does not compute what the model computes"
        lines = [f"{self.exported} {verdict} ({kind}, tolerance {self.tolerance:g}: {self.reason})"]
        lines.append("batch  relative  absolute  where")
        for row in self.rows:
            where = f"{list(row.index)}: {row.got:.6g}, the model {row.wanted:.6g}" if row.absolute else "equal"
            where = f"output {row.output} " * (row.output > 0) + where
            lines.append(f"{row.batch:5}  {row.problem or f'{row.error:8.1e}  {row.absolute:8.1e}  {where}'}")
        return "\n".join([*lines, self.diagnosis] if self.diagnosis else lines)


def parity(
    model: nn.Module,
    exported: Callable | torch.export.ExportedProgram,
    inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 4, 8),
    tolerance: float | None = None,
) -> Parity:
    """Run the model in eval mode and `exported` on the same rows, for each batch size, and tell how far they differ.

    The same NaN or infinity in the same place is no difference; whole numbers are equal or they are not. Shapes, dtypes
    and NaN that differ, and batch sizes that `exported` refuses, are told in the report, not raised.

    An export in train mode is recognised: two runs on one input differ (dropout), or the output is that of the model in
    train mode (BatchNorm with the statistics of the batch). The model is left as it was, buffers and modes included.

    Args:
        model: what was exported, in any mode.
        exported: an exported program, or any callable that takes the same inputs.
        inputs: (n, ...), or a tuple of such tensors, on the model's device. Rows are repeated where a batch needs more.
        batch_sizes: each at least 1.
        tolerance: None takes 0 for torch.export on a CPU, which calls the same kernels, and else what fits the dtype:
            1e-5 for float32. On a GPU with TF32 switched on, 1e-3 is what can be had.
    """
    rows = tensors_of("inputs", inputs)
    sizes = _sizes(batch_sizes)
    run = exported.module() if isinstance(exported, torch.export.ExportedProgram) else exported
    if not callable(run):
        raise TypeError(
            f"exported must be a program or a callable, got {expect.describe(exported)}. Load it: OnnxSession(path)."
        )
    buffers = [(buffer, buffer.clone()) for buffer in expect.module("model", model).buffers()]
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # asking one that sleeps would wake it
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus):
            with eval_mode(model):
                wanted = {size: _outputs(model(*rows_of(rows, size))) for size in sizes}
                again = _outputs(model(*rows_of(rows, max(sizes))))
            results = [_compare_batch(size, wanted[size], run, rows) for size in sizes]
            dtype = next((x.dtype for x in wanted[sizes[0]] if x.is_floating_point()), wanted[sizes[0]][0].dtype)
            limit, reason = _tolerance(model, run, rows, dtype) if tolerance is None else (float(tolerance), "as asked for")
            report = Parity(_name(run), dtype, limit, reason, tuple(results))
            steady = _error(wanted[max(sizes)], again).error <= max(limit, TOLERANCES.get(dtype, 0))
            return _diagnosed(report, model, run, rows, steady)
    finally:
        for buffer, before in buffers:  # a script or a program made elsewhere shares them with the model
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def largest_error(
    model: nn.Module, exported: Callable, inputs: Inputs, batch_sizes: Sequence[int] = (1, 4, 8)
) -> dict[str, float | int | tuple[int, ...] | None]:
    """`parity` in one number: the error of the batch size at which it is largest.

    Infinite where there is nothing to compare: another shape, NaN in one of the two alone, a batch that is refused.

    Args:
        model, exported, inputs, batch_sizes: as for `parity`.

    Returns:
        {"error", "batch_size": where it is largest, the first of equals, "index": of the worst element or None}
    """
    rows = tensors_of("inputs", inputs)
    with eval_mode(expect.module("model", model)), torch.no_grad():
        results = [_compare_batch(size, _outputs(model(*rows_of(rows, size))), exported, rows) for size in _sizes(batch_sizes)]
    worst = max(results, key=lambda row: row.error)
    return {"error": worst.error, "batch_size": worst.batch, "index": worst.index or None}


def _diagnosed(report: Parity, model: nn.Module, run: Callable, rows: tuple[Tensor, ...], steady: bool) -> Parity:
    """The report with what can be told of the export as a whole. `steady`: two runs of the model in eval mode agree."""
    refused = [row.batch for row in report.rows if row.problem.startswith("refused")]
    taken = [row.batch for row in report.rows if row.batch not in refused]
    faults = []
    if refused and len(taken) == 1 and _compare_batch(taken[0] + 1, [], run, rows).problem.startswith("refused"):
        faults.append(f"fixed batch size: it takes {listed(taken)} and refuses {listed(refused)}. Export a dynamic batch.")
    if not steady:
        faults.append("the model itself gives two outputs for one input in eval mode. Look for dropout that ignores eval mode.")
    elif taken:
        size = max(taken)
        batch = rows_of(rows, size)
        allowed = max(report.tolerance, TOLERANCES.get(report.dtype, 0.0))
        first, second = _outputs(run(*batch)), _outputs(run(*fresh(batch)))
        if _error(first, second).error > allowed:
            faults.append("exported in train mode: two runs on one input differ, as with dropout. Call model.eval() first.")
        elif any(row.batch == size and row.error > allowed for row in report.rows) and _as_in_train_mode(
            model, first, batch, allowed
        ):
            faults.append("exported in train mode: BatchNorm takes the statistics of the batch. Call model.eval() first.")
    return replace(report, diagnosis="\n".join(faults))


def _as_in_train_mode(model: nn.Module, got: list[Tensor], batch: tuple[Tensor, ...], allowed: float) -> bool:
    """Whether `got` is what the model computes in the modes it has now, or wholly in train mode."""
    for train in (False, True):
        try:
            twin = copy.deepcopy(model)
            twin = twin.train() if train else twin
            if _error(_outputs(twin(*fresh(batch))), got).error <= allowed:
                return True
        except (ValueError, RuntimeError):  # a model may not run in train mode: BatchNorm wants more than one value
            continue
    return False


def _compare_batch(size: int, wanted: list[Tensor], run: Callable, rows: tuple[Tensor, ...]) -> BatchParity:
    try:
        got = _outputs(run(*rows_of(rows, size)))
    except Exception as error:  # every format has its own class for a shape that it does not take
        return BatchParity(size, problem=f"refused: {first_line(error)}")
    return replace(_error(wanted, got), batch=size)


def _error(wanted: list[Tensor], got: list[Tensor]) -> BatchParity:
    """Where two lists of outputs lie furthest apart; batch 0."""
    if len(wanted) != len(got):
        return BatchParity(0, problem=f"{len(got)} outputs, the model gives {len(wanted)}")
    worst = BatchParity(0, error=0.0, absolute=0.0)
    for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape:
            return BatchParity(0, output=number, problem=f"shape {tuple(b.shape)}, the model gives {tuple(a.shape)}")
        if a.dtype != b.dtype:
            return BatchParity(0, output=number, problem=f"{b.dtype}, the model gives {a.dtype}")
        scaled = a.is_floating_point()  # whole numbers are equal or they are not
        a, b = a.cpu().double(), b.cpu().double()
        if (odd := a.isnan() != b.isnan()).any():
            index = tuple(odd.nonzero()[0].tolist())
            where = "the export" if b[index].isnan() else "the model"
            return BatchParity(0, output=number, index=index, problem=f"NaN at {list(index)} in {where} alone")
        if a.numel() == 0:
            continue
        difference = (a - b).abs().masked_fill((a == b) | a.isnan(), 0)  # inf - inf is no difference
        index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        absolute = difference[index].item()
        scale = a[a.isfinite()].abs().max().item() if scaled and a.isfinite().any() else float(not scaled)
        error = absolute / scale if absolute and scale else float("inf") if absolute else 0.0
        if error > worst.error:
            worst = BatchParity(0, error, absolute, number, index, a[index].item(), b[index].item())
    return worst


def _sizes(batch_sizes: Sequence[int]) -> list[int]:
    sizes = [expect.whole_number("a batch size", size) for size in batch_sizes]
    if not sizes:
        raise ValueError("batch_sizes must hold at least 1 size, got none. Take (1, 4, 8).")
    return sizes


def _tolerance(model: nn.Module, run: Callable, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[float, str]:
    if dtype not in TOLERANCES:
        return 0.0, "whole numbers are equal or they are not"
    # in eval mode these two take a fused kernel that torch.export does not record
    fused = any(isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer) for module in model.modules())
    if isinstance(run, torch.fx.GraphModule) and rows[0].device.type == "cpu" and not fused:
        return 0.0, "torch.export on a CPU calls the same kernels in the same order"
    kind, step = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 2
    return TOLERANCES[dtype], f"{kind} rounds by up to {step:.0e} of a number, and sums are in another order"


def tensors_of(name: str, value: object) -> tuple[Tensor, ...]:
    """Inputs of a model as a tuple of tensors with the same number of rows.

    Raises:
        TypeError: `value` is something else, such as a list of texts.
        ValueError: a tensor has no rows, or another number of them.
    """
    tensors = (value,) if isinstance(value, Tensor) else value
    if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise TypeError(
            f"{name} must be a tensor (n, ...) or a tuple of such tensors, got {expect.describe(value)}. A model that takes "
            "texts or files prepares them in Python: export what comes after, as text_backbone().encoder."
        )
    for index, x in enumerate(tensors):
        expect.tensor(name if x is value else f"{name}[{index}]", x, ("n", "..."))
    if len({len(x) for x in tensors}) > 1:
        raise ValueError(f"{name} must have the same number of rows each, got {listed([len(x) for x in tensors])}.")
    return tensors


def rows_of(tensors: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """`count` rows of each, from the first on, around and around; copies, for models that write into their input."""
    return tuple(x[torch.arange(count, device=x.device) % len(x)] for x in tensors)


def fresh(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies without a graph."""
    return tuple(x.detach().clone() for x in tensors)


def _outputs(value: object) -> list[Tensor]:
    """The tensors in what a model gives, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for item in value for x in _outputs(item)]
    return [torch.as_tensor(value)]  # arrays and numbers


def _name(run: Callable) -> str:
    kinds = {torch.fx.GraphModule: "torch.export", torch.jit.ScriptModule: "TorchScript"}
    return next((name for kind, name in kinds.items() if isinstance(run, kind)), type(run).__name__)


def listed(numbers: Sequence[int]) -> str:
    """1, 4 and 8."""
    return " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = lines[-1] if lines[0].startswith("The following operation failed in the TorchScript") else lines[0]
    return f"{type(error).__name__}: {text if len(text) <= 120 else text[:120] + '…'}".rstrip(".")
