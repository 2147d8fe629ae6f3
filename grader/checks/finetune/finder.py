"""Exercise 4.6: find a learning rate, and leave no trace of the search."""

import copy
import math
from functools import partial
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from grader.checks import traces
from grader.checks.finetune.searching import (
    Batches,
    Shift,
    WatchedSGD,
    alike,
    all_the_same,
    as_floats,
    call_finder,
    draw_batches,
    equal_steps,
    geometric,
    geometric_down,
    geometric_short,
    is_sliding_mean,
    lists_of,
    normalised_network,
    train_losses,
    unchanged,
)
from grader.experiment import Exercise, Experiment, Fact, Trial
from grader.near import near, which
from helpers.finetune import find_lr, put_back

exercise = Exercise(__name__, "4.6", find_lr, core=5)

RISING = "growing by one factor, from lowest to highest"
NEVER = "of a model that is never trained"
WAYS: dict[str, dict] = {
    "before each step, in train mode": {},
    "after each step": {"after": True},
    "of steps along the gradients of all batches so far": {"clear": False},
    NEVER: {"rates": lambda lr, own: [0.0] * len(own)},
    "of steps with the optimizer's own learning rate": {"rates": unchanged},
    "in the modes it came in": {"enter": lambda model: None},
    "in eval mode": {"enter": nn.Module.eval},
    "of an optimizer that remembers nothing": {"forget": True},
    "sums over the batch": {"loss_of": partial(F.cross_entropy, reduction="sum")},
    "of smoothed labels": {"loss_of": partial(F.cross_entropy, label_smoothing=0.1)},
    "of probabilities, taken for logits": {"loss_of": lambda logits, labels: F.cross_entropy(logits.softmax(1), labels)},
}


class _Rising(Experiment):
    """Draws a model, its optimizer and six or seven batches, and keeps what the subject returns."""

    lowest, highest = 0.02, 1.0

    def network(self, trial: Trial, width: int) -> tuple[nn.Module, Optimizer]:
        raise NotImplementedError

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model, optimizer = self.network(trial, width)
        return {"model": model, "optimizer": optimizer, "batches": draw_batches(trial, trial.integer(6, 7), width)}

    def measure(self, subject, inputs):
        WatchedSGD.moved.clear()
        lrs, losses = call_finder(subject, *inputs.values(), self.lowest, self.highest)
        return {"lrs": lrs, "losses": losses, "moved": any(WatchedSGD.moved)}

    def find_way(self, raw: dict, inputs: dict, ways: dict[str, dict]) -> str:
        """The first way of training with these learning rates, given by options of `train_losses`, that has these losses."""
        found = (name for name, options in ways.items() if near(raw["losses"], self.losses(raw, inputs, **options)))
        return next(found, "different")  # most subjects are right, and the first way is then the only one to be trained

    def losses(self, raw: dict, inputs: dict, forget: bool = False, **options) -> list[float]:
        model, optimizer = copy.deepcopy((inputs["model"], inputs["optimizer"]))
        if forget:
            optimizer.state.clear()
        return list(train_losses(model, optimizer, inputs["batches"][: len(raw["lrs"])], raw["lrs"], **options))

    def complete(self, raw: dict, inputs: dict) -> bool:
        """Whether there is a loss for each batch, or for each up to one that ends the search."""
        losses = raw["losses"]
        return len(losses) == len(inputs["batches"]) or (len(losses) > 1 and losses[-1] > 4 * min(losses))


class _ThreeGroups(_Rising):
    own = (0.01, 0.2, 0.05)  # neither the first group nor the last has the largest

    def network(self, trial, width):
        model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.Linear(3, 3))
        layers = model[0], model[2], model[3]
        return model, SGD([{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, self.own, strict=True)])


@exercise.experiment("learning rates", 1)
class LearningRates(_ThreeGroups):
    points = 2

    def facts(self, raw, inputs):
        n = len(inputs["batches"])
        schedules = {
            RISING: geometric(self.lowest, self.highest, n),
            "growing by one difference, from lowest to highest": equal_steps(self.lowest, self.highest, n),
            "falling by one factor, from highest to lowest": geometric_down(self.lowest, self.highest, n),
            "growing by one factor, short of highest": geometric_short(self.lowest, self.highest, n),
        }
        return {"learning rates": next((name for name, lrs in schedules.items() if alike(raw["lrs"], lrs)), "different")}


@exercise.experiment("ratio of the groups", 2)
class RatioOfTheGroups(_ThreeGroups):
    ways: ClassVar = {
        "in their ratio, the largest as noted": {},
        "all as noted": {"rates": all_the_same},
        "in their ratio, the first as noted": {"rates": lambda lr, own: [lr * rate / own[0] for rate in own]},
        "their own, all the time": {"rates": unchanged},
    }

    def facts(self, raw, inputs):
        found = "different"
        if self.complete(raw, inputs):
            found = self.find_way(raw, inputs, self.ways)
            # How else it trains is the question of another experiment, in which there is one group.
            if found == "different" and (
                self.find_way(raw, inputs, WAYS) != found or is_sliding_mean(raw["losses"], self.losses(raw, inputs))
            ):
                found = None
        return {"learning rates of the groups": found}


@exercise.experiment("losses", 3)
class Losses(_Rising):
    points = 2
    highest = 0.5

    def network(self, trial, width):
        model = normalised_network(trial, width).eval()  # as after an evaluation
        model[1].train()
        optimizer = WatchedSGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
        for parameter in model.parameters():  # an optimizer in use remembers a step
            parameter.grad = 0.5 * trial.normal(*parameter.shape)
        optimizer.step()
        optimizer.zero_grad()
        return model, optimizer

    def facts(self, raw, inputs):
        if not self.complete(raw, inputs):
            return {"the losses": "not one for each batch"}
        found = self.find_way(raw, inputs, WAYS)
        if found == NEVER and raw["moved"]:
            found = "of a model that is put back after each step"
        elif found == "different" and is_sliding_mean(raw["losses"], self.losses(raw, inputs)):
            found = "a mean that slides over those of the batches"
        return {"the losses": found}


class _Ending(Experiment):
    """Batches with the losses that are wanted: the learning rates are too small to matter."""

    wanted: ClassVar[dict[str, tuple[float, ...]]]

    def draw(self, trial: Trial) -> dict:
        label = trial.integer(0, 1)
        batches = []
        for losses in self.wanted.values():
            margins = [300.0 if loss == 0 else loss if math.isnan(loss) else -math.log(math.expm1(loss)) for loss in losses]
            inputs = [torch.tensor([[m, 0.0] if label == 0 else [0.0, m]]).repeat(3, 1) for m in margins]
            batches.append([(x, torch.full((3,), label)) for x in inputs])
        return {"model": Shift(), "batches": batches}

    def measure(self, subject, inputs):
        counts, right = [], []
        for batches, wanted in zip(inputs["batches"], self.wanted.values(), strict=True):
            model = copy.deepcopy(inputs["model"])
            _, losses = call_finder(subject, model, SGD(model.parameters(), lr=1e-9), batches, 1e-9, 1e-8)
            counts.append(len(losses))
            right += [near(got, loss) for got, loss in zip(losses, takewhile(math.isfinite, wanted), strict=False)]
        return {"counts": counts, "right": all(right)}

    def facts(self, raw, inputs):
        words = {3: "ends the search, and is left out", 4: "ends the search, and is noted", 6: "does not end the search"}
        ends = [words.get(count, "something else ends the search") for count in raw["counts"]]
        if not raw["right"]:  # what is noted are no losses of the batches: the question of "losses"
            ends = [None] * len(ends)
        return dict(zip(self.wanted, ends, strict=True))


@exercise.experiment("stops early", 4)
class StopsEarly(_Ending):
    points = 2
    wanted: ClassVar = {
        "a loss 3 times the smallest": (1.0, 0.5, 0.9, 1.5, 1.2, 0.6),
        "a loss 4.5 times the smallest": (1.0, 0.2, 0.6, 0.9, 0.3, 0.25),  # but below the first, and twice the one before
        "a loss 5 times the first": (0.4, 0.5, 0.6, 2.0, 0.5, 0.6),
        "a loss that is NaN": (0.7, 0.6, 0.65, math.nan, 0.6, 0.5),
        "a loss that is infinite": (0.7, 0.6, 0.65, math.inf, 0.6, 0.5),
    }


@exercise.experiment("a loss of 0", 6)
class ALossOfZero(_Ending):
    wanted: ClassVar = {
        "a small loss after one of 0": (0.5, 0.0, 0.0, 0.3, 0.2, 0.1),
        "a small loss after one of 0.01": (0.5, 0.01, 0.01, 0.3, 0.2, 0.1),
        "nothing above 0 after it": (0.5, 0.4, 0.3, 0.0, 0.0, 0.0),
        "nothing above 0.1 after it": (0.5, 0.4, 0.3, 0.1, 0.1, 0.1),
    }

    def facts(self, raw, inputs):
        after, usual, never, usually = super().facts(raw, inputs).values()
        return {
            "a small loss after one of 0": "the same as after one of 0.01" if after and after == usual else after,
            "losses of 0 until the end": "the same as losses of 0.1" if never and never == usually else never,
        }


class _LeavesNoTrace(Experiment):
    """Draws a network, and one batch over and over, on which the loss falls if anything is trained."""

    kinds: tuple[str, ...]  # of traces to look for

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model = normalised_network(trial, width)
        model[4].eval()  # one BatchNorm is in eval mode
        return {"model": model, "batches": draw_batches(trial, 1, width) * 12}

    def search(self, subject, model: nn.Module, optimizer: Optimizer, batches: Batches, highest: float) -> str:
        _, losses = call_finder(subject, model, optimizer, batches, highest / 20, highest)
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
        return self.seen(raw, traces.changes(inputs["model"], raw["traces"], *self.kinds))

    @staticmethod
    def seen(raw: dict, facts: dict) -> dict:
        """The facts, or nothing where nothing was trained: that leaves no trace, and is the question of "losses"."""
        return facts if raw["loss"] == "falls" else dict.fromkeys(facts)


@exercise.experiment("model as it was", 5)
class ModelAsItWas(_LeavesNoTrace):
    points = 2
    kinds = "parameters", "buffers"


@exercise.experiment("modes as they were", 5)
class ModesAsTheyWere(_LeavesNoTrace):
    kinds = ("modes",)


@exercise.experiment("no gradient is left", 5)
class NoGradientIsLeft(_LeavesNoTrace):
    def facts(self, raw, inputs):
        moves = "moves the model" if raw["moved"] else "moves nothing"
        return self.seen(raw, {"a step of the optimizer, without a backward pass": moves})


@exercise.experiment("optimizer as it was", 5)
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
            facts |= self.seen(
                raw[name],
                {
                    f"the learning rates of {name}": "as they were" if alike(raw[name]["lrs"], self.own) else "different",
                    f"the next step of {name}, apart from those": which(raw[name]["step"], {"as it would have been": step}),
                },
            )
        return facts


@exercise.experiment("no graph", 7)
class NoGraph(_Rising):
    def network(self, trial, width):
        model = nn.Linear(width, 3)
        return model, SGD(model.parameters(), lr=0.1)

    def measure(self, subject, inputs):
        returned = subject(*inputs.values(), self.lowest, self.highest)
        as_floats(returned)
        return {name: any(isinstance(v, Tensor) and v.requires_grad for v in values) for name, values in lists_of(returned)}

    def facts(self, raw, inputs):
        return {f"the {name}": "hold a graph" if raw[name] else "hold no graph" for name in ("lrs", "losses")}


def solution(
    *arguments,
    schedule=geometric,  # (lowest, highest, number of batches) -> learning rates
    copied=copy.deepcopy,  # (model, optimizer) -> the two to search with
    left=(),  # what ends as the search left it: "moments", "learning rates" or kinds of traces
    above=4,  # the search stops after a loss that is so many times
    smallest=min,  # of the losses so far
    finite=math.isfinite,  # and before a loss of which this is not true
    noted=lambda losses: losses,  # what is returned of them
    **training,  # options of `train_losses`
) -> tuple[list[float], list[float]]:
    """A right solution, with options for what goes wrong below."""
    model, optimizer, batches, lowest, highest = arguments
    used_model, used_optimizer = copied((model, optimizer))
    lrs, losses = schedule(lowest, highest, len(batches)), []
    for loss in train_losses(used_model, used_optimizer, batches, lrs, **training):
        if not finite(loss):
            break
        losses.append(loss)
        if loss > above * smallest(losses):
            break
    traces.put_back(model, {kind: values for kind, values in traces.of(used_model).items() if kind in left})
    if "moments" in left:
        for parameter, used in zip(model.parameters(), used_model.parameters(), strict=True):
            optimizer.state[parameter] = used_optimizer.state[used]
    if "learning rates" in left:
        for group, used in zip(optimizer.param_groups, used_optimizer.param_groups, strict=True):
            group["lr"] = used["lr"]
    losses = noted(losses)
    return lrs[: len(losses)], losses


def _slid(losses: list[float]) -> list[float]:
    """As learning rate finders smooth them, with a share of 0.9 for what was before, corrected for the start."""
    mean, means = 0.0, []
    for k, loss in enumerate(losses):
        mean = 0.9 * mean + 0.1 * loss
        means.append(mean / (1 - 0.9 ** (k + 1)))
    return means


def _without_the_one_that_ended_it(losses: list[float]) -> list[float]:
    return losses[:-1] if losses[-1] > 4 * min(losses) else losses


exercise.misconceptions_of(
    solution,
    {
        "learning rates in equal steps": {"schedule": equal_steps},
        "from highest to lowest": {"schedule": geometric_down},
        "one learning rate for all groups": {"rates": all_the_same},
        "learning rate set where nothing reads it": {"rates": unchanged},
        "loss noted after the step": {"after": True},
        "gradients add up": {"clear": False},
        "optimizer of another model": {"copied": lambda pair: map(copy.deepcopy, pair)},
        "in the mode it came in": {"enter": lambda model: None},
        "never gets to highest": {"schedule": geometric_short},
        "smoothed losses": {"noted": _slid},
        "compared with the first loss": {"smallest": lambda losses: losses[0]},
        "the loss that ends it left out": {"noted": _without_the_one_that_ended_it},
        "losses with their graphs": {"noted": lambda losses: [torch.tensor(loss, requires_grad=True) * 1 for loss in losses]},
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


@exercise.misconception("put back after each batch")
def put_back_after_each_batch(model, optimizer, batches, lowest, highest):
    losses = []
    for batch, lr in zip(batches, lrs := geometric(lowest, highest, len(batches)), strict=True):
        with put_back(model, optimizer):
            losses += train_losses(model, optimizer, [batch], [lr])
        if not math.isfinite(losses[-1]) or losses[-1] > 4 * min(losses):
            break
    losses = losses if math.isfinite(losses[-1]) else losses[:-1]
    return lrs[: len(losses)], losses


@exercise.misconception("moments kept without a copy")
def moments_kept_without_a_copy(model, optimizer, *rest):
    saved = optimizer.state_dict()
    with traces.kept(model, *traces.KINDS):
        result = solution(model, optimizer, *rest, copied=lambda pair: pair)
    optimizer.load_state_dict(saved)
    return result
