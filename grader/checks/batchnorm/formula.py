"""Exercise 5.1: what a BatchNorm layer computes, and what it does to its buffers."""

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from grader.checks.batchnorm.ways import (
    ROOTS,
    SHARES,
    UNKNOWN,
    all_but_channels,
    column,
    divisors_of,
    moments,
    shares_of,
    variances,
    way_of,
    ways,
)
from grader.checks.networks import with_statistics
from grader.checks.traces import some
from grader.experiment import Exercise, Experiment, Trial, expect_number, expect_tensor
from grader.near import near, which
from helpers.batchnorm import batch_norm

exercise = Exercise(__name__, "5.1", batch_norm, core=5)


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


@exercise.experiment("normalises with the batch", 1)
class NormalisesWithTheBatch(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)  # the last axis is as long, so that what belongs to channels also fits there
        return {"x": _batch(trial, 3, channels, 2, channels), "layer": _plain(_layer(trial, nn.BatchNorm2d, channels))}

    def measure(self, subject, inputs):
        return {"y": _output(subject, inputs["x"], inputs["layer"]), "after": _buffers(inputs["layer"])}

    def facts(self, raw, inputs):
        return way_of(raw["y"], inputs["x"].double(), inputs["layer"], raw["after"])[0]


@exercise.experiment("eval mode", 2)
class EvalMode(NormalisesWithTheBatch):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["layer"].eval()
        return inputs

    def facts(self, raw, inputs):
        before = inputs["layer"].state_dict()
        moved = (name for name, after in raw["after"].items() if not near(after, before[name]))
        normalised = {f"in eval mode, {fact}": value for fact, value in super().facts(raw, inputs).items()}
        return normalised | {"buffers that moved": some(moved)}


class _ManyBatches(Experiment):
    """Batches of every shape, most of them with `channels` at the end too, so that what belongs to channels also fits there.

    At the first of them it finds out how the subject normalises; the question is whether it does so at the others.
    """

    training: bool
    where = "at (n, channels, h, w)"

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(3, 4)
        batches = {
            self.where: _batch(trial, 3, c, 2, c),
            "(n, channels)": _batch(trial, 7, c),
            "two values of one channel": _batch(trial, 2, 1),
            "one sample, (1, channels, length)": _batch(trial, 1, c, c),
            "channels last in memory": _batch(trial, 5, c, 4, c).contiguous(memory_format=torch.channels_last),
            "every second sample": _batch(trial, 8, c, c)[::2],
            "a part of each image": _batch(trial, 4, c, 3, c + 1)[:, :, 1:, :-1],
            "(n, channels, d, h, w)": _batch(trial, 2, c, 3, 2, c),
        }
        if not self.training:
            batches["one value of each channel"] = _batch(trial, 1, c)
        kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        layers = {name: _plain(_layer(trial, kinds[x.ndim], x.shape[1])).train(self.training) for name, x in batches.items()}
        return {"batches": batches, "layers": layers}

    def measure(self, subject, inputs):
        outputs, after = {}, {}
        for name, x in inputs["batches"].items():
            outputs[name] = _output(subject, x, inputs["layers"][name])
            after[name] = _buffers(inputs["layers"][name])
        return {"outputs": outputs, "after": after}

    def facts(self, raw, inputs):
        def seen(name: str) -> tuple[Tensor, nn.Module, dict]:
            return inputs["batches"][name].double(), inputs["layers"][name], raw["after"][name]

        way = way_of(raw["outputs"][self.where], *seen(self.where))[0]
        alike = [
            name
            for name, y in raw["outputs"].items()
            if any(facts == way and near(y, normalised) for facts, normalised, _ in ways(*seen(name)))
        ]
        return {f"shapes at which it normalises as {self.where}": None if way is UNKNOWN else alike}


@exercise.experiment("any batch", 1, 3)
class AnyBatch(_ManyBatches):
    training = True

    def facts(self, raw, inputs):
        def seen(name: str) -> tuple[Tensor, nn.Module, dict]:
            return inputs["batches"][name], inputs["layers"][name], raw["after"][name]

        share, divisor = shares_of(*seen(self.where)), divisors_of(*seen(self.where))[:1]
        alike = [name for name in raw["after"] if share <= shares_of(*seen(name)) and {*divisor} <= {*divisors_of(*seen(name))}]
        moves = {f"shapes at which the buffers move as {self.where}": alike if share and divisor else None}
        return super().facts(raw, inputs) | moves


@exercise.experiment("any batch in eval mode", 2)
class AnyBatchInEvalMode(_ManyBatches):
    training = False


@exercise.experiment("running mean", 3)
class RunningMean(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        return {"x": 3 + 2 * trial.normal(6, channels, 1, channels), "layer": _layer(trial, nn.BatchNorm2d, channels)}

    def measure(self, subject, inputs):
        calls = []
        for _ in range(2):
            _output(subject, inputs["x"], inputs["layer"])
            calls.append(_buffers(inputs["layer"]))
        return {"calls": calls}

    def facts(self, raw, inputs):
        start, goal = inputs["layer"].running_mean.double(), inputs["x"].double().mean((0, 2, 3))
        known = {
            name: torch.stack([goal + (1 - share(inputs["layer"].momentum)) ** calls * (start - goal) for calls in (1, 2)])
            for name, share in SHARES.items()
        }
        moved = torch.stack([buffers["running_mean"] for buffers in raw["calls"]])
        return {"share of the batch in the new running_mean": which(moved, known)}


@exercise.experiment("batches counted", 3)
class BatchesCounted(RunningMean):
    points = 1

    def facts(self, raw, inputs):
        counts = [buffers["num_batches_tracked"] - int(inputs["layer"].num_batches_tracked) for buffers in raw["calls"]]
        return {"num_batches_tracked after one and two calls": counts}


@exercise.experiment("running variance", 3)
class RunningVariance(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layer = _layer(trial, nn.BatchNorm2d, channels)
        layer.running_var.copy_(layer.running_var.sort().values)  # rising, and the batch's falling: never in proportion
        spread = torch.arange(channels, 0, -1)[:, None, None]
        return {"x": spread * trial.normal(3, channels, 1, channels), "layer": layer}

    def measure(self, subject, inputs):
        _output(subject, inputs["x"], inputs["layer"])
        return {"after": _buffers(inputs["layer"])}

    def facts(self, raw, inputs):
        divisors = divisors_of(inputs["x"], inputs["layer"], raw["after"])
        return {"running_var moves towards the sum of squares divided by": (divisors or ["different"])[0]}


@exercise.experiment("fresh layer", 3)
class FreshLayer(Experiment):
    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        return {
            "batches": [3 + 2 * trial.normal(4, channels, 2, channels) for _ in range(2)],
            "layer": nn.BatchNorm2d(channels),
        }

    def measure(self, subject, inputs):
        calls = []
        for x in inputs["batches"]:
            _output(subject, x, inputs["layer"])
            calls.append(_buffers(inputs["layer"]))
        return {"calls": calls}

    def facts(self, raw, inputs):
        layer, facts = inputs["layer"], {}
        for which_one, x, after in zip(("first", "second"), inputs["batches"], raw["calls"], strict=True):
            shares = shares_of(x, layer, after, of=("running_mean", "running_var"))
            name = next((share for share in SHARES if share in shares), "different")
            facts[f"share of a fresh layer's {which_one} batch in its statistics"] = name
            layer.running_mean, layer.running_var = after["running_mean"], after["running_var"]
        return facts


@exercise.experiment("weight and bias", 4)
class WeightAndBias(Experiment):
    training = True

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        layer = _layer(trial, nn.BatchNorm2d, channels)
        bare = nn.BatchNorm2d(channels, layer.eps, layer.momentum, affine=False)
        bare.load_state_dict(layer.state_dict(), strict=False)
        layers = [layer, _plain(copy.deepcopy(layer)), bare]
        return {
            "x": _batch(trial, 3, channels, 2, channels),
            "layers": [each.train(self.training).requires_grad_(self.training) for each in layers],
        }

    def measure(self, subject, inputs):
        return {"outputs": [_output(subject, inputs["x"], layer) for layer in inputs["layers"]]}

    def facts(self, raw, inputs):
        y, plain, bare = (output.double() for output in raw["outputs"])
        weight, bias = (values.detach().double() for values in inputs["layers"][0].parameters())
        acts = {"each channel": lambda values: column(values, y), "the last axis": lambda values: values, "nothing": None}
        words = ["different", "different"]
        for scaled, w in acts.items():
            for shifted, b in acts.items():
                if near(y, plain * (w(weight) if w else 1) + (b(bias) if b else 0)):
                    words = [scaled, shifted]
        same = "those of weight 1 and bias 0" if near(bare, plain) else "different"
        return {"weight acts on": words[0], "bias acts on": words[1], "outputs with affine=False": same}


@exercise.experiment("weight and bias in eval mode", 4)
class WeightAndBiasInEvalMode(WeightAndBias):
    training = False

    def facts(self, raw, inputs):
        return {f"in eval mode, {fact}": value for fact, value in super().facts(raw, inputs).items()}


@exercise.experiment("gradients", 4, 5)
class Gradients(Experiment):
    points = 2
    training = True

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        x, layer = _batch(trial, 3, channels, 2, channels), _layer(trial, nn.BatchNorm2d, channels)
        return {"x": x, "layer": _plain(layer).train(self.training), "push": trial.normal(*x.shape)}

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
            way, y, divisor = way_of(raw["y"], x, inputs["layer"], raw["after"])
            full = torch.autograd.grad(y, x, push)[0]
        known = {"as depending on x": full, "as constants": push / divisor.detach()}
        taken = None if way is UNKNOWN else which(got, known) if got is not None else "no gradient reaches x"
        reached = all(gradient is not None and not near(gradient, 0) for gradient in affine)
        return {
            "the gradient of x takes mean and variance": taken,
            "gradients reach weight and bias": "yes" if reached else "no",
        }


@exercise.experiment("gradients in eval mode", 4, 5)
class GradientsInEvalMode(Gradients):
    points = 1
    training = False

    def facts(self, raw, inputs):
        return {f"in eval mode, {fact}": value for fact, value in super().facts(raw, inputs).items()}


@exercise.experiment("no graph in the buffers", 6)
class NoGraphInTheBuffers(Gradients):
    points = 1

    def facts(self, raw, inputs):
        return {"the buffers carry a graph": "yes" if raw["graph"] else "no"}


def solution(
    x: Tensor,
    layer: nn.Module,
    *,
    axes: Callable[[int], Sequence[int]] = all_but_channels,  # of the mean and the variance that normalise
    correction: int = 0,  # of that variance
    stored: Callable[[Tensor], Tensor] = lambda x: variances(x)["n - 1"].to(x),
    share: Callable[[nn.Module], float] = lambda layer: layer.momentum,  # of the batch in the new running statistics
    counted: int = 1,
    root: Callable[[Tensor, float], Tensor] = ROOTS["inside the root"],
    normalising: Collection[bool] = (True,),  # the modes, as `layer.training`, in which the batch normalises
    moving: Collection[bool] = (True,),  # the modes in which the buffers move
    column: Callable[[Tensor, Tensor], Tensor] = column,
    detached: bool = False,  # whether mean and variance are constants
    graph: bool = False,  # whether the buffers carry one
    affine: Collection[bool] = (True, False),  # the modes in which weight and bias act
) -> Tensor:
    """Right if left alone; each of the misconceptions changes a piece."""
    if layer.training in moving:
        with torch.set_grad_enabled(graph):
            mean, var = x.mean(all_but_channels(x.ndim)), stored(x)
            layer.running_mean = layer.running_mean.lerp(mean, share(layer))
            layer.running_var = layer.running_var.lerp(var, share(layer))
            layer.num_batches_tracked += counted
    if layer.training in normalising:
        mean, var = moments(x.detach() if detached else x, axes(x.ndim), correction)
    else:
        mean, var = column(layer.running_mean, x), column(layer.running_var, x)
    y = (x - mean) / root(var, layer.eps)
    return y if layer.weight is None or layer.training not in affine else y * column(layer.weight, x) + column(layer.bias, x)


exercise.misconceptions_of(
    solution,
    {
        "unbiased variance normalises": {"correction": 1},
        "biased running variance": {"stored": lambda x: variances(x)["n"].to(x)},
        "samples counted, not values": {"stored": lambda x: variances(x)["n - 1, with n the number of samples"].to(x)},
        "momentum the other way round": {"share": lambda layer: 1 - layer.momentum},
        "always the default momentum": {"share": lambda layer: 0.1},
        "the first batch as it is": {"share": lambda layer: layer.momentum if layer.num_batches_tracked else 1.0},
        "batches not counted": {"counted": 0},
        "eps outside the root": {"root": ROOTS["outside the root"]},
        "not the layer's eps": {"root": ROOTS["nowhere, or another eps"]},
        "each sample on its own": {"axes": lambda dimensions: list(range(1, dimensions))},
        "each position on its own": {"axes": lambda dimensions: [0]},
        "running statistics in train mode": {"normalising": ()},
        "batch statistics in eval mode": {"normalising": (True, False)},
        "buffers never moved": {"moving": ()},
        "buffers moved in eval mode": {"moving": (True, False)},
        "layer.training not read": {"normalising": (True, False), "moving": (True, False)},
        "broadcast along the last axis": {"column": lambda values, x: values},
        "weight and bias in train mode only": {"affine": (True,)},
        "statistics without a graph": {"detached": True},
        "graph kept in the buffers": {"graph": True},
    },
)
