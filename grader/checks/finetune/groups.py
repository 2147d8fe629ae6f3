"""Exercise 4.2: parameter groups for an optimizer, with lower learning rates nearer to the stem."""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.networks import linear, named, tied
from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, wrong_return
from grader.near import near
from helpers import expect
from helpers.finetune import parameter_groups

exercise = Exercise(__name__, "4.2", parameter_groups, core=4)


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
            "factor": 2.21 + trial.integer(0, 10) / 20,  # never 2.6, and no multiple of it is one of its powers
            "weight_decay": trial.integer(2, 9) / 100,
            "stages": stages,
        }

    def measure(self, subject, inputs):
        return _settings(_listed(subject(*inputs.values())), inputs)


@exercise.experiment("lr per stage", 1)
class LrPerStage(_Groups):
    points = 2

    def network(self, trial, width):
        blocks = named(**{"0": linear(width, 2), "1": linear(width, 2)})
        return named(embed=linear(width), blocks=blocks, fc=linear(width)), ("embed", "blocks.0", "blocks.1", "fc")

    def facts(self, raw, inputs):
        return {"powers of the factor that divide lr, from stem to head": _powers(raw, inputs, inputs["stages"])}


@exercise.experiment("one stage", 1)
class OneStage(_Groups):
    def network(self, trial, width):
        return named(fc=linear(width, 3)), ("fc",)

    def facts(self, raw, inputs):
        return {"power of the factor that divides lr, with one stage": _powers(raw, inputs, inputs["stages"])}


@exercise.experiment("between the names", 2)
class BetweenTheNames(_Groups):
    points = 2

    def network(self, trial, width):
        model = named(
            conv1=nn.Conv2d(1, width, 3, bias=False),
            bn1=nn.BatchNorm2d(width),
            layer1=linear(width),
            layer2=linear(width),
            norm=nn.LayerNorm(width),
            fc=nn.Linear(width, 3),
            scale=nn.LayerNorm(3),
        )
        model.token = nn.Parameter(torch.zeros(1, width))  # in no module but the model itself
        return model, ("layer1", "layer2", "fc")

    def facts(self, raw, inputs):
        stem = {"as the first stage": "layer1.0.weight", "as the last": "fc.weight"}
        around = {"as the stage before it": "layer2.0.weight", "as the stage after it": "fc.weight"}
        before = _like(raw, ("conv1", "bn1"), stem)
        below = inputs["lr"] / inputs["factor"] ** len(inputs["stages"])
        if before == "different" and _alike(
            [below, *(r for name, r in raw["lr"].items() if name.startswith(("conv1", "bn1")))]
        ):
            before = "one stage below the first"
        return {
            "what comes before the first stage": before,
            "what stands in no module but the model": _like(raw, ("",), stem),
            "what comes between two stages": _like(raw, ("norm",), around),
            "what comes after the last stage": _like(raw, ("scale",), {"as the last stage": "fc.weight"}),
        }


class _Decays(_Groups):
    def facts(self, raw, inputs):
        kinds: dict[str, set] = {}
        for name, parameter in inputs["model"].named_parameters():
            # Without a decay of its own a group has AdamW's, which is no mistake of this kind but that of another line.
            unseen = parameter.ndim <= 1 and name in raw["bare"]
            kinds.setdefault(self.kind(name, parameter), set()).add(None if unseen else raw["weight_decay"].get(name))
        return {f"weight decay of {kind}": _decay(decays, inputs["weight_decay"]) for kind, decays in kinds.items()}

    def kind(self, name: str, parameter: nn.Parameter) -> str:
        """What a parameter is called in a fact."""
        raise NotImplementedError


@exercise.experiment("weight decay", 3)
class WeightDecay(_Decays):
    points = 2

    def network(self, trial, width):
        downsample = named(**{"0": nn.Conv2d(width, 2 * width, 1, bias=False), "1": nn.BatchNorm2d(2 * width)})
        block = named(conv1=nn.Conv2d(width, width, 3), bn1=nn.BatchNorm2d(width), downsample=downsample)
        stem = named(conv1=nn.Conv2d(1, width, 3), bn1=nn.BatchNorm2d(width))
        return named(stem=stem, layer1=block, fc=nn.Linear(2 * width, 3)), ("stem", "layer1", "fc")

    def kind(self, name, parameter):
        if parameter.ndim > 1:
            return "weights with two dimensions or more"
        if name.endswith(".bias"):
            return "biases"
        return f"weights of a BatchNorm called `{'bn1' if 'bn1' in name else 'downsample.1'}`"


@exercise.experiment("whatever they are called", 3)
class WhateverTheyAreCalled(_Decays):
    def network(self, trial, width):
        block, head = nn.Linear(width, width), nn.Linear(width, 1)
        block.gamma = nn.Parameter(torch.ones(width))  # as in ConvNeXt
        block.position_bias = nn.Parameter(torch.zeros(width, 7))  # as in Swin
        head.scale = nn.Parameter(torch.tensor(2.0))  # as in CLIP: logits are multiplied by it
        return named(stem=linear(width), layer1=block, fc=head), ("stem", "layer1", "fc")

    def kind(self, name, parameter):
        kinds = {
            "position_bias": "a table of biases",
            "fc.weight": "a weight with one row",
            "scale": "a parameter without dimensions",
            "gamma": "a parameter with one dimension, of no norm",
            "bias": "biases",
        }
        return next((kind for end, kind in kinds.items() if name.endswith(end)), "weights with two dimensions or more")


@exercise.experiment("each in a group", 4)
class EachInAGroup(_Groups):
    def network(self, trial, width):
        model, stages = BetweenTheNames().network(trial, width)
        model.fc.bias.requires_grad_(False)
        return model, stages

    def facts(self, raw, inputs):
        lost = [name for name, p in inputs["model"].named_parameters() if p.requires_grad and name not in raw["lr"]]
        return {"trainable parameters in no group": "none" if not lost else "some"}

    def notes(self, raw, inputs):
        lost = [name for name, p in inputs["model"].named_parameters() if p.requires_grad and name not in raw["lr"]]
        return {"trainable parameters in no group": ", ".join(lost[:4]) + (" and more" if len(lost) > 4 else "")}


@exercise.experiment("frozen stage", 4)
class FrozenStage(_Groups):
    points = 2

    def network(self, trial, width):
        layer1, layer2, layer3, fc = (linear(width) for _ in range(4))
        model = named(stem=linear(width, 2), layer1=layer1, layer2=layer2, norm=nn.LayerNorm(width), layer3=layer3, fc=fc)
        model.layer1.requires_grad_(False)
        model.layer2.requires_grad_(False)  # and what comes after it trains
        model.stem[0].bias.requires_grad_(False)
        return model, ("stem", "layer1", "layer2", "layer3", "fc")

    def draw(self, trial):
        inputs = super().draw(trial)
        return inputs | {"all trains": copy.deepcopy(inputs["model"]).requires_grad_(True)}

    def measure(self, subject, inputs):
        model, *settings, all_trains = inputs.values()
        frozen = _settings(_listed(subject(model, *settings)), inputs) | {"traces": traces.of(model)}
        return frozen | {"all trains": _settings(_listed(subject(all_trains, *settings)), inputs | {"model": all_trains})}

    def facts(self, raw, inputs):
        frozen = [name for name, parameter in inputs["model"].named_parameters() if not parameter.requires_grad]
        alike = {
            stages: _powers(raw, inputs, stages) == _powers(raw["all trains"], inputs, stages)
            for stages in (("stem", "layer3", "fc"), ("norm",))
        }
        others, after = ("as if nothing were frozen" if same else "changed by what is frozen" for same in alike.values())
        return {
            "frozen parameters in a group": "none" if raw["lr"].keys().isdisjoint(frozen) else "some",
            "learning rates of the others": others,
            "learning rates of what comes after a frozen stage": after,
            **traces.changes(inputs["model"], raw["traces"], "flags"),
        }


@exercise.experiment("shared weight", 5)
class SharedWeight(_Groups):
    def network(self, trial, width):
        return tied(trial.integer(6, 9), width), ("embed", "body", "head")

    def measure(self, subject, inputs):
        groups = _listed(subject(*inputs.values()))
        shared = inputs["model"].head.weight
        times = sum(parameter is shared for group in groups for parameter in _parameters(group))
        return {"times": times, "settings": _settings(groups, inputs) if times == 1 else None}

    def facts(self, raw, inputs):
        places = {"that of the stage `embed`": "embed.places.weight", "that of the stage `head`": "head.bias"}
        return {
            "times that the shared weight is in a group": raw["times"] if raw["times"] < 2 else "more than once",
            "its learning rate": _like(raw["settings"], ("embed.words",), places) if raw["settings"] else None,
        }


@exercise.experiment("whole names", 6)
class WholeNames(_Groups):
    def network(self, trial, width):
        model = named(embed=linear(width), blocks=linear(width, 12), fc=linear(width))
        return model, ("embed", "blocks.1", "blocks.4", "blocks.10", "fc")

    def facts(self, raw, inputs):
        lr, alike = raw["lr"], ("blocks.10", "blocks.11")
        first = lr.get("blocks.1.weight")
        if first is None or _alike([first, lr.get("blocks.4.weight", 0.0)]):  # other experiments say what is wrong with these
            return {"blocks from the tenth on that have the rate of `blocks.1`": None}
        taken = [name for name in alike if _alike([first, lr.get(f"{name}.weight", 0.0)])]
        return {"blocks from the tenth on that have the rate of `blocks.1`": traces.some(taken)}


@exercise.experiment("own settings", 7)
class OwnSettings(_Groups):
    def network(self, trial, width):
        return named(stem=linear(width, 2), fc=linear(width)), ("stem", "fc")

    def facts(self, raw, inputs):
        return {"groups with `lr` and `weight_decay` of their own": "all" if raw["own"] else "not all"}


def _settings(groups: list[dict], inputs: dict) -> dict:
    """What each parameter has in an AdamW made from the groups: {"lr": name -> number, "weight_decay": name -> number}.

    Beside them "own": whether each group brings both; "bare": the names of parameters whose group brings no weight decay;
    "unread": whether a group has a number under a key unknown to AdamW.
    """
    times = Counter(id(parameter) for group in groups for parameter in _parameters(group))
    names = {id(parameter): name for name, parameter in inputs["model"].named_parameters()}
    if foreign := times.keys() - names.keys():
        raise WrongReturn(f"the groups must hold the model's own parameters, got {len(foreign)} tensors that are others.")
    if twice := [names[key] for key, count in times.items() if count > 1]:
        rest = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise WrongReturn(f"each parameter must be in one group, once, as AdamW wants it; {twice[0]}{rest} came more often.")
    own = all({"lr", "weight_decay"} <= group.keys() for group in groups)
    bare = [names[id(p)] for group in groups if "weight_decay" not in group for p in _parameters(group)]
    try:
        optimizer = torch.optim.AdamW(groups, lr=inputs["lr"], weight_decay=inputs["weight_decay"])
    except (TypeError, ValueError, KeyError) as error:
        raise WrongReturn(f"torch.optim.AdamW does not take the groups: {' '.join(str(error).split())}") from None
    settings = {
        key: {names[id(parameter)]: float(group[key]) for group in optimizer.param_groups for parameter in group["params"]}
        for key in ("lr", "weight_decay")
    }
    read = optimizer.defaults.keys() | {"params", "param_names"}
    unread = [value for group in groups for key, value in group.items() if key not in read and isinstance(value, int | float)]
    return settings | {"own": own, "bare": bare, "unread": bool(unread)}


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
    rates = [lr[name] for name, parameter in inside if parameter.requires_grad and name in lr]
    if not rates:
        return "in no group"
    if not _alike(rates):
        return "several"
    if rates[0] <= 0:
        return "no whole power"
    power = math.log(inputs["lr"] / rates[0], inputs["factor"])
    return round(power) if near(power, round(power)) else "no whole power"


def _like(raw: dict, modules: tuple[str, ...], places: dict[str, str]) -> str | None:
    """Which of the places, each given by one of its parameters, has the learning rate of these modules."""
    lr = raw["lr"]
    rates = [rate for name, rate in lr.items() if name.rpartition(".")[0] in modules]
    if not rates:
        return "in no group"
    if _alike(list(lr.values())):  # that of every place; why, `_powers` says
        return None if raw["unread"] else "that of all others too"
    return next((words for words, name in places.items() if name in lr and _alike([lr[name], *rates])), "different")


def _alike(numbers: list[float]) -> bool:
    return near(numbers, numbers[0], scale=max(map(abs, numbers)) or 1.0)


def _decay(decays: set[float | None], weight_decay: float) -> str | None:
    decays = decays - {None}  # what is in no group, another experiment says
    if not decays:
        return None
    known = {"0": 0.0, "weight_decay": weight_decay}
    return next((word for word, decay in known.items() if near(list(decays), decay, scale=weight_decay)), "neither for all")


def solution(
    *arguments,
    start=0,  # the stage of what comes before the first
    goes_on=True,  # whether a stage goes on until the next begins
    end=".",  # what follows the name of a stage in the name of a parameter
    once=True,  # whether a shared parameter counts only under its first name
    wanted=lambda parameter: parameter.requires_grad,
    rate=lambda lr, factor, depth: lr / factor**depth,
    spared=lambda name, parameter: parameter.ndim <= 1,
):
    """A right solution, in pieces that a misconception replaces."""
    model, lr, factor, weight_decay, stages = arguments
    stage, groups = start, {}
    for name, parameter in model.named_parameters(remove_duplicate=once):
        otherwise = stage if goes_on else None
        stage = next((i for i, begin in enumerate(stages) if name.startswith(begin + end)), otherwise)
        if wanted(parameter) and stage is not None:
            settings = rate(lr, factor, len(stages) - 1 - stage), 0.0 if spared(name, parameter) else weight_decay
            groups.setdefault(settings, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


exercise.misconceptions_of(
    solution,
    {
        "forgotten stem": {"start": None},
        "stem as a stage of its own": {"start": -1},
        "only what the stages hold": {"goes_on": False},
        "factor times depth": {"rate": lambda lr, factor, depth: lr / (factor * depth if depth else 1)},
        "beginning of a stage's name": {"end": ""},
        "multiplied by the factor": {"rate": lambda lr, factor, depth: lr * factor**depth},
        "head divided too": {"rate": lambda lr, factor, depth: lr / factor ** (depth + 1)},
        "decay on everything": {"spared": lambda name, parameter: False},
        "biases alone spared": {"spared": lambda name, parameter: name.endswith(".bias")},
        "norms by the letters bn": {"spared": lambda name, parameter: "bn" in name or name.endswith(".bias")},
        "frozen parameters put in": {"wanted": lambda parameter: True},
        "a parameter twice": {"once": False},
    },
)


@exercise.misconception("order turned round")
def order_turned_round(model, lr, factor, weight_decay, stages):
    # The head gets what the stem should have, and the rates grow from there.
    return solution(model, lr / factor ** (len(stages) - 1), 1 / factor, weight_decay, stages)


@exercise.misconception("lr_scale")
def lr_scale(model, lr, factor, weight_decay, stages):
    groups = solution(model, 1.0, factor, weight_decay, stages)
    return [{**group, "lr": lr, "lr_scale": group["lr"]} for group in groups]


@exercise.misconception("depth per parameter")
def depth_per_parameter(model, lr, factor, weight_decay, stages):
    each = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return solution(model, lr, factor, weight_decay, each, end="")


@exercise.misconception("depth among trainable stages")
def depth_among_trainable_stages(model, lr, factor, weight_decay, stages):
    trainable = [stage for stage in stages if any(p.requires_grad for p in model.get_submodule(stage).parameters())]
    return solution(model, lr, factor, weight_decay, trainable)
