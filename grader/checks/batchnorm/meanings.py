"""Exercise 5.3: what of a BatchNorm is frozen, found out by experiment."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.checks.shared_list import SharedList
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, wrong_return
from helpers import expect
from helpers.batchnorm import what_is_frozen

exercise = Exercise(__name__, "5.3", what_is_frozen, core=5)

_KEYS = "affine", "statistics", "normalisation"
_RUNNING = "running_mean", "running_var"


def _answer(value: object) -> dict[str, bool]:
    """The answer as three bools, or a sentence about its form."""
    if not isinstance(value, dict):
        raise wrong_return(f"the answer must be a dict with {', '.join(_KEYS)}", value)
    if set(value) != set(_KEYS):
        raise WrongReturn(f"the answer must have the keys {', '.join(_KEYS)}, got {', '.join(map(str, value)) or 'none'}.")
    answer = {}
    for key in _KEYS:
        item = value[key]
        if isinstance(item, np.bool_) or (isinstance(item, Tensor) and item.numel() == 1):
            item = item.item()
        if not isinstance(item, bool):
            raise WrongReturn(f"answer[{key!r}] must be True or False, got {expect.describe(value[key])}.")
        answer[key] = item
    return answer


class _Stuck(nn.BatchNorm2d):
    """Stays in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.training = False

    def train(self, mode: bool = True) -> "_Stuck":
        return self


class _OwnForward(nn.BatchNorm2d):
    """In train mode it does what it was made for, whatever its attributes say.

    Args:
        channels: of the input.
        stored: whether the stored statistics normalise, and so stay where they are.
        still: the names of the statistics that stay where they are.
        detached: whether weight and bias get no gradient.
        momentum: as in every BatchNorm.
    """

    def __init__(
        self, channels: int, stored: bool = False, still: str = "", detached: bool = False, momentum: float = 0.1
    ) -> None:
        super().__init__(channels, momentum=momentum)
        self.stored, self.still, self.detached = stored, still, detached

    def forward(self, x: Tensor) -> Tensor:
        affine = (self.weight.detach(), self.bias.detach()) if self.detached else (self.weight, self.bias)
        running = self.running_mean, self.running_var
        if self.training and not self.stored:
            self.num_batches_tracked += 1
            running = [values.clone() if name in self.still else values for name, values in zip(_RUNNING, running, strict=True)]
        return F.batch_norm(x, *running, *affine, self.training and not self.stored, self.momentum, self.eps)


class _Counting(nn.BatchNorm1d):
    """Remembers every call, also of its copies."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.calls = SharedList()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x)


class _EvalFromTheFirstTrain(_Counting):
    """In train mode until train() is called for the first time: that puts it into eval mode, and so does every later call."""

    def train(self, mode: bool = True) -> "_EvalFromTheFirstTrain":
        return super().train(False)


def _into_eval_mode(layer: nn.Module, _) -> None:
    layer.eval()


def _with_old_gradients(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return layer


class _Kinds(Experiment):
    """An experiment on layers of several kinds."""

    kind: type[nn.Module] = nn.BatchNorm2d
    size: tuple[int, ...] = (3, 2)

    def layers(self, new: Callable[..., nn.Module]) -> dict[str, nn.Module]:
        """The layers, each with its description; `new(kind, **options)` makes one that has been trained."""
        raise NotImplementedError

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(2, 4)

        def new(kind: type = self.kind, *, fresh: bool = False, **options: Any) -> nn.Module:
            return kind(channels, **options) if fresh else with_statistics(kind(channels, **options), trial)

        return {"layers": self.layers(new), "x": 4 + 3 * trial.normal(trial.integer(6, 9), channels, *self.size)}

    def measure(self, subject, inputs):
        return {what: _answer(subject(layer, inputs["x"].clone())) for what, layer in inputs["layers"].items()}

    def facts(self, raw, inputs):
        return {what: _words(answer) for what, answer in raw.items()}


def _words(answer: dict[str, bool]) -> str:
    return " + ".join(key for key in _KEYS if answer[key]) or "nothing"


class _Part(_Kinds):
    """Looks at one of the three answers alone."""

    part: str

    def facts(self, raw, inputs):
        return {f"{what}, {self.part}": "frozen" if answer[self.part] else "not frozen" for what, answer in raw.items()}


class _Pairs(_Kinds):
    """Layers that do in training what plainer ones do: who misjudges these may misjudge those in the same way."""

    def pairs(self, new: Callable[..., nn.Module]) -> dict[str, tuple[nn.Module, nn.Module, str]]:
        """The layers, each with its description, the plainer one, and what is frozen of both."""
        raise NotImplementedError

    def layers(self, new):
        pairs = self.pairs(new).items()
        return {what: pair[0] for what, pair in pairs} | {f"plain: {what}": pair[1] for what, pair in pairs}

    def facts(self, raw, inputs):
        facts = {}
        for what, (_, _, frozen) in self.pairs(lambda kind=self.kind, **options: kind(2, **options)).items():
            as_plain = raw[what] == raw[f"plain: {what}"]
            facts[what] = frozen if as_plain else _words(raw[what])
        return facts


@exercise.experiment("four recipes", 1, 2, 3, 4)
class FourRecipes(_Kinds):
    points = 2

    def layers(self, new):
        return {
            "a fresh BatchNorm": new(fresh=True),
            "a BatchNorm that was trained": new(momentum=0.9),
            "requires_grad_(False)": new().requires_grad_(False),
            "eval mode that train() does not undo": new(_Stuck),
            "both": new(_Stuck).requires_grad_(False),
        }


@exercise.experiment("weight or bias", 1)
class WeightOrBias(_Part):
    part = "affine"

    def layers(self, new):
        weight, bias = new(), new()
        weight.weight.requires_grad_(False)
        bias.bias.requires_grad_(False)
        return {
            "its weight frozen, its bias not": weight,
            "its bias frozen, its weight not": bias,
            "neither, in eval mode for good": new(_Stuck),
        }


@exercise.experiment("mean or variance", 2)
class MeanOrVariance(_Part):
    part = "statistics"

    def layers(self, new):
        slow = {"momentum 0.00005": new(momentum=5e-5)}
        return {f"{name} alone stands still": new(_OwnForward, still=name, momentum=0.9) for name in _RUNNING} | slow


@exercise.experiment("still and used", 2, 3, 4)
class StillAndUsed(_Kinds):
    points = 2

    def layers(self, new):
        untracked = new()
        untracked.track_running_stats = False
        return {
            "momentum 0": new(momentum=0.0),
            "track_running_stats off": untracked,
            "Keras before TensorFlow 2": new(momentum=0.0).requires_grad_(False),
            "eval mode for good": new(_Stuck),
        }


@exercise.experiment("whatever the attributes say", 5)
class WhateverTheAttributesSay(_Pairs):
    points = 2

    def pairs(self, new):
        hooked = new()
        hooked.register_forward_pre_hook(_into_eval_mode)
        still, used = "statistics", "statistics + normalisation"
        return {
            "a forward that ignores the mode": (new(_OwnForward, stored=True), new(_Stuck), used),
            "a forward that moves nothing": (new(_OwnForward, still=" ".join(_RUNNING)), new(momentum=0.0), still),
            "a hook that calls eval()": (hooked, new(_Stuck), used),
            "weights that are detached in forward": (new(_OwnForward, detached=True), new().requires_grad_(False), "affine"),
            "a switch of its own, Keras since TensorFlow 2": (
                new(_OwnForward, stored=True, detached=True),
                new(_Stuck).requires_grad_(False),
                f"affine + {used}",
            ),
        }


@exercise.experiment("found in eval mode", 4)
class FoundInEvalMode(_Pairs):
    kind, size = nn.BatchNorm1d, ()

    def pairs(self, new):
        frozen = "requires_grad_(False), and in eval mode"
        return {
            "a BatchNorm in eval mode": (new().eval(), new(), "nothing"),
            frozen: (new().requires_grad_(False).eval(), new().requires_grad_(False), "affine"),
        }


@exercise.experiment("old gradients", 6)
class OldGradients(_Part):
    part = "affine"

    def layers(self, new):
        return {
            "requires_grad_(False) with old gradients": _with_old_gradients(new()).requires_grad_(False),
            "requires_grad_(False) without": new().requires_grad_(False),
            "a BatchNorm with old gradients": _with_old_gradients(new()),
            "one in eval mode for good, with old gradients": _with_old_gradients(new(_Stuck)),
        }


@exercise.experiment("left as found", 7)
class LeftAsFound(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        kinds = _Counting, _Counting, _EvalFromTheFirstTrain
        in_eval_mode, with_gradients, own_train = (with_statistics(kind(channels), trial) for kind in kinds)
        layers = nn.ModuleList([in_eval_mode.eval(), _with_old_gradients(with_gradients), own_train])
        with_gradients.bias.requires_grad_(False)
        return {"layers": layers, "x": 4 + 3 * trial.normal(trial.integer(6, 8), channels)}

    def measure(self, subject, inputs):
        for layer in inputs["layers"]:
            _answer(subject(layer, inputs["x"]))
        return {
            "tried": all(layer.calls for layer in inputs["layers"]),
            "traces": traces.of(inputs["layers"]),
            "settings": [_settings(layer) for layer in inputs["layers"]],
        }

    def facts(self, raw, inputs):
        same = raw["settings"] == [_settings(layer) for layer in inputs["layers"]]
        changes = traces.changes(inputs["layers"], raw["traces"], *traces.KINDS)
        facts = changes | {"hooks, settings and methods of its own": "as before" if same else "changed"}
        return facts if raw["tried"] else dict.fromkeys(facts)  # nothing was tried, so nothing could be left behind


def _settings(layer: nn.Module) -> list:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return [layer.eps, layer.momentum, layer.track_running_stats, *map(len, hooks), *sorted(vars(layer))]


def solution(
    layer: nn.Module,
    x: Tensor,
    *,
    mode: Callable[[nn.Module], bool] = lambda layer: True,
    keep: Callable[[Tensor], Tensor] = Tensor.clone,
    watched: Sequence[str] = _RUNNING,
    graph: bool = True,
    company: Callable[[Tensor], Tensor] = lambda rows: 9 - 2 * rows,
    read_off: Callable[[nn.Module, dict], dict] = lambda layer, answer: {},
) -> dict[str, bool]:
    """Right if left alone, for the layers above; each of the misconceptions changes a piece.

    A copy of the layer, in that mode, runs twice: the first half of x is in other company then, which `company` makes.
    `keep` remembers the statistics that are `watched`, `graph` says whether there is one, and `read_off` has the last word.
    """
    tested = copy.deepcopy(layer)
    tested.train(mode(tested))
    before = [keep(getattr(tested, name)) for name in watched]
    half = len(x) // 2
    with torch.set_grad_enabled(graph):
        output = tested(x)
    moved = not all(torch.equal(values, getattr(tested, name)) for name, values in zip(watched, before, strict=True))
    in_company = tested(torch.cat([x[:half], company(x[half:])]))
    answer = {
        "affine": not output.requires_grad,
        "statistics": not moved,
        "normalisation": torch.allclose(output[:half], in_company[:half], atol=1e-4),
    }
    return answer | read_off(layer, answer)


def _by_mode(layer: nn.Module, answer: dict) -> dict:
    used = not copy.deepcopy(layer).train().training
    return {"statistics": used, "normalisation": used}


def by_flags(layer: nn.Module, answer: dict) -> dict:
    return {"affine": not (layer.weight.requires_grad or layer.bias.requires_grad)}


def _by_settings(layer: nn.Module, answer: dict) -> dict:
    used = not copy.deepcopy(layer).train().training
    return {"statistics": used or not layer.track_running_stats or layer.momentum == 0, "normalisation": used}


def without_the_bias(layer: nn.Module, answer: dict) -> dict:
    return {"affine": answer["affine"] or not layer.weight.requires_grad}


def by_old_gradients_too(layer: nn.Module, answer: dict) -> dict:
    return {"affine": answer["affine"] and layer.weight.grad is None and layer.bias.grad is None}


exercise.misconceptions_of(
    solution,
    {
        "the mode read off": {"read_off": _by_mode},
        "requires_grad read off": {"read_off": by_flags},
        "settings read off": {"read_off": _by_settings},
        "measured in eval mode": {"mode": lambda layer: False},
        "measured in the mode it was found in": {"mode": lambda layer: layer.training},
        "the bias not looked at": {"read_off": without_the_bias},
        "running_var not looked at": {"watched": ["running_mean"]},
        "no copies": {"keep": lambda statistics: statistics},
        "still taken for used": {"read_off": lambda layer, answer: {"normalisation": answer["statistics"]}},
        "the same batch twice": {"company": lambda rows: rows},
        "no gradient under no_grad": {"graph": False},
        "an old gradient taken for a new one": {"read_off": by_old_gradients_too},
    },
)


@exercise.misconception("left as the test leaves it")
def left_as_the_test_leaves_it(layer, x):
    answer = solution(layer, x)
    output = layer.train()(x)
    if output.requires_grad:
        output.square().sum().backward()
    return answer


@exercise.misconception("gradients left behind")
def gradients_left_behind(layer, x):
    with traces.kept(layer, "buffers", "modes"):
        return left_as_the_test_leaves_it(layer, x)
