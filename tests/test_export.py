import copy
import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from helpers import export
from helpers.export import (
    ExportFailed,
    OnnxSession,
    to_onnx,
    to_program,
    to_torchscript,
)
from helpers.parity import largest_error, parity
from helpers.recordings.formats import Format, Formats, compare
from helpers.tensorrt import TensorRTEngine, to_tensorrt

EXPORTERS = {"torchscript": to_torchscript, "program": to_program}

on_every_device = pytest.mark.usefixtures("device")  # see conftest.py; the others are about files, names and errors


@pytest.fixture
def net(digits_net):
    """In train mode, with running statistics that a batch does not have."""
    with torch.no_grad():
        digits_net.bn.running_mean.normal_()
        digits_net.bn.running_var.uniform_(0.5, 2)
    return digits_net


@pytest.fixture
def images():
    return torch.randn(8, 1, 9, 9)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class PythonBranch(nn.Module):
    """One that script cannot compile."""

    def forward(self, *inputs):
        x = inputs[0]
        if x.sum() > 0:
            return x + 1
        return x - 1


class FixedRows(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.view(self.rows, 3) + 1


class TwoOutputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor):
        return a + b, (a * b).argmax(1)


class ForgetfulDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


def exported_carelessly(model: nn.Module, example: Tensor, how: str):
    """As one would without these helpers: in the modes that the model has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "script":
            return torch.jit.script(model)
        if how == "trace":
            return torch.jit.trace(model, example)
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC},))


def in_eval_mode(model: nn.Module, *inputs: Tensor) -> Tensor:
    return copy.deepcopy(model).eval()(*inputs).detach()


# ---- exporters


@pytest.mark.parametrize("how", EXPORTERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_in_train_mode_is_exported_in_eval_mode_for_any_batch(net, images, how, rows):
    exported = EXPORTERS[how](net, images[:rows])
    run = exported.module() if how == "program" else exported
    for size in (1, 2, 8):
        assert torch.equal(run(images[:size]), in_eval_mode(net, images[:size]))


@pytest.mark.parametrize("how", EXPORTERS)
def test_exporting_leaves_the_model_and_the_example_as_they_were(net, images, how, capfd):
    net.bn.eval()
    net.conv.requires_grad_(False)
    modes = {name: module.training for name, module in net.named_modules()}
    before, example = copy.deepcopy(net.state_dict()), images.clone()
    EXPORTERS[how](net, example)
    with pytest.raises((ExportFailed, ValueError)):
        EXPORTERS[how](net, images[:, :, :1])  # smaller than the kernel
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["conv.weight", "conv.bias"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(example, images)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", EXPORTERS)
def test_what_was_exported_does_not_follow_later_training(net, images, how):
    exported = EXPORTERS[how](net, images)
    wanted = in_eval_mode(net, images)
    with torch.no_grad():
        net.fc.weight.zero_()
        net.bn.running_mean.fill_(100)
    assert torch.equal((exported.module() if how == "program" else exported)(images), wanted)


@pytest.mark.parametrize("how", EXPORTERS)
def test_a_model_that_writes_into_its_input_is_exported_too(how):
    model, x = nn.ReLU(inplace=True), torch.randn(4, 3)
    before = x.clone()
    assert parity(model, EXPORTERS[how](model, x), x).ok
    assert torch.equal(x, before)


def test_script_keeps_a_branch(images):
    script = to_torchscript(Branch(), torch.ones(2, 3))
    assert torch.equal(script(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert torch.equal(script(-torch.ones(2, 3)), torch.full((2, 3), -2.0))


def test_a_trace_that_freezes_a_branch_is_refused_unless_asked_for():
    message = (
        "a trace would freeze `if x.sum() > 0:` (test_export.py) as it went for the example. Compute both sides and choose "
        "with torch.where, or pass freeze_branches=True if it always goes that way."
    )
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_torchscript(PythonBranch(), torch.ones(2, 3))
    frozen = to_torchscript(PythonBranch(), torch.ones(2, 3), freeze_branches=True)
    assert torch.equal(frozen(-torch.ones(2, 3)), torch.zeros(2, 3))  # x + 1, where the model gives x - 1


def test_a_trace_of_a_model_that_is_not_steady_is_refused():
    class Unsteady(nn.Module):
        def forward(self, *inputs):
            return F.dropout(inputs[0], 0.5)

    message = (
        "a trace must compute what the model computes, got another output from a second run of it. "
        "Look for dropout that ignores eval mode: F.dropout(x, p, self.training)."
    )
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_torchscript(Unsteady(), torch.randn(20, 30), freeze_branches=True)


def test_a_warning_of_the_model_itself_is_passed_on():
    class Warning(nn.Module):
        def forward(self, *inputs):
            warnings.warn("inputs in 0 to 255", stacklevel=1)
            return inputs[0] / 255

    model = Warning()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_torchscript(model, torch.ones(2, 3))
    assert {str(warning.message) for warning in caught} == {"inputs in 0 to 255"}


def test_a_branch_on_values_is_refused_by_torch_export_in_one_sentence(capfd):
    message = (
        "torch.export cannot follow `if x.sum() > 0:` in forward: it depends on the values of a tensor. "
        "Compute both sides and choose with torch.where, or use torch.cond."
    )
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_program(Branch(), torch.ones(2, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rows", [1, 4])
def test_a_fixed_batch_is_refused_by_torch_export(rows):
    message = (
        f"the model's code fixes the batch size to {rows}, as of the example. "
        "Where a number, len(x) or a loop over rows says so, take x.shape[0], -1 or x.flatten(1)."
    )
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_program(FixedRows(rows), torch.ones(rows, 3))


def test_a_model_that_keeps_a_graph_is_named():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x):
            self.last = self.fc(x)
            return self.last

    model = nn.Sequential(Remembers())
    model(torch.ones(2, 3))
    message = "a model to export must be copied, and 0.last keeps a graph. Detach what forward stores."
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_program(model, torch.ones(2, 3))


def test_several_inputs_and_a_second_dynamic_dimension():
    a, b = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    program = to_program(TwoOutputs(), (a, b), axes={2: "tokens"})
    for shape in ((1, 2, 5), (4, 2, 9)):
        a, b = torch.randn(shape), torch.randn(shape)
        assert all(torch.equal(x, y) for x, y in zip(program.module()(a, b), TwoOutputs()(a, b), strict=True))


def test_positional_inputs_without_names():
    class Sum(nn.Module):
        def forward(self, first, *rest):
            return first + sum(rest)

    x = torch.randn(3, 2)
    assert torch.equal(to_program(Sum(), (x, x, x)).module()(x[:1], x[:1], x[:1]), x[:1] + 2 * x[:1])


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (
            ["a text"],
            TypeError,
            "example must be a tensor (n, ...) or a tuple of such tensors, got a list. A model that takes texts or files "
            "prepares them in Python: export what comes after, as text_backbone().encoder.",
        ),
        (torch.ones(()), ValueError, "example must have shape (n, ...), got ()."),
        (torch.ones(0, 3), ValueError, "example must have shape (n, ...), got (0, 3)."),
        (
            (torch.ones(2, 3), torch.ones(4, 3)),
            ValueError,
            "example must have the same number of rows each, got 2 and 4.",
        ),
        (
            torch.ones(2, 5),
            ValueError,
            "example must be what the model takes, got RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x5 and 3x1). "
            "A model that takes texts or files prepares them in Python: export what comes after, as text_backbone().encoder.",
        ),
    ],
)
@pytest.mark.parametrize("how", EXPORTERS)
def test_an_example_that_does_not_fit_is_named(how, example, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        EXPORTERS[how](nn.Linear(3, 1), example)


def test_a_dynamic_dimension_needs_a_size_above_1_in_the_example():
    message = "example must have a size of at least 2 along axis 1, got 1: torch.export keeps a 1."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_program(nn.ReLU(), torch.ones(2, 1), axes={1: "tokens"})


# ---- ONNX


@pytest.mark.slow
def test_onnx_is_one_file_with_names_and_a_dynamic_batch_and_nothing_is_printed(net, images, tmp_path, capfd):
    import onnx

    path = to_onnx(net, images[:1], tmp_path / "new" / "net.onnx")  # whose forward calls them images
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]
    graph = onnx.load(path).graph
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in graph.input] == [("input", "batch")]
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in graph.output] == [("output", "batch")]
    report = parity(net, OnnxSession(path, threads=1), images)
    assert report.ok and report.tolerance == 1e-5 and net.training
    message = "the file takes 1 inputs, ['input'], got 2. Pass each."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OnnxSession(path)(images, images)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_onnx_with_two_inputs_and_outputs_and_weights_beside_a_large_file(tmp_path, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(50, 50)

        def forward(self, ids, mask):
            return self.fc(ids) * mask, mask.sum(1)

    monkeypatch.setattr(export, "ONE_FILE", 100)
    model, inputs = Two(), (torch.randn(2, 6, 50), torch.ones(2, 6, 50))
    path = to_onnx(model, inputs, tmp_path / "two.onnx", axes={1: "tokens"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["two.onnx", "two.onnx.data"]
    session = OnnxSession(path)
    assert (session.inputs, session.outputs) == (["ids", "mask"], ["output_0", "output_1"])
    assert parity(model, session, (torch.randn(3, 9, 50), torch.ones(3, 9, 50))).ok


def test_a_failed_onnx_export_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        args[2].write_bytes(b"half")
        raise RuntimeError("no operator for aten::odd")

    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.onnx, "export", interrupted)
    message = "Linear cannot become ONNX: RuntimeError: no operator for aten::odd. Try to_program."
    with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
        to_onnx(nn.Linear(3, 1), torch.ones(2, 3), path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call, message in (
        (
            lambda: to_onnx(nn.ReLU(), torch.ones(2, 3), tmp_path / "x.onnx"),
            "ONNX files need onnx and onnxscript. Install: pip install onnx onnxscript",
        ),
        (lambda: OnnxSession("x.onnx"), "an ONNX file needs onnxruntime to run. Install: pip install onnxruntime"),
        (
            lambda: to_tensorrt("x.onnx", "x.engine"),
            "TensorRT needs the package tensorrt and a CUDA GPU, not found here. Take OnnxSession on this machine.",
        ),
        (
            lambda: TensorRTEngine("x.engine"),
            "TensorRT needs the package tensorrt and a CUDA GPU, not found here. Take OnnxSession on this machine.",
        ),
    ):
        with pytest.raises(ExportFailed, match=f"^{re.escape(message)}$"):
            call()


# ---- parity


@on_every_device
def test_the_error_is_the_largest_difference_by_the_largest_output_and_is_located():
    class Shifted(nn.Module):
        def forward(self, x):
            return x + 0.5 * ((torch.arange(len(x)) == 2)[:, None] & (torch.arange(3) == 1))

    x = torch.tensor([[1.0, -10.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    report = parity(nn.Identity(), Shifted(), x, batch_sizes=(1, 4))
    first, second = report.rows
    assert (first.error, first.absolute) == (0, 0)
    assert (second.error, second.absolute, second.index) == (0.05, 0.5, (2, 1))
    assert (second.wanted, second.got, report.worst) == (8.0, 8.5, second)
    assert (report.error, report.ok, report.diagnosis) == (0.05, False, "")
    assert parity(nn.Identity(), Shifted(), x, tolerance=0.05).ok
    assert str(report).splitlines() == [
        "Shifted does not compute what the model computes "
        "(float32, tolerance 1e-05: float32 rounds by up to 6e-08 of a number, and sums are in another order)",
        "batch  relative  absolute  where",
        "    1   0.0e+00   0.0e+00  equal",
        "    4   5.0e-02   5.0e-01  [2, 1]: 8.5, the model 8",
    ]


@pytest.mark.parametrize(
    ("wanted", "got", "problem"),
    [
        (torch.ones(1, 3), torch.ones(1, 2), "shape (1, 2), the model gives (1, 3)"),
        (torch.ones(1, 3), torch.ones(1, 3).double(), "torch.float64, the model gives torch.float32"),
        (torch.ones(1, 3), (torch.ones(1, 3),) * 2, "2 outputs, the model gives 1"),
        (torch.ones(1, 2), torch.tensor([[1, torch.nan]]), "NaN at [0, 1] in the export alone"),
        (torch.tensor([[1, torch.nan]]), torch.ones(1, 2), "NaN at [0, 1] in the model alone"),
    ],
)
def test_outputs_that_cannot_be_compared_are_told(wanted, got, problem):
    class Says(nn.Module):
        def forward(self, x):
            return wanted

    report = parity(Says(), lambda x: got, torch.ones(1, 1), batch_sizes=(1,), tolerance=100)
    assert not report.ok and report.error == float("inf")
    assert report.rows[0].problem == problem and str(report).splitlines()[-1].endswith(problem)


@on_every_device
def test_the_same_nan_and_infinity_are_no_difference_and_others_are():
    x = torch.tensor([[torch.nan, torch.inf, 1.0]])
    assert parity(nn.Identity(), lambda x: x + 0, x).ok
    assert parity(nn.Identity(), lambda x: -x, x).error == float("inf")


@on_every_device
def test_whole_numbers_are_equal_or_not():
    x = torch.tensor([[1_000_000, 5]])
    assert parity(nn.Identity(), lambda x: x + 0, x).ok
    report = parity(nn.Identity(), lambda x: x + 1, x)
    assert not report.ok and report.error == 1 and report.tolerance == 0


@on_every_device
def test_zeros_are_compared_too():
    assert parity(nn.Identity(), lambda x: x + 0, torch.zeros(2, 2)).ok
    assert parity(nn.Identity(), lambda x: x + 1e-9, torch.zeros(2, 2)).error == float("inf")


@on_every_device
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_the_tolerance_fits_sums_in_another_order(dtype, tolerance):
    linear = nn.Linear(300, 20, dtype=dtype)
    order = torch.randperm(300)
    report = parity(
        linear, lambda x: F.linear(x[:, order], linear.weight[:, order], linear.bias), torch.randn(8, 300, dtype=dtype)
    )
    assert report.tolerance == tolerance and report.ok and report.dtype == dtype


def test_torch_export_on_a_cpu_is_held_to_equality(net, images):
    report = parity(net, to_program(net, images), images)
    assert (report.tolerance, report.error, report.exported) == (0, 0, "torch.export")


def test_a_fused_kernel_of_eval_mode_gets_a_tolerance():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(8, 5, 16)
    report = parity(layer, to_program(layer, x), x)
    assert report.ok and report.tolerance == 1e-5


@pytest.mark.parametrize("how", ["script", "trace", "program"])
def test_an_export_in_train_mode_with_dropout_is_recognised(how):
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2))
    x = torch.randn(8, 3)
    report = parity(model, exported_carelessly(model, x, how), x)
    assert not report.ok
    assert report.diagnosis == (
        "exported in train mode: two runs on one input differ, as with dropout. Call model.eval() first."
    )


@pytest.mark.parametrize("how", ["script", "trace", "program"])
@pytest.mark.parametrize("batch_sizes", [(1,), (1, 4)])
def test_an_export_in_train_mode_with_batchnorm_is_recognised_and_moves_nothing(how, batch_sizes):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3))
    x = torch.randn(4, 1, 7, 7)
    exported = exported_carelessly(model, x, how)
    model.eval()  # too late
    before = copy.deepcopy(model.state_dict())
    if how == "script":
        exported.train()  # a script follows eval() of its own
    report = parity(model, exported, x, batch_sizes)
    assert report.diagnosis == ("exported in train mode: BatchNorm takes the statistics of the batch. Call model.eval() first.")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and not model.training


@on_every_device
def test_an_error_of_other_origin_is_not_taken_for_train_mode(net, images):
    assert parity(net, lambda x: in_eval_mode(net, x) + 1, images).diagnosis == ""
    assert parity(nn.Linear(9, 9), lambda x: x + 1, images).diagnosis == ""


def test_a_model_that_is_not_steady_in_eval_mode_is_named():
    report = parity(ForgetfulDropout(), to_program(ForgetfulDropout(), torch.randn(8, 30)), torch.randn(8, 30))
    assert report.diagnosis == (
        "the model itself gives two outputs for one input in eval mode. Look for dropout that ignores eval mode."
    )


def test_a_fixed_batch_size_is_reported_not_raised():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    report = parity(model, torch.export.export(model.eval(), (x,)), x)
    assert report.diagnosis == "fixed batch size: it takes 4 and refuses 1 and 8. Export a dynamic batch."
    assert [bool(row.problem) for row in report.rows] == [True, False, True]
    assert all(row.problem.startswith("refused: ") for row in report.rows if row.problem) and not report.ok


@on_every_device
def test_parity_leaves_modes_and_random_state(net, images):
    net.bn.eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    assert not parity(net, net, images).ok  # in the modes it has, dropout is on
    assert [module.training for module in net.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError):
        parity(nn.Sequential(net, Raising()), net, images)
    assert [module.training for module in net.modules()] == modes


class Raising(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError


def test_what_parity_cannot_take_is_named():
    with pytest.raises(TypeError, match=r"^exported must be a program or a callable, got 'm.onnx'. Load it: OnnxSession"):
        parity(nn.ReLU(), "m.onnx", torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^batch_sizes must hold at least 1 size, got none. Take \(1, 4, 8\).$"):
        parity(nn.ReLU(), nn.ReLU(), torch.ones(2, 3), batch_sizes=())


# ---- formats


@pytest.mark.slow
def test_a_model_is_compared_in_every_format(net, images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {row.name: row for row in compare(net, images, tmp_path, rounds=2)}
    assert list(rows) == ["eager", "TorchScript", "torch.export", "ONNX Runtime", "TensorRT"]
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sorted(files.values()) == sorted(row.bytes for row in rows.values() if not row.note)
    assert all(row.parity.ok for row in rows.values() if not row.note) and "tensorrt" in rows["TensorRT"].note
    assert net.training


def test_formats_are_printed_as_a_table():
    report = parity(nn.ReLU(), nn.ReLU(), torch.ones(2, 3))
    table = Formats([
        Format("ONNX Runtime", False, 1298777, 1.5, (0.45, 0.49, 0.6), report),
        Format("TensorRT", False, note="not here."),
    ])  # fmt: skip
    assert str(table).splitlines() == [
        "format           Python       KB export s    median ms (quartiles)    error  within",
        "ONNX Runtime     no         1299     1.50      0.49 (0.45 to 0.60)    0e+00  1e-05: yes",
        "TensorRT         no     not here.",
    ]


@pytest.fixture
def small():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    small[1].eval()
    return small


@on_every_device
def test_the_largest_error_is_relative_to_the_largest_output_of_its_batch(small):
    x = torch.randn(8, 3)
    y = small(x).detach().cpu()
    place = torch.unravel_index(y[:4].abs().argmin(), (4, 2))  # next to 0, where a ratio of its own would be large

    def exported(batch):
        out = small(batch)
        if len(batch) == 4:
            out[place] -= 0.01
        return out

    worst = largest_error(small, exported, x, (1, 4, 8))
    assert worst["error"] == pytest.approx(0.01 / y[:4].abs().max().item(), rel=1e-4)
    assert (worst["batch_size"], worst["index"]) == (4, tuple(int(i) for i in place))


@on_every_device
def test_the_largest_error_leaves_every_module_in_its_mode(small):
    assert largest_error(small, lambda x: small[2](small[0](x)), torch.randn(8, 3))["error"] == 0
    assert [module.training for module in small.modules()] == [True, True, False, True]


@on_every_device
@pytest.mark.parametrize("spoil", [lambda y: y[:, :1], lambda y: y.squeeze(), lambda y: y * math.nan, lambda y: y.view(99)])
def test_what_cannot_be_compared_is_infinitely_wrong(small, spoil):
    worst = largest_error(small, lambda x: spoil(small(x)) if len(x) == 1 else small(x), torch.randn(8, 3))
    assert (worst["error"], worst["batch_size"]) == (math.inf, 1)


@on_every_device
def test_outputs_that_are_zero_in_both_are_equal():
    zeros = nn.Linear(3, 2).requires_grad_(False)
    nn.init.zeros_(zeros.weight), nn.init.zeros_(zeros.bias)
    assert largest_error(zeros, lambda x: x.new_zeros(len(x), 2), torch.randn(8, 3))["error"] == 0
    assert largest_error(zeros, lambda x: x.new_ones(len(x), 2), torch.randn(8, 3))["error"] == math.inf


def test_the_largest_error_needs_a_batch_size(small):
    with pytest.raises(ValueError, match=r"^batch_sizes must hold at least 1 size, got none\. Take \(1, 4, 8\)\.$"):
        largest_error(small, small, torch.randn(3, 3), ())


# ---- models of the course


@pytest.mark.slow
def test_a_resnet_and_glyphnet_compute_the_same_when_exported(tmp_path):
    from torchvision.models import resnet18

    from helpers.backbones import glyphnet

    for model, x in ((resnet18(), torch.rand(1, 3, 64, 64)), (glyphnet(), torch.rand(1, 1, 32, 32))):
        assert parity(model, to_torchscript(model, x), x).ok
        assert parity(model, to_program(model, x), x).ok
    assert parity(model, OnnxSession(to_onnx(model, x, tmp_path / "model.onnx")), x).ok


@pytest.mark.slow
def test_minilm_is_exported_for_any_number_of_texts_and_tokens():
    from helpers.backbones import text_backbone

    backbone = text_backbone()
    example = tuple(backbone.preprocess(["one text", "a longer one"]).values())
    texts = tuple(backbone.preprocess([" ".join(["word"] * count) for count in range(1, 12)]).values())
    assert parity(backbone.encoder, to_program(backbone.encoder, example, axes={1: "tokens"}), texts).ok
    assert parity(backbone.encoder, to_torchscript(backbone.encoder, example, freeze_branches=True), texts).ok
    with pytest.raises(ValueError, match=r"prepares them in Python: export what comes after, as text_backbone\(\).encoder.$"):
        to_program(backbone, example[:1])


def test_the_file_of_a_program_holds_no_more_than_the_rows_of_its_example(tmp_path):
    everything = torch.randn(1000, 100)
    sizes = []
    for name, example in (("slice.pt2", everything[:2]), ("clone.pt2", everything[:2].clone())):
        torch.export.save(to_program(nn.Linear(100, 2), example), tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] == sizes[1] < everything.nbytes / 10
