"""Exercise 8.2 in other styles."""

import copy
import warnings
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch.jit.frontend import NotSupportedError

from grader.checks.export.parity import children_kept, in_eval_mode, kept_unless_it_raises, one_mode_kept, only_the_root
from grader.checks.export.torchscript import script_or_trace


def on_a_copy(model, example):
    frozen = copy.deepcopy(model)
    frozen.eval()
    try:
        return torch.jit.script(frozen)
    except Exception:
        return torch.jit.trace(frozen, (example,))


def modes_in_a_list(model, example):
    flags = [module.training for module in model.modules()]
    model.train(False)
    exported = None
    try:
        with suppress(Exception):
            exported = torch.jit.script(model)
        if exported is None:
            exported = torch.jit.trace(model, example, check_trace=False)
    finally:
        for module, flag in zip(model.modules(), flags, strict=True):
            module.train(flag) if not list(module.children()) else setattr(module, "training", flag)
    return exported


class ByCallbacks:
    """Each module's way back is put on a stack before the first is switched."""

    def __call__(self, model, example):
        with ExitStack() as after, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for module in model.modules():
                after.callback(setattr, module, "training", module.training)
                module.training = False
            for export in (lambda: torch.jit.script(model), lambda: torch.jit.trace_module(model, {"forward": example})):
                try:
                    return export()
                except Exception as error:
                    last = error
            raise last


def frozen_constants(model, example):
    training = [name for name, module in model.named_modules() if module.training]
    try:
        model.eval()
        try:
            exported = torch.jit.script(model)
        except Exception:
            exported = torch.jit.trace(model, example, strict=False)
        return torch.jit.freeze(exported)
    finally:
        for name in training:
            model.get_submodule(name).training = True


def the_usual_three_lines(model, example):
    model.eval()
    return torch.jit.trace(model, example)


def script_as_it_is(model, example):
    return torch.jit.script(model)


CORRECT = [on_a_copy, modes_in_a_list, ByCallbacks(), frozen_constants]
REWRITTEN = {}


def torchscript(export, **changes):
    """A right solution around `export(model, example)`, but for the changes."""
    return partial(in_eval_mode, export=export, **changes)


def without_batchnorm_in_eval_mode(model, example):
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return script_or_trace(twin, example)


def scripted_in_train_mode(model, example):
    try:
        return torch.jit.script(model)
    except Exception:
        return on_a_copy(model, example)


def traced_if_it_can_be(model, example):
    try:
        return torch.jit.trace(model, example)
    except Exception:
        return torch.jit.script(model)


def traced_if_two_batches_agree(model, example):
    trace = torch.jit.trace(model, example)
    with torch.no_grad(), suppress(Exception):
        if torch.allclose(trace(example[:1]), model(example[:1])):
            return trace
    return script_or_trace(model, example)


def two_errors(model, example):
    return script_or_trace(model, example, (RuntimeError, NotSupportedError))


def an_error_printed(model, example):
    try:
        return script_or_trace(model, example)
    except Exception as error:
        print(error)


def the_model_itself(model, example):
    try:
        return script_or_trace(model, example)
    except Exception:
        return model


def one_row_is_enough(model, example):
    return script_or_trace(model, example[:1])


def made_up(model, example):
    return script_or_trace(model, torch.rand_like(example))


BROKEN = {
    1: [torchscript(script_or_trace, evaluated=only_the_root), without_batchnorm_in_eval_mode, scripted_in_train_mode],
    2: [torchscript(traced_if_it_can_be), torchscript(traced_if_two_batches_agree)],
    3: [
        *(torchscript(export) for export in (two_errors, one_row_is_enough, made_up)),
        torchscript(partial(script_or_trace, caught=RuntimeError)),
    ],
    4: [torchscript(an_error_printed), torchscript(the_model_itself)],
    5: [torchscript(script_or_trace, keeping=keeping) for keeping in (one_mode_kept, kept_unless_it_raises, children_kept)],
}
COMBINED = [
    ({"always traced", "left in eval mode"}, the_usual_three_lines),
    ({"always scripted", "train mode exported"}, script_as_it_is),
]

EQUIVALENT = {
    "except Exception: -> except BaseException:": "also catches what no compiler raises",
}
