"""Exercise 4.6: find a learning rate, and leave no trace of the search."""

import copy
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near, which
from helpers.finetune import find_lr

exercise = Exercise(__name__, "4.6", find_lr)

Batches = list[tuple[Tensor, Tensor]]


def _in_ratio(lr: float, own: list[float]) -> list[float]:
    """The learning rates of the groups: the largest becomes `lr`, the others follow."""
    return [lr * rate / max(own) for rate in own]


def _all_the_same(lr: float, own: list[float]) -> list[float]:
    return [lr] * len(own)


def _unchanged(lr: float, own: list[float]) -> list[float]:
    return own


def _losses(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    lrs: list[float],
    *,
    rates=_in_ratio,
    train: bool = True,
    clear: bool = True,
    after: bool = False,
) -> Iterator[float]:
    """Train the model, one step for each batch and learning rate, and give the loss of each batch before its step.

    The options are what may go wrong: learning rates of the groups, train mode, gradients cleared, the loss after the step.
    """
    own = [group["lr"] for group in optimizer.param_groups]
    if train:
        model.train()
    for (inputs, labels), lr in zip(batches, lrs, strict=True):
        for group, rate in zip(optimizer.param_groups, rates(lr, own), strict=True):
            group["lr"] = rate
        loss = F.cross_entropy(model(inputs), labels)
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield (F.cross_entropy(model(inputs), labels) if after else loss).item()


def _geometric(lowest: float, highest: float, n: int) -> list[float]:
    return [lowest * (highest / lowest) ** (k / (n - 1)) for k in range(n)]


def _geometric_down(lowest: float, highest: float, n: int) -> list[float]:
    return _geometric(lowest, highest, n)[::-1]


def _equal_steps(lowest: float, highest: float, n: int) -> list[float]:
    return torch.linspace(lowest, highest, n, dtype=torch.float64).tolist()


class _Rising(Experiment):
    """Draws a model, its optimizer and six or seven batches, and keeps what the subject returns."""

    lowest, highest = 0.02, 1.0

    def network(self, trial: Trial, width: int) -> tuple[nn.Module, Optimizer]:
        raise NotImplementedError

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model, optimizer = self.network(trial, width)
        return {"model": model, "optimizer": optimizer, "batches": _batches(trial, trial.integer(6, 7), width)}

    def measure(self, subject, inputs):
        lrs, losses = _call(subject, *inputs.values(), self.lowest, self.highest)
        return {"lrs": lrs, "losses": losses}

    def find_way(self, raw: dict, inputs: dict, ways: dict[str, dict]) -> str:
        """The first way of training with these learning rates, given by options of `_losses`, that has these losses."""
        known = {}
        for name, options in ways.items():
            model, optimizer = copy.deepcopy((inputs["model"], inputs["optimizer"]))
            known[name] = list(_losses(model, optimizer, inputs["batches"], raw["lrs"], **options))
        return which(raw["losses"], known)


@exercise.experiment("learning rates")
class LearningRates(_Rising):
    points = 2
    own = (0.01, 0.2, 0.05)  # neither the first group nor the last has the largest

    def network(self, trial, width):
        model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.Linear(3, 3))
        layers = model[0], model[2], model[3]
        return model, SGD([{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, self.own, strict=True)])

    def facts(self, raw, inputs):
        n = len(inputs["batches"])
        schedules = {
            "growing by one factor, from lowest to highest": _geometric(self.lowest, self.highest, n),
            "growing by one difference, from lowest to highest": _equal_steps(self.lowest, self.highest, n),
            "falling by one factor, from highest to lowest": _geometric_down(self.lowest, self.highest, n),
            "growing by one factor, short of highest": _geometric(self.lowest, self.highest, n + 1)[:-1],
        }
        schedule = next((name for name, lrs in schedules.items() if _alike(raw["lrs"], lrs)), "different")
        ways = {
            "in their ratio, the largest as noted": {},
            "all as noted": {"rates": _all_the_same},
            "in their ratio, the first as noted": {"rates": lambda lr, own: [lr * rate / own[0] for rate in own]},
            "their own, all the time": {"rates": _unchanged},
        }
        right = schedule == "growing by one factor, from lowest to highest"
        return {
            "learning rates": schedule,
            "learning rates of the groups": self.find_way(raw, inputs, ways) if right else None,
        }


@exercise.experiment("losses")
class Losses(_Rising):
    points = 2
    highest = 0.5
    ways: ClassVar = {
        "before each step, in train mode": {},
        "after each step": {"after": True},
        "of steps along the gradients of all batches so far": {"clear": False},
        "of a model that is never trained": {"rates": lambda lr, own: [0.0]},
        "of steps with the optimizer's own learning rate": {"rates": _unchanged},
        "in eval mode": {"train": False},
    }

    def network(self, trial, width):
        model = _network(trial, width).eval()  # as after an evaluation
        return model, SGD(model.parameters(), lr=0.1)

    def facts(self, raw, inputs):
        complete = len(raw["losses"]) == len(inputs["batches"])
        return {"the losses": self.find_way(raw, inputs, self.ways) if complete else "not one for each batch"}


@exercise.experiment("stops early")
class StopsEarly(Experiment):
    points = 2
    # The learning rates are too small to matter, so the batches alone decide what their losses are.
    wanted: ClassVar = {
        "a loss 3 times the smallest": (1.0, 0.5, 0.9, 1.5, 1.2, 0.6),
        "a loss 4.5 times the smallest": (1.0, 0.2, 0.6, 0.9, 0.3, 0.25),  # but below the first, and twice the one before
        "a loss that is NaN": (0.7, 0.6, 0.65, math.nan, 0.6, 0.5),
    }

    def draw(self, trial: Trial) -> dict:
        model = nn.Linear(2, 2)
        apart = model.weight[0] - model.weight[1]
        with torch.no_grad():
            model.bias.zero_()
            model.weight.mul_(2 / apart.norm())
            apart = (model.weight[0] - model.weight[1]).clone()
        label, sign = (0, 1) if trial.integer(0, 1) else (1, -1)
        batches = []
        for losses in self.wanted.values():
            margins = [math.inf if math.isnan(loss) else -math.log(math.expm1(loss)) for loss in losses]
            inputs = [torch.full((3, 2), m) if math.isinf(m) else (sign * m / 4 * apart).repeat(3, 1) for m in margins]
            batches.append([(x, torch.full((3,), label)) for x in inputs])
        return {"model": model, "batches": batches}

    def measure(self, subject, inputs):
        counts = []
        for batches in inputs["batches"]:
            model = copy.deepcopy(inputs["model"])
            _, losses = _call(subject, model, SGD(model.parameters(), lr=0.1), batches, 1e-9, 1e-8)
            counts.append(len(losses))
        return {"counts": counts}

    def facts(self, raw, inputs):
        words = {3: "ends the search, and is left out", 4: "ends the search, and is noted", 6: "does not end the search"}
        ends = [words.get(count, "something else ends the search") for count in raw["counts"]]
        return dict(zip(self.wanted, ends, strict=True))


class _LeavesNoTrace(Experiment):
    """Draws a network, and one batch over and over, on which the loss falls if anything is trained."""

    kinds: tuple[str, ...]  # of traces to look for

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model = _network(trial, width)
        model[4].eval()  # one BatchNorm is in eval mode
        return {"model": model, "batches": _batches(trial, 1, width) * 12}

    def search(self, subject, model: nn.Module, optimizer: Optimizer, batches: Batches, highest: float) -> str:
        _, losses = _call(subject, model, optimizer, batches, highest / 20, highest)
        # By 2 %, at least for a while: whoever trains anything gets further, and without training the loss stays.
        return "falls" if losses and min(losses) < 0.98 * losses[0] else "does not fall"

    def measure(self, subject, inputs):
        model = inputs["model"]
        optimizer = SGD(model.parameters(), lr=0.1)
        loss = self.search(subject, model, optimizer, inputs["batches"], 0.3)
        left = traces.of(model)
        optimizer.step()
        return {"loss": loss, "traces": left, "moved": traces.changed(model, left, "parameters")}

    def facts(self, raw, inputs):
        loss = {"the loss on one batch, seen again and again": raw["loss"]}
        return loss | traces.changes(inputs["model"], raw["traces"], *self.kinds)


@exercise.experiment("model as it was")
class ModelAsItWas(_LeavesNoTrace):
    points = 2
    kinds = "parameters", "buffers"


@exercise.experiment("modes as they were")
class ModesAsTheyWere(_LeavesNoTrace):
    kinds = ("modes",)


@exercise.experiment("no gradient is left")
class NoGradientIsLeft(_LeavesNoTrace):
    def facts(self, raw, inputs):
        return {
            "the loss on one batch, seen again and again": raw["loss"],
            "a step of the optimizer, without a backward pass": "moves the model" if raw["moved"] else "moves nothing",
        }


@exercise.experiment("optimizer as it was")
class OptimizerAsItWas(_LeavesNoTrace):
    points = 2
    own = (0.002, 0.02)

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        # About as large as gradients of the loss: if Adam remembered larger ones, the search would hardly train.
        inputs["gradients"] = [[0.1 * trial.normal(*p.shape) for p in inputs["model"].parameters()] for _ in range(3)]
        return inputs

    def optimizer(self, model: nn.Module, gradients: list[list[Tensor]]) -> Optimizer:
        """Adam with two groups, after a step with each of these gradients."""
        *body, weight, bias = model.parameters()
        optimizer = Adam([{"params": [weight, bias]}, {"params": body}])
        for step in gradients:
            self.step(model, optimizer, step)
        for group, lr in zip(optimizer.param_groups, self.own, strict=True):
            group["lr"] = lr
        return optimizer

    def step(self, model: nn.Module, optimizer: Optimizer, gradients: list[Tensor]) -> Tensor:
        """One step with these gradients and a learning rate of 1 in every group; by how much each parameter moves."""
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        optimizer.step()
        optimizer.zero_grad()
        return nn.utils.parameters_to_vector(model.parameters()).detach() - before

    def histories(self, inputs: dict) -> dict[str, list[list[Tensor]]]:
        return {"an optimizer in use": inputs["gradients"][:2], "a new optimizer": []}

    def measure(self, subject, inputs):
        raw = {}
        for name, gradients in self.histories(inputs).items():
            model = copy.deepcopy(inputs["model"])
            optimizer = self.optimizer(model, gradients)
            loss = self.search(subject, model, optimizer, inputs["batches"], 0.05)
            lrs = [float(group["lr"]) for group in optimizer.param_groups]
            raw[name] = {"loss": loss, "lrs": lrs, "step": self.step(model, optimizer, inputs["gradients"][2])}
        return raw

    def facts(self, raw, inputs):
        facts: dict[str, Fact] = {}
        for name, gradients in self.histories(inputs).items():
            model = copy.deepcopy(inputs["model"])
            step = self.step(model, self.optimizer(model, gradients), inputs["gradients"][2])
            facts |= {
                f"the loss on one batch, with {name}": raw[name]["loss"],
                f"the learning rates of {name}": "as they were" if _alike(raw[name]["lrs"], self.own) else "different",
                f"the next step of {name}, apart from those": which(raw[name]["step"], {"as it would have been": step}),
            }
        return facts


def _network(trial: Trial, width: int) -> nn.Sequential:
    norms = with_statistics(nn.BatchNorm1d(8), trial), with_statistics(nn.BatchNorm1d(8), trial)
    return nn.Sequential(nn.Linear(width, 8), norms[0], nn.Tanh(), nn.Linear(8, 8), norms[1], nn.Tanh(), nn.Linear(8, 3))


def _batches(trial: Trial, count: int, width: int) -> Batches:
    """Batches of 12 inputs (12, width) of three classes that can be told apart."""
    labels = [(torch.arange(12) % 3)[trial.permutation(12)] for _ in range(count)]
    return [(2 * torch.eye(width)[y] + 0.5 * trial.normal(12, width), y) for y in labels]


def _call(subject, *arguments) -> tuple[list[float], list[float]]:
    """What the subject returns, as two lists of floats."""
    returned = subject(*arguments)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise wrong_return("find_lr must return two lists, (lrs, losses)", returned)
    lists = []
    for name, values in zip(("lrs", "losses"), returned, strict=True):
        if isinstance(values, str | dict) or not hasattr(values, "__iter__"):
            raise wrong_return(f"{name} must be a list of floats", values)
        lists.append([expect_number(value, f"each of {name}") for value in values])
    lrs, losses = lists
    if len(lrs) != len(losses):
        raise WrongReturn(f"there must be as many lrs as losses, got {len(lrs)} and {len(losses)}.")
    return lrs, losses


def _alike(numbers: list[float], known: list[float] | tuple[float, ...]) -> bool:
    """Whether each number is the known one, relative to it: small learning rates count as much as large ones."""
    return len(numbers) == len(known) and near([number / right for number, right in zip(numbers, known, strict=True)], 1)


def solution(
    *arguments,
    schedule=_geometric,  # (lowest, highest, number of batches) -> learning rates
    copied=copy.deepcopy,  # (model, optimizer) -> the two to search with
    left=(),  # what ends as the search left it: "moments", "learning rates" or kinds of traces
    above=4,  # the search stops after a loss that is so many times the smallest
    finite=math.isfinite,  # and before a loss of which this is not true
    **training,  # options of `_losses`
) -> tuple[list[float], list[float]]:
    """A right solution, with options for what goes wrong below."""
    model, optimizer, batches, lowest, highest = arguments
    used_model, used_optimizer = copied((model, optimizer))
    lrs, losses = schedule(lowest, highest, len(batches)), []
    for loss in _losses(used_model, used_optimizer, batches, lrs, **training):
        if not finite(loss):
            break
        losses.append(loss)
        if loss > above * min(losses):
            break
    traces.put_back(model, {kind: values for kind, values in traces.of(used_model).items() if kind in left})
    if "moments" in left:
        for parameter, used in zip(model.parameters(), used_model.parameters(), strict=True):
            optimizer.state[parameter] = used_optimizer.state[used]
    if "learning rates" in left:
        for group, used in zip(optimizer.param_groups, used_optimizer.param_groups, strict=True):
            group["lr"] = used["lr"]
    return lrs[: len(losses)], losses


exercise.misconceptions_of(
    solution,
    {
        "learning rates in equal steps": {"schedule": _equal_steps},
        "from highest to lowest": {"schedule": _geometric_down},
        "one learning rate for all groups": {"rates": _all_the_same},
        "learning rate set where nothing reads it": {"rates": _unchanged},
        "loss noted after the step": {"after": True},
        "gradients add up": {"clear": False},
        "optimizer of another model": {"copied": lambda pair: map(copy.deepcopy, pair)},
        "in the mode it came in": {"train": False},
        "no early stop": {"above": math.inf, "finite": lambda loss: True},
        "NaN passes the comparison": {"finite": lambda loss: True},
        "only the parameters put back": {"left": ("buffers",)},
        "optimizer forgotten": {"left": ("moments", "learning rates")},
        "moments left": {"left": ("moments",)},
        "learning rates left": {"left": ("learning rates",)},
        "model kept without a copy": {"left": ("parameters", "buffers")},
        "modes left": {"left": ("modes",)},
        "gradients left": {"left": ("gradients",)},
        "nothing put back": {"copied": lambda pair: pair},
    },
)


@exercise.misconception("moments kept without a copy")
def moments_kept_without_a_copy(model, optimizer, *rest):
    saved = optimizer.state_dict()
    with traces.kept(model, *traces.KINDS):
        result = solution(model, optimizer, *rest, copied=lambda pair: pair)
    optimizer.load_state_dict(saved)
    return result
