"""Exercise 2.2a in other styles."""

from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import nn

from grader.checks.features.modes import solution
from helpers.modes import eval_mode


class EvalMode:
    """A class in place of a generator."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.trained = {name for name, module in self.model.named_modules() if module.training}
        self.model.apply(lambda module: setattr(module, "training", False))
        return self.model

    def __exit__(self, *_):
        for name, module in self.model.named_modules():
            module.training = name in self.trained
        return False


@contextmanager
def by_exit_stack(model):
    with ExitStack() as stack:
        for module in set(model.modules()):
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        yield model


def two_lists(model):
    modules = list(model.modules())

    @contextmanager
    def manager():
        flags = [vars(module)["training"] for module in modules]
        for module in modules:
            vars(module)["training"] = False
        try:
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                vars(module)["training"] = flag

    return manager()


@contextmanager
def by_every_name(model):
    """A module in two places is noted twice, before anything is switched."""
    flags = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    nn.Module.train(model, False)
    for module in model.modules():
        module.training = False
    try:
        yield
    finally:
        for name, flag in flags.items():
            model.get_submodule(name).training = flag


@contextmanager
def all_by_train(model):
    model.eval()
    yield
    model.train(True)


@contextmanager
def norms_switched(model):
    flags = [(module, module.training) for module in model.modules()]
    for norm in (module for module, _ in flags if "BatchNorm" in type(module).__name__):
        norm.train(False)
    try:
        yield
    finally:
        while flags:
            module, module.training = flags.pop()


def norms_and_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.Dropout):
            module.training = False


def only_children(model):
    for module in (model, *model.children()):
        module.training = False


def modes_of_children(model):
    return {module: module.training for module in (model, *model.children())}


def by_torchs_train(model, modes):
    """Modules of their own kind come right: what is called is torch's `train`, and it comes to them last."""
    for module, mode in modes.items():
        nn.Module.train(module, mode)


def by_a_train_of_its_own(model, modes):
    for module, mode in modes.items():
        if type(module).train is nn.Module.train:
            module.training = mode
        else:
            module.train(mode)


@contextmanager
def errors_made_its_own(model):
    try:
        with solution(model):
            yield
    except ValueError as error:
        raise RuntimeError("evaluation failed") from error


@contextmanager
def errors_suppressed(model):
    with suppress(ValueError), solution(model):
        yield


@contextmanager
def put_back_after_errors_alone(model):
    flags = [(module, module.training) for module in model.modules()]
    nn.Module.eval(model)
    for module in model.modules():
        module.training = False

    def put_back():
        for module, flag in flags:
            module.training = flag

    try:
        yield
    except Exception:
        put_back()
        raise
    put_back()


@contextmanager
def switched_back_what_was_switched(model):
    switched = [module for module in model.modules() if module.training]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


FLAGS = {}


@contextmanager
def one_table_for_all(model):
    for module in model.modules():
        FLAGS[module] = module.training
        module.training = False
    try:
        yield
    finally:
        for module in model.modules():
            module.training = FLAGS.pop(module, False)


@contextmanager
def by_recursion(model):
    flags = []

    def switch(module):
        flags.append((module, module.training))
        module.training = False
        for child in module.children():
            switch(child)

    switch(model)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def without_gradients(model):
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def frozen_meanwhile(model):
    with eval_mode(model):
        model.requires_grad_(False)
        yield
    model.requires_grad_(True)


CORRECT = [EvalMode, by_exit_stack, two_lists, by_every_name]
BROKEN = {
    1: [partial(solution, into=norms_and_dropout), partial(solution, into=only_children)],
    2: [partial(solution, remember=modes_of_children)],
    3: [errors_made_its_own, errors_suppressed],
    4: [put_back_after_errors_alone],
    5: [switched_back_what_was_switched, one_table_for_all],
    6: [by_recursion, partial(solution, put_back=by_torchs_train)],
    7: [partial(solution, into=lambda model: model.eval()), partial(solution, put_back=by_a_train_of_its_own)],
    8: [without_gradients, frozen_meanwhile],
}
REWRITTEN = {"only BatchNorm in eval mode": norms_switched}
COMBINED = [({"put back with train()", "no finally"}, all_by_train)]
EQUIVALENT = {}
