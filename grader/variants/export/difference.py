"""Exercise 8.1 in other styles."""

import copy
import math
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from operator import itemgetter

import numpy as np
import torch

from grader.checks.export.difference import solution


def running_worst(model, exported, inputs, batch_sizes):
    modes = [(module, module.training) for module in model.modules()]
    worst = {"error": -1.0, "batch_size": None, "index": None}
    model.eval()
    for b in batch_sizes:
        x = inputs[:b]
        with torch.no_grad():
            wanted = model(x)
        try:
            got = exported(x)
        except Exception:
            got = None
        error, index = math.inf, None
        if got is not None and got.shape == wanted.shape:
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


@torch.inference_mode()
def inside_a_context(model, exported, inputs, batch_sizes):
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
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
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            self.rows = [(*self.row(model, exported, inputs[torch.arange(b)]), b) for b in batch_sizes]
        finally:
            for module in training:
                module.training = True
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


def _by(off, model, exported, inputs, batch_sizes):
    """The largest number of `off(wanted, got)`, NaN above all of them."""
    modes = {name: module.training for name, module in model.named_modules()}
    rows = []
    with torch.no_grad():
        model.train(False)
        for size in batch_sizes:
            wanted = model(inputs[:size])
            try:
                got = exported(inputs[:size])
            except Exception:
                got = torch.empty(0)
            relative = off(wanted, got).nan_to_num(nan=math.inf) if wanted.shape == got.shape else torch.tensor(math.inf)
            rows.append((float(relative.amax()), size, np.unravel_index(int(relative.argmax()), relative.shape)))
    for name, module in model.named_modules():
        module.training = modes[name]
    return dict(zip(("error", "batch_size", "index"), sorted(rows, key=lambda row: row[0])[-1], strict=True))


by_error = itemgetter("error")
CORRECT = [running_worst, of_a_copy, inside_a_context, Report()]
REWRITTEN = {
    "each element by itself": partial(_by, lambda wanted, got: ((got - wanted) / (wanted.abs() + 1e-8)).abs()),
    "not relative": partial(_by, lambda wanted, got: torch.maximum(got - wanted, wanted - got)),
    "differences with their sign": partial(_by, lambda wanted, got: (got - wanted) / wanted.norm(p=math.inf)),
}


def _rows_by_themselves(wanted, got):
    return (got - wanted).abs().flatten(1) / wanted.abs().flatten(1).amax(1, keepdim=True)


def _without_signs(wanted, got):
    return (got.abs() - wanted.abs()).abs() / wanted.abs().max()


def exported_in_one_piece(model, exported, inputs, batch_sizes):
    return of_a_copy(model, lambda x: exported(inputs)[: len(x)], inputs, batch_sizes)


def last_index(model, exported, inputs, batch_sizes):
    answer = of_a_copy(model, exported, inputs, batch_sizes)
    return answer | {"index": of_a_copy(model, exported, inputs, batch_sizes[-1:])["index"]}


def flat_index(model, exported, inputs, batch_sizes):
    answer = of_a_copy(model, exported, inputs, batch_sizes)
    if answer["index"] is not None:
        with torch.no_grad():
            shape = copy.deepcopy(model).eval()(inputs[: answer["batch_size"]]).shape
        answer["index"] = (int(answer["index"][0]), int(np.ravel_multi_index(answer["index"][1:], shape[1:])))
    return answer


def first_that_is_off(model, exported, inputs, batch_sizes):
    worst = of_a_copy(model, exported, inputs, batch_sizes)
    if worst["error"] in (0, math.inf):
        return worst
    answers = (of_a_copy(model, exported, inputs, [size]) for size in batch_sizes)
    return next(answer for answer in answers if answer["error"] > 1e-5)


def smallest_and_largest(model, exported, inputs, batch_sizes):
    worst = of_a_copy(model, exported, inputs, batch_sizes)
    return worst if math.isinf(worst["error"]) else of_a_copy(model, exported, inputs, [min(batch_sizes), max(batch_sizes)])


def what_python_calls_largest(model, exported, inputs, batch_sizes):
    rows = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for size in batch_sizes:
        with torch.no_grad():
            wanted = model(inputs[:size])
        row = {"error": math.inf, "batch_size": size, "index": None}
        try:
            got = exported(inputs[:size])
        except Exception:
            got = torch.empty(0)
        if got.shape == wanted.shape:
            each = (got - wanted).detach().abs() / wanted.abs().max()
            row |= {"error": each.max().item(), "index": np.unravel_index(int(each.argmax()), each.shape)}
        rows.append(row)
    for module, mode in modes:
        module.training = mode
    return max(rows, key=lambda row: row["error"])


def as_many_elements(model, exported, inputs, batch_sizes):
    def reshaped(x):
        got, rows = exported(x), len(x)
        return got.reshape(rows, -1) if got.ndim == 1 and got.numel() == rows * 4 and inputs.shape[1] == 3 else got

    return of_a_copy(model, reshaped, inputs, batch_sizes)


def only_the_model_itself(model, exported, inputs, batch_sizes):
    with modes_kept(model):
        model.training = False
        return solution(model, exported, inputs, batch_sizes, evaluated=lambda model: model)


def in_eval_mode_after_the_first(model, exported, inputs, batch_sizes):
    first, *others = batch_sizes
    rows = [solution(model, exported, inputs, [first], evaluated=lambda model: model)]
    rows += [solution(model, exported, inputs, others)] if others else []
    return max(rows, key=lambda row: row["error"])


@contextmanager
def modes_kept(model):
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in training:
            module.training = training[module]


@contextmanager
def the_mode_of_the_whole(model):
    training = model.training
    yield
    model.train(training)


def lost_in_a_refusal(model, exported, inputs, batch_sizes):
    training = {module: module.training for module in model.modules()}
    model.eval()
    for size in batch_sizes:
        with torch.no_grad():
            model(inputs[:size])
        try:
            exported(inputs[:size])
        except Exception:
            return {"error": math.inf, "batch_size": size, "index": None}
    for module in training:
        module.training = training[module]
    return solution(model, exported, inputs, batch_sizes)


def compared_in_a_list(model, exported, inputs, batch_sizes):
    with modes_kept(model):
        model.eval()
        wanted = [model(inputs[:size]) for size in batch_sizes]
        with torch.no_grad():
            return solution(model, exported, inputs, batch_sizes) | {"outputs": len(wanted)}


BROKEN = {
    1: [
        partial(solution, batch=lambda inputs, size: inputs[-size:]),
        partial(solution, batch=lambda inputs, size: inputs[torch.arange(size) * (len(inputs) // size)]),
        partial(solution, errors=lambda wanted, got: (got - wanted).abs() / wanted.max()),
        partial(solution, errors=_rows_by_themselves),
        partial(solution, errors=_without_signs),
        exported_in_one_piece,
    ],
    2: [last_index, flat_index, first_that_is_off, smallest_and_largest],
    3: [partial(solution, caught=(RuntimeError, AssertionError, ValueError)), partial(solution, skipped=IndexError)],
    4: [what_python_calls_largest, as_many_elements, partial(solution, broadcast=True)],
    5: [only_the_model_itself, in_eval_mode_after_the_first],
    6: [partial(solution, keeping=the_mode_of_the_whole), partial(solution, keeping=nullcontext), lost_in_a_refusal],
    7: [partial(solution, graph=nullcontext), compared_in_a_list],
    8: [partial(solution, choose=lambda rows: max([{"error": 0, "batch_size": None, "index": None}, *rows], key=by_error))],
}
COMBINED = [
    ({"an average", "the refusal passed on"}, partial(solution, figure=torch.mean, caught=())),
    ({"left in eval mode", "shapes that broadcast"}, partial(solution, keeping=nullcontext, broadcast=True)),
]

EQUIVALENT = {
    "worst = {'error': -1.0} -> worst = {'error': -2.0}": "any start below 0",
    "except Exception: -> except BaseException:": "an exception of whatever type is infinite",
    "error = (difference.max() / wanted.abs().max()).item() -> "
    "error = difference.max() / wanted.abs().max()": "a tensor with one number in it is a number too",
    "index = tuple((i.item() for i in index)) -> pass": "a tuple of tensors with one number in each will do",
    "index = tuple((i.item() for i in index)) -> index = tuple((i for i in index))": "tensors with one number in each will do",
    "if error > worst['error']: -> if error >= worst['error']:": "of equals, any may be named",
}
