"""Exercise 5.2: count what moves, whatever its flags say."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from helpers import expect
from helpers.batchnorm import moved

exercise = Exercise(__name__, "5.2", moved)


def _norm(trial: Trial, channels: int) -> nn.BatchNorm1d:
    """A BatchNorm whose statistics and affine part are not those of a fresh layer."""
    norm = nn.BatchNorm1d(channels)
    norm.running_mean.copy_(trial.normal(channels))
    norm.running_var.copy_(0.5 + trial.normal(channels).square())
    norm.num_batches_tracked.fill_(trial.integer(5, 50))
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * trial.normal(channels))
        norm.bias.copy_(trial.normal(channels))
    return norm


@exercise.experiment("frozen network")
class FrozenNetwork(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        n, width = trial.integer(3, 6), trial.integer(3, 5)
        layers = OrderedDict(body=nn.Linear(4, width), norm=_norm(trial, width), head=nn.Linear(width, 2))
        return {"model": nn.Sequential(layers).requires_grad_(False), "x": 2 + trial.normal(n, 4)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        trained = _names(subject(model, lambda: model.train()(x)))
        return {"train": trained, "eval": _names(subject(model, lambda: model.eval()(x)))}

    def facts(self, raw, inputs):
        return {
            "moved by a forward pass in train mode": _in_order(raw["train"], inputs["model"]),
            "moved by a forward pass in eval mode": _in_order(raw["eval"], inputs["model"]),
        }


@exercise.experiment("flags and movement")
class FlagsAndMovement(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        model = nn.Sequential(OrderedDict(body=nn.Linear(4, width), head=nn.Linear(width, 2)))
        model.body.requires_grad_(False)
        return {"model": model, "step": 0.1 + trial.normal(width, 4).abs()}

    def measure(self, subject, inputs):
        model, step = inputs["model"], inputs["step"]

        def action() -> None:
            with torch.no_grad():
                model.body.weight = nn.Parameter(model.body.weight - step, requires_grad=False)
                model.head.bias += 0.5

        return {"names": _names(subject(model, action))}

    def facts(self, raw, inputs):
        return {"the frozen body.weight and the trainable head.bias moved; named": _in_order(raw["names"], inputs["model"])}


@exercise.experiment("parameters first")
class ParametersFirst(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        layers = OrderedDict(stem=_norm(trial, 4), body=nn.Linear(4, width), after=_norm(trial, width))
        return {"model": nn.Sequential(layers), "x": 2 + trial.normal(5, 4)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]

        def action() -> None:
            model.train()(x)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.25

        return {"names": _names(subject(model, action))}

    def facts(self, raw, inputs):
        everything = [*dict(inputs["model"].named_parameters()), *dict(inputs["model"].named_buffers())]
        if sorted(raw["names"]) != sorted(everything):
            return {"the order of the names, where everything moved": None}
        known = {
            "parameters first": everything,
            "module by module": list(inputs["model"].state_dict()),
            "alphabetical": sorted(everything),
        }
        order = next((order for order, names in known.items() if raw["names"] == names), "another")
        return {"the order of the names, where everything moved": order}


class _Average(nn.Module):
    """A layer with buffers of three kinds: saved, not saved, and whole numbers."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(trial.normal(width))
        self.register_buffer("average", trial.normal(width))
        self.register_buffer("last", trial.normal(width), persistent=False)
        self.register_buffer("steps", torch.tensor(trial.integer(1, 9)))
        self.register_buffer("start", trial.normal(width))


@exercise.experiment("every buffer")
class EveryBuffer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        return {"model": nn.Sequential(OrderedDict(ema=_Average(trial, width))), "x": 3 + trial.normal(width).abs()}

    def measure(self, subject, inputs):
        ema, x = inputs["model"].ema, inputs["x"]

        def action() -> None:
            with torch.no_grad():
                ema.scale += 1
            ema.average = 0.9 * ema.average + 0.1 * x
            ema.last.copy_(x)
            ema.steps += 1

        return {"names": _names(subject(inputs["model"], action))}

    def facts(self, raw, inputs):
        return {"scale, average, last and steps moved, start did not; named": _in_order(raw["names"], inputs["model"])}


class _Held(nn.Module):
    """A module that only holds parameters."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


@exercise.experiment("other values")
class OtherValues(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(2, 4)
        model = _Held(
            swapped=torch.arange(1.0, 2 * width + 2)[trial.permutation(2 * width + 1)],  # sum, mean and squares are exact
            nudged=torch.tensor([1 + trial.integer(0, 7) / 8]),
            replaced=trial.normal(width),
            replaced_by_its_like=trial.normal(width),
            rewritten=trial.normal(width),
        )
        return {"model": model}

    def measure(self, subject, inputs):
        model = inputs["model"]

        @torch.no_grad()
        def action() -> None:
            model.swapped[:2] = model.swapped[:2].flip(0).clone()
            model.nudged.copy_(model.nudged.nextafter(torch.tensor(9.0)))
            model.replaced = nn.Parameter(model.replaced + 1)
            model.replaced_by_its_like = nn.Parameter(model.replaced_by_its_like.clone())
            model.rewritten.copy_(model.rewritten.clone())

        return {"names": _names(subject(model, action))}

    def facts(self, raw, inputs):
        what = {
            "swapped": "two values that changed places",
            "nudged": "a change in the last digit",
            "replaced": "a new tensor of other values under the old name",
            "replaced_by_its_like": "a new tensor of the same values under the old name",
            "rewritten": "the same values written once more",
        }
        return {words: _named(name, raw["names"]) for name, words in what.items()}


@exercise.experiment("numbers and nan")
class NumbersAndNan(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 5)
        stays, becomes = trial.normal(width), 1 + trial.normal(width).abs()
        stays[trial.integer(0, width - 1)] = torch.nan
        return {"model": _Held(stays=stays, becomes=becomes, moves=trial.normal(width)), "place": trial.integer(0, width - 1)}

    def measure(self, subject, inputs):
        model = inputs["model"]

        @torch.no_grad()
        def action() -> None:
            model.becomes[inputs["place"]] = torch.nan
            model.moves = nn.Parameter(model.moves + 1)

        return {"names": _names(subject(model, action))}

    def facts(self, raw, inputs):
        return {
            "a tensor with a NaN that stays": _named("stays", raw["names"]),
            "a tensor with a number that becomes NaN": _named("becomes", raw["names"]),
            "a tensor of numbers that moved": _named("moves", raw["names"]),
        }


@exercise.experiment("once and for good")
class OnceAndForGood(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": nn.Linear(3, trial.integer(2, 5))}

    def measure(self, subject, inputs):
        model, calls = inputs["model"], []

        def action() -> None:
            calls.append(1)
            with torch.no_grad():
                model.bias += 1

        _names(subject(model, action))
        return {"calls": len(calls), "bias": model.bias.detach().clone()}

    def facts(self, raw, inputs):
        there = not torch.equal(raw["bias"], inputs["model"].bias)
        return {
            "calls of the action": raw["calls"],
            "what the action did": None if raw["calls"] == 0 else "is there" if there else "was put back",
        }


def _names(value: object) -> list[str]:
    """The answer as a list of strings, or a sentence about its form."""
    if isinstance(value, str | dict | set | frozenset | Tensor) or not isinstance(value, Iterable):
        raise wrong_return("the names must be a list of strings", value)
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise WrongReturn(f"the names must be a list of strings, got a list with {expect.describe(name)}.")
    return names


def _in_order(names: list[str], model: nn.Module) -> list[str]:
    """The names without their order, which has an experiment of its own."""
    known = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    return [name for name in known if name in names] + sorted(set(names) - set(known))


def _named(name: str, names: list[str]) -> str:
    return "named" if name in names else "not named"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _other(one: Tensor, other: Tensor) -> bool:
    return bool(((one != other) & ~(one.isnan() & other.isnan())).any())


@exercise.misconception("no copies")
def no_copies(model, action):
    before = _tensors(model)
    action()
    return [name for name, tensor in _tensors(model).items() if _other(before[name], tensor)]


@exercise.misconception("parameters only")
def parameters_only(model, action):
    before = _copies(model)
    action()
    return [name for name, tensor in model.named_parameters() if _other(before[name], tensor)]


@exercise.misconception("state dict only")
def state_dict_only(model, action):
    names = moved(model, action)
    return [name for name in names if name in model.state_dict()]


@exercise.misconception("order of the state dict")
def order_of_the_state_dict(model, action):
    names = moved(model, action)
    places = {name: place for place, name in enumerate(model.state_dict())}
    return sorted(names, key=lambda name: places.get(name, len(places)))


@exercise.misconception("running mean and variance only")
def running_mean_and_variance_only(model, action):
    before = _copies(model)
    action()
    wanted = [*dict(model.named_parameters()), *(name for name in before if "running_" in name)]
    return [name for name in wanted if _other(before[name], _tensors(model)[name])]


@exercise.misconception("requires_grad taken for movement")
def requires_grad_taken_for_movement(model, action):
    action()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@exercise.misconception("totals compared")
def totals_compared(model, action):
    before = {name: tensor.nansum().item() for name, tensor in _tensors(model).items()}
    action()
    return [name for name, tensor in _tensors(model).items() if tensor.nansum().item() != before[name]]


@exercise.misconception("nearly equal is equal")
def nearly_equal_is_equal(model, action):
    before = _copies(model)
    action()
    return [
        name for name, tensor in _tensors(model).items() if not torch.allclose(before[name], tensor.detach(), equal_nan=True)
    ]


@exercise.misconception("the old tensors looked at again")
def the_old_tensors_looked_at_again(model, action):
    before = [(name, tensor, tensor.detach().clone()) for name, tensor in _tensors(model).items()]
    action()
    return [name for name, tensor, copy in before if _other(copy, tensor)]


@exercise.misconception("NaN differs from itself")
def nan_differs_from_itself(model, action):
    before = _copies(model)
    action()
    return [name for name, tensor in _tensors(model).items() if not torch.equal(before[name], tensor)]


@exercise.misconception("largest difference above zero")
def largest_difference_above_zero(model, action):
    before = _copies(model)
    action()
    return [name for name, tensor in _tensors(model).items() if ((tensor - before[name]).abs() > 0).any()]


@exercise.misconception("old values put back")
def old_values_put_back(model, action):
    before = _copies(model)
    names = moved(model, action)
    with torch.no_grad():
        for name in names:
            _tensors(model)[name].copy_(before[name])
    return names
