"""What a subject leaves behind in a model: a snapshot of it, and what has changed since.

    def measure(self, subject, inputs):
        subject(inputs["model"])
        return {"traces": traces.of(inputs["model"])}

    def facts(self, raw, inputs):
        return traces.changes(inputs["model"], raw["traces"])  # `facts` gets the model as it was drawn

And for solutions, right and wrong: `with kept(model, "modes"):` puts back what is named, and leaves the rest.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from grader.near import same

KINDS = "parameters", "buffers", "flags", "modes", "gradients"


def of(model: nn.Module) -> dict[str, dict]:
    """A snapshot of a model, by kind and by name: values of parameters and buffers, `requires_grad`, modes, gradients."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "buffers": {name: buffer.detach().clone() for name, buffer in model.named_buffers(remove_duplicate=False)},
        "flags": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "modes": {name: module.training for name, module in model.named_modules(remove_duplicate=False)},
        "gradients": {name: None if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()},
    }


def changed(before: nn.Module, after: dict[str, dict], kind: str, *, but: str = "") -> list[str]:
    """The names under which one of `KINDS` is not what it was, missing ones included.

    Args:
        before: the model as it was.
        after: a snapshot.
        kind: what to look at.
        but: names that begin so may change.
    """
    values, now = of(before)[kind], after[kind]
    return [name for name in values if not (but and name.startswith(but)) and not same(values[name], now.get(name))]


def changes(before: nn.Module, after: dict[str, dict], *kinds: str, but: str = "") -> dict[str, str]:
    """Facts about what became of a model: "some" or "none" of each of the kinds; all but gradients if none is named."""
    facts = {}
    for kind in kinds or KINDS[:4]:
        names = changed(before, after, kind, but=but)
        if kind == "modes":
            facts["modules switched to eval mode"] = some(name for name in names if after[kind].get(name) is False)
            facts["modules switched to train mode"] = some(name for name in names if after[kind].get(name) is True)
        else:
            facts[FACTS[kind]] = some(names)
    return facts


FACTS = {
    "parameters": "parameters that moved",
    "buffers": "buffers that moved",
    "flags": "parameters whose requires_grad changed",
    "gradients": "gradients that changed",
}


@contextmanager
def kept(model: nn.Module, *kinds: str) -> Iterator[None]:
    """Afterwards the modes of the model, or whichever of `KINDS` are named, are what they were before the `with`."""
    was = {kind: values for kind, values in of(model).items() if kind in (kinds or ("modes",))}
    try:
        yield
    finally:
        put_back(model, was)


def put_back(model: nn.Module, snapshot: dict[str, dict]) -> None:
    """Make a model what it was, in the kinds that the snapshot has; what it had no name for stays."""
    for name, module in model.named_modules():
        module.training = snapshot.get("modes", {}).get(name, module.training)
    with torch.no_grad():
        for kind, tensors in (("parameters", model.named_parameters()), ("buffers", model.named_buffers())):
            for name, tensor in tensors:
                if name in snapshot.get(kind, {}):
                    tensor.copy_(snapshot[kind][name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(snapshot.get("flags", {}).get(name, parameter.requires_grad))
        parameter.grad = snapshot.get("gradients", {}).get(name, parameter.grad)


def hooks(model: nn.Module) -> int:
    """How many hooks hang in the modules of a model."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def some(things: Iterable) -> str:
    """ "some" or "none": whether there is any of them."""
    return "some" if list(things) else "none"


def how_many(flags: Iterable[bool]) -> str:
    """ "all", "some" or "none" of them."""
    flags = list(flags)
    return "all" if all(flags) else "some" if any(flags) else "none"
