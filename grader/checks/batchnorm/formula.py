"""Exercise 5.1: what a BatchNorm layer computes, and what it does to its buffers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, expect_number, expect_tensor
from grader.near import near
from helpers.batchnorm import batch_norm

exercise = Exercise(__name__, "5.1", batch_norm)

OTHER = "something else"


def _layer(trial: Trial, kind: type, channels: int, *, plain: bool = True, affine: bool = True) -> nn.Module:
    """A layer that has been used: no buffer, no eps and no momentum is that of a fresh one. `plain` keeps weight 1, bias 0."""
    layer = kind(channels, eps=trial.integer(3, 6) / 10, momentum=trial.integer(20, 35) / 100, affine=affine)
    layer.running_mean.copy_(2 * trial.normal(channels))
    layer.running_var.copy_(2 + 3 * torch.rand(channels, generator=trial.generator))
    layer.num_batches_tracked.fill_(trial.integer(5, 50))
    if affine and not plain:
        layer.weight.data.copy_(2 + trial.normal(channels).abs())
        layer.bias.data.copy_(1 + trial.normal(channels).abs())
    return layer


def _batch(trial: Trial, *shape: int) -> Tensor:
    """Inputs whose mean and spread differ between samples, between channels and between positions."""
    x = trial.normal(*shape)
    for axis, size in enumerate(shape):
        along = [size if other == axis else 1 for other in range(len(shape))]
        x = x + (1.5 * torch.arange(size) + trial.normal(size) / 4)[trial.permutation(size)].view(along) / 2
    return x


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(channels,) -> (channels, 1, ...), which broadcasts along the channels of x."""
    return values.view(-1, *[1] * (x.ndim - 2))


def _moments(x: Tensor, over: list[int] | None = None, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance over some axes, all but the channels' if None, as they broadcast against x."""
    over = [axis for axis in range(x.ndim) if axis != 1] if over is None else over
    return x.mean(over, keepdim=True), x.var(over, correction=int(unbiased), keepdim=True)


_ROOTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inside the root": lambda var, eps: (var + eps).sqrt(),
    "outside the root": lambda var, eps: var.sqrt() + eps,
    "nowhere, or another eps": lambda var, eps: (var + 1e-5).sqrt(),
}


def _ways(x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> Iterator[tuple[dict[str, str | None], Tensor, Tensor]]:
    """Every way to normalise that this check knows: its facts, the normalised x, and what x was divided by."""
    rest = list(range(2, x.ndim))
    over = {
        "the batch's, one for each channel": [0, *rest],
        "the sample's own, over all channels": [1, *rest],
        "the sample's own, one for each channel": rest,
        "the batch's, one for each channel and position": [0],
    }

    def moments() -> Iterator[tuple[str, str, Tensor, Tensor]]:
        for name, axes in over.items():
            for unbiased in (False, True):
                yield name, "n - 1" if unbiased else "n", *_moments(x, axes, unbiased)
        for buffers in (before.state_dict(), after):
            mean, var = (buffers[name].to(x) for name in ("running_mean", "running_var"))
            yield "the running ones", "as stored", _column(mean, x), _column(var, x)
            yield "the running ones, along the last axis", "as stored", mean, var

    for name, divisor, mean, var in moments():
        for where, root in _ROOTS.items():
            facts = {"mean and variance are": name, "the variance is divided by": divisor, "eps is added": where}
            yield facts, (x - mean) / root(var, before.eps), root(var, before.eps)


def _how(y: Tensor, x: Tensor, before: nn.Module, after: dict[str, Tensor]) -> tuple[dict[str, str | None], Tensor, Tensor]:
    """The way in which y is x normalised; x in float64, perhaps with a graph."""
    unknown = {"mean and variance are": OTHER, "the variance is divided by": None, "eps is added": None}
    return next((way for way in _ways(x, before, after) if near(y, way[1])), (unknown, x, x))


@exercise.experiment("normalises with the batch")
class NormalisesWithTheBatch(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)  # the last axis is as long, so that what belongs to channels also fits there
        return {"x": _batch(trial, 3, channels, 2, channels), "layer": _layer(trial, nn.BatchNorm2d, channels)}

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
        moved = any(not near(after, before[name]) for name, after in raw["after"].items())
        return super().facts(raw, inputs) | {"buffers that moved": "some" if moved else "none"}


@exercise.experiment("running mean")
class RunningMean(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        return {"x": 3 + 2 * trial.normal(6, channels), "layer": _layer(trial, nn.BatchNorm1d, channels)}

    def measure(self, subject, inputs):
        layer = inputs["layer"]
        _output(subject, inputs["x"], layer)
        first = _buffers(layer)
        _output(subject, inputs["x"], layer)
        return {"first": first, "second": _buffers(layer)}

    def facts(self, raw, inputs):
        layer, m = inputs["layer"], inputs["layer"].momentum
        counts = [raw[call]["num_batches_tracked"] - int(layer.num_batches_tracked) for call in ("first", "second")]
        start, goal = layer.running_mean.double(), inputs["x"].double().mean(0)
        known = {"momentum": m, "1 - momentum": 1 - m, "0, it stays": 0.0, "0.1": 0.1, "1": 1.0}
        found = OTHER
        for name, share in known.items():
            once = start + share * (goal - start)
            twice = once + share * (goal - once)
            if near(raw["first"]["running_mean"], once) and near(raw["second"]["running_mean"], twice):
                found = name
                break
        return {"share of the batch in the new running_mean": found, "num_batches_tracked after two calls": counts}


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
        found = "it stays" if near(step, 0) else OTHER
        for unbiased in (False, True):
            way = _moments(inputs["x"].double(), unbiased=unbiased)[1].flatten() - start
            share = (step @ way) / (way @ way)
            if found == OTHER and near(step, share * way):
                found = "n - 1" if unbiased else "n"
        return {"running_var moves towards the sum of squares divided by": found}


@exercise.experiment("weight and bias")
class WeightAndBias(Experiment):
    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        layer = _layer(trial, nn.BatchNorm3d, channels, plain=False)
        plain, bare = (nn.BatchNorm3d(channels, layer.eps, layer.momentum, affine=affine) for affine in (True, False))
        for other in (plain, bare):
            for name, buffer in layer.named_buffers():
                other.get_buffer(name).copy_(buffer)
        return {"x": _batch(trial, 3, channels, 2, 2, channels), "layers": [layer, plain, bare]}

    def measure(self, subject, inputs):
        return {"outputs": [_output(subject, inputs["x"], layer) for layer in inputs["layers"]]}

    def facts(self, raw, inputs):
        y, plain, bare = (output.double() for output in raw["outputs"])  # plain: what weight 1 and bias 0 give
        weight, bias = (values.detach().double() for values in inputs["layers"][0].parameters())
        acts = {"each channel": lambda v: _column(v, y), "the last axis": lambda v: v, "nothing": None}
        found = [OTHER, OTHER]
        for scaled, w in acts.items():
            for shifted, b in acts.items():
                if near(y, plain * (w(weight) if w else 1) + (b(bias) if b else 0)):
                    found = [scaled, shifted]
        same = "those of weight 1 and bias 0" if near(bare, plain) else "different"
        return {"weight acts on": found[0], "bias acts on": found[1], "outputs with affine=False": same}


@exercise.experiment("gradients")
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 4)
        x = _batch(trial, 3, channels, channels)
        return {"x": x, "layer": _layer(trial, nn.BatchNorm1d, channels), "push": trial.normal(*x.shape)}

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
        found = "no gradient reaches x" if got is None else OTHER
        if got is not None:
            found = next((name for name, gradient in known.items() if near(got, gradient)), OTHER)
        reached = all(gradient is not None and not near(gradient, 0) for gradient in affine)
        return {
            "the gradient of x takes mean and variance": found,
            "gradients reach weight and bias": "yes" if reached else "no",
            "the buffers carry a graph": "yes" if raw["graph"] else "no",
        }


def _output(subject, x: Tensor, layer: nn.Module) -> Tensor:
    return expect_tensor(subject(x, layer), tuple(x.shape), "the output").detach()


def _buffers(layer: nn.Module) -> dict:
    """Copies of the layer's buffers."""
    names, shape = ("running_mean", "running_var"), (layer.num_features,)
    buffers = {name: expect_tensor(getattr(layer, name), shape, f"layer.{name}").detach().clone() for name in names}
    return buffers | {"num_batches_tracked": expect_number(layer.num_batches_tracked, "layer.num_batches_tracked")}


def _normalise(x: Tensor, layer: nn.Module, mean: Tensor, var: Tensor) -> Tensor:
    """The formula, for what is wrong elsewhere; mean and var broadcast against x."""
    y = (x - mean) / (var + layer.eps).sqrt()
    return y if layer.weight is None else y * _column(layer.weight, x) + _column(layer.bias, x)


def _running(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    return _column(layer.running_mean, x), _column(layer.running_var, x)


@torch.no_grad()
def _move(x: Tensor, layer: nn.Module, share: float | None = None, unbiased: bool = True) -> None:
    """Move the buffers as torch does, for what is wrong elsewhere."""
    mean, var = _moments(x, unbiased=unbiased)
    share = layer.momentum if share is None else share
    layer.running_mean.lerp_(mean.flatten(), share)
    layer.running_var.lerp_(var.flatten(), share)
    layer.num_batches_tracked += 1


@exercise.misconception("unbiased variance normalises")
def unbiased_variance_normalises(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    _move(x, layer)
    return _normalise(x, layer, *_moments(x, unbiased=True))


@exercise.misconception("biased running variance")
def biased_running_variance(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    _move(x, layer, unbiased=False)
    return _normalise(x, layer, *_moments(x))


@exercise.misconception("momentum the other way round")
def momentum_the_other_way_round(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    _move(x, layer, share=1 - layer.momentum)
    return _normalise(x, layer, *_moments(x))


@exercise.misconception("eps outside the root")
def eps_outside_the_root(x, layer):
    mean, var = _running(x, layer)
    if layer.training:
        _move(x, layer)
        mean, var = _moments(x)
    y = (x - mean) / (var.sqrt() + layer.eps)
    return y if layer.weight is None else y * _column(layer.weight, x) + _column(layer.bias, x)


@exercise.misconception("each sample on its own")
def each_sample_on_its_own(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    _move(x, layer)
    return _normalise(x, layer, *_moments(x, list(range(1, x.ndim))))


@exercise.misconception("each position on its own")
def each_position_on_its_own(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    _move(x, layer)
    return _normalise(x, layer, *_moments(x, [0]))


@exercise.misconception("running statistics in train mode")
def running_statistics_in_train_mode(x, layer):
    if layer.training:
        _move(x, layer)
    return _normalise(x, layer, *_running(x, layer))


@exercise.misconception("batch statistics in eval mode")
def batch_statistics_in_eval_mode(x, layer):
    if layer.training:
        _move(x, layer)
    return _normalise(x, layer, *_moments(x))


@exercise.misconception("buffers never moved")
def buffers_never_moved(x, layer):
    return _normalise(x, layer, *(_moments(x) if layer.training else _running(x, layer)))


@exercise.misconception("buffers moved in eval mode")
def buffers_moved_in_eval_mode(x, layer):
    y = _normalise(x, layer, *(_moments(x) if layer.training else _running(x, layer)))
    _move(x, layer)
    return y


@exercise.misconception("broadcast along the last axis")
def broadcast_along_the_last_axis(x, layer):
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        _move(x, layer)
        mean, var = _moments(x)
    y = (x - mean) / (var + layer.eps).sqrt()
    return y if layer.weight is None else y * layer.weight + layer.bias


@exercise.misconception("statistics without a graph")
def statistics_without_a_graph(x, layer):
    mean, var = _running(x, layer)
    if layer.training:
        _move(x, layer)
        mean, var = _moments(x.detach())
    return _normalise(x, layer, mean, var)


@exercise.misconception("graph kept in the buffers")
def graph_kept_in_the_buffers(x, layer):
    if not layer.training:
        return _normalise(x, layer, *_running(x, layer))
    mean, stored = _moments(x, unbiased=True)
    layer.running_mean = (1 - layer.momentum) * layer.running_mean + layer.momentum * mean.flatten()
    layer.running_var = (1 - layer.momentum) * layer.running_var + layer.momentum * stored.flatten()
    layer.num_batches_tracked += 1
    return _normalise(x, layer, *_moments(x))
