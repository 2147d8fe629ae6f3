"""Exercise 4.6a in other styles."""

import copy
import io
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from grader.checks.finetune.restoring import exercise, solution

WRONG = {m.key: m.subject for m in exercise.misconceptions}


class Snapshot:
    """Takes a picture of both at the beginning, and copies it back at the end."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def __enter__(self):
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in (*self.model.parameters(), *self.model.buffers())]
        self.grads = [(p, p.grad if p.grad is None else p.grad.detach().clone()) for p in self.model.parameters()]
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.memory = copy.deepcopy(self.optimizer.state_dict())
        return self

    @torch.no_grad()
    def __exit__(self, *_):
        for tensor, value in self.tensors:
            tensor.set_(value)
        for parameter, gradient in self.grads:
            parameter.grad = gradient
        for module, mode in self.modes:
            module.training = mode
        self.optimizer.load_state_dict(self.memory)


@contextmanager
def through_files(model, optimizer):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    modes = {name for name, module in model.named_modules() if module.training}
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    try:
        yield model, optimizer
    finally:
        file.seek(0)
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for name, module in model.named_modules():
            module.training = name in modes


def a_stack_of_callbacks(model, optimizer):
    def back(old, new):
        for name, parameter in old.named_parameters():
            now = new.get_parameter(name)
            now.data.copy_(parameter.data)
            now.grad = parameter.grad
        for name, module in old.named_modules():
            new.get_submodule(name).training = module.training
            for key, buffer in module.named_buffers(recurse=False):
                getattr(new.get_submodule(name), key).copy_(buffer)

    stack = ExitStack()
    twin, other = copy.deepcopy((model, optimizer))
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        its_twin.grad = None if parameter.grad is None else parameter.grad.clone()
    stack.callback(back, twin, model)
    stack.callback(optimizer.load_state_dict, copy.deepcopy(other.state_dict()))
    return stack


@contextmanager
def but_the_counts(model, optimizer):
    counts = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    with Snapshot(model, optimizer):
        yield
        left = [norm.num_batches_tracked.clone() for norm in counts]
    for norm, count in zip(counts, left, strict=True):
        norm.num_batches_tracked.copy_(count)


class ButTheWeights(Snapshot):
    def __enter__(self):
        super().__enter__()
        self.tensors = [(tensor, value) for tensor, value in self.tensors if tensor.ndim != 2]
        return self


class ButWhatIsFrozen(Snapshot):
    def __enter__(self):
        super().__enter__()
        frozen = {parameter for parameter in self.model.parameters() if not parameter.requires_grad}
        self.tensors = [(tensor, value) for tensor, value in self.tensors if tensor not in frozen]
        return self


class ButWhatTheOptimizerLacks(Snapshot):
    def __enter__(self):
        super().__enter__()
        lacks = set(self.model.parameters()).difference(*(group["params"] for group in self.optimizer.param_groups))
        self.tensors = [(tensor, value) for tensor, value in self.tensors if tensor not in lacks]
        return self


class AllInTrainMode(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        self.model.train()


class TheModeOfTheModel(Snapshot):
    def __enter__(self):
        super().__enter__()
        self.modes = [(module, self.model.training) for module in self.model.modules()]
        return self


class ButWeightDecay(Snapshot):
    def __exit__(self, *error):
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        super().__exit__(*error)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class TheLrOfTheFirst(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.param_groups[0]["lr"]


class NewMemory(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        if len(self.optimizer.state) and "step" not in str(self.memory):
            self.optimizer.state.clear()


class OnlyWhatWasThere(Snapshot):
    """Puts back what the optimizer remembered, and leaves what a new one has learnt since."""

    def __exit__(self, *error):
        learnt = dict(self.optimizer.state)
        super().__exit__(*error)
        for parameter in learnt.keys() - self.optimizer.state.keys():
            self.optimizer.state[parameter] = learnt[parameter]


class OtherParameters(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fresh = nn.Parameter(parameter.detach().clone())
                fresh.grad = parameter.grad
                setattr(module, name, fresh)


class ReturnsTrue(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        return True


class OnlyWithoutAnError(Snapshot):
    def __exit__(self, kind, *error):
        if kind is None:
            super().__exit__(kind, *error)


class RaisesAnotherOne(Snapshot):
    def __exit__(self, kind, *error):
        super().__exit__(kind, *error)
        if kind is not None:
            raise RuntimeError("the block failed")


class ZeroGradAtTheEnd(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        self.optimizer.zero_grad()


class ZerosForNone(Snapshot):
    def __exit__(self, *error):
        super().__exit__(*error)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class GradientsKeptWithoutACopy(Snapshot):
    def __enter__(self):
        super().__enter__()
        self.grads = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        return self


class StateDictAlone(Snapshot):
    def __enter__(self):
        super().__enter__()
        saved = {id(tensor) for tensor in self.model.state_dict(keep_vars=True).values()}
        self.tensors = [(tensor, value) for tensor, value in self.tensors if id(tensor) in saved]
        return self


class BothKeptWithoutACopy(Snapshot):
    def __enter__(self):
        super().__enter__()
        self.tensors, self.memory = [], self.optimizer.state_dict()
        return self


CORRECT = [Snapshot, through_files, a_stack_of_callbacks]
REWRITTEN = {
    "exception swallowed": ReturnsTrue,
    "put back after success alone": OnlyWithoutAnError,
    "gradients dropped": ZeroGradAtTheEnd,
    "state dict alone": StateDictAlone,
    "new Parameter objects": OtherParameters,
    "one mode for all": TheModeOfTheModel,
}
BROKEN = {
    1: [but_the_counts, ButTheWeights, ButWhatIsFrozen, ButWhatTheOptimizerLacks, WRONG["only the parameters put back"]],
    2: [AllInTrainMode, TheModeOfTheModel, WRONG["modes forgotten"]],
    3: [ButWeightDecay, TheLrOfTheFirst],
    4: [NewMemory, OnlyWhatWasThere, WRONG["moments left"]],
    5: [OtherParameters],
    6: [ReturnsTrue, OnlyWithoutAnError, RaisesAnotherOne, WRONG["only after an Exception"]],
    7: [ZeroGradAtTheEnd, ZerosForNone, GradientsKeptWithoutACopy, WRONG["gradients left"]],
    8: [StateDictAlone],
}
COMBINED = [
    ({"model kept without a copy", "moments kept without a copy"}, BothKeptWithoutACopy),
    ({"modes forgotten", "gradients left"}, partial(solution, kinds=("parameters", "buffers"))),
    ({"exception swallowed", "learning rates left"}, partial(solution, settings=False, passed_on=False)),
]
EQUIVALENT = {}
