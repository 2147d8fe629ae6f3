"""Exercise 8.4 in other styles."""

import copy
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


def the_usual_call(model, example, path):
    model.eval()
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)


CORRECT = [of_a_copy, saved_afterwards, ThroughAProgram()]


REWRITTEN = {}
USUAL = {"the example's batch size only", "left in eval mode", "weights in a second file", "names left to the exporter"}


def onnx_with(**changes):
    """A right solution, but for the changes."""
    return partial(in_eval_mode, **{"export": export_onnx} | changes)


def fixed_to_one_row(model, example, path):
    export_onnx(model, example, path, **{"doubled": False, "dynamic_shapes": None} if len(example) == 1 else {})


def under_the_name_of_the_argument(model, example, path):
    export_onnx(model, example, path, input_names=None)


def batchnorm_of_the_batch(model, example, path):
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    export_onnx(twin, example, path)


BROKEN = {
    1: [onnx_with(evaluated=only_the_root), batchnorm_of_the_batch],
    2: [onnx_with(export=fixed_to_one_row)],
    3: [onnx_with(external_data=True)],
    4: [onnx_with(export=under_the_name_of_the_argument)],
    5: [onnx_with(keeping=children_kept)],
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
