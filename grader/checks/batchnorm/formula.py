"""Exercise 5.1: what a BatchNorm layer computes, and what it does to its buffers."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from grader.checks.networks import with_statistics
from grader.checks.traces import some
from grader.experiment import Exercise, Experiment, Trial, expect_number, expect_tensor
from grader.near import near, which
from helpers.batchnorm import batch_norm

exercise = Exercise(__name__, "5.1", batch_norm)

_DIVISORS = {"n": 0, "n - 1": 1}  # what a variance is divided by, and the `correction` that torch calls it
_ROOTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inside the root": lambda var, eps: (var + eps).sqrt(),
    "outside the root": lambda var, eps: var.sqrt() + eps,
    "nowhere, or another eps": lambda var, eps: (var + 1e-5).sqrt(),
}


def _layer(trial: Trial, kind: type, channels: int) -> nn.Module:
    """A layer that has been used: no buffer, no eps and no momentum is that of a fresh one."""
    return with_statistics(kind(channels, eps=trial.integer(3, 6) / 10, momentum=trial.integer(20, 35) / 100), trial)


def _plain(layer: nn.Module) -> nn.Module:
    """Give the layer weight 1 and bias 0, in place: then its output is x normalised."""
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _batch(trial: Trial, *shape: int) -> Tensor:
    """Inputs whose mean and spread differ between samples, between channels and between positions."""
    x = trial.normal(*shape)
    for axis, size in enumerate(shape):
        along = [size if i == axis else 1 for i in range(len(shape))]
        x = x + (1.5 * torch.arange(size) + trial.normal(size) / 4)[trial.permutation(size)].view(along) / 2
    return x


def _output(subject, x: Tensor, layer: nn.Module) -> Tensor:
    return expect_tensor(subject(x, layer), tuple(x.shape), "the output").detach()


def _buffers(layer: nn.Module) -> dict:
    """Copies of the layer's buffers."""
    names, shape = ("running_mean", "running_var"), (layer.num_features,)
    buffers = {name: expect_tensor(getattr(layer, name), shape, f"layer.{name}").detach().clone() for name in names}
    return buffers | {"num_batches_tracked": expect_number(layer.num_batches_tracked, "layer.num_batches_tracked")}


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(channels,) -> (channels, 1, ...), which broadcasts along the channels of x."""
    return values.view(-1, *[1] * (x.ndim - 2))


def _all_but_channels(dimensions: int) -> list[int]:
    return [axis for axis in range(dimensions) if axis != 1]


def _moments(x: Tensor, axes: Sequence[int], correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over those axes, as they broadcast against x."""
    return x.mean(axes, keepdim=True), x.var(axes, correction=correction, keepdim=True)


def _ways(x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> Iterator[tuple[dict[str, str | None], Tensor, Tensor]]:
    """Every way to normalise that this check knows: its facts, the normalised x, and what x was divided by."""
    rest = list(range(2, x.ndim))
    axes = {
        "the batch's, one for each channel": [0, *rest],
        "the sample's own, over all channels": [1, *rest],
        "the sample's own, one for each channel": rest,
        "the batch's, one for each channel and position": [0],
    }
    moments = [
        (name, divisor, *_moments(x, over, correction))
        for name, over in axes.items()
        for divisor, correction in _DIVISORS.items()
    ]
    for buffers in (before.state_dict(), after):
        mean, var = (buffers[name].to(x) for name in ("running_mean", "running_var"))
        moments.append(("the running ones", "as stored", _column(mean, x), _column(var, x)))
        moments.append(("the running ones, along the last axis", "as stored", mean, var))
    for name, divisor, mean, var in moments:
        for where, root in _ROOTS.items():
            facts = {"mean and variance are": name, "the variance is divided by": divisor, "eps is added": where}
            yield facts, (x - mean) / root(var, before.eps), root(var, before.eps)


def _how(y: Tensor, x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> tuple[dict[str, str | None], Tensor, Tensor]:
    """The way in which y is x normalised; x in float64, perhaps with a graph."""
    unknown = {"mean and variance are": "different", "the variance is divided by": None, "eps is added": None}
    return next((way for way in _ways(x, before, after) if near(y, way[1])), (unknown, x, x))


@exercise.experiment("normalises with the batch")
class NormalisesWithTheBatch(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)  # the last axis is as long, so that what belongs to channels also fits there
        return {"x": _batch(trial, 3, channels, 2, channels), "layer": _plain(_layer(trial, nn.BatchNorm2d, channels))}

    def measure(self, subject, inputs):
        return {"y": _output(subject, inputs["x"], inputs["layer"]), "after": _buffers(inputs["layer"])}

    def facts(self, raw, inputs):
        return _how(raw["y"], inputs["x"].double(), inputs["layer"], raw["after"])[0]


@exercise.experiment("eval mode")
class EvalMode(NormalisesWithTheBatch):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["layer"].eval()
        return inputs

    def facts(self, raw, inputs):
        before = inputs["layer"].state_dict()
        moved = (name for name, after in raw["after"].items() if not near(after, before[name]))
        return super().facts(raw, inputs) | {"buffers that moved": some(moved)}


@exercise.experiment("running mean")
class RunningMean(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        return {"x": 3 + 2 * trial.normal(6, channels), "layer": _layer(trial, nn.BatchNorm1d, channels)}

    def measure(self, subject, inputs):
        calls = []
        for _ in range(2):
            _output(subject, inputs["x"], inputs["layer"])
            calls.append(_buffers(inputs["layer"]))
        return {"calls": calls}

    def facts(self, raw, inputs):
        layer, m = inputs["layer"], inputs["layer"].momentum
        start, goal = layer.running_mean.double(), inputs["x"].double().mean(0)
        shares = {"momentum": m, "1 - momentum": 1 - m, "0, it stays": 0.0, "0.1": 0.1, "1": 1.0}
        known = {
            name: torch.stack([goal + (1 - share) ** calls * (start - goal) for calls in (1, 2)])
            for name, share in shares.items()
        }
        return {
            "share of the batch in the new running_mean": which(torch.stack([b["running_mean"] for b in raw["calls"]]), known),
            "num_batches_tracked after two calls": [
                buffers["num_batches_tracked"] - int(layer.num_batches_tracked) for buffers in raw["calls"]
            ],
        }


@exercise.experiment("running variance")
class RunningVariance(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layer = _layer(trial, nn.BatchNorm1d, channels)
        layer.running_var.copy_(layer.running_var.sort().values)  # rising, and the batch's falling: never in proportion
        spread = torch.arange(channels, 0, -1)[:, None]
        return {"x": spread * trial.normal(3, channels, channels), "layer": layer}

    def measure(self, subject, inputs):
        _output(subject, inputs["x"], inputs["layer"])
        return {"after": _buffers(inputs["layer"])["running_var"]}

    def facts(self, raw, inputs):
        start = inputs["layer"].running_var.double()
        step = raw["after"].double() - start
        known = {"it stays": torch.zeros_like(step)}
        for divisor, correction in _DIVISORS.items():
            way = inputs["x"].double().var((0, 2), correction=correction) - start
            known[divisor] = (step @ way) / (way @ way) * way  # as far on the way as the step goes
        return {"running_var moves towards the sum of squares divided by": which(step, known)}


@exercise.experiment("weight and bias")
class WeightAndBias(Experiment):
    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        layer = _layer(trial, nn.BatchNorm3d, channels)
        bare = nn.BatchNorm3d(channels, layer.eps, layer.momentum, affine=False)
        bare.load_state_dict(layer.state_dict(), strict=False)
        return {"x": _batch(trial, 3, channels, 2, 2, channels), "layers": [layer, _plain(copy.deepcopy(layer)), bare]}

    def measure(self, subject, inputs):
        return {"outputs": [_output(subject, inputs["x"], layer) for layer in inputs["layers"]]}

    def facts(self, raw, inputs):
        y, plain, bare = (output.double() for output in raw["outputs"])
        weight, bias = (values.detach().double() for values in inputs["layers"][0].parameters())
        acts = {"each channel": lambda values: _column(values, y), "the last axis": lambda values: values, "nothing": None}
        words = ["different", "different"]
        for scaled, w in acts.items():
            for shifted, b in acts.items():
                if near(y, plain * (w(weight) if w else 1) + (b(bias) if b else 0)):
                    words = [scaled, shifted]
        same = "those of weight 1 and bias 0" if near(bare, plain) else "different"
        return {"weight acts on": words[0], "bias acts on": words[1], "outputs with affine=False": same}


@exercise.experiment("gradients")
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        x = _batch(trial, 3, channels, channels)
        return {"x": x, "layer": _plain(_layer(trial, nn.BatchNorm1d, channels)), "push": trial.normal(*x.shape)}

    def measure(self, subject, inputs):
        layer, x = inputs["layer"], inputs["x"].clone().requires_grad_()
        y = expect_tensor(subject(x, layer), tuple(x.shape), "the output")
        gradients = [None, None, None]
        if y.requires_grad:
            leaves = [x, layer.weight, layer.bias]
            gradients = list(torch.autograd.grad(y, leaves, inputs["push"].to(y.dtype), allow_unused=True))
        graph = any(buffer.requires_grad for buffer in layer.buffers())
        return {"y": y.detach(), "gradients": gradients, "graph": graph, "after": _buffers(layer)}

    def facts(self, raw, inputs):
        x, push = inputs["x"].double().requires_grad_(), inputs["push"].double()
        got, *affine = raw["gradients"]
        with torch.enable_grad():  # the gradient that belongs to the subject's own way to normalise
            _, y, divisor = _how(raw["y"], x, inputs["layer"], raw["after"])
            full = torch.autograd.grad(y, x, push)[0]
        known = {"as depending on x": full, "as constants": push / divisor.detach()}
        reached = all(gradient is not None and not near(gradient, 0) for gradient in affine)
        return {
            "the gradient of x takes mean and variance": "no gradient reaches x" if got is None else which(got, known),
            "gradients reach weight and bias": "yes" if reached else "no",
            "the buffers carry a graph": "yes" if raw["graph"] else "no",
        }


def solution(
    x: Tensor,
    layer: nn.Module,
    *,
    axes: Callable[[int], Sequence[int]] = _all_but_channels,  # of the mean and the variance that normalise
    correction: int = 0,  # of that variance
    stored_correction: int = 1,
    share: Callable[[float], float] = lambda momentum: momentum,  # of the batch in the new running statistics
    root: Callable[[Tensor, float], Tensor] = _ROOTS["inside the root"],
    normalising: Collection[bool] = (True,),  # the modes, as `layer.training`, in which the batch normalises
    moving: Collection[bool] = (True,),  # the modes in which the buffers move
    column: Callable[[Tensor, Tensor], Tensor] = _column,
    detached: bool = False,  # whether mean and variance are constants
    graph: bool = False,  # whether the buffers carry one
) -> Tensor:
    """Right if left alone; each of the misconceptions changes a piece."""
    if layer.training in moving:
        with torch.set_grad_enabled(graph):
            mean, var = (values.flatten() for values in _moments(x, _all_but_channels(x.ndim), stored_correction))
            layer.running_mean = layer.running_mean.lerp(mean, share(layer.momentum))
            layer.running_var = layer.running_var.lerp(var, share(layer.momentum))
            layer.num_batches_tracked += 1
    if layer.training in normalising:
        mean, var = _moments(x.detach() if detached else x, axes(x.ndim), correction)
    else:
        mean, var = column(layer.running_mean, x), column(layer.running_var, x)
    y = (x - mean) / root(var, layer.eps)
    return y if layer.weight is None else y * column(layer.weight, x) + column(layer.bias, x)


exercise.misconceptions_of(
    solution,
    {
        "unbiased variance normalises": {"correction": 1},
        "biased running variance": {"stored_correction": 0},
        "momentum the other way round": {"share": lambda momentum: 1 - momentum},
        "eps outside the root": {"root": _ROOTS["outside the root"]},
        "each sample on its own": {"axes": lambda dimensions: list(range(1, dimensions))},
        "each position on its own": {"axes": lambda dimensions: [0]},
        "running statistics in train mode": {"normalising": ()},
        "batch statistics in eval mode": {"normalising": (True, False)},
        "buffers never moved": {"moving": ()},
        "buffers moved in eval mode": {"moving": (True, False)},
        "broadcast along the last axis": {"column": lambda values, x: values},
        "statistics without a graph": {"detached": True},
        "graph kept in the buffers": {"graph": True},
    },
)
