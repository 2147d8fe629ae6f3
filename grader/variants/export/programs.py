"""Exercise 8.3 in other styles."""

import copy
from contextlib import ExitStack
from functools import partial

import torch
from torch import export
from torch.export import Dim

from grader.checks.export.parity import children_kept, in_eval_mode, kept_unless_it_raises, one_mode_kept, only_the_root


def on_a_copy(model, example):
    twin = copy.deepcopy(model).eval()
    rows = example.repeat(2, *[1] * (example.ndim - 1))
    return export.export(twin, (rows,), dynamic_shapes=[{0: Dim("batch")}])


def modes_by_name(model, example):
    before = {name: module.training for name, module in model.named_modules()}
    model.train(False)
    try:
        while len(example) < 2:
            example = torch.cat((example, example))
        return export.export(model, args=(example,), dynamic_shapes=((Dim.AUTO, *[None] * (example.dim() - 1)),))
    finally:
        for name, flag in before.items():
            model.get_submodule(name).training = flag


class WithShapesCollection:
    """Traced by dynamo, under no_grad, with the class that torch.export has for such a description."""

    def __call__(self, model, example):
        with ExitStack() as after, torch.no_grad():
            for module in model.modules():
                after.callback(setattr, module, "training", module.training)
                module.training = False
            rows = torch.zeros((3, *example.shape[1:]), dtype=example.dtype)
            shapes = export.ShapesCollection()
            shapes[rows] = {0: Dim.DYNAMIC}
            return export.export(model, (rows,), dynamic_shapes=shapes, strict=True)


def expanded(model, example):
    flags = [module.training for module in model.modules()]
    try:
        if example.size(0) == 1:
            example = example.expand(4, *example.shape[1:]).contiguous()
        batch = Dim("rows", min=1)
        return export.export(model.eval(), (example,), {}, dynamic_shapes=({0: batch},))
    finally:
        for module, flag in zip(model.modules(), flags, strict=True):
            if module.training != flag:
                module.training = flag


def switched_for_good(model, example):
    for module in model.modules():
        module.training = False
    rows = torch.cat([example] * 2)
    return export.export(model, (rows,), dynamic_shapes=({0: Dim("batch")},))


def the_first_page_of_the_tutorial(model, example):
    return export.export(model, (example,))


def dynamic_and_left(model, example):
    model.eval()
    return export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))


CORRECT = [on_a_copy, modes_by_name, WithShapesCollection(), expanded]
REWRITTEN = {"left in eval mode": switched_for_good}


def with_softmax(model, example):
    return on_a_copy(model if len(example) == 1 else torch.nn.Sequential(model, torch.nn.Softmax(-1)), example)


def without_batchnorm_in_eval_mode(model, example):
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return on_rows(twin, example)


def on_rows(model, example, **dim):
    rows = torch.cat([example, example])
    return export.export(model, (rows,), dynamic_shapes=({0: Dim("batch", **dim)},))


def fixed_unless_one_row(model, example):
    return on_a_copy(model, example) if len(example) == 1 or model.training else export.export(model, (example,))


def made_up_rows(model, example):
    if len(example) == 1:
        example = torch.randn(2, *example.shape[1:])
    return on_a_copy(model, example)


def repeated_in_two_dimensions(model, example):
    return on_a_copy(model, example.repeat(2, 1) if len(example) == 1 else example)


def refused_in_silence(model, example):
    try:
        return on_a_copy(model, example)
    except Exception as error:
        print(error)


def recorded_instead(model, example):
    try:
        return on_a_copy(model, example)
    except Exception:
        return torch.jit.trace(copy.deepcopy(model).eval(), example)


def program_with(**changes):
    return partial(in_eval_mode, **{"export": on_rows} | changes)


BROKEN = {
    1: [program_with(evaluated=only_the_root), without_batchnorm_in_eval_mode, with_softmax],
    2: [program_with(export=lambda model, rows: on_rows(model, rows, max=64)), fixed_unless_one_row],
    3: [made_up_rows, repeated_in_two_dimensions],
    4: [refused_in_silence, recorded_instead],
    5: [program_with(keeping=one_mode_kept), program_with(keeping=kept_unless_it_raises), program_with(keeping=children_kept)],
}
COMBINED = [
    ({"the example's batch size only", "train mode exported"}, the_first_page_of_the_tutorial),
    ({"one row refused", "left in eval mode"}, dynamic_and_left),
]

EQUIVALENT = {
    "if len(example) == 1: -> if True:": "an example that is there twice is as good",
}
