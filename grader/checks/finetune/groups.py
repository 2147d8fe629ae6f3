"""Exercise 4.2: parameter groups for an optimizer, with lower learning rates nearer to the stem."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, wrong_return
from grader.near import near
from helpers import expect
from helpers.finetune import parameter_groups

exercise = Exercise(__name__, "4.2", parameter_groups)


def _linear(width: int, layers: int = 1) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


class _Scaled(nn.Linear):
    """A head whose logits are multiplied by a trained number without dimensions, as in CLIP."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, classes)
        return self.scale * super().forward(x)


class _Tied(nn.Module):
    """A language model in small: the weight of its head is that of the embedding of its words."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"words": nn.Embedding(words, width), "places": nn.Embedding(8, width)})
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed["words"].weight

    def forward(self, tokens: Tensor) -> Tensor:  # (n, length) of at most 8 words -> (n, length, words)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(torch.tanh(self.body(self.embed["words"](tokens) + self.embed["places"](places))))


class _Groups(Experiment):
    """What the experiments on parameter groups share: numbers at random, and a subject asked through a real AdamW."""

    def network(self, trial: Trial, width: int) -> tuple[nn.Module, tuple[str, ...]]:
        """A model, and the names of its stages."""
        raise NotImplementedError

    def draw(self, trial: Trial) -> dict:
        model, stages = self.network(trial, width=trial.integer(2, 5))
        return {
            "model": model,
            "lr": trial.integer(1, 9) / 1000,
            "factor": 2.2 + trial.integer(0, 10) / 20,  # where no multiple of it is one of its powers
            "weight_decay": trial.integer(2, 9) / 100,
            "stages": stages,
        }

    def measure(self, subject, inputs):
        return _seen(_listed(_answer(subject, inputs)), inputs)


@exercise.experiment("lr per stage")
class LrPerStage(_Groups):
    points = 2

    def network(self, trial, width):
        blocks = nn.Sequential(OrderedDict({"1": _linear(width, 2), "10": _linear(width, 2)}))
        model = _named(embed=_linear(width), blocks=blocks, fc=_linear(width))
        return model, ("embed", "blocks.1", "blocks.10", "fc")

    def facts(self, raw, inputs):
        powers = _powers(raw, inputs, inputs["stages"])
        own = "all" if raw["own"] else "not all"
        return {
            "powers of the factor that divide lr, from stem to head": powers,
            "groups with `lr` and `weight_decay` of their own": own if powers == [3, 2, 1, 0] else None,
        }


@exercise.experiment("between the names")
class BetweenTheNames(_Groups):
    points = 2

    def network(self, trial, width):
        model = _named(
            **{"conv1": nn.Conv2d(1, width, 3, bias=False), "bn1": nn.BatchNorm2d(width)},
            **{"layer1": _linear(width), "layer2": _linear(width), "norm": nn.LayerNorm(width), "fc": nn.Linear(width, 3)},
        )
        return model, ("layer1", "layer2", "fc")

    def facts(self, raw, inputs):
        around = {"as the stage before it": "layer2.0.weight", "as the stage after it": "fc.weight"}
        return {
            "what comes before the first stage": _like(raw, ("conv1", "bn1"), {"as the first stage": "layer1.0.weight"}),
            "what comes between two stages": _like(raw, ("norm",), around),
        }


@exercise.experiment("weight decay")
class WeightDecay(_Groups):
    points = 2

    def network(self, trial, width):
        downsample = _named(**{"0": nn.Conv2d(width, 2 * width, 1, bias=False), "1": nn.BatchNorm2d(2 * width)})
        block = _named(conv1=nn.Conv2d(width, width, 3), bn1=nn.BatchNorm2d(width), downsample=downsample)
        stem = _named(conv1=nn.Conv2d(1, width, 3), bn1=nn.BatchNorm2d(width))
        return _named(stem=stem, layer1=block, fc=_Scaled(2 * width, 3)), ("stem", "layer1", "fc")

    def facts(self, raw, inputs):
        decay, kinds = raw["weight_decay"], {}
        for name, parameter in inputs["model"].named_parameters():
            if parameter.ndim > 1:
                kinds.setdefault("weights with two dimensions or more", set()).add(decay.get(name))
            elif name.endswith(".bias"):
                kinds.setdefault("biases", set()).add(decay.get(name))
            elif parameter.ndim == 0:
                kinds.setdefault("a parameter without dimensions", set()).add(decay.get(name))
            else:
                called = "bn1" if "bn1" in name else "downsample.1"
                kinds.setdefault(f"weights of a BatchNorm called `{called}`", set()).add(decay.get(name))
        return {f"weight decay of {kind}": _decay(found, inputs["weight_decay"]) for kind, found in kinds.items()}


@exercise.experiment("frozen stage")
class FrozenStage(_Groups):
    points = 2

    def network(self, trial, width):
        model = _named(stem=_linear(width, 2), layer1=_linear(width), layer2=_linear(width), fc=_linear(width))
        model.layer1.requires_grad_(False)
        model.stem[0].bias.requires_grad_(False)
        return model, ("stem", "layer1", "layer2", "fc")

    def facts(self, raw, inputs):
        frozen = [name for name, parameter in inputs["model"].named_parameters() if not parameter.requires_grad]
        return {
            "frozen parameters in a group": "none" if raw["lr"].keys().isdisjoint(frozen) else "some",
            "powers of the factor that divide lr, in the stages that train": _powers(raw, inputs, ("stem", "layer2", "fc")),
        }


@exercise.experiment("shared weight")
class SharedWeight(_Groups):
    def network(self, trial, width):
        return _Tied(trial.integer(6, 9), width), ("embed", "body", "head")

    def measure(self, subject, inputs):
        groups = _listed(_answer(subject, inputs))
        shared = inputs["model"].head.weight
        times = sum(parameter is shared for group in groups for parameter in _parameters(group))
        return {"times": times, "seen": _seen(groups, inputs) if times == 1 else None}

    def facts(self, raw, inputs):
        places = {"that of the stage `embed`": "embed.places.weight", "that of the stage `head`": "head.bias"}
        return {
            "times that the shared weight is in a group": raw["times"] if raw["times"] < 2 else "more than once",
            "its learning rate": _like(raw["seen"], ("embed.words",), places) if raw["seen"] else None,
        }


def _answer(subject, inputs: dict) -> object:
    return subject(*(inputs[name] for name in ("model", "lr", "factor", "weight_decay", "stages")))


def _seen(groups: list[dict], inputs: dict) -> dict:
    """What each parameter has in an AdamW made from the groups: {"lr": name -> number, "weight_decay": name -> number}.

    Beside them "own": whether each group brings both; "unread": whether a group has a number under a key unknown to AdamW.
    """
    times = Counter(id(parameter) for group in groups for parameter in _parameters(group))
    names = {id(parameter): name for name, parameter in inputs["model"].named_parameters()}
    if foreign := times.keys() - names.keys():
        raise WrongReturn(f"the groups must hold the model's own parameters, got {len(foreign)} tensors that are others.")
    if twice := [names[key] for key, count in times.items() if count > 1]:
        rest = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise WrongReturn(f"each parameter must be in one group, once, as AdamW wants it; {twice[0]}{rest} came more often.")
    own = all({"lr", "weight_decay"} <= group.keys() for group in groups)
    try:
        optimizer = torch.optim.AdamW(groups, lr=inputs["lr"], weight_decay=inputs["weight_decay"])
    except (TypeError, ValueError, KeyError) as error:
        raise WrongReturn(f"torch.optim.AdamW does not take the groups: {' '.join(str(error).split())}") from None
    seen = {
        key: {names[id(parameter)]: float(group[key]) for group in optimizer.param_groups for parameter in group["params"]}
        for key in ("lr", "weight_decay")
    }
    read = optimizer.defaults.keys() | {"params", "param_names"}
    unread = [value for group in groups for key, value in group.items() if key not in read and isinstance(value, int | float)]
    return seen | {"own": own, "unread": bool(unread)}


def _listed(value: object) -> list[dict]:
    """The groups, with their parameters in a list each, whatever was returned them in."""
    if isinstance(value, str | dict | Tensor) or not isinstance(value, Iterable):
        raise wrong_return("parameter_groups must return a list of dicts", value)
    groups = []
    for group in value:
        if not isinstance(group, dict) or "params" not in group:
            came = "one without" if isinstance(group, dict) else expect.describe(group)
            raise WrongReturn(f"every group must be a dict with the key 'params', got {came}.")
        params = group["params"]
        if not isinstance(params, Iterable):
            raise WrongReturn(f"'params' must be a list of parameters, got {expect.describe(params)}.")
        ordered = params if isinstance(params, set) else [params] if isinstance(params, Tensor) else list(params)
        groups.append({**group, "params": ordered})  # a set stays one: AdamW refuses it
        for parameter in _parameters(groups[-1]):
            if not isinstance(parameter, Tensor):
                raise WrongReturn(f"'params' must be a list of parameters, got a list with {expect.describe(parameter)}.")
    return groups


def _parameters(group: dict) -> Iterator[Tensor]:
    for item in group["params"]:
        yield item[1] if isinstance(item, tuple) else item  # AdamW also takes pairs (name, parameter)


def _powers(raw: dict, inputs: dict, stages: tuple[str, ...]) -> Fact:
    powers = [_power(raw["lr"], inputs, stage) for stage in stages]
    return "all 0; a key that AdamW does not read holds numbers" if raw["unread"] and set(powers) == {0} else powers


def _power(lr: dict[str, float], inputs: dict, stage: str) -> Fact:
    """k, if all that is trainable in a stage has lr / factor**k."""
    inside = ((name, parameter) for name, parameter in inputs["model"].named_parameters() if name.startswith(stage + "."))
    found = [lr.get(name) for name, parameter in inside if parameter.requires_grad]
    if None in found:
        return "in no group" if set(found) == {None} else "in part in no group"
    if not _alike(found):
        return "several"
    if found[0] <= 0:
        return "no whole power"
    power = math.log(inputs["lr"] / found[0], inputs["factor"])
    return round(power) if near(power, round(power)) else "no whole power"


def _like(raw: dict, modules: tuple[str, ...], places: dict[str, str]) -> str | None:
    """Which of the places, each given by one of its parameters, has the learning rate of these modules."""
    lr = raw["lr"]
    found = [number for name, number in lr.items() if name.rpartition(".")[0] in modules]
    if not found:
        return "in no group"
    if _alike(list(lr.values())):  # that of every place; why, `_powers` says
        return None if raw["unread"] else "that of all others too"
    return next((words for words, name in places.items() if name in lr and _alike([lr[name], *found])), "another")


def _alike(numbers: list[float]) -> bool:
    return near(numbers, numbers[0], scale=max(map(abs, numbers)) or 1.0)


def _decay(found: set[float | None], weight_decay: float) -> str:
    if None in found:
        return "in part in no group"
    known = {"0": 0.0, "weight_decay": weight_decay}
    return next((word for word, decay in known.items() if near(list(found), decay, scale=weight_decay)), "neither for all")


def _staged(model: nn.Module, stages: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Every trainable parameter with its name and the number of its stage, counted from the stem."""
    stage = 0
    for name, parameter in model.named_parameters():
        stage = next((i for i, begin in enumerate(stages) if name.startswith(begin + ".")), stage)
        if parameter.requires_grad:
            yield name, parameter, stage


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1


def _grouped(rates: Iterable[tuple[str, nn.Parameter, float]], weight_decay: float, spared=_no_decay) -> list[dict]:
    """One group for each pair of a learning rate and a weight decay."""
    groups = {}
    for name, parameter, lr in rates:
        decay = 0.0 if spared(name, parameter) else weight_decay
        groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


@exercise.misconception("forgotten stem")
def forgotten_stem(model, lr, factor, weight_decay, stages):
    names = [name for name, _ in model.named_parameters()]
    begin = next(i for i, name in enumerate(names) if name.startswith(stages[0] + "."))
    rates = (
        (name, parameter, lr / factor ** (len(stages) - 1 - stage))
        for name, parameter, stage in _staged(model, stages)
        if names.index(name) >= begin
    )
    return _grouped(rates, weight_decay)


@exercise.misconception("only what the stages hold")
def only_what_the_stages_hold(model, lr, factor, weight_decay, stages):
    inside = tuple(stage + "." for stage in stages)
    rates = (
        (name, parameter, lr / factor ** (len(stages) - 1 - stage))
        for name, parameter, stage in _staged(model, stages)
        if name.startswith(inside)
    )
    return _grouped(rates, weight_decay)


@exercise.misconception("order turned round")
def order_turned_round(model, lr, factor, weight_decay, stages):
    return _grouped(((name, p, lr / factor**stage) for name, p, stage in _staged(model, stages)), weight_decay)


@exercise.misconception("factor times depth")
def factor_times_depth(model, lr, factor, weight_decay, stages):
    depths = ((name, parameter, len(stages) - 1 - stage) for name, parameter, stage in _staged(model, stages))
    return _grouped(((name, parameter, lr / (factor * k if k else 1)) for name, parameter, k in depths), weight_decay)


@exercise.misconception("beginning of a stage's name")
def beginning_of_a_stages_name(model, lr, factor, weight_decay, stages):
    rates, stage = [], 0
    for name, parameter in model.named_parameters():
        stage = next((i for i, begin in enumerate(stages) if name.startswith(begin)), stage)
        if parameter.requires_grad:
            rates.append((name, parameter, lr / factor ** (len(stages) - 1 - stage)))
    return _grouped(rates, weight_decay)


@exercise.misconception("lr_scale")
def lr_scale(model, lr, factor, weight_decay, stages):
    depths = ((name, parameter, len(stages) - 1 - stage) for name, parameter, stage in _staged(model, stages))
    groups = _grouped(((name, parameter, factor**-k) for name, parameter, k in depths), weight_decay)
    return [{**group, "lr": lr, "lr_scale": group["lr"]} for group in groups]


@exercise.misconception("head divided too")
def head_divided_too(model, lr, factor, weight_decay, stages):
    rates = ((name, p, lr / factor ** (len(stages) - stage)) for name, p, stage in _staged(model, stages))
    return _grouped(rates, weight_decay)


@exercise.misconception("depth per parameter")
def depth_per_parameter(model, lr, factor, weight_decay, stages):
    trainable = list(_staged(model, stages))
    rates = ((name, parameter, lr / factor**k) for k, (name, parameter, _) in enumerate(reversed(trainable)))
    return _grouped(rates, weight_decay)


@exercise.misconception("depth among trainable stages")
def depth_among_trainable_stages(model, lr, factor, weight_decay, stages):
    staged = list(_staged(model, stages))
    depth = {stage: k for k, stage in enumerate(sorted({stage for _, _, stage in staged}, reverse=True))}
    return _grouped(((name, parameter, lr / factor ** depth[stage]) for name, parameter, stage in staged), weight_decay)


@exercise.misconception("decay on everything")
def decay_on_everything(model, lr, factor, weight_decay, stages):
    depths = ((name, parameter, len(stages) - 1 - stage) for name, parameter, stage in _staged(model, stages))
    rates = ((name, parameter, lr / factor**k) for name, parameter, k in depths)
    return _grouped(rates, weight_decay, spared=lambda name, parameter: False)


@exercise.misconception("norms by the letters bn")
def norms_by_the_letters_bn(model, lr, factor, weight_decay, stages):
    depths = ((name, parameter, len(stages) - 1 - stage) for name, parameter, stage in _staged(model, stages))
    rates = ((name, parameter, lr / factor**k) for name, parameter, k in depths)
    return _grouped(rates, weight_decay, spared=lambda name, parameter: "bn" in name or "bias" in name)


@exercise.misconception("frozen parameters put in")
def frozen_parameters_put_in(model, lr, factor, weight_decay, stages):
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True)
    staged = list(_staged(model, stages))
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    rates = ((name, parameter, lr / factor ** (len(stages) - 1 - stage)) for name, parameter, stage in staged)
    return _grouped(rates, weight_decay)


@exercise.misconception("a parameter twice")
def a_parameter_twice(model, lr, factor, weight_decay, stages):
    rates, stage = [], 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = next((i for i, begin in enumerate(stages) if name.startswith(begin + ".")), stage)
        if parameter.requires_grad:
            rates.append((name, parameter, lr / factor ** (len(stages) - 1 - stage)))
    return _grouped(rates, weight_decay)
