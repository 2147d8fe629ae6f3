"""Exercise 4.6: find a learning rate, and leave no trace of the search."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, wrong_return
from grader.near import near
from helpers import expect
from helpers.finetune import find_lr

exercise = Exercise(__name__, "4.6", find_lr)

Batches = list[tuple[Tensor, Tensor]]


@exercise.experiment("learning rates")
class LearningRates(Experiment):
    points = 2
    lowest, highest = 0.02, 1.0
    own = (0.01, 0.2, 0.05)  # neither the first group nor the last has the largest

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3, bias=False), nn.Linear(3, 3))
        optimizer = torch.optim.SGD(self.groups(model), lr=0.1)
        return {"model": model, "optimizer": optimizer, "batches": _batches(trial, trial.integer(6, 7), width)}

    def groups(self, model: nn.Sequential) -> list[dict]:
        return [{"params": list(model[i].parameters()), "lr": lr} for i, lr in zip((0, 2, 3), self.own, strict=True)]

    def measure(self, subject, inputs):
        lrs, losses = _call(subject, *inputs.values(), self.lowest, self.highest)
        return {"lrs": lrs, "losses": losses}

    def facts(self, raw, inputs):
        n, ratio = len(inputs["batches"]), self.highest / self.lowest
        geometric = [self.lowest * ratio ** (k / (n - 1)) for k in range(n)]
        schedules = {
            "growing by one factor, from lowest to highest": geometric,
            "growing by one difference, from lowest to highest": torch.linspace(self.lowest, self.highest, n).tolist(),
            "falling by one factor, from highest to lowest": geometric[::-1],
            "growing by one factor, short of highest": [self.lowest * ratio ** (k / n) for k in range(n)],
        }
        found = next((name for name, lrs in schedules.items() if _alike(raw["lrs"], lrs)), "different")
        return {"learning rates": found, "learning rates of the groups": self.find_groups(raw, inputs, geometric)}

    def find_groups(self, raw: dict, inputs: dict, geometric: list[float]) -> Fact:
        if not _alike(raw["lrs"], geometric):
            return None
        model, largest = inputs["model"], max(self.own)
        groups = [group["params"] for group in self.groups(model)]
        schemes = {
            "in their ratio, the largest as noted": [[lr * own / largest for own in self.own] for lr in geometric],
            "all as noted": [[lr] * 3 for lr in geometric],
            "in their ratio, the first as noted": [[lr * own / self.own[0] for own in self.own] for lr in geometric],
            "their own, all the time": [list(self.own)] * len(geometric),
        }
        return _which(raw["losses"], {n: lambda s=s: _losses(model, inputs["batches"], s, groups) for n, s in schemes.items()})


@exercise.experiment("losses")
class Losses(Experiment):
    points = 2
    own = 0.1

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model = _network(trial, width).eval()  # as after an evaluation
        optimizer = torch.optim.SGD(model.parameters(), lr=self.own)
        return {"model": model, "optimizer": optimizer, "batches": _batches(trial, trial.integer(6, 7), width)}

    def measure(self, subject, inputs):
        lrs, losses = _call(subject, *inputs.values(), 0.02, 0.5)
        return {"lrs": lrs, "losses": losses}

    def facts(self, raw, inputs):
        model, batches, rates = inputs["model"], inputs["batches"], [[lr] for lr in raw["lrs"]]
        if len(rates) != len(batches):
            return {"the losses": "not one for each batch"}
        ways = {
            "before each step, in train mode": lambda: _losses(model, batches, rates),
            "after each step": lambda: _losses(model, batches, rates, after=True),
            "of steps along the gradients of all batches so far": lambda: _losses(model, batches, rates, add_up=True),
            "of a model that is never trained": lambda: _losses(model, batches, [[0.0]] * len(batches)),
            "of steps with the optimizer's own learning rate": lambda: _losses(model, batches, [[self.own]] * len(batches)),
            "in eval mode": lambda: _losses(model, batches, rates, train=False),
        }
        return {"the losses": _which(raw["losses"], ways)}


@exercise.experiment("stops early")
class StopsEarly(Experiment):
    points = 2
    # The learning rates are too small to matter, so the batches alone decide what their losses are.
    wanted = (
        (1.0, 0.5, 0.9, 1.5, 1.2, 0.6),  # 3 times the smallest
        (1.0, 0.2, 0.6, 0.9, 0.3, 0.25),  # 4.5 times the smallest, but less than the first and than twice the one before
        (0.7, 0.6, 0.65, math.nan, 0.6, 0.5),
    )

    def draw(self, trial: Trial) -> dict:
        model = nn.Linear(2, 2)
        apart = model.weight[0] - model.weight[1]
        with torch.no_grad():
            model.bias.zero_()
            model.weight.mul_(2 / apart.norm())
            apart = (model.weight[0] - model.weight[1]).clone()
        label, sign = (0, 1) if trial.integer(0, 1) else (1, -1)
        batches = []
        for losses in self.wanted:
            margins = [math.inf if math.isnan(loss) else -math.log(math.expm1(loss)) for loss in losses]
            inputs = [torch.full((3, 2), m) if math.isinf(m) else (sign * m / 4 * apart).repeat(3, 1) for m in margins]
            batches.append([(x, torch.full((3,), label)) for x in inputs])
        return {"model": model, "batches": batches}

    def measure(self, subject, inputs):
        counts = []
        for batches in inputs["batches"]:
            model = copy.deepcopy(inputs["model"])
            _, losses = _call(subject, model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 1e-9, 1e-8)
            counts.append(len(losses))
        return {"counts": counts}

    def facts(self, raw, inputs):
        words = {3: "ends the search, and is left out", 4: "ends the search, and is noted", 6: "does not end the search"}
        found = [words.get(count, "something else ends the search") for count in raw["counts"]]
        return dict(
            zip(("a loss 3 times the smallest", "a loss 4.5 times the smallest", "a loss that is NaN"), found, strict=True)
        )


class _Traces(Experiment):
    """Draws a network, an optimizer for it, and one batch over and over, on which the loss falls if anything is trained."""

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 5)
        model = _network(trial, width)
        model[4].eval()  # one BatchNorm is in eval mode
        return {"model": model, "batches": _batches(trial, 1, width) * 8}

    def search(self, subject, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, highest: float) -> str:
        _, losses = _call(subject, model, optimizer, batches, highest / 20, highest)
        # By 2 %: whoever trains anything gets further, and without training the loss stays.
        return "falls" if len(losses) > 1 and losses[-1] < 0.98 * losses[0] else "does not fall"

    def search_with_sgd(self, subject, inputs) -> tuple[str, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(inputs["model"].parameters(), lr=0.1)
        return self.search(subject, inputs["model"], optimizer, inputs["batches"], 0.3), optimizer


@exercise.experiment("model as it was")
class ModelAsItWas(_Traces):
    points = 2

    def measure(self, subject, inputs):
        loss, _ = self.search_with_sgd(subject, inputs)
        return {"loss": loss, "state": {name: tensor.clone() for name, tensor in inputs["model"].state_dict().items()}}

    def facts(self, raw, inputs):
        model, after = inputs["model"], raw["state"]
        moved = {name for name, was in model.state_dict().items() if name not in after or not torch.equal(after[name], was)}
        parameters = dict(model.named_parameters()).keys()
        return {
            "the loss on one batch, seen again and again": raw["loss"],
            "parameters that moved": "some" if moved & parameters else "none",
            "buffers that moved": "some" if moved - parameters else "none",
        }


@exercise.experiment("modes as they were")
class ModesAsTheyWere(_Traces):
    def measure(self, subject, inputs):
        loss, _ = self.search_with_sgd(subject, inputs)
        return {"loss": loss, "modes": {name: module.training for name, module in inputs["model"].named_modules()}}

    def facts(self, raw, inputs):
        switched = {
            raw["modes"].get(name) for name, m in inputs["model"].named_modules() if raw["modes"].get(name) != m.training
        }
        return {
            "the loss on one batch, seen again and again": raw["loss"],
            "modules switched to train mode": "some" if True in switched else "none",
            "modules switched to eval mode": "some" if False in switched else "none",
        }


@exercise.experiment("no gradient is left")
class NoGradientIsLeft(_Traces):
    def measure(self, subject, inputs):
        loss, optimizer = self.search_with_sgd(subject, inputs)
        before = [parameter.detach().clone() for parameter in inputs["model"].parameters()]
        optimizer.step()
        moved = any(not torch.equal(p, was) for p, was in zip(inputs["model"].parameters(), before, strict=True))
        return {"loss": loss, "moved": moved}

    def facts(self, raw, inputs):
        return {
            "the loss on one batch, seen again and again": raw["loss"],
            "a step of the optimizer, without a backward pass": "moves the model" if raw["moved"] else "moves nothing",
        }


@exercise.experiment("optimizer as it was")
class OptimizerAsItWas(_Traces):
    points = 2
    own = (0.002, 0.02)

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["gradients"] = [[trial.normal(*p.shape) for p in inputs["model"].parameters()] for _ in range(3)]
        return inputs

    def optimizer(self, model: nn.Module, gradients: list[list[Tensor]]) -> torch.optim.Optimizer:
        """Adam with two groups, after a step with each of these gradients."""
        *body, weight, bias = model.parameters()
        optimizer = torch.optim.Adam([{"params": [weight, bias]}, {"params": body}])
        for step in gradients:
            self.step(model, optimizer, step)
        for group, lr in zip(optimizer.param_groups, self.own, strict=True):
            group["lr"] = lr
        return optimizer

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> Tensor:
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
            same = near(raw[name]["step"], step)
            facts |= {
                f"the loss on one batch, with {name}": raw[name]["loss"],
                f"the learning rates of {name}": "as they were" if _alike(raw[name]["lrs"], self.own) else "different",
                f"the next step of {name}, apart from those": "as it would have been" if same else "another",
            }
        return facts


def _network(trial: Trial, width: int) -> nn.Sequential:
    """A network with two BatchNorms, whose statistics are not those of fresh layers."""
    norms = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    for norm in norms:
        norm.running_mean.copy_(trial.normal(8))
        norm.running_var.copy_(0.5 + trial.normal(8).square())
        norm.num_batches_tracked.fill_(trial.integer(5, 50))
    return nn.Sequential(nn.Linear(width, 8), norms[0], nn.Tanh(), nn.Linear(8, 8), norms[1], nn.Tanh(), nn.Linear(8, 3))


def _batches(trial: Trial, count: int, width: int) -> Batches:
    """Batches of 12 inputs (12, width) of three classes that can be told apart."""
    labels = [(torch.arange(12) % 3)[trial.permutation(12)] for _ in range(count)]
    return [(2 * torch.eye(width)[y] + 0.5 * trial.normal(12, width), y) for y in labels]


def _call(subject, model, optimizer, batches, lowest, highest) -> tuple[list[float], list[float]]:
    """What the subject returns, as two lists of floats."""
    returned = subject(model, optimizer, batches, lowest, highest)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise wrong_return("find_lr must return two lists, (lrs, losses)", returned)
    lists = []
    for name, values in zip(("lrs", "losses"), returned, strict=True):
        if isinstance(values, str | dict) or not hasattr(values, "__iter__"):
            raise WrongReturn(f"{name} must be a list of floats, got {expect.describe(values)}.")
        lists.append([expect_number(value, f"each of {name}") for value in values])
    lrs, losses = lists
    if len(lrs) != len(losses):
        raise WrongReturn(f"there must be as many lrs as losses, got {len(lrs)} and {len(losses)}.")
    return lrs, losses


def _losses(
    model: nn.Module,
    batches: Batches,
    rates: list[list[float]],
    groups: list[list[nn.Parameter]] | None = None,
    *,
    after: bool = False,
    add_up: bool = False,
    train: bool = True,
) -> list[float]:
    """Plain gradient descent on a copy of `model`: one step for each batch, with one rate for each group of parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [[names[parameter] for parameter in group] for group in groups or [list(names)]]
    copied = copy.deepcopy(model).train(train)
    parameters, total, noted = dict(copied.named_parameters()), {}, []
    for (x, labels), lrs in zip(batches, rates, strict=True):
        loss = F.cross_entropy(copied(x), labels)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        total = {name: total.get(name, 0) + gradient for name, gradient in gradients.items()} if add_up else gradients
        with torch.no_grad():
            for lr, group in zip(lrs, grouped, strict=True):
                for name in group:
                    parameters[name] -= lr * total[name]
            noted.append((F.cross_entropy(copied(x), labels) if after else loss).item())
    return noted


def _which(losses: list[float], ways: dict[str, Callable[[], list[float]]]) -> str:
    """The first of the ways of training that gives these losses."""
    return next((name for name, compute in ways.items() if _alike(losses, compute())), "different")


def _alike(some: list[float], others: list[float] | tuple[float, ...]) -> bool:
    one, other = (torch.tensor(numbers, dtype=torch.float64) for numbers in (some, others))
    return len(one) == len(other) and near(one / other, 1)


@contextmanager
def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer, *, but: str = "") -> Iterator[None]:
    """Put everything back after the `with`, except what the misconceptions below forget."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    kept, lrs = copy.deepcopy(optimizer.state_dict()), [group["lr"] for group in optimizer.param_groups]
    yield
    used, highest = dict(optimizer.state), [group["lr"] for group in optimizer.param_groups]
    if but != "model":
        model.load_state_dict(tensors)
    if but != "optimizer":
        optimizer.load_state_dict(kept)
    if but == "moments":
        optimizer.state.update(used)
    for group, lr in zip(optimizer.param_groups, highest if but in ("rates", "optimizer") else lrs, strict=True):
        group["lr"] = lr
    for module, training in modes.items():
        module.training = module.training if but == "modes" else training
    if but != "gradients":
        optimizer.zero_grad()


def _search(model, optimizer, batches, rates, *, note="before", clear=True, shares=True, above=4, nan=True):
    """The loop that the misconceptions below share; they differ in what they note, clear, set and stop at."""
    largest = max(group["lr"] for group in optimizer.param_groups)
    shares = [group["lr"] / largest if shares else 1.0 for group in optimizer.param_groups]
    lrs, losses = [], []
    model.train()
    for (inputs, labels), lr in zip(batches, rates, strict=True):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = lr * share
        loss = F.cross_entropy(model(inputs), labels)
        if nan and not loss.isfinite():
            break
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            noted = F.cross_entropy(model(inputs), labels) if note == "after" else loss
        lrs.append(lr)
        losses.append(noted.item())
        if losses[-1] > above * min(losses):
            break
    return lrs, losses


def _geometric(lowest, highest, n):
    return [lowest * (highest / lowest) ** (k / (n - 1)) for k in range(n)]


@exercise.misconception("learning rates in equal steps")
def learning_rates_in_equal_steps(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, torch.linspace(lowest, highest, len(batches)).tolist())


@exercise.misconception("from highest to lowest")
def from_highest_to_lowest(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, _geometric(highest, lowest, len(batches)))


@exercise.misconception("one learning rate for all groups")
def one_learning_rate_for_all_groups(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)), shares=False)


@exercise.misconception("learning rate set where nothing reads it")
def learning_rate_set_where_nothing_reads_it(model, optimizer, batches, lowest, highest):
    own = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    with _put_back(model, optimizer):
        for batch, lr in zip(batches, _geometric(lowest, highest, len(batches)), strict=True):
            optimizer.lr = lr
            noted = _search(model, optimizer, [batch], [max(own)])[1]
            if not noted:
                break
            lrs.append(lr)
            losses += noted
            if losses[-1] > 4 * min(losses):
                break
        return lrs, losses


@exercise.misconception("loss noted after the step")
def loss_noted_after_the_step(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)), note="after")


@exercise.misconception("gradients add up")
def gradients_add_up(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)), clear=False)


@exercise.misconception("optimizer of another model")
def optimizer_of_another_model(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(copy.deepcopy(model), optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("in the mode it came in")
def in_the_mode_it_came_in(model, optimizer, batches, lowest, highest):
    train, model.train = model.train, lambda: model
    try:
        with _put_back(model, optimizer):
            return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))
    finally:
        model.train = train


@exercise.misconception("no early stop")
def no_early_stop(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        rates = _geometric(lowest, highest, len(batches))
        return _search(model, optimizer, batches, rates, above=math.inf, nan=False)


@exercise.misconception("NaN passes the comparison")
def nan_passes_the_comparison(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)), nan=False)


@exercise.misconception("only the parameters put back")
def only_the_parameters_put_back(model, optimizer, batches, lowest, highest):
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with _put_back(model, optimizer, but="model"):
        found = _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))
    with torch.no_grad():
        for parameter, was in zip(model.parameters(), kept, strict=True):
            parameter.copy_(was)
    return found


@exercise.misconception("optimizer forgotten")
def optimizer_forgotten(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer, but="optimizer"):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("moments left")
def moments_left(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer, but="moments"):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("learning rates left")
def learning_rates_left(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer, but="rates"):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("model kept without a copy")
def model_kept_without_a_copy(model, optimizer, batches, lowest, highest):
    kept = model.state_dict()
    with _put_back(model, optimizer, but="model"):
        found = _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))
    model.load_state_dict(kept)
    return found


@exercise.misconception("moments kept without a copy")
def moments_kept_without_a_copy(model, optimizer, batches, lowest, highest):
    kept = optimizer.state_dict()
    with _put_back(model, optimizer, but="optimizer"):
        found = _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))
    optimizer.load_state_dict(kept)
    return found


@exercise.misconception("modes left")
def modes_left(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer, but="modes"):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("gradients left")
def gradients_left(model, optimizer, batches, lowest, highest):
    with _put_back(model, optimizer, but="gradients"):
        return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))


@exercise.misconception("nothing put back")
def nothing_put_back(model, optimizer, batches, lowest, highest):
    return _search(model, optimizer, batches, _geometric(lowest, highest, len(batches)))
