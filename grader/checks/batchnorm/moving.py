"""Exercise 5.2: count what moves, whatever its flags say."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.networks import tied, with_statistics
from grader.experiment import Exercise, Experiment, Trial, expect_names
from helpers.batchnorm import moved

exercise = Exercise(__name__, "5.2", moved, core=4)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _names(value: object) -> list[str]:
    return expect_names(value, "the names must be a list of strings")


def _in_order(names: list[str], model: nn.Module) -> list[str]:
    """The names without their order, which has an experiment of its own."""
    known = list(tensors_of(model))
    return [name for name in known if name in names] + sorted(set(names) - set(known))


class _Acting(Experiment):
    """Measures what the subject says of an action, which gets the inputs by their names."""

    def act(self, **inputs: Any) -> None:
        raise NotImplementedError

    def measure(self, subject, inputs):
        @torch.no_grad()
        def action() -> None:
            self.act(**inputs)

        return {"names": _names(subject(inputs["model"], action))}


@exercise.experiment("frozen network", 3)
class FrozenNetwork(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        n, width = trial.integer(3, 6), trial.integer(3, 5)
        norm = with_statistics(nn.BatchNorm1d(width), trial)
        layers = OrderedDict(body=nn.Linear(4, width), norm=norm, head=nn.Linear(width, 2))
        return {"model": nn.Sequential(layers).requires_grad_(False), "x": 2 + trial.normal(n, 4)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        in_train_mode = _names(subject(model, lambda: model.train()(x)))
        return {
            "train": in_train_mode,
            "eval": _names(subject(model, lambda: model.eval()(x))),
        }

    def facts(self, raw, inputs):
        return {
            "moved by a forward pass in train mode": _in_order(raw["train"], inputs["model"]),
            "moved by a forward pass in eval mode": _in_order(raw["eval"], inputs["model"]),
        }


@exercise.experiment("flags and movement", 2)
class FlagsAndMovement(_Acting):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        layers = OrderedDict(body=nn.Linear(4, width).requires_grad_(False), head=nn.Linear(width, 2))
        layers["head"].register_parameter("temperature", nn.Parameter(torch.tensor(2.0)))
        return {"model": nn.Sequential(layers), "step": 0.1 + trial.normal(width, 4).abs()}

    def act(self, model, step):
        model.body.weight -= step
        model.head.bias[-1] += 0.5
        model.head.temperature *= 2

    def facts(self, raw, inputs):
        moved = "the frozen body.weight, the trainable head.bias and head.temperature moved; named"
        return {moved: _in_order(raw["names"], inputs["model"])}


@exercise.experiment("parameters first", 4)
class ParametersFirst(_Acting):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        stem, after = (with_statistics(nn.BatchNorm1d(channels), trial) for channels in (4, width))
        layers = OrderedDict(stem=stem, body=nn.Linear(4, width), after=after)
        return {"model": nn.Sequential(layers), "x": 2 + trial.normal(5, 4)}

    def act(self, model, x):
        model.train()(x)
        for parameter in model.parameters():
            parameter += 0.25

    def facts(self, raw, inputs):
        everything = list(tensors_of(inputs["model"]))
        known = {
            "parameters first": everything,
            "module by module": list(inputs["model"].state_dict()),
            "alphabetical": sorted(everything),
        }
        order = next((order for order, names in known.items() if raw["names"] == names), "another")
        complete = sorted(raw["names"]) == sorted(everything)
        return {"the order of the names, where everything moved": order if complete else None}


@exercise.experiment("shared tensors", 4)
class SharedTensors(_Acting):
    def draw(self, trial: Trial) -> dict:
        return {"model": tied(trial.integer(5, 8), trial.integer(2, 4))}

    def act(self, model):
        model.head.weight += 1

    def facts(self, raw, inputs):
        shared = [name for name in raw["names"] if name in ("embed.words.weight", "head.weight")]
        return {"a parameter that two modules share is named": " and ".join(shared) or None}


class _Average(nn.Module):
    """A layer with buffers of three kinds: saved, not saved, and whole numbers."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(trial.normal(width))
        self.register_buffer("average", trial.normal(width))
        self.register_buffer("last", trial.normal(width), persistent=False)
        self.register_buffer("steps", torch.tensor(trial.integer(1, 9)))
        self.register_buffer("start", trial.normal(width))


@exercise.experiment("every buffer", 3)
class EveryBuffer(_Acting):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(3, 6)
        return {"model": nn.Sequential(OrderedDict(ema=_Average(trial, width))), "x": 3 + trial.normal(width).abs()}

    def act(self, model, x):
        for buffer in (model.ema.average, model.ema.last):
            buffer[-1] = 9 + x[-1]
        model.ema.steps += 1

    def facts(self, raw, inputs):
        return {"average, last and steps moved, scale and start did not; named": _in_order(raw["names"], inputs["model"])}


class _Named(_Acting):
    """Asks which tensors are named; `words` say what happens to each."""

    words: ClassVar[dict[str, str]]

    def facts(self, raw, inputs):
        return {words: "named" if name in raw["names"] else "not named" for name, words in self.words.items()}


@exercise.experiment("small changes", 5)
class SmallChanges(_Named):
    points = 2
    words: ClassVar = {
        "swapped": "two values that changed places",
        "nudged": "a change in the last digit",
        "nudged_double": "a change in the last digit of a float64",
        "tiny": "a small number that changed by a small one",
    }

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(2, 4)
        values = {
            "swapped": torch.arange(1.0, 2 * width + 2)[trial.permutation(2 * width + 1)],  # sum, mean and squares are exact
            "nudged": torch.zeros(width, 3),
            "nudged_double": torch.zeros(3, width).double(),
            "tiny": 1e-12 * (1 + trial.normal(width).abs()),
        }
        for name in ("nudged", "nudged_double"):
            values[name][-1, -1] = 1 + trial.integer(0, 7) / 8  # alone, so that every sum changes, and exact in all dtypes
        return {"model": nn.ParameterDict(values)}

    def act(self, model):
        model.swapped[:2] = model.swapped[:2].flip(0).clone()
        for nudged in (model.nudged, model.nudged_double):
            nudged[-1, -1] = nudged[-1, -1].nextafter(torch.tensor(9.0, dtype=nudged.dtype, device=nudged.device))
        model.tiny *= 1.5


@exercise.experiment("small changes of a buffer", 5)
class SmallChangesOfABuffer(_Acting):
    def draw(self, trial: Trial) -> dict:
        model = _Average(trial, trial.integer(2, 4))
        model.average.zero_()[-1] = 1 + trial.integer(0, 7) / 8
        return {"model": model}

    def act(self, model):
        model.average[-1] = model.average[-1].nextafter(torch.full_like(model.average[-1], 9))
        model.start[-1] += 1

    def facts(self, raw, inputs):
        much, little = ("named" if name in raw["names"] else "not named" for name in ("start", "average"))
        return {"a buffer that changed in the last digit": little if much == "named" else None}


@exercise.experiment("new tensors", 7)
class NewTensors(_Named):
    words: ClassVar = {
        "replaced": "a new parameter of other values under the old name",
        "replaced_by_its_like": "a new parameter of the same values under the old name",
        "rewritten": "the same values written once more",
    }

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(2, 4)
        return {"model": nn.ParameterDict({name: trial.normal(width) for name in self.words})}

    def act(self, model):
        model.replaced = nn.Parameter(model.replaced + 1)
        model.replaced_by_its_like = nn.Parameter(model.replaced_by_its_like.clone())
        model.rewritten.copy_(model.rewritten.clone())


@exercise.experiment("new buffers", 7)
class NewBuffers(_Acting):
    def draw(self, trial: Trial) -> dict:
        return {"model": _Average(trial, trial.integer(2, 4))}

    def act(self, model):
        model.average = 0.9 * model.average + 1
        model.start.add_(1)
        model.last.copy_(model.last.clone())

    def facts(self, raw, inputs):
        in_place, new, rewritten = ("named" if name in raw["names"] else "not named" for name in ("start", "average", "last"))
        by_values = in_place == "named" and rewritten == "not named"
        return {"a new buffer of other values under the old name": new if by_values else None}


@exercise.experiment("numbers and NaN", 6)
class NumbersAndNan(_Named):
    points = 2
    words: ClassVar = {
        "stays": "a tensor with a NaN that stays",
        "becomes": "a tensor with a number that becomes NaN",
        "heals": "a tensor with a NaN that becomes 0",
        "wanders": "a tensor whose NaN and a 0 change places",
        "beside": "a tensor with a NaN that stays, and a number that moved",
        "infinite": "a tensor with an infinity that stays",
    }

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        values = {name: 1 + trial.normal(width).abs() for name in self.words}
        place = trial.integer(1, width - 2)
        for name in ("stays", "heals", "wanders", "beside"):
            values[name][place] = torch.nan
        values["infinite"][place] = torch.inf
        values["wanders"][values["wanders"].isfinite()] = 0
        return {"model": nn.ParameterDict(values), "place": place}

    def act(self, model, place):
        model.becomes[place] = torch.nan
        model.heals[place] = 0
        model.wanders.copy_(model.wanders.roll(1))
        model.beside[-1] += 1


@exercise.experiment("once and for good", 1)
class OnceAndForGood(Experiment):
    def draw(self, trial: Trial) -> dict:
        layers = OrderedDict(body=nn.Linear(3, trial.integer(2, 5)), dropout=nn.Dropout(0.5).eval())
        return {"model": nn.Sequential(layers), "x": trial.normal(4, 3)}

    def measure(self, subject, inputs):
        model, x, calls = inputs["model"], inputs["x"], []

        def modes() -> list[bool]:
            return [module.training for module in model.modules()]

        def action() -> None:
            output = model(x)
            calls.append([output.requires_grad, modes()])
            with torch.no_grad():
                model.body.bias += 1

        _names(subject(model, action))
        return {"calls": calls, "bias": model.body.bias.detach().clone(), "modes": modes()}

    def facts(self, raw, inputs):
        there = not torch.equal(raw["bias"], inputs["model"].body.bias)
        modes = [module.training for module in inputs["model"].modules()]
        found = [raw["modes"], *(during for _, during in raw["calls"])]
        return {
            "calls of the action": len(raw["calls"]),
            "what the action did": None if not raw["calls"] else "is there" if there else "was put back",
            "outputs that the action computes have a graph": "yes" if all(graph for graph, _ in raw["calls"]) else "no",
            "the modes of its modules": "as they were" if all(now == modes for now in found) else "changed",
        }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def differ(before: Tensor, now: Tensor) -> bool:
    return bool(((before != now) & ~(before.isnan() & now.isnan())).any())


def without_nan(before: Tensor, now: Tensor) -> bool:
    return not torch.equal(before.nan_to_num(), now.nan_to_num())


def not_equal(before: Tensor, now: Tensor) -> bool:
    return not torch.equal(before, now)


def solution(
    model: nn.Module,
    action: Callable[[], object],
    *,
    find: Callable[[nn.Module], dict[str, Tensor]] = tensors_of,
    afresh: bool = True,
    look: Callable[[Tensor], Tensor] = _copy,
    differ: Callable[[Tensor, Tensor], bool] = differ,
) -> list[str]:
    """Right if left alone; each of the misconceptions changes a piece.

    It compares what `look` makes of each tensor before and afterwards; `afresh` is whether it finds the tensors anew then.
    """
    watched = find(model)
    before = {name: look(tensor) for name, tensor in watched.items()}
    action()
    if afresh:
        watched = find(model)
    return [name for name, tensor in watched.items() if differ(before[name], look(tensor))]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def trainable(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors_of(model).items() if tensor.requires_grad or name in buffers}


def floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors_of(model).items() if tensor.is_floating_point()}


def module_by_module(model: nn.Module) -> dict[str, Tensor]:
    tensors = tensors_of(model)
    return {name: tensors[name] for name in dict.fromkeys((*model.state_dict(), *tensors)) if name in tensors}


def _running(model: nn.Module) -> dict[str, Tensor]:
    return parameters(model) | {name: buffer for name, buffer in model.named_buffers() if "running_" in name}


exercise.misconceptions_of(
    solution,
    {
        "no copies": {"look": lambda tensor: tensor},
        "parameters only": {"find": parameters},
        "trainable parameters only": {"find": trainable},
        "whole numbers left out": {"find": floating},
        "state dict only": {"find": nn.Module.state_dict},
        "order of the state dict": {"find": module_by_module},
        "running mean and variance only": {"find": _running},
        "totals compared": {"look": torch.nansum},
        "nearly equal is equal": {"differ": lambda before, now: not torch.allclose(before, now, equal_nan=True)},
        "the old tensors looked at again": {"afresh": False},
        "NaN differs from itself": {"differ": not_equal},
        "NaN taken for 0": {"differ": without_nan},
        "largest difference above zero": {"differ": lambda before, now: bool(((now - before).abs() > 0).any())},
    },
)


@exercise.misconception("a gradient taken for movement")
def a_gradient_taken_for_movement(model, action):
    action()
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


@exercise.misconception("the action without gradients")
@torch.no_grad()
def the_action_without_gradients(model, action):
    return solution(model, action)


@exercise.misconception("requires_grad taken for movement")
def requires_grad_taken_for_movement(model, action):
    action()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@exercise.misconception("old values put back")
def old_values_put_back(model, action):
    with traces.kept(model, "parameters", "buffers"):
        return solution(model, action)
