"""Exercise 4.5 in other styles."""

import copy
import io
import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from grader.checks.finetune.stopping import BadScoresAddedUp, OneCheckpointForAll, RestoreForgetsTheBest, TheLastStateKept


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


class NeverSetBack(History):
    """Counts every score that was not the highest so far."""

    def step(self, score):
        super().step(score)
        highest = set(np.maximum.accumulate(self.scores)) - {-np.inf}
        return len(self.scores) - len(highest) >= self.patience


class LastAndTotal(TheLastStateKept, BadScoresAddedUp):
    """What the last score left is kept, and all bad scores count."""


class NeverSetBackNorRestored(NeverSetBack):
    def restore(self):
        pass


class ABadScoreTooFew(History):
    def __init__(self, model, patience):
        super().__init__(model, max(1, patience - 1))


class PatienceAsWarmUp(History):
    def step(self, score):
        super().step(score)
        return len(self.scores) > self.patience and self.scores[-1] <= max(self.scores[:-1])


class LaterOfEqualOnes(History):
    def step(self, score):
        self.scores.append(-np.inf if np.isnan(score) else score)
        best = len(self.scores) - 1 - int(np.argmax(self.scores[::-1]))  # the last of equal ones
        if best == len(self.scores) - 1 and self.scores[best] > -np.inf:
            self.tensors = [(t, t.detach().numpy().copy()) for t in (*self.model.parameters(), *self.model.buffers())]
        return (len(self.scores) - 1 - best if self.scores[best] > -np.inf else len(self.scores)) >= self.patience


class RoundedToFourDigits(AsGenerator):
    def step(self, score):
        return super().step(round(score, 4) if score == score else score)


class ParametersAlone(History):
    def restore(self):
        names = {id(parameter) for parameter in self.model.parameters()}
        self.tensors = [(tensor, values) for tensor, values in self.tensors if id(tensor) in names]
        super().restore()


class FloatsAlone(History):
    @torch.no_grad()
    def restore(self):
        for tensor, values in self.tensors:
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(values))


class ReferencesKept(History):
    def step(self, score):
        stop = super().step(score)
        self.tensors = [(tensor, tensor.detach().numpy()) for tensor, _ in self.tensors]
        return stop


class OtherParameters(History):
    def step(self, score):
        stop = super().step(score)
        if self.scores.index(max(self.scores)) == len(self.scores) - 1:
            self.kept = copy.deepcopy(self.model)
        return stop

    def restore(self):
        for name, module in copy.deepcopy(self.kept).named_modules():
            now = self.model.get_submodule(name)
            now._parameters, now._buffers = module._parameters, module._buffers


class HandsOutItsOwnCopy(AsGenerator):
    def restore(self):
        for tensor, value in self.best:
            tensor.data = value


class RestoresOnce(AsGenerator):
    def restore(self):
        best, self.best = self.best, []
        for tensor, value in best:
            tensor.detach().copy_(value)


class NanIsTheNewBest(AsGenerator):
    def step(self, score):
        return super().step(math.inf if score != score else score)


class NanDoesNotCount(History):
    def step(self, score):
        return False if np.isnan(score) else super().step(score)


class NanAsZero(History):
    def step(self, score):
        return super().step(np.nan_to_num(score))


class NanCountsOnceThereIsANumber(History):
    def step(self, score):
        if np.isnan(score) and not self.scores:
            return False
        return super().step(score)


class OneFile(History):
    def __init__(self, model, patience, file=io.BytesIO()):  # noqa: B008 - that is the mistake
        super().__init__(model, patience)
        self.file = file

    def step(self, score):
        stop = super().step(score)
        if self.scores and self.scores[-1] == max(self.scores):
            self.file.seek(0)
            self.file.truncate()
            torch.save(self.model.state_dict(), self.file)
        return stop

    def restore(self):
        self.file.seek(0)
        self.model.load_state_dict(torch.load(self.file))


CORRECT = [History, in_a_closure, Remembering, AsGenerator]
REWRITTEN = {"bad scores added up": NeverSetBack}
BROKEN = {
    1: [NeverSetBack, ABadScoreTooFew, PatienceAsWarmUp],
    2: [LaterOfEqualOnes, RoundedToFourDigits],
    3: [ParametersAlone, FloatsAlone, ReferencesKept, TheLastStateKept],
    4: [OtherParameters],
    5: [HandsOutItsOwnCopy, RestoresOnce, RestoreForgetsTheBest],
    6: [NanIsTheNewBest, NanDoesNotCount, NanAsZero, NanCountsOnceThereIsANumber],
    7: [OneFile, OneCheckpointForAll],
}
COMBINED = [
    ({"the last state kept", "bad scores added up"}, LastAndTotal),
    ({"restore changes nothing", "bad scores added up"}, NeverSetBackNorRestored),
]
EQUIVALENT = {
    "self.best, self.waited, self.state = (float('-inf'), 0, None) -> "
    "self.best, self.waited, self.state = (float('-inf'), -1, None)": "a NaN that comes first may or may not be waited for",
}
