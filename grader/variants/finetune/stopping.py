"""Exercise 4.5 in other styles."""

import copy
import io
import math
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Counting:
    def __init__(self, model, patience):
        self.model = model
        self.left = self.patience = patience
        self.best = float("-inf")

    def step(self, score):
        self.left -= 1
        if score > self.best:
            self.best = score
            self.left = self.patience
            self.state = copy.deepcopy(self.model.state_dict())
        return self.left <= 0

    def restore(self):
        self.model.load_state_dict(self.state)


class History:
    """Looks at all scores again each time."""

    def __init__(self, model, patience):
        self.model, self.patience = model, patience
        self.scores, self.tensors = [], {}

    def step(self, score):
        self.scores.append(-np.inf if np.isnan(score) else score)
        best = int(np.argmax(self.scores))  # the first of equal ones
        if best == len(self.scores) - 1:
            everything = [*self.model.parameters(), *self.model.buffers()]
            self.tensors = [(tensor, tensor.detach().numpy().copy()) for tensor in everything]
        return len(self.scores) - 1 - best >= self.patience

    @torch.no_grad()
    def restore(self):
        for tensor, values in self.tensors:
            tensor.copy_(torch.from_numpy(values))


def in_a_closure(model, patience):
    best, waited, file = -math.inf, 0, io.BytesIO()

    def step(score):
        nonlocal best, waited
        waited += 1
        if not math.isnan(score) and best < score:
            best, waited = score, 0
            file.seek(0)
            file.truncate()
            torch.save(model.state_dict(), file)
        return waited == patience

    def restore():
        file.seek(0)
        model.load_state_dict(torch.load(file, weights_only=True))

    return SimpleNamespace(step=step, restore=restore)


class Remembering(nn.Module):
    """A copy of the whole model, and the last answers to "was that better?"."""

    def __init__(self, model, patience):
        super().__init__()
        self.live = [model]  # in a list, so that it is no child of this module
        self.recent = deque([True] * patience, maxlen=patience)
        self.register_buffer("highest", torch.tensor(-torch.inf, dtype=torch.float64))
        self.twin = None

    def step(self, score):
        improved = bool(self.highest.lt(score))
        self.recent.append(improved)
        if improved:
            self.highest.fill_(score)
            self.twin = copy.deepcopy(self.live[0])
        return not any(self.recent)

    def restore(self):
        for now, then in zip(self.live[0].modules(), self.twin.modules(), strict=True):
            for name, parameter in now.named_parameters(recurse=False):
                parameter.data = getattr(then, name).data.clone()
            for name, buffer in now.named_buffers(recurse=False):
                buffer.copy_(getattr(then, name))


@dataclass
class AsVectors:
    model: nn.Module
    patience: int
    epoch: int = 0
    best: tuple = (-math.inf, 0)
    kept: dict = field(default_factory=dict)

    def step(self, score):
        self.epoch += 1
        if max(score, self.best[0]) == score != self.best[0]:
            self.best = (score, self.epoch)
            self.kept["vector"] = parameters_to_vector(self.model.parameters()).detach()
            self.kept["buffers"] = list(map(torch.clone, self.model.buffers()))
        return self.epoch - self.best[1] >= self.patience

    def restore(self):
        vector_to_parameters(self.kept["vector"].clone(), self.model.parameters())
        for buffer, value in zip(self.model.buffers(), self.kept["buffers"], strict=True):
            buffer.set_(value.clone())


class AsGenerator:
    """A coroutine that gets scores and gives answers."""

    def __init__(self, model, patience):
        self.waiting = self.run(model, patience)
        next(self.waiting)

    def run(self, model, patience):
        best, streak, answer = -math.inf, [], False
        while True:
            score = yield answer
            streak = [] if score > best else [*streak, score]
            if not streak:
                best = score
                self.best = [(t, t.detach().clone()) for t in model.state_dict(keep_vars=True).values()]
            answer = len(streak) >= patience

    def step(self, score):
        return self.waiting.send(score)

    def restore(self):
        for tensor, value in self.best:
            tensor.detach().copy_(value)


class OnlyWhatTrains(Counting):
    def step(self, score):
        stop = super().step(score)
        if self.left == self.patience:
            self.state = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return stop

    def restore(self):
        self.model.load_state_dict(self.state, strict=False)


class NeverSetBack:
    def __init__(self, model, patience):
        self.model, self.left, self.best = model, patience, float("-inf")

    def step(self, score):
        improved = score > self.best
        if improved:
            self.best, self.state = score, {k: v.clone() for k, v in self.model.state_dict().items()}
        self.left -= not improved
        return self.left < 1

    def restore(self):
        self.model.load_state_dict(self.state)


class HighestOfAll:
    """max of a list that starts with NaN is NaN."""

    def __init__(self, model, patience):
        self.model, self.patience, self.scores, self.states = model, patience, [], []

    def step(self, score):
        self.scores.append(score)
        self.states.append(copy.deepcopy(self.model.state_dict()))
        self.best = self.scores.index(max(self.scores))
        return len(self.scores) > self.best + self.patience

    def restore(self):
        self.model.load_state_dict(self.states[self.best])


class TieAndOneMore(Counting):
    def step(self, score):
        super().step(score)
        if score >= self.best:
            self.left, self.state = self.patience, copy.deepcopy(self.model.state_dict())
        return self.left < 0


class ParametersReplaced(OnlyWhatTrains):
    def restore(self):
        for name, value in copy.deepcopy(self.state).items():
            module, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(module), attribute, nn.Parameter(value))


class LastAndTotal(NeverSetBack):
    def step(self, score):
        stop = super().step(score)
        self.state = copy.deepcopy(self.model.state_dict())
        return stop


class NoneAndLive:
    def __init__(self, model, patience):
        self.model, self.patience, self.best, self.bad = model, patience, None, 0

    def step(self, score):
        if self.best is None or score > self.best:
            self.best, self.bad, self.state = score, 0, self.model.state_dict()
        else:
            self.bad += 1
        return self.bad >= self.patience

    def restore(self):
        self.model.load_state_dict(self.state)


CORRECT = [Counting, History, in_a_closure, Remembering, AsVectors, AsGenerator]
REWRITTEN = {
    "bad scores added up": NeverSetBack,
    "the first score is the best, even NaN": HighestOfAll,
}
COMBINED = [
    ({"a tie taken as better", "one score too many"}, TieAndOneMore),
    ({"buffers forgotten", "new Parameter objects"}, ParametersReplaced),
    ({"the last state kept", "bad scores added up"}, LastAndTotal),
    ({"the first score is the best, even NaN", "restore changes nothing"}, NoneAndLive),
]
EQUIVALENT = {}
