"""Exercise 8.2 in other styles."""

import copy
import warnings
from contextlib import ExitStack, suppress

import torch


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
BROKEN = {}
COMBINED = [
    ({"always traced", "left in eval mode"}, the_usual_three_lines),
    ({"always scripted", "train mode exported"}, script_as_it_is),
]

EQUIVALENT = {
    "except Exception: -> except BaseException:": "also catches what no compiler raises",
}
