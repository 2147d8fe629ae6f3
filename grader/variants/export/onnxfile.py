"""Exercise 8.4 in other styles."""

import copy
import warnings
from functools import partial

import torch
from torch.export import Dim

from grader.checks.export.onnxfile import export_onnx
from grader.checks.export.parity import children_kept, in_eval_mode, only_the_root


def of_a_copy(model, example, path):
    twin = copy.deepcopy(model)
    twin.eval()
    torch.onnx.export(
        twin,
        (example.expand(2, *example.shape[1:]) if len(example) == 1 else example,),
        str(path),
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=[{0: Dim("batch")}],
        external_data=False,
        dynamo=True,
    )
    return path


def saved_afterwards(model, example, path):
    flags = [module.training for module in model.modules()]
    try:
        program = torch.onnx.export(
            model.train(False),
            args=(torch.cat([example] * 2),),
            dynamo=True,
            dynamic_shapes=[{0: Dim.DYNAMIC}],
            input_names=("input",),
            output_names=("output",),
            verbose=False,
        )
    finally:
        for module, flag in zip(model.modules(), flags, strict=True):
            module.training = flag
    program.save(path)


class ThroughAProgram:
    """torch.export first; what it made is what ONNX gets."""

    def __call__(self, model, example, path):
        training = {name for name, module in model.named_modules() if module.training}
        for module in model.modules():
            module.training = False
        try:
            with torch.no_grad():
                rows = example.repeat_interleave(2, dim=0)
                program = torch.export.export(model, (rows,), dynamic_shapes=({0: Dim.AUTO},))
        finally:
            for name in training:
                model.get_submodule(name).training = True
        names = {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(program, (rows,), path, dynamo=True, external_data=False, verbose=False, **names)


def by_the_old_exporter(model, example, path, fixed_at=0, given="input"):
    """Through a trace, ten times as fast; `fixed_at` rows the batch size is a constant."""
    modes = {module: module.training for module in model.modules()}
    axes = None if len(example) == fixed_at else {name: {0: "batch"} for name in (given, "output")}
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        torch.onnx.export(
            model.eval(), (example,), str(path), dynamo=False, input_names=[given], output_names=["output"], dynamic_axes=axes
        )
    for module in modes:
        module.training = modes[module]


def the_usual_call(model, example, path):
    model.eval()
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)


CORRECT = [of_a_copy, saved_afterwards, ThroughAProgram(), by_the_old_exporter]
REWRITTEN = {}
USUAL = {"the example's batch size only", "left in eval mode", "weights in a second file", "names left to the exporter"}


def onnx_with(**changes):
    """A right solution, but for the changes."""
    return partial(in_eval_mode, **{"export": export_onnx} | changes)


def batchnorm_of_the_batch(model, example, path):
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    export_onnx(twin, example, path)


BROKEN = {
    1: [onnx_with(evaluated=only_the_root), batchnorm_of_the_batch],
    2: [partial(by_the_old_exporter, fixed_at=1)],
    3: [onnx_with(external_data=True)],
    4: [partial(by_the_old_exporter, given="x")],
    5: [onnx_with(export=by_the_old_exporter, keeping=children_kept)],
}
COMBINED = [(USUAL, the_usual_call)]

EQUIVALENT = {
    "… (rows,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch')},), … -> "
    "… (rows,), path, dynamic_shapes=({0: torch.export.Dim('batch')},), …": "True is the default",
    "… output_names=['output'], external_data=False, verbose=False) -> "
    "… output_names=['output'], external_data=False)": "what it prints is not asked for",
    "… dynamic_shapes=({0: torch.export.Dim('batch')},), input_names=['input'], … -> "
    "… dynamic_shapes=({0: 'batch'},), input_names=['input'], …": "a name makes a dimension, too",
    "… external_data=False, verbose=False) -> … external_data=False, verbose=True)": "what it prints is not asked for",
}
