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


def trace_and_then_script(model, example):
    """Trace hardly ever fails, so script hardly ever gets its turn."""
    twin = copy.deepcopy(model).eval()
    for export in (lambda: torch.jit.trace(twin, example, check_trace=False), lambda: torch.jit.script(twin)):
        try:
            return export()
        except Exception as error:
            last = error
    raise last


def compiled_copy(model, _):
    return torch.jit.script(copy.deepcopy(model).train(False))


def a_tuple_of_errors(model, example):
    twin = copy.deepcopy(model).eval()
    try:
        exported = torch.jit.script(twin)
    except (RuntimeError, TypeError, ValueError, OSError):
        exported = torch.jit.trace(twin, example_inputs=(example,))
    return exported


def as_it_is(model, example):
    with suppress(Exception):
        return torch.jit.script(model)
    return torch.jit.trace(model, example, check_trace=False)


def switched_for_script_alone(model, example):
    flags = {name: module.training for name, module in model.named_modules()}
    try:
        return torch.jit.script(model.eval())
    except Exception:
        for name, flag in flags.items():
            model.get_submodule(name).training = flag
        return torch.jit.trace(model, example, check_trace=False)
    finally:
        for name, flag in flags.items():
            model.get_submodule(name).training = flag


def switched_for_good(model, example):
    for module in model.modules():
        module.training = False
    with suppress(Exception):
        return torch.jit.script(model)
    return torch.jit.trace(model, example)


def train_afterwards(model, example):
    was = model.training
    model.eval()
    try:
        try:
            return torch.jit.script(model)
        except Exception:
            return torch.jit.trace(model, (example,))
    finally:
        if was:
            model.train()


def else_and_back(model, example):
    flags = [module.training for module in model.modules()]
    model.eval()
    try:
        exported = torch.jit.script(model)
    except Exception:
        exported = torch.jit.trace(model, example)
    for module, flag in zip(model.modules(), flags, strict=True):
        setattr(module, "training", flag)  # noqa: B010
    return exported


def the_usual_three_lines(model, example):
    model.eval()
    return torch.jit.trace(model, example)


def script_as_it_is(model, example):
    return torch.jit.script(model)


RIGHT = [on_a_copy, modes_in_a_list, ByCallbacks(), frozen_constants]
AGAIN = {
    "always traced": trace_and_then_script,
    "always scripted": compiled_copy,
    "one kind of error expected": a_tuple_of_errors,
    "train mode exported": as_it_is,
    "traced in train mode": switched_for_script_alone,
    "left in eval mode": switched_for_good,
    "one mode for all modules": train_afterwards,
    "not restored after an error": else_and_back,
}
BOTH = [
    ({"always traced", "left in eval mode"}, the_usual_three_lines),
    ({"always scripted", "train mode exported"}, script_as_it_is),
]
