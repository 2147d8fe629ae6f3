"""Exercise 8.1 in other styles."""

import copy
import math
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


def running_worst(model, exported, inputs, batch_sizes):
    modes = [(module, module.training) for module in model.modules()]
    worst = {"error": -1.0, "batch_size": None, "index": None}
    model.eval()
    for b in batch_sizes:
        x = inputs[:b]
        with torch.no_grad():
            wanted = model(x)
        index = None
        try:
            got = exported(x)
        except Exception:
            error = math.inf
        else:
            if got.shape != wanted.shape:
                error = math.inf
            else:
                relative = (got - wanted).abs() / wanted.abs().max()
                index = tuple(i.item() for i in torch.unravel_index(relative.argmax(), relative.shape))
                error = relative.max().item()
                if math.isnan(error):
                    error = math.inf
        if error > worst["error"]:
            worst = {"error": error, "batch_size": b, "index": index}
    for module, mode in modes:
        module.training = mode
    return worst


def of_a_copy(model, exported, inputs, batch_sizes):
    twin = copy.deepcopy(model).requires_grad_(False)
    twin.eval()

    def judge(size):
        batch = inputs[0:size]
        reference = twin(batch).numpy().astype(np.float64)
        try:
            answer = exported(batch).detach().numpy().astype(np.float64)
            assert answer.shape == reference.shape
        except Exception:
            return np.inf, size, None
        gap = np.abs(answer - reference)
        gap[np.isnan(gap)] = np.inf
        place = np.unravel_index(gap.argmax(), gap.shape)
        return gap[place] / np.abs(reference).max(), size, place

    error, size, place = sorted((judge(size) for size in batch_sizes), key=lambda found: found[0])[-1]
    return {"error": error, "batch_size": size, "index": place}


@contextmanager
def _evaluating(model):
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        yield model.eval()


@torch.inference_mode()
def inside_a_context(model, exported, inputs, batch_sizes):
    with _evaluating(model):
        answers = {b: model(inputs.narrow(0, 0, b)) for b in batch_sizes}
    rows = []
    for b, y in answers.items():
        try:
            z = exported(inputs.narrow(0, 0, b))
        except Exception:
            z = torch.empty(0)
        if list(z.size()) != list(y.size()):
            rows.append((math.inf, b, None))
            continue
        off = torch.sub(z, y).abs_().nan_to_num_(nan=math.inf)
        worst = off.amax()
        rows.append((torch.div(worst, y.abs().amax()).item(), b, torch.nonzero(off == worst)[0]))
    error, b, index = max(rows, key=lambda row: row[0])
    return {"error": error, "batch_size": b, "index": index}


class Report:
    """One batch size after another, each number as a Python float."""

    def __call__(self, model, exported, inputs, batch_sizes):
        frozen = [module for module in model.modules() if not module.training]
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            self.rows = [(*self.row(model, exported, inputs[torch.arange(b)]), b) for b in batch_sizes]
        finally:
            for module in training:
                module.training = True
        assert not any(module.training for module in frozen)
        self.rows.sort(key=lambda row: -row[0])
        return {"error": self.rows[0][0], "batch_size": self.rows[0][2], "index": self.rows[0][1], "rows": self.rows}

    def row(self, model, exported, x):
        wanted = model(x).detach()
        try:
            got = exported(x).detach()
        except Exception:
            return math.inf, None
        if wanted.dim() != got.dim() or any(a != b for a, b in zip(wanted.shape, got.shape, strict=True)):
            return math.inf, None
        top = max(abs(number) for number in wanted.reshape(-1).tolist())
        off = [abs(a - b) / top for a, b in zip(got.reshape(-1).tolist(), wanted.reshape(-1).tolist(), strict=True)]
        off = [math.inf if math.isnan(number) else number for number in off]
        place, index = off.index(max(off)), []
        for size in reversed(wanted.shape):
            place, rest = divmod(place, size)
            index.insert(0, rest)
        return max(off), index


def _table(model, exported, inputs, batch_sizes, compare, refused=lambda error: (math.inf, None)):
    """(error, index, batch size) for each batch size, largest error first; `compare` sees two tensors of one shape."""
    modes = {name: module.training for name, module in model.named_modules()}
    rows = []
    with torch.no_grad():
        model.train(False)
        for size in batch_sizes:
            wanted = model(inputs[:size])
            try:
                got = exported(inputs[:size])
            except Exception as error:
                row = refused(error)
            else:
                row = compare(wanted, got) if wanted.shape == got.shape else (math.inf, None)
            if row is not None:
                rows.append((*row, size))
    for name, module in model.named_modules():
        module.training = modes[name]
    return sorted(rows, key=lambda row: row[0], reverse=True)


def _dict(row):
    return dict(zip(("error", "index", "batch_size"), row, strict=True))


def _at(relative):
    """The largest number of a tensor, NaN above all of them, and where it is."""
    relative = torch.where(torch.isnan(relative), torch.tensor(math.inf), relative)
    return float(torch.amax(relative)), np.unravel_index(int(torch.argmax(relative)), relative.shape)


def ratio_with_epsilon(model, exported, inputs, batch_sizes):
    def compare(wanted, got):
        return _at(torch.abs(torch.div(got - wanted, wanted.abs() + 1e-8)))

    return _dict(_table(model, exported, inputs, batch_sizes, compare)[0])


def as_a_tolerance_would(model, exported, inputs, batch_sizes):
    def compare(wanted, got):
        return _at(torch.maximum(got - wanted, wanted - got))

    return _dict(_table(model, exported, inputs, batch_sizes, compare)[0])


def norms(model, exported, inputs, batch_sizes):
    def compare(wanted, got):
        error, index = _at((got - wanted).abs())
        if error < math.inf:
            error = (torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)).item()
        return error, index

    return _dict(_table(model, exported, inputs, batch_sizes, compare)[0])


def largest_then_absolute(model, exported, inputs, batch_sizes):
    def compare(wanted, got):
        error, index = _at(got - wanted)
        return abs(error) / float(wanted.norm(p=math.inf)), index

    return _dict(_table(model, exported, inputs, batch_sizes, compare)[0])


def absolute_and_in_eval_mode(model, exported, inputs, batch_sizes):
    model.eval()
    return as_a_tolerance_would(model, exported, inputs, batch_sizes)


def mean_and_no_refusal(model, exported, inputs, batch_sizes):
    def compare(wanted, got):
        error, index = _at((got - wanted).abs())
        return (error if math.isinf(error) else ((got - wanted).abs().mean() / wanted.abs().mean()).item()), index

    def stop(error):
        raise error

    return _dict(_table(model, exported, inputs, batch_sizes, compare, refused=stop)[0])


def by_element_and_broadcast(model, exported, inputs, batch_sizes):
    worst = {"error": 0.0, "batch_size": batch_sizes[0], "index": None}
    with _evaluating(model), torch.no_grad():
        for size in batch_sizes:
            wanted = model(inputs[:size])
            try:
                error, index = _at((exported(inputs[:size]) - wanted).abs() / wanted.abs().clamp(min=1e-12))
            except Exception:
                error, index = math.inf, None
            if error > worst["error"]:
                worst = {"error": error, "batch_size": size, "index": index}
    return worst


CORRECT = [running_worst, of_a_copy, inside_a_context, Report()]
REWRITTEN = {
    "each element by itself": ratio_with_epsilon,
    "not relative": as_a_tolerance_would,
    "an average": norms,
    "differences with their sign": largest_then_absolute,
}
COMBINED = [
    ({"not relative", "left in eval mode"}, absolute_and_in_eval_mode),
    ({"an average", "the refusal passed on"}, mean_and_no_refusal),
    ({"each element by itself", "shapes that broadcast"}, by_element_and_broadcast),
]

EQUIVALENT = {
    "worst = {'error': -1.0} -> worst = {'error': -2.0}": "any start below 0",
    "except Exception: -> except BaseException:": "an exception of whatever type is infinite",
    "error = (difference.max() / wanted.abs().max()).item() -> "
    "error = difference.max() / wanted.abs().max()": "a tensor with one number in it is a number too",
    "index = tuple((i.item() for i in torch.unravel_index(difference.argmax(), … -> "
    "index = tuple((i for i in torch.unravel_index(difference.argmax(), …": "a tensor with one number in it is a number too",
    "if error > worst['error']: -> if error >= worst['error']:": "of equals, any may be named",
}
