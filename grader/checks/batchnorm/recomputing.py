"""Exercise 5.6: the statistics of a network's BatchNorms, measured anew on other data."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks.batchnorm.cuts import OTHER, known_means, known_variances, rows_of, uneven, which, which_far
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.batchnorm import recompute_statistics

exercise = Exercise(__name__, "5.6", recompute_statistics)

BEFORE = "as before"


def _used(trial: Trial, norm: _BatchNorm) -> _BatchNorm:
    """A layer with statistics, weight and bias that no fresh layer has."""
    norm.running_mean.copy_(1 + trial.normal(norm.num_features).abs())
    norm.running_var.copy_(0.2 + 0.3 * torch.rand(norm.num_features, generator=trial.generator))
    norm.num_batches_tracked.fill_(trial.integer(5, 50))
    if norm.affine:
        norm.weight.data.copy_(1 + trial.normal(norm.num_features).abs())
        norm.bias.data.copy_(trial.normal(norm.num_features))
    return norm


@exercise.experiment("all batches as one")
class AllBatchesAsOne(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(4, 6)
        layers = OrderedDict(bn=_used(trial, nn.BatchNorm2d(channels)), flatten=nn.Flatten(), fc=nn.Linear(4 * channels, 3))
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
        norm = inputs["models"][0].bn
        means = _or_before(norm.running_mean, known_means(inputs["less"], norm.running_mean))  # around 100 rounding blurs them
        words = {
            name: which_far(raw[name], _or_before(norm.running_var, known_variances(inputs[name], norm.running_var)))
            for name in ("far", "less")
        }
        return {
            "running_mean is": which(
                raw["mean"], means, lambda mean, wanted: near(mean, wanted, scale=wanted.abs().max().item())
            ),
            "running_var is": words["far"],
            "running_var of the same values less 100 is": words["less"],
        }


@exercise.experiment("deeper layers")
class DeeperLayers(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        channels, width = trial.integer(2, 3), trial.integer(4, 5)
        layers = OrderedDict(
            bn1=_used(trial, nn.BatchNorm2d(channels)),
            conv=nn.Conv2d(channels, width, 1),
            relu=nn.LeakyReLU(0.2),
            bn2=_used(trial, nn.BatchNorm2d(width)),
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
        first, norm = model.bn1, model.bn2

        def seen(normalise: Callable[[Tensor], Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [model.relu(model.conv(normalise(batch))) for batch in batches]

        rows = torch.cat([rows_of(batch) for batch in batches], 1)
        ways = {
            "with each batch's own statistics": lambda x: F.batch_norm(x, None, None, first.weight, first.bias, True),
            "with the statistics stored before": first,
            "with the new statistics": lambda x: F.batch_norm(x, rows.mean(1), rows.var(1), first.weight, first.bias),
        }
        best = {"those before it normalise": OTHER, "its running_mean is": OTHER, "its running_var is": OTHER}
        for name, way in ways.items():
            values = seen(way)
            mean = which(raw["mean"], _or_before(norm.running_mean, known_means(values, norm.running_mean)))
            var = which(raw["var"], _or_before(norm.running_var, known_variances(values, norm.running_var)))
            found = {"those before it normalise": name, "its running_mean is": mean, "its running_var is": var}
            if list(found.values()).count(OTHER) < list(best.values()).count(OTHER):
                best = found
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
        for norm in self.modules():
            if isinstance(norm, _BatchNorm):
                _used(trial, norm)

    def norms(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
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
            [norm(x.unflatten(2, (2,)).reshape(*x.shape[:2], *to)).flatten(1) for norm, to in self.norms().values()], 1
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
            for norm in _norms(model):
                norm.running_mean.copy_(rows.mean(1))
                norm.running_var.copy_(rows.var(1))
            right = model(inputs["probe"]).double()

        def nearly(values: Tensor, wanted: Tensor) -> bool:  # whether, not how exactly: other experiments ask that
            return (values - wanted).norm() < 0.02 * (right - before).norm()

        found = {
            name: which(raw["outputs"][:, i], {"recomputed": [right[:, i]], BEFORE: [before[:, i]]}, nearly)
            for i, name in enumerate(model.norms())
        }
        return {name: None if word == OTHER else word for name, word in found.items()}  # neither: nothing to be said here


@exercise.experiment("dropout off")
class DropoutOff(Experiment):
    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        layers = OrderedDict(dropout=nn.Dropout(0.5), bn=_used(trial, nn.BatchNorm2d(channels)))
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
            conv1=nn.Conv2d(channels, 4, 1),
            bn1=_used(trial, nn.BatchNorm2d(4, momentum=0.3)),
            dropout=nn.Dropout(0.2),
            conv2=nn.Conv2d(4, 3, 1),
            bn2=_used(trial, nn.BatchNorm2d(3)),
        )
        model = nn.Sequential(layers)
        model.bn2.eval()
        model.conv2.eval()
        model.conv1.requires_grad_(False)
        return {"model": model, "batches": uneven(trial, [(3, 2, 2), (5, 2, 2)], channels)}

    def moved(self, model: nn.Module, before: nn.Module) -> str:
        """Which BatchNorms have other statistics than before."""
        moved = [
            not (torch.equal(now.running_mean, then.running_mean) and torch.equal(now.running_var, then.running_var))
            for now, then in ((model.bn1, before.bn1), (model.bn2, before.bn2))
        ]
        words = {(True, True): "both", (False, False): "none", (True, False): "only the one in train mode"}
        return words.get(tuple(moved), "only the one in eval mode")


@exercise.experiment("modes kept")
class ModesKept(_Mixed):
    points = 2

    def measure(self, subject, inputs):
        model = inputs["model"]
        before = copy.deepcopy(model)
        subject(model, inputs["batches"])
        return {"modes": [module.training for module in model.modules()], "moved": self.moved(model, before)}

    def facts(self, raw, inputs):
        pairs = [(module.training, now) for module, now in zip(inputs["model"].modules(), raw["modes"], strict=True)]
        return {
            "BatchNorms with new statistics": raw["moved"],
            "modules switched to train mode": "some" if (False, True) in pairs else "none",
            "modules switched to eval mode": "some" if (True, False) in pairs else "none",
        }


@exercise.experiment("nothing else changes")
class NothingElseChanges(_Mixed):
    def measure(self, subject, inputs):
        model = inputs["model"]
        before = copy.deepcopy(model)
        subject(model, inputs["batches"])
        momenta = [[norm.momentum, norm.track_running_stats] for norm in _norms(model)]
        return {
            "moved": self.moved(model, before),
            "momenta": momenta == [[norm.momentum, norm.track_running_stats] for norm in _norms(before)],
            "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
            "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "graph": any(buffer.requires_grad for buffer in model.buffers()),
            "inference": any(buffer.is_inference() for buffer in model.buffers()),
        }

    def facts(self, raw, inputs):
        parameters = dict(inputs["model"].named_parameters())
        same = parameters.keys() == raw["parameters"].keys() and all(
            torch.equal(parameters[name], now) for name, now in raw["parameters"].items()
        )
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        kind = "inference tensors, which no later training accepts" if raw["inference"] else "plain tensors"
        kind = "tensors with a graph behind them" if raw["graph"] else kind
        return {
            "BatchNorms with new statistics": raw["moved"],
            "momentum": "kept" if raw["momenta"] else "changed",
            "parameters": "kept" if same else "changed",
            "requires_grad": "kept" if flags == raw["flags"] else "changed",
            "the statistics are": kind,
        }


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _statistics(norm: nn.Module) -> dict[str, Tensor]:
    shape = (norm.num_features,)
    return {
        "mean": expect_tensor(norm.running_mean, shape, "running_mean").detach().clone(),
        "var": expect_tensor(norm.running_var, shape, "running_var").detach().clone(),
    }


def _or_before(stored: Tensor, known: dict) -> dict:
    return {BEFORE: [stored.double()]} | known


Pool = Callable[[list[Tensor], _BatchNorm], tuple[Tensor, Tensor]]  # the inputs of a layer -> mean, var


def _exactly(inputs: list[Tensor], norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    rows = torch.cat([rows_of(x) for x in inputs], 1)
    return rows.mean(1), rows.var(1)


def _recompute(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    pool: Pool = _exactly,
    chosen: Callable[[str, nn.Module], bool] = lambda name, module: True,
    batch_statistics: bool = True,
    others_in_train_mode: bool = False,
) -> None:
    """Right if left alone; each of the misconceptions changes one thing."""
    norms = [module for name, module in model.named_modules() if isinstance(module, _BatchNorm) and chosen(name, module)]
    modes = {module: module.training for module in model.modules()}
    kept = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in _norms(model)}
    seen: dict[_BatchNorm, list[Tensor]] = {norm: [] for norm in norms}
    model.train(others_in_train_mode)
    for norm in norms:
        norm.train(batch_statistics)
    hooks = [norm.register_forward_pre_hook(lambda norm, args: seen[norm].append(args[0])) for norm in norms]
    with torch.no_grad():
        for batch in batches:
            model(batch)
        for norm, buffers in kept.items():
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        for norm in norms:
            mean, var = pool(seen[norm], norm)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    for hook in hooks:
        hook.remove()
    for module, mode in modes.items():
        module.training = mode


@exercise.misconception("forward in eval mode")
def forward_in_eval_mode(model, batches):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for module, mode in modes.items():
        module.training = mode


@exercise.misconception("moving average")
def moving_average(model, batches):
    def pool(inputs: list[Tensor], norm: _BatchNorm) -> tuple[Tensor, Tensor]:
        mean, var = norm.running_mean, norm.running_var
        for rows in map(rows_of, inputs):
            mean, var = mean + 0.1 * (rows.mean(1) - mean), var + 0.1 * (rows.var(1) - var)
        return mean, var

    _recompute(model, batches, pool=pool)


@exercise.misconception("mean of the batches' statistics")
def mean_of_the_batches_statistics(model, batches):
    def pool(inputs: list[Tensor], norm: _BatchNorm) -> tuple[Tensor, Tensor]:
        rows = [rows_of(x) for x in inputs]
        return tuple(torch.stack(values).mean(0) for values in ([r.mean(1) for r in rows], [r.var(1) for r in rows]))

    _recompute(model, batches, pool=pool)


@exercise.misconception("last batch only")
def last_batch_only(model, batches):
    _recompute(model, batches, pool=lambda inputs, norm: _exactly(inputs[-1:], norm))


@exercise.misconception("difference of two large numbers")
def difference_of_squares(model, batches):
    def pool(inputs: list[Tensor], norm: _BatchNorm) -> tuple[Tensor, Tensor]:
        rows = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
        n, mean = rows.shape[1], rows.mean(1)
        return mean, ((rows**2).mean(1) - mean**2) * n / (n - 1)

    _recompute(model, batches, pool=pool)


@exercise.misconception("measured behind the stored statistics")
def measured_behind_the_stored_statistics(model, batches):
    _recompute(model, batches, batch_statistics=False)


@exercise.misconception("only BatchNorm2d")
def only_batchnorm2d(model, batches):
    _recompute(model, batches, chosen=lambda name, module: isinstance(module, nn.BatchNorm2d))


@exercise.misconception("found by name")
def found_by_name(model, batches):
    _recompute(model, batches, chosen=lambda name, module: "bn" in name)


@exercise.misconception("dropout active")
def dropout_active(model, batches):
    _recompute(model, batches, others_in_train_mode=True)


@exercise.misconception("left in train mode")
def left_in_train_mode(model, batches):
    _recompute(model, batches)
    model.train()


@exercise.misconception("all in eval mode at the end")
def all_in_eval_mode_at_the_end(model, batches):
    _recompute(model, batches)
    model.eval()


@exercise.misconception("momentum left changed")
def momentum_left_changed(model, batches):
    _recompute(model, batches)
    for norm in _norms(model):
        norm.momentum = None
