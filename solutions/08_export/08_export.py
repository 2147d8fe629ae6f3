# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · Export
#
# A trained network is a Python object. Its users may have another version of PyTorch, no PyTorch, or no Python. An
# export turns the network into a file that other programs run. Each format keeps something and loses something, and
# most of what goes wrong raises no error: the file computes something else. So this chapter starts with the test, and
# applies it to four ways out.
#
# | | |
# |---|---|
# | you need | chapters 00, 02 and 04; no GPU, no network |
# | time | two hours for you; 15 seconds for two CPU cores (measured; without a GPU) |
# | exercises | 5 |
#
# Afterwards you can
#
# - prove that an export computes what the model computes, and say within which tolerance and why,
# - say what TorchScript loses when it traces, and why it is a legacy today,
# - export with a batch size that may vary, whatever the example had,
# - write an ONNX file that runs without PyTorch,
# - time formats against each other so that the numbers can be trusted,
# - choose a format from a table that you measured.
#
# Words in *italics* at their first use are in the [glossary](../../docs/glossary.md).

# %%
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from grader import check, continue_with, hint, progress, quiz
from helpers.modes import eval_mode

# %% [markdown]
# ## The model
#
# The model is glyphnet with a head for handwritten digits, fine-tuned as in chapter 04. Its preprocessing, (x - mean)
# / std, is the first step of its `forward`, so it travels inside every file. A transform outside the model has to be
# written again wherever the file runs, and there the two often differ.
#
# **Predict before you run.** Take the time of the model in PyTorch, for one image, as 1. How much time does the same
# network take in ONNX Runtime on the same CPU? And as a torch.export program? And how large is the ONNX file, taking
# the 1.3 MB of the weights as 1?

# %% tags=["demo"]
from helpers.predict import predict

guess = predict(onnx_time=None, program_time=None, onnx_size=None)

# %% tags=["demo"]
from helpers.backbones import classifier, glyphnet
from helpers.data import digits
from helpers.features import drop_head
from helpers.training import evaluate, fit

train, test = digits("train", labels_per_class=10), digits("test")
model = classifier(drop_head(glyphnet()), classes=10)
fit(model, train, steps=150, lr=3e-3, batch_size=32)
model.eval()
folder = Path(tempfile.mkdtemp())
torch.save(model.state_dict(), folder / "weights.pt")
print(
    f"accuracy {evaluate(model, test):.3f}   weights alone: "
    f"{(folder / 'weights.pt').stat().st_size:,} bytes"
)

# %% [markdown]
# # Part 1: the test

# %% [markdown]
# ## Exercise 8.1: is it still the same model?
#
# An export is another program. Run it and the model on the same inputs, at several *batch sizes*: an export may have
# one built in, and only the others show it. An average hides a wrong element, so *parity* looks at the largest
# difference. It compares that with the largest output, since beside an output near 0 rounding is a large ratio.
#
# **Exercise 8.1** (25 min, ●●○). Write `largest_error`.
#
# *Core*
#
# 1. A batch is the first `b` inputs; its error is `max |exported(x) - model(x)| / max |model(x)|`.
# 2. The result names the largest error, its batch size and the index of its worst element.
# 3. If `exported` raises, whatever exception it is, the error is infinite.
# 4. If its output has another shape, or a NaN, the error is infinite too.
# 5. The model computes in eval mode.
#
# *Fine print*
#
# 6. Each module is in its own mode afterwards, also if `exported` raised.
# 7. The model's run keeps no graph.
# 8. An exact export has a batch size too.


# %%
def largest_error(
    model: nn.Module,
    exported: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    batch_sizes: tuple[int, ...],
) -> dict:
    """The largest difference between an export and its model, and where it is.

    >>> inputs = torch.tensor([[1.0, -2.0], [4.0, 3.0]])
    >>> largest_error(nn.Identity(), torch.abs, inputs, (1, 2))
    {'error': 2.0, 'batch_size': 1, 'index': (0, 1)}

    Args:
        model: in any mode. Its outputs (b, ...) are right: finite, not all 0.
        exported: any function of one batch (b, ...). Its output may have a shape
            that only broadcasts with the model's: that counts as another shape.
        inputs: (n, ...).
        batch_sizes: each from 1 to n.

    Returns:
        "error": over all elements of the output, 0 or more.
        "batch_size": one of `batch_sizes`; any of them if several errors are equal.
        "index": a whole number for each dimension of the batch's output; any of them
            if several are equal, and None is fine if the error is infinite.
            `torch.unravel_index` makes it from the one number that `argmax` gives.
    """
    ### BEGIN SOLUTION
    worst = {"error": -1.0}
    with eval_mode(model):
        for b in batch_sizes:
            with torch.no_grad():
                wanted = model(inputs[:b])
            try:
                got = exported(inputs[:b])
            except Exception:
                got = None
            error, index = float("inf"), None
            if got is not None and got.shape == wanted.shape and not got.isnan().any():
                difference = (got - wanted).abs()
                error = (difference.max() / wanted.abs().max()).item()
                index = torch.unravel_index(difference.argmax(), difference.shape)
                index = tuple(i.item() for i in index)
            if error > worst["error"]:
                worst = {"error": error, "batch_size": b, "index": index}
    return worst
    ### END SOLUTION


# %%
check("8.1", largest_error)

# %%
largest_error = continue_with("8.1")

# %% [markdown]
# ### Where a tolerance comes from
#
# Here the model is compared with itself: the same weights and the same images, computed in different ways. None of
# them is wrong.


# %% tags=["demo"]
images = test.inputs[:8]


def one_by_one(x):
    return torch.cat([model(row[None]) for row in x])


def without_onednn(x):
    with torch.backends.mkldnn.flags(enabled=False):
        return model(x)


warnings.filterwarnings(
    "ignore", "TF32 acceleration", UserWarning
)  # torch says that this machine has no Intel GPU
double, half = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
others = {
    "the same again": model,
    "one image at a time": one_by_one,
    "other kernels (no oneDNN)": without_onednn,
    "float64": lambda x: double(x.double()).float(),
    "bfloat16": lambda x: half(x.bfloat16()).float(),
}
with torch.no_grad():
    for name, other in others.items():
        print(
            f"{name:<28}{largest_error(model, other, images, (1, 4, 8))['error']:.1e}"
        )

# %% [markdown]
# One image at a time and eight at once add the same numbers in another order; so do other *kernels*, the pieces of code
# that compute one operation (oneDNN is a library of them). In float32 each addition rounds by up to 6e-8 of its result,
# and the results differ in the seventh digit. float64 hardly rounds, so its row shows the rounding of the float32 model
# itself. A *tolerance* of **1e-5** leaves room for some 170 roundings in the same direction; the wrong exports of this
# chapter are off by more than 1. bfloat16 keeps 8 significant bits: one rounding is up to 0.4 %, and here they add up
# to 0.8 %. A tolerance is not a number that makes a test pass: it follows from the number format and the number of
# sums.

# %% [markdown]
# # Part 2: four ways out

# %% [markdown]
# ## Exercise 8.2: compile it, or record it
#
# *TorchScript* runs without Python, and without the model's class. There are two ways into it. A *script* is compiled
# from the source of `forward`, branches and loops included, but its compiler knows only a part of Python. A *trace*
# records the tensor operations of one run. It accepts nearly any Python and keeps none of it: an `if` becomes the
# side that the example took, a loop becomes the steps that it needed, and from train mode a dropout stays on for
# ever.
#
# **Exercise 8.2** (20 min, ●●○). Write `to_torchscript`.
#
# *Core*
#
# 1. Saved and loaded, the result computes what the model computes in eval mode.
# 2. A model that script can compile is scripted: right for any batch size, and on both sides of an `if`.
# 3. A model that script cannot compile, whatever the error, is traced with `example`.
#
# *Fine print*
#
# 4. If the trace fails too, an error is raised.
# 5. Each module is in its own mode again, also after an error.


# %%
def to_torchscript(model: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    """The model as TorchScript: compiled if that is possible, recorded if not.

    >>> module = to_torchscript(nn.Linear(3, 2), torch.randn(4, 3))
    >>> isinstance(module, torch.jit.ScriptModule), module(torch.randn(1, 3)).shape
    (True, torch.Size([1, 2]))

    Args:
        model: takes one tensor (n, ...), n the batch; in any mode.
        example: such a tensor.

    Returns:
        A module that `torch.jit.save` writes. A trace may have frozen a branch; your
        function need not notice (`helpers.export.to_torchscript` does).

    Raises:
        Exception: of any type, if the model can be neither scripted nor traced.
    """
    ### BEGIN SOLUTION
    with eval_mode(model):
        try:
            return torch.jit.script(model)
        except Exception:  # the compiler has errors of several kinds
            return torch.jit.trace(model, example)
    ### END SOLUTION


# %%
check("8.2", to_torchscript)  # exports several times: some seconds

# %%
to_torchscript = continue_with("8.2")

# %% [markdown]
# ### What each of the two loses
#
# Here are a model that branches on its input, and one with arguments that TorchScript's compiler does not know:


# %% tags=["demo"]
class Bright(nn.Module):
    """Inverts images that are mostly ink."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        if images.mean() > 0.5:
            images = 1 - images
        return self.inner(images)


class Several(nn.Module):
    """Takes any number of batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *batches):
        return self.inner(torch.cat(batches))


bright, ink = Bright(model), 1 - test.inputs[:8]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    traced = torch.jit.trace(bright, test.inputs[:8])
for message in dict.fromkeys(
    str(warning.message).split(". ")[0][:110] for warning in said
):
    print("warning:", message)
print(
    "traced:     paper as in the example "
    f"{largest_error(bright, traced, test.inputs[:8], (8,))['error']:.1e}"
)
print(
    "            inverted images         "
    f"{largest_error(bright, traced, ink, (8,))['error']:.1e}"
)
warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # said once is enough
scripted = to_torchscript(bright, test.inputs[:8])
print(
    "scripted:   inverted images         "
    f"{largest_error(bright, scripted, ink, (8,))['error']:.1e}"
)
try:
    torch.jit.script(Several(model))
except Exception as error:
    print(
        "script of Several:", type(error).__name__, str(error).strip().splitlines()[0]
    )

# %% [markdown]
# The trace is right on images like its example, and wrong by more than the largest logit on the others, without an
# error. While tracing there was only a warning about a Python boolean; outside this cell it goes to stderr. The
# script kept the `if`. A script loses nothing in silence: it refuses what its compiler does not know, such as
# arguments collected with `*`, most of Python's libraries, and much of what transformers are made of.
#
# TorchScript is a legacy today, deprecated since PyTorch 2.5; PyTorch 2.14 warns at each call, and for Python 3.14 it
# says that TorchScript is not supported. Models had to be written for its compiler, which never caught up with
# Python, and its trace freezes branches in silence. Today one uses `torch.export`, the subject of the next exercise,
# for what leaves Python, and `torch.compile` for speed inside it. TorchScript is still worth knowing: there are many
# such files, and nothing else shows so plainly what a recorded run loses.

# %% tags=["demo"]
scripted = to_torchscript(model, test.inputs[:2])
scripted.save(folder / "model.torchscript.pt")
print(
    "parity of the file:",
    largest_error(
        model, torch.jit.load(folder / "model.torchscript.pt"), images, (1, 4, 8)
    ),
)

# %% [markdown]
# ## Exercise 8.3: a graph for any number of rows
#
# `torch.export` runs the model on tensors without numbers and writes down every operation. The result is an *exported
# program*, a graph with its weights. Where numbers would decide what comes next, it refuses. Sizes are constants,
# unless `dynamic_shapes` says that they may vary. It is a tuple with an entry for each argument of `forward`: a dict
# from a dimension to a `torch.export.Dim("name")`. This gives you a *dynamic batch*. But a size of 1 stays a
# constant: arithmetic has special rules for it.
#
# **Exercise 8.3** (20 min, ●●○). Write `to_program`.
#
# *Core*
#
# 1. Saved and loaded, the program computes what the model computes in eval mode.
# 2. Its batch size is dynamic: it takes 1, 4 or 8 rows, or any larger number.
# 3. Its batch size is dynamic even if `example` has a single row.
#
# *Fine print*
#
# 4. An error of `torch.export` is passed on.
# 5. Each module is in its own mode again, also after an error.


# %%
def to_program(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The model as a graph of torch operators, for any number of rows.

    >>> program = to_program(nn.Linear(3, 2), torch.randn(1, 3))
    >>> program.module()(torch.randn(5, 3)).shape
    torch.Size([5, 2])

    Args:
        model: takes one tensor (n, ...), n the batch; in any mode.
        example: such a tensor, n at least 1; of floats, or of integers as tokens
            are. Its dtype and its other sizes are those of all inputs; the numbers
            in it do not matter.
    """
    ### BEGIN SOLUTION
    if len(example) == 1:
        example = torch.cat([example, example])  # a size of 1 would become a constant
    with eval_mode(model):
        batch = torch.export.Dim("batch")
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    ### END SOLUTION


# %%
check("8.3", to_program)  # exports several times: some seconds

# %%
to_program = continue_with("8.3")

# %% [markdown]
# ### What a program is, and what it refuses
#
# The graph of an exported program is a list of torch's own operations, *operators*. The first of ours:

# %% tags=["demo"]
program = to_program(model, test.inputs[:2])
operators = [
    str(node.target) for node in program.graph.nodes if node.op == "call_function"
]
print(f"{len(operators)} operators:", *operators[:9], "...", sep="\n    ")
torch.export.save(program, folder / "with_slice.pt2")
torch.export.save(to_program(model, test.inputs[:2].clone()), folder / "model.pt2")
for name in ("with_slice.pt2", "model.pt2"):
    print(f"{name:<16}{(folder / name).stat().st_size:>10,} bytes")
loaded = torch.export.load(folder / "model.pt2").module()
print("parity of the file:", largest_error(model, loaded, images, (1, 4, 8)))

# %% [markdown]
# A program shares its weights with the model until it is saved: train on, and the program changes too. Save it at once,
# or export a copy.
#
# Both files are of the same network, and one is three times as large. A program keeps its example, and `save` writes
# all of the memory that the example is a slice of: here 800 test images of 4 KB. Export with a row of your training
# data, and you may send all of it along. A `clone()` of the rows holds nothing else; made-up rows hold nobody's data.

# %% [markdown]
# A list of operators cannot hold a branch that depends on numbers in a tensor:

# %% tags=["demo"]
import helpers.export

try:
    helpers.export.to_program(bright, images)
except helpers.export.ExportFailed as error:
    print("ExportFailed:", error)


class BrightWithoutBranch(Bright):
    def forward(self, images):
        return self.inner(torch.where(images.mean() > 0.5, 1 - images, images))


rewritten = helpers.export.to_program(BrightWithoutBranch(model), images)
print(
    "rewritten with torch.where, inverted images: "
    f"{largest_error(bright, rewritten.module(), ink, (1, 4, 8))['error']:.1e}"
)

# %% [markdown]
# ### Exported in train mode
#
# This is the popular mistake in all formats: torch's own functions get the model in train mode, as a training loop
# leaves it. The error is measured against the model in eval mode. glyphnet has BatchNorm and no dropout, so a second
# network gets a dropout before its first layer:

# %% tags=["demo"]
from helpers.progress import progress_bar

careless = copy.deepcopy(model).train()
dropping = nn.Sequential(nn.Dropout(0.5), copy.deepcopy(model)).train()


def onnx_session(model, name):
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (images,),
        folder / name,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch},),
    )
    return helpers.export.OnnxSession(folder / name)


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    batch = torch.export.Dim("batch")
    exports = {
        "torch.jit.trace": lambda: torch.jit.trace(copy.deepcopy(careless), images),
        "torch.export.export": lambda: torch.export.export(
            copy.deepcopy(careless), (images,), dynamic_shapes=({0: batch},)
        ).module(),
        "torch.onnx.export": lambda: onnx_session(
            copy.deepcopy(careless), "careless.onnx"
        ),
        "the same, with dropout": lambda: onnx_session(dropping, "dropping.onnx"),
    }
    in_train_mode = {
        name: export() for name, export in progress_bar(exports.items(), "exporting")
    }
for message in dict.fromkeys(
    str(warning.message).split(".")[0]
    for warning in said
    if "training mode" in str(warning.message)
):
    print("warning:", message)
print(
    f"{'exported in train mode':<28}{'error':>9}   right of 200, one image at a time  "
    " all 200 at once"
)
for name, exported in ({"(the model in eval mode)": model} | in_train_mode).items():
    error = largest_error(model, exported, images, (1, 4, 8))["error"]
    with torch.no_grad():
        single = torch.cat([exported(image[None]) for image in test.inputs[:200]])
        right = [
            (logits.argmax(1) == test.labels[:200]).sum().item()
            for logits in (single, exported(test.inputs[:200]))
        ]
    print(f"{name:<28}{error:>9.1e}   {right[0]:<34}{right[1]}")

# %% [markdown]
# The trace and the exported program keep BatchNorm as it is in train mode: it uses the statistics of the batch that
# it gets. Accuracy on 200 images at once does not show it. Parity shows it at any batch size. One image at a time, as
# a service gets them, 120 digits of 200 are lost. The ONNX exporter warns, but it writes BatchNorm with its running
# statistics. It leaves dropout on, and a quarter of the digits is lost, different ones each time.

# %% [markdown]
# ## Exercise 8.4: a file for other programs
#
# *ONNX* is a file format for networks. *ONNX Runtime* and other programs run it, in many languages, without PyTorch;
# all they get of your model is this file. `torch.onnx.export` works by way of `torch.export`. Three of its defaults
# do not suit a file that you hand on: all sizes are constants, most weights go to a second file, and the output is
# named after the operation that made it.
#
# **Exercise 8.4** (25 min, ●●●). Write `to_onnx`.
#
# *Core*
#
# 1. ONNX Runtime computes from the file what the model computes in eval mode, its *logits*, to 1e-5 of the largest.
# 2. Its batch size is dynamic, even if `example` has a single row.
# 3. The file is all that is needed: a copy in another folder opens there.
# 4. Its input is called `input`, whatever `forward` calls it, and its output `output`.
#
# *Fine print*
#
# 5. Each module is in its own mode again.


# %%
def to_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write the model as one ONNX file for any number of rows.

    >>> import onnxruntime, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "model.onnx")
    >>> _ = to_onnx(nn.Linear(3, 2), torch.randn(1, 3), path)
    >>> session = onnxruntime.InferenceSession(path)
    >>> session.run(["output"], {"input": torch.randn(5, 3).numpy()})[0].shape
    (5, 2)

    Args:
        model: takes one tensor (n, ...), n the batch; in any mode.
        example: such a tensor, n at least 1.
        path: of the file, in a folder that exists.
    """
    ### BEGIN SOLUTION
    rows = torch.cat(
        [example, example]
    )  # two or more: a size of 1 may become a constant
    with eval_mode(model):
        torch.onnx.export(
            model,
            (rows,),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["input"],
            output_names=["output"],
            external_data=False,  # the weights in the same file
            verbose=False,
        )
    ### END SOLUTION


# %% [markdown]
# The exporter prints what it does; `verbose=False` keeps it quiet.

# %%
check("8.4", to_onnx)  # exports several times: some seconds

# %%
to_onnx = continue_with("8.4")

# %% [markdown]
# ### The file, without PyTorch
#
# A new Python process that never imports torch runs the file on eight images:

# %% tags=["demo"]
import subprocess
import sys

import numpy as np

path = folder / "model.onnx"
to_onnx(model, test.inputs[:2], path)
np.save(folder / "images.npy", images.numpy())
code = """
import sys, time
started = time.perf_counter()
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0]
seconds = time.perf_counter() - started
print("digits", logits.argmax(1).tolist(), f"after {seconds:.2f} s;", end=" ")
print("torch imported:", "torch" in sys.modules)
"""
program = [sys.executable, "-c", code, path, folder / "images.npy"]
print(
    subprocess.run(program, capture_output=True, text=True, check=True).stdout.rstrip()
)
print("labels", test.labels[:8].tolist())
print(
    "parity of the file:",
    largest_error(model, helpers.export.OnnxSession(path), images, (1, 4, 8)),
)

# %% [markdown]
# The file holds the preprocessing, the network and the head, and the process that ran it never saw torch. (Where the
# model is wrong, the file is wrong too: parity compares with the model, not with the labels.) The file does not hold
# the names of the classes, or whatever happens to an image before it is a tensor.
#
# Who can read it? ONNX Runtime, in C, C++, C#, Java, JavaScript and more, and other runtimes. TensorFlow cannot by
# itself. Of the converters, tf2onnx goes the other way; onnx2tf, which one person maintains, goes this way.
#
# ### TensorRT
#
# *TensorRT* builds an engine, a program for one kind of NVIDIA GPU, from an ONNX file.
# `helpers.tensorrt.to_tensorrt(onnx_path, path)` does this with its Python API, in full float32. With its
# command-line tool it is
#
#     trtexec --onnx=model.onnx --saveEngine=model.engine --noTF32 --minShapes=input:1x1x32x32 --optShapes=input:4x1x32x32 --maxShapes=input:8x1x32x32
#
# TF32, which `--noTF32` turns off, keeps 10 bits of a float32's 23 in products; a tolerance of 1e-5 would be too
# tight for it. The next cell runs TensorRT if you have it and a GPU.

# %% tags=["demo"]
from helpers.tensorrt import TensorRTEngine, to_tensorrt

engine = None
try:
    engine = TensorRTEngine(to_tensorrt(path, folder / "model.engine"))
    print(
        "parity of the engine:",
        largest_error(model, lambda x: engine(x).cpu(), images, (1, 4, 8)),
    )
except helpers.export.ExportFailed as error:
    print("not run here:", error)

# %% [markdown]
# # Part 3: which one?

# %% [markdown]
# ## Exercise 8.5: which one is faster?
#
# A first call is slow: memory is asked for, code is compiled, caches are filled (*warm-up*). Later the machine does
# something else for a moment, and one call is an *outlier*; the *median* hardly moves. Or the machine slows down for
# a minute, and whatever ran in that minute looks slow. So functions take turns. The time of one call is its
# *latency*.
#
# **Exercise 8.5** (20 min, ●●○). Write `median_seconds`.
#
# *Core*
#
# 1. First every function runs at least once; these calls do not count.
# 2. Then come `rounds` rounds. In each of them every function runs once, in any order.
# 3. Each call is timed by itself with `clock`, from right before it to right after it.
# 4. The result is the median of a function's `rounds` times. For an even number of times it is the mean of the
#    middle two.


# %%
import statistics
from collections.abc import Callable


def median_seconds(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median time of each function in seconds, under its name.

    >>> now = [100.0]
    >>> def slow():
    ...     now[0] += 2.5
    >>> def fast():
    ...     now[0] += 0.5
    >>> median_seconds({"slow": slow, "fast": fast}, 3, lambda: now[0])
    {'slow': 2.5, 'fast': 0.5}

    Args:
        functions: name -> a function without arguments. What it returns does not
            matter. On a GPU it ends with `torch.cuda.synchronize()`, or you would time
            only the start of the work.
        rounds: at least 1.
        clock: gives the time in seconds; only differences mean anything. In real use
            this is `time.perf_counter`. The check has a clock of its own, on which
            minutes pass in no time.
    """
    ### BEGIN SOLUTION
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
    ### END SOLUTION


# %%
check("8.5", median_seconds)

# %%
median_seconds = continue_with("8.5")

# %% [markdown]
# ### The table
#
# The table shows the files as they are on the disk, beside the model itself, which is called *eager*: PyTorch runs
# one operation after the other. Your `largest_error` and your `median_seconds` measure them, on one thread, since
# several threads also measure what else the machine does. (A service uses more. Measure yours.)

# %% tags=["demo"]
from helpers.recordings.formats import NEEDS, circumstances, recorded
from helpers.training import one_thread

files = {
    "eager": (folder / "weights.pt", model),
    "TorchScript": (
        folder / "model.torchscript.pt",
        torch.jit.load(folder / "model.torchscript.pt"),
    ),
    "torch.export": (
        folder / "model.pt2",
        torch.export.load(folder / "model.pt2").module(),
    ),
    "ONNX Runtime": (path, helpers.export.OnnxSession(path, threads=1)),
}
if engine is not None:
    files["TensorRT"] = (
        folder / "model.engine",
        lambda x: engine(x).cpu(),
    )  # on the GPU, with the copies there and back
calls = {name: lambda run=run: run(images[:1]) for name, (_, run) in files.items()}
with one_thread(), torch.no_grad():
    median_seconds(
        calls, 3, time.perf_counter
    )  # TorchScript goes on optimising after its first call
    seconds = median_seconds(calls, 101, time.perf_counter)
sizes = {name: file.stat().st_size for name, (file, _) in files.items()}
print(
    f"{'one image':<16}{'runs in':<22}{'KB':>6}{'ms':>8}{'of eager':>10}{'error':>10}"
)
for name, (_, run) in files.items():
    where = (
        "Python"
        if NEEDS[name].python
        else "C++ with PyTorch"
        if NEEDS[name].torch
        else "its own runtime"
    )
    error = largest_error(model, run, images, (1, 4, 8))["error"]
    print(
        f"{name:<16}{where:<22}{sizes[name] / 1000:>6.0f}{1000 * seconds[name]:>8.2f}"
        f"{seconds[name] / seconds['eager']:>10.2f}{error:>10.0e}"
    )

guess.beside(
    {
        "onnx_time": seconds["ONNX Runtime"] / seconds["eager"],
        "program_time": seconds["torch.export"] / seconds["eager"],
        "onnx_size": sizes["ONNX Runtime"] / sizes["eager"],
    }
)

# %% [markdown]
# Compilers make another kind of file, or none, and take longer. *torch.compile* makes kernels for a model while it
# runs, for this process; *AOTInductor* compiles an exported program into a package for C++. Both need a C++ compiler.
# They were recorded once, with the other formats, for three networks:

# %% tags=["demo"]
print(
    f"recorded on {circumstances()['machine']}, one thread, {circumstances()['date']}"
    "; milliseconds as a share of eager's"
)
rows_of = {
    "glyphnet, 1 row": ("glyphnet", 1),
    "resnet18, 1 row": ("resnet18", 1),
    "MiniLM, 32 rows": ("MiniLM", 32),
}
print(f"{'':<16}{'made in':>10}" + "".join(f"{name:>18}" for name in rows_of))
kept = {
    name: {row.name: row for row in recorded(network)[batch]}
    for name, (network, batch) in rows_of.items()
}
for name in NEEDS:
    first, cells = kept["glyphnet, 1 row"][name], []
    for rows in kept.values():
        there = rows[name].milliseconds
        cells.append(
            f"{there[1] / rows['eager'].milliseconds[1]:.2f}" if there else "none yet"
        )
    print(
        f"{name:<16}{f'{first.seconds:.1f} s' if first.seconds else '':>10}"
        + "".join(f"{cell:>18}" for cell in cells)
    )

# %% [markdown]
# The files hold the weights and little more. In the record ONNX Runtime takes 0.32 of eager's time for one image and
# this small network, TorchScript 0.67. Is your table above close to that? Both are ratios of times around a
# millisecond, and they move from run to run. An exported program gains nothing (1.17), since the same kernels run: it
# is what the compilers and the ONNX exporter start from.
#
# On a larger network, or with more rows, you may gain less, or more: a compiled resnet18 takes 1.01 of eager's time
# on 1 row, 0.82 on 8 and 0.72 on 32, while glyphnet in ONNX Runtime goes from 0.32 to 0.51. On 32 texts for MiniLM
# the fastest takes 0.92. So measure yours.
#
# Read the tables by need, not by row: first where it has to run, then what you measured there.
#
#
# | where it has to run | what there is | what it costs |
# |---|---|---|
# | in Python, with the model's code | eager; torch.compile for more speed | the code has to be there; compiling takes long, again in each process |
# | in Python, without the model's code | torch.export | PyTorch; its documentation says that newer versions may not read the file |
# | in C++ with PyTorch's library | AOTInductor; TorchScript (legacy) | a package fits one platform; a trace freezes branches |
# | without PyTorch | ONNX | operators that ONNX does not have; another program to keep up to date |
# | on one kind of NVIDIA GPU | TensorRT, from the ONNX file | an engine for that GPU and that version alone |
#
# For phones there is ExecuTorch, which starts from an exported program; it is not tried here.
# `helpers.recordings.formats.compare` makes this table for a network of yours.
#
# ### Turn the knobs

# %% tags=["demo"]
from helpers.explorers import explore_export

explore_export()

# %% tags=["demo"]
quiz("export")

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - An export is right when a test says so: several batch sizes, inputs that take every branch, eval mode, a tolerance
#   with a reason.
# - A trace is one run. Branches on data are frozen; torch warns, once, on stderr.
# - The batch size of the example is in the file unless you say that it may vary. An example of one row is a special
#   case.
# - Export in eval mode. A trace and an exported program keep train mode without a word. The ONNX exporter warns;
#   today it switches BatchNorm to eval mode, and leaves dropout on.
# - Preprocessing that is not in the model is not in the file.
# - Formats are compared in turns, after a warm-up, by medians. A small difference may be reversed when you measure
#   again: look at the spread.
# - Which format: first where it has to run, then what you measured there.
#
# Words: [AOTInductor](../../docs/glossary.md#aotinductor), [batch size](../../docs/glossary.md#batch-size), [dynamic
# batch](../../docs/glossary.md#dynamic-batch), [eager](../../docs/glossary.md#eager), [eval
# mode](../../docs/glossary.md#eval-mode), [export](../../docs/glossary.md#export), [exported
# program](../../docs/glossary.md#exported-program), [kernel](../../docs/glossary.md#kernel),
# [latency](../../docs/glossary.md#latency), [median](../../docs/glossary.md#median),
# [ONNX](../../docs/glossary.md#onnx), [ONNX Runtime](../../docs/glossary.md#onnx-runtime),
# [operator](../../docs/glossary.md#operator), [outlier](../../docs/glossary.md#outlier),
# [parity](../../docs/glossary.md#parity), [script](../../docs/glossary.md#script),
# [TensorRT](../../docs/glossary.md#tensorrt), [tolerance](../../docs/glossary.md#tolerance),
# [torch.compile](../../docs/glossary.md#torchcompile), [torch.export](../../docs/glossary.md#torchexport),
# [TorchScript](../../docs/glossary.md#torchscript), [trace](../../docs/glossary.md#trace),
# [warm-up](../../docs/glossary.md#warm-up).
