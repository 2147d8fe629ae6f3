"""Early stopping: keep the best state of a model, and say when to stop waiting for a better one."""

import math

import torch
from torch import Tensor, nn

from helpers import expect


class EarlyStopping:
    """Keep the best state of `model` so far, and say when to stop waiting for a better one.

        stopping = EarlyStopping(model, patience=3)
        fit(model, train, ..., validation=validation, every=20, early_stopping=stopping)

    A state is a copy of all parameters and buffers. `best = model.state_dict()` is none: its tensors are the
    model's own and train on.

    Args:
        model: any model.
        patience: stop when that many scores in a row were not better than the best before them.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model = expect.module("model", model)
        self.patience = expect.whole_number("patience", patience)
        self.best: float | None = None
        self.waited = 0
        self._state: dict[str, Tensor] = {}

    def step(self, score: float) -> bool:
        """Take note of a score, higher is better; True means stop. NaN is never an improvement."""
        if not math.isnan(score) and (self.best is None or score > self.best):
            self.best, self.waited = float(score), 0
            self._state = {name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self) -> None:
        """Put the best state back into the model, in place: the same Parameter objects get their old values.

        Raises:
            ValueError: there was no score yet, or parameters or buffers of the model were added, removed or reshaped since.
        """
        if self.best is None:
            raise ValueError("no state to restore: step(score) must come first, with a number.")
        tensors = _tensors(self.model)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        kept = {name: tensor.shape for name, tensor in self._state.items()}
        if shapes != kept:
            changed = sorted(name for name in shapes.keys() | kept.keys() if shapes.get(name) != kept.get(name))
            raise ValueError(f"the model must be as it was at step(score), but these differ: {changed[:3]}.")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self._state[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that a state dict leaves out included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
