"""Exercise 5.6: the statistics of a network's BatchNorms, measured anew on other data."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks import traces
from grader.checks.batchnorm.cuts import BEFORE, DIFFERENT, far_known_as, known_as, known_statistics, rows_of, uneven
from grader.checks.batchnorm.layers import norms
from grader.checks.batchnorm.pooling import difference_of_squares
from grader.checks.networks import with_statistics
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.batchnorm import pooled_statistics, recompute_statistics

exercise = Exercise(__name__, "5.6", recompute_statistics)


def _statistics(norm: nn.Module) -> dict[str, Tensor]:
    shape = (norm.num_features,)
    return {
        "mean": expect_tensor(norm.running_mean, shape, "running_mean").detach().clone(),
        "var": expect_tensor(norm.running_var, shape, "running_var").detach().clone(),
    }


def _used(norm: _BatchNorm, trial: Trial) -> _BatchNorm:
    """Give it statistics far from those of every batch that is drawn here, so that recomputing them shows."""
    with_statistics(norm, trial)
    norm.running_mean.copy_(1 + trial.normal(norm.num_features).abs())
    norm.running_var.copy_(0.2 + 0.3 * torch.rand(norm.num_features, generator=trial.generator))
    return norm


@exercise.experiment("all batches as one")
class AllBatchesAsOne(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(4, 6)
        layers = OrderedDict(bn=_used(nn.BatchNorm2d(channels), trial), flatten=nn.Flatten(), fc=nn.Linear(4 * channels, 3))
        model = nn.Sequential(layers).eval()
        far = uneven(trial, [(2, 2, 2), (4, 2, 2), (3, 2, 2), (12, 2, 2)], channels, offset=100.0, unit=0.002)
        return {
            "models": [model, copy.deepcopy(model)],
            "far": far,
            "less": [batch - 100 for batch in far],  # exact: the difference of two near float32 numbers
        }

    def measure(self, subject, inputs):
        for model, batches in zip(inputs["models"], (inputs["far"], inputs["less"]), strict=True):
            subject(model, batches)
        far, less = (_statistics(model.bn) for model in inputs["models"])
        return {"mean": less["mean"], "far": far["var"], "less": less["var"]}

    def facts(self, raw, inputs):
        stored = _statistics(inputs["models"][0].bn)
        less = known_statistics(inputs["less"], stored)
        return {
            "running_mean is": known_as(raw["mean"], less["mean"], _near_by_its_own_scale),  # around 100 rounding blurs them
            "running_var is": far_known_as(raw["far"], known_statistics(inputs["far"], stored)["var"]),
            "running_var of the same values less 100 is": far_known_as(raw["less"], less["var"]),
        }


def _near_by_its_own_scale(mean: Tensor, expected: Tensor) -> bool:
    return near(mean, expected, scale=expected.abs().max().item())


@exercise.experiment("deeper layers")
class DeeperLayers(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels, width = trial.integer(2, 3), trial.integer(4, 5)
        layers = OrderedDict(
            bn1=_used(nn.BatchNorm2d(channels), trial),
            conv=nn.Conv2d(channels, width, 1),
            relu=nn.LeakyReLU(0.2),
            bn2=_used(nn.BatchNorm2d(width), trial),
        )
        return {
            "model": nn.Sequential(layers).eval(),
            "batches": uneven(trial, [(3, 2, 2), (9, 2, 2), (2, 2, 2)], channels),
        }

    def measure(self, subject, inputs):
        subject(inputs["model"], inputs["batches"])
        return _statistics(inputs["model"].bn2)

    def facts(self, raw, inputs):
        model, batches = copy.deepcopy(inputs["model"]).double(), [batch.double() for batch in inputs["batches"]]
        first, rows = model.bn1, torch.cat([rows_of(batch) for batch in batches], 1)
        ways = {
            "with each batch's own statistics": lambda x: F.batch_norm(x, None, None, first.weight, first.bias, True),
            "with the statistics stored before": first,
            "with the new statistics": lambda x: F.batch_norm(x, rows.mean(1), rows.var(1), first.weight, first.bias),
        }
        guesses = []
        for name, normalise in ways.items():
            with torch.no_grad():
                inputs_of_bn2 = [model.relu(model.conv(normalise(batch))) for batch in batches]
            known = known_statistics(inputs_of_bn2, _statistics(model.bn2))
            mean, var = (known_as(raw[key], known[key]) for key in ("mean", "var"))
            guesses.append({"those before it normalise": name, "its running_mean is": mean, "its running_var is": var})
        best = min(guesses, key=lambda guess: list(guess.values()).count(DIFFERENT))
        if best["its running_mean is"] == best["its running_var is"] == BEFORE:
            best["those before it normalise"] = None
        return best


class _Kinds(nn.Module):
    """BatchNorms of every kind, each with a part of the output of its own."""

    def __init__(self, trial: Trial, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.bn3 = nn.BatchNorm3d(channels)
        self.bn_plain = nn.BatchNorm2d(channels, affine=False)
        self.layer = nn.Sequential(OrderedDict(block=nn.ModuleList([nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels)))])))
        self.downsample = nn.Sequential(nn.Identity(), nn.BatchNorm2d(channels))
        for norm in norms(self):
            _used(norm, trial)

    def places(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """Each BatchNorm with the shape, behind (n, channels), in which it sees the image."""
        return {
            "a BatchNorm2d": (self.bn2, (2, 4)),
            "a BatchNorm1d": (self.bn1, (8,)),
            "a BatchNorm3d": (self.bn3, (2, 2, 2)),
            "one with affine=False": (self.bn_plain, (2, 4)),
            "one inside another module": (self.layer.block[0], (2, 4)),
            "one called downsample.1": (self.downsample, (2, 4)),
        }

    def forward(self, x: Tensor) -> Tensor:  # (n, channels, 2, 4) -> (n, norms, channels * 8)
        return torch.stack(
            [norm(x.unflatten(2, (2,)).reshape(*x.shape[:2], *to)).flatten(1) for norm, to in self.places().values()], 1
        )


@exercise.experiment("every kind")
class EveryKind(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(2, 4)
        batch, probe = 3 + 2 * trial.normal(20, channels, 2, 4), trial.normal(3, channels, 2, 4)
        return {"model": _Kinds(trial, channels).eval(), "batch": batch, "probe": probe}

    def measure(self, subject, inputs):
        model = inputs["model"]
        subject(model, [inputs["batch"]])
        with torch.no_grad():
            return {"outputs": model.eval()(inputs["probe"]).detach()}

    def facts(self, raw, inputs):
        model = inputs["model"]
        rows = rows_of(inputs["batch"])
        with torch.no_grad():
            before = model(inputs["probe"]).double()
            for norm in norms(model):
                norm.running_mean.copy_(rows.mean(1))
                norm.running_var.copy_(rows.var(1))
            right = model(inputs["probe"]).double()

        def nearly(values: Tensor, wanted: Tensor) -> bool:  # whether, not how exactly: other experiments ask that
            return (values - wanted).norm() < 0.02 * (right - before).norm()

        facts = {}
        for i, name in enumerate(model.places()):
            word = known_as(raw["outputs"][:, i], {"recomputed": [right[:, i]], BEFORE: [before[:, i]]}, nearly)
            facts[name] = None if word == DIFFERENT else word  # neither: nothing to be said here
        return facts


@exercise.experiment("dropout off")
class DropoutOff(Experiment):
    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layers = OrderedDict(dropout=nn.Dropout(0.5), bn=_used(nn.BatchNorm2d(channels), trial))
        return {"model": nn.Sequential(layers), "batch": 30 + 3 * trial.normal(12, channels, 2, 2)}

    def measure(self, subject, inputs):
        subject(inputs["model"], [inputs["batch"]])
        return _statistics(inputs["model"].bn)

    def facts(self, raw, inputs):
        # Dropping half of numbers around 30 adds about 900 to a variance of 9; dividing by n takes 2 % off it.
        times = raw["var"] / rows_of(inputs["batch"]).var(1)
        return {"dropout was": "on" if times.min() > 4 else "off" if (times - 1).abs().max() < 0.1 else None}


class _Mixed(Experiment):
    """Draws a model some of whose modules are in train mode, some in eval mode, with one parameter frozen."""

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layers = OrderedDict(
            conv1=nn.Conv2d(channels, 4, 1).requires_grad_(False),
            bn1=_used(nn.BatchNorm2d(4, momentum=0.3), trial),
            dropout=nn.Dropout(0.2),
            conv2=nn.Conv2d(4, 3, 1).eval(),
            bn2=_used(nn.BatchNorm2d(3), trial).eval(),
        )
        return {"model": nn.Sequential(layers), "batches": uneven(trial, [(3, 2, 2), (5, 2, 2)], channels)}

    def measure(self, subject, inputs):
        subject(inputs["model"], inputs["batches"])
        return {"traces": traces.of(inputs["model"])}

    def facts(self, raw, inputs):
        names = traces.changed(inputs["model"], raw["traces"], "buffers")
        new = tuple(any(f"{norm}.{name}" in names for name in ("running_mean", "running_var")) for norm in ("bn1", "bn2"))
        words = {(True, True): "both", (False, False): "none", (True, False): "only the one in train mode"}
        return {"BatchNorms with new statistics": words.get(new, "only the one in eval mode")}


@exercise.experiment("modes kept")
class ModesKept(_Mixed):
    points = 2

    def facts(self, raw, inputs):
        return super().facts(raw, inputs) | traces.changes(inputs["model"], raw["traces"], "modes")


@exercise.experiment("nothing else changes")
class NothingElseChanges(_Mixed):
    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        buffers = list(inputs["model"].buffers())
        return raw | {
            "settings": _settings(inputs["model"]),
            "graph": any(buffer.requires_grad for buffer in buffers),
            "inference": any(buffer.is_inference() for buffer in buffers),
        }

    def facts(self, raw, inputs):
        kind = "inference tensors, which no later training accepts" if raw["inference"] else "plain tensors"
        return {
            **super().facts(raw, inputs),
            "momentum": "kept" if raw["settings"] == _settings(inputs["model"]) else "changed",
            **traces.changes(inputs["model"], raw["traces"], "parameters", "flags"),
            "the statistics are": "tensors with a graph behind them" if raw["graph"] else kind,
        }


def _settings(model: nn.Module) -> list:
    return [[norm.momentum, norm.track_running_stats] for norm in norms(model)]


@torch.no_grad()
def forward_passes(model: nn.Module, batches: Iterable[Tensor], *, training: bool = True, momentum: float | None = 0.1) -> None:
    """What torch itself makes of the batches, with BatchNorms in that mode; a momentum of None starts anew and averages."""
    own = {norm: norm.momentum for norm in norms(model)}
    with traces.kept(model):
        model.eval()
        for norm in own:
            norm.train(training)
            norm.momentum = momentum
            if momentum is None:
                norm.reset_running_stats()
        for batch in batches:
            model(batch)
    for norm, its_momentum in own.items():
        norm.momentum = its_momentum


exercise.misconceptions_of(
    forward_passes,
    {
        "forward in eval mode": {"training": False},
        "moving average": {"momentum": 0.1},
        "mean of the batches' statistics": {"momentum": None},
        "last batch only": {"momentum": 1.0},
    },
)


def solution(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    chosen: Callable[[str, nn.Module], bool] = lambda name, module: True,
    norms_train: bool = True,
    all_else_trains: bool = False,
    pool: Callable[[list[Tensor]], tuple[Tensor, Tensor]] = pooled_statistics,
    finish: Callable[[nn.Module], object] = lambda model: None,
) -> None:
    """Right if left alone; each of the misconceptions changes a piece."""
    layers = [module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and chosen(name, module)]
    inputs = {layer: [] for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0])) for layer in layers]
    with traces.kept(model, "modes", "buffers"), torch.no_grad():
        model.train(all_else_trains)
        for layer in layers:
            layer.train(norms_train)
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        mean, var = pool(inputs[layer])
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    finish(model)


def _forget_momentum(model: nn.Module) -> None:
    for norm in norms(model):
        norm.momentum = None


exercise.misconceptions_of(
    solution,
    {
        "difference of two large numbers": {"pool": difference_of_squares},
        "measured behind the stored statistics": {"norms_train": False},
        "only BatchNorm2d": {"chosen": lambda name, module: isinstance(module, nn.BatchNorm2d)},
        "found by name": {"chosen": lambda name, module: "bn" in name},
        "dropout active": {"all_else_trains": True},
        "left in train mode": {"finish": nn.Module.train},
        "all in eval mode at the end": {"finish": nn.Module.eval},
        "momentum left changed": {"finish": _forget_momentum},
    },
)
