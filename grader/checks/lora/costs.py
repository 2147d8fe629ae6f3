"""Exercise 6.2: what an adapter costs, in numbers and in bytes."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn, expect_number, misconception
from grader.near import near
from helpers import expect
from helpers.lora import cost

KEYS = ("full", "adapter", "gradient_bytes", "optimizer_bytes")
MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2}
PRIMES = (11, 13, 17, 19, 23)  # of two different ones the sum and the product have no factor in common


def _linear(trial: Trial, **how) -> nn.Linear:
    one, other = trial.permutation(len(PRIMES))[:2].tolist()
    return nn.Linear(PRIMES[one], PRIMES[other], **{"bias": False, **how})


def _convolution(trial: Trial) -> nn.Conv2d:
    """Three groups, a kernel that is not square, and sizes at which no two ways to count give one number."""
    channels, filters = 3 * trial.integer(2, 4), 3 * (2 * trial.integer(3, 5) + 1)
    return nn.Conv2d(channels, filters, kernel_size=(3, 5), stride=2, padding=1, groups=3, bias=False)


def _rank(trial: Trial) -> int:
    return 2 * trial.integer(1, 2) + 1  # odd: no rank is a number of bytes or of moments


class LinearLayer(Experiment):
    """A and B of a Linear have rank x (in + out) numbers together."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _linear(trial), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        return _counted(subject, [inputs["layer"]], inputs["rank"])

    def facts(self, raw, inputs):
        out, in_ = inputs["layer"].weight.shape
        matrices = {"rank x (in + out)": in_ + out, "in + out, without the rank": (in_ + out) / inputs["rank"]}
        names = matrices | {"rank x in x out": in_ * out, "in x out": in_ * out / inputs["rank"]}
        return {"numbers in A and B": _which(raw["adapter"] / inputs["rank"], names, sides=(in_, out))}

    def notes(self, raw, inputs):
        out, in_ = inputs["layer"].weight.shape
        return {"numbers in A and B": f"{raw['adapter']:g} for {in_} -> {out} at rank {inputs['rank']}"}


class Convolution(Experiment):
    """A convolution counts as the matrix (out_channels, in_channels / groups x kernel)."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"layer": _convolution(trial), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        return _counted(subject, [inputs["layer"]], inputs["rank"])

    def facts(self, raw, inputs):
        layer = inputs["layer"]
        out, (high, wide) = layer.out_channels, layer.kernel_size
        channels, group, kernel = layer.in_channels, layer.in_channels // layer.groups, high * wide
        names = {
            "rank x (in / groups x kernel + out)": group * kernel + out,
            "rank x (in / groups + out)": group + out,
            "rank x (in x kernel + out)": channels * kernel + out,
            "rank x (in + out)": channels + out,
            "rank x out x in / groups x kernel": out * group * kernel,
        }
        return {"numbers in A and B": _which(raw["adapter"] / inputs["rank"], names, sides=(group * kernel, out))}

    def notes(self, raw, inputs):
        return {"numbers in A and B": f"{raw['adapter']:g} at rank {inputs['rank']} for {inputs['layer']}"}


class FullWeights(Experiment):
    """`full` counts the numbers of each weight, frozen or not, and of no bias."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        plain = _linear(trial)
        biased = nn.Linear(plain.in_features, plain.out_features)
        frozen = nn.Linear(plain.in_features, plain.out_features, bias=False).requires_grad_(False)
        return {"plain": plain, "biased": biased, "frozen": frozen, "convolution": _convolution(trial)}

    def measure(self, subject, inputs):
        return {name: _counted(subject, [layer], rank=3)["full"] for name, layer in inputs.items()}

    def facts(self, raw, inputs):
        size = inputs["plain"].weight.numel()
        bias = inputs["biased"].bias.numel()
        convolution = inputs["convolution"]
        numbers = convolution.weight.numel()
        kernel = math.prod(convolution.kernel_size)
        names = {
            "out x in / groups x kernel": numbers,
            "out x in x kernel": numbers * convolution.groups,
            "out x in / groups": numbers / kernel,
            "out x in": numbers * convolution.groups / kernel,
        }
        return {
            "a Linear": _which(raw["plain"], {"in x out": size, "rank x in x out": 3 * size}),
            "a bias adds": _which(raw["biased"] - raw["plain"], {"nothing": 0, "its numbers": bias}) if raw["plain"] else None,
            "a frozen Linear": _which(raw["frozen"], {"as before": raw["plain"], "nothing": 0}) if raw["plain"] else None,
            "a convolution with groups": _which(raw["convolution"], names),
        }


class Gradients(Experiment):
    """Only A and B have gradients, each in the dtype of its layer's weight."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        dtypes = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
        return {"layers": {name: _linear(trial, dtype=dtype) for name, dtype in dtypes.items()}, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layers, rank = inputs["layers"], inputs["rank"]
        together = [layers["float32"], layers["bfloat16"]]
        return {name: _counted(subject, [layer], rank, "sgd") for name, layer in layers.items()} | {
            "together": [_counted(subject, order, rank, "sgd") for order in (together, together[::-1])]
        }

    def facts(self, raw, inputs):
        alone = {f"bytes for each number of A and B, {name}": _bytes_each(raw[name]) for name in inputs["layers"]}
        parts = raw["float32"], raw["bfloat16"]
        sizes = [part["gradient_bytes"] / part["adapter"] if part["adapter"] else 0 for part in parts]
        numbers = sum(part["adapter"] for part in parts)
        orders = [order["gradient_bytes"] for order in raw["together"]]
        if not numbers:
            how = None
        elif near(orders[0], orders[1]) and near(orders[0], sum(part["gradient_bytes"] for part in parts)):
            how = "as each by itself"
        elif all(any(near(order, size * numbers) for size in sizes) for order in orders):
            how = "all as one of them"
        else:
            how = "another number"
        return alone | {"a float32 and a bfloat16 layer together": how}


class OptimizerState(Experiment):
    """AdamW keeps two numbers for each number of A and B, momentum one, plain SGD none."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        layer = _linear(trial)
        return {"layer": layer, "half": _linear(trial, dtype=torch.bfloat16), "rank": _rank(trial)}

    def measure(self, subject, inputs):
        layer, half, rank = (inputs[name] for name in ("layer", "half", "rank"))
        return {name: _counted(subject, [layer], rank, name) for name in MOMENTS} | {
            "half": _counted(subject, [half], rank, "adamw")
        }

    def facts(self, raw, inputs):
        facts = {f"numbers of state for each of A and B, {name}": _state_each(raw[name], size=4) for name in MOMENTS}
        return facts | {"the same, adamw in bfloat16": _state_each(raw["half"], size=2)}


class EveryWeightOnce(Experiment):
    """Layers add up, and a weight that comes twice counts once."""

    points = 2

    def draw(self, trial: Trial) -> dict:
        one = _linear(trial)
        sizes = one.in_features, one.out_features
        sharing, equal = nn.Linear(*sizes, bias=False), nn.Linear(*sizes, bias=False)
        sharing.weight = one.weight
        equal.load_state_dict(one.state_dict())
        return {"one": one, "other": _convolution(trial), "sharing": sharing, "equal": equal, "rank": _rank(trial)}

    def measure(self, subject, inputs):
        one, other, rank = inputs["one"], inputs["other"], inputs["rank"]
        lists = {
            "one": [one],
            "other": [other],
            "both": [one, other],
            "twice": [one, other, one],
            "sharing": [one, inputs["sharing"]],
            "equal": [one, inputs["equal"]],
        }
        return {name: _counted(subject, layers, rank) for name, layers in lists.items()}

    def facts(self, raw, inputs):
        one, other = raw["one"], raw["other"]
        if not all(one.values()):
            facts = "two different layers", "the same layer twice", "two layers of one weight", "two equal layers"
            return dict.fromkeys(facts)
        added = {key: one[key] + other[key] for key in KEYS}
        again = {key: added[key] + one[key] for key in KEYS}
        return {
            "two different layers": _as(raw["both"], {"add up": added, "count as the first": one, "count as the last": other}),
            "the same layer twice": _as(raw["twice"], {"counts once": added, "counts twice": again}),
            "two layers of one weight": _as(raw["sharing"], _times(one)),
            "two equal layers": _as(raw["equal"], _times(one)),
        }


def _counted(subject, layers: list[nn.Module], rank: int, optimizer: str = "adamw") -> dict[str, float]:
    """The four numbers that a subject returns."""
    value = subject(list(layers), rank, optimizer)
    if not isinstance(value, Mapping):
        question = " Is there a return?" if value is None else ""
        raise WrongReturn(f"cost must return a dict, got {expect.describe(value)}.{question}")
    if missing := [key for key in KEYS if key not in value]:
        raise WrongReturn(f"cost must return a dict with the keys {list(KEYS)}, {missing} not among those that came.")
    return {key: expect_number(value[key], f"cost(...)['{key}']") for key in KEYS}


def _which(number: float, names: dict[str, float], sides: tuple[int, ...] = ()) -> str:
    """The name of a number; `sides` are those of the matrix, for a number that stands for the rank times one of them."""
    if name := next((name for name, value in names.items() if near(number, value)), None):
        return name
    for side in sides:
        for times, name in ((1, "rank x one side of the matrix alone"), (2, "2 x rank x one side of the matrix")):
            if near(number, times * side):
                return name
    return "another number"


def _as(counts: dict[str, float], names: dict[str, dict[str, float]]) -> str:
    """The name of four numbers."""
    same = (name for name, wanted in names.items() if all(near(counts[key], wanted[key]) for key in KEYS))
    return next(same, "another number")


def _times(one: dict[str, float]) -> dict[str, dict[str, float]]:
    twice = {key: 2 * number for key, number in one.items()}
    return {"count once": one, "count twice": twice, "count once in full, twice in the adapters": twice | {"full": one["full"]}}


def _bytes_each(counts: dict[str, float]) -> Fact:
    """Bytes of gradients for each number that trains; bytes for as many numbers as the full weight has are called that."""
    adapter, full, given = counts["adapter"], counts["full"], counts["gradient_bytes"]
    if not adapter:
        return None
    for size in (1, 2, 4, 8):
        if full and near(given, size * full):
            return f"{size} for each number of the full weight instead"
        if full and near(given, size * (full + adapter)):
            return f"{size} for these and those of the full weight"
    size = given / adapter
    return round(size) if near(size, round(size)) else "another number"


def _state_each(counts: dict[str, float], size: int) -> Fact:
    """Numbers of optimizer state for each number that trains, if one takes as many bytes as its gradient, or `size`."""
    adapter, full, given = counts["adapter"], counts["full"], counts["optimizer_bytes"]
    if not adapter:
        return None
    own = _bytes_each(counts)
    for unit in ([own] if isinstance(own, int) and own else []) + [size]:
        for times in range(5):
            if near(given, times * unit * adapter):
                return times
        for times in range(1, 5):
            if near(given, times * unit * full):
                return f"{times} for each number of the full weight instead"
            if near(given, times * unit * (full + adapter)):
                return f"{times} for these and those of the full weight"
    return "another number"


def _total(
    layers: list[nn.Module],
    rank: int,
    optimizer: str,
    *,
    full=lambda layer: layer.weight.numel(),
    adapter=lambda layer, rank: rank * sum(layer.weight.flatten(1).shape),
    trained=lambda layer, numbers: numbers,
    size=lambda layer: layer.weight.element_size(),
    kept=lambda layer, numbers: numbers,
    moments=MOMENTS,
    key=lambda layer: id(layer.weight),
) -> dict[str, int]:
    """The four numbers; what a misconception does otherwise is given by name."""
    total = dict.fromkeys(KEYS, 0)
    for layer in {key(layer): layer for layer in layers}.values():
        numbers = adapter(layer, rank)
        total["full"] += full(layer)
        total["adapter"] += numbers
        total["gradient_bytes"] += trained(layer, numbers) * size(layer)
        total["optimizer_bytes"] += moments[optimizer] * kept(layer, numbers) * size(layer)
    return total


@misconception(
    "one matrix alone",
    hint="The update is a product of two matrices, and both train. Which sides of the weight do the shapes of A and of B meet?",
    source="a line of reasoning: the rank is the number of new rows, so rank x in; the way back to the outputs is not counted",
)
def one_matrix_alone(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * layer.weight[0].numel())


@misconception(
    "rank times the whole weight",
    hint="With rank 2 your adapter is larger than the weight that it spares. What are the shapes of A and B, each by itself?",
    source="a line of reasoning: B A is a sum of `rank` matrices of the shape of the weight, none of which is ever stored",
)
def rank_times_the_whole_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * layer.weight.numel())


@misconception(
    "as if the weight were square",
    hint="For 768 -> 768 your count is right. What would A and B be for a layer with 768 inputs and 3,072 outputs?",
    source="Hu et al. 2021, section 5.1: 2 x layers x d_model x rank, for square matrices of attention, taken for any layer",
)
def as_if_square(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: 2 * rank * layer.weight.shape[0])


@misconception(
    "kernel forgotten",
    hint="How many numbers go into one output of a 3 x 5 convolution? A has one column for each of them.",
    source="a line of reasoning: weight.shape[0] and weight.shape[1] are the sides of a Linear, and there they are enough",
)
def kernel_forgotten(layers, rank, optimizer):
    return _total(layers, rank, optimizer, adapter=lambda layer, rank: rank * (layer.weight.shape[0] + layer.weight.shape[1]))


@misconception(
    "groups ignored",
    hint="Print the shape of the weight of a convolution with three groups. Which of its inputs does one output see?",
    source="peft 0.21: A of a convolution with groups reads all in_channels, as its weight does not",
)
def groups_ignored(layers, rank, optimizer):
    def adapter(layer, rank):
        groups = getattr(layer, "groups", 1)
        return rank * (layer.weight.shape[0] + groups * layer.weight[0].numel())

    return _total(layers, rank, optimizer, adapter=adapter)


@misconception(
    "channels alone",
    hint="A Linear has one weight for each input of an output. Count those of one output of a convolution: are there as many?",
    source="a line of reasoning: in_channels and out_channels stand in a convolution where a Linear has its features",
)
def channels_alone(layers, rank, optimizer):
    def adapter(layer, rank):
        return rank * (layer.weight.shape[0] + getattr(layer, "groups", 1) * layer.weight.shape[1])

    return _total(layers, rank, optimizer, adapter=adapter)


@misconception(
    "biases counted",
    hint="LoRA puts its update beside the weight. Is a bias replaced by anything? Count a layer without one, and compare.",
    source="a line of reasoning: sum(p.numel() for p in layer.parameters()) is how the size of a model is counted everywhere",
)
def biases_counted(layers, rank, optimizer):
    return _total(layers, rank, optimizer, full=lambda layer: sum(parameter.numel() for parameter in layer.parameters()))


@misconception(
    "trainable parameters only",
    hint="Freeze the layer before you count: `full` becomes 0. With what is the adapter compared, if the weight never trains?",
    source="an issue tracker: all that requires gradients is counted, in the model and in the same model once it is frozen",
)
def trainable_parameters_only(layers, rank, optimizer):
    def full(layer):
        return sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)

    return _total(layers, rank, optimizer, full=full)


@misconception(
    "weight without its groups",
    hint="Your `full` of a convolution with groups is larger than its weight. Which pairs of channels have none between them?",
    source="a line of reasoning: out_channels x in_channels x kernel is how a convolution's weights are first counted",
)
def weight_without_its_groups(layers, rank, optimizer):
    return _total(layers, rank, optimizer, full=lambda layer: layer.weight.numel() * getattr(layer, "groups", 1))


@misconception(
    "four bytes each",
    hint="Print the memory of a float32 and of a bfloat16 weight of one shape. Which of your numbers should differ too?",
    source="peft: autocast_adapter_dtype=True makes adapters float32 beside bfloat16 weights; here they are as the weight",
)
def four_bytes_each(layers, rank, optimizer):
    return _total(layers, rank, optimizer, size=lambda layer: 4)


@misconception(
    "one dtype for all",
    hint="In a model whose parts differ in dtype the total depends on the order of the layers. Whose gradient has which dtype?",
    source="seen in public training code: next(model.parameters()).dtype stands for the model's",
)
def one_dtype_for_all(layers, rank, optimizer):
    size = layers[0].weight.element_size()
    return _total(layers, rank, optimizer, size=lambda layer: size)


@misconception(
    "gradients of the full weight",
    hint="Run backward through a layer whose weight is frozen, and look at the weight's `grad`. What is there?",
    source="a line of reasoning: backward passes through every weight, so each would need room for its gradient",
)
def gradients_of_the_full_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, trained=lambda layer, numbers: layer.weight.numel())


@misconception(
    "one moment for AdamW",
    hint="Look into `optimizer.state` of an AdamW after one step. How many tensors of the parameter's shape are there?",
    source="a line of reasoning: momentum is what an optimizer remembers; the average of the squares is overlooked",
)
def one_moment_for_adamw(layers, rank, optimizer):
    return _total(layers, rank, optimizer, moments=MOMENTS | {"adamw": 1})


@misconception(
    "state of the full weight",
    hint="Give all parameters to an AdamW, freeze some, make a step: for which does `optimizer.state` have an entry?",
    source="a line of reasoning: the optimizer was given model.parameters(), so it keeps its averages for all of them",
)
def state_of_the_full_weight(layers, rank, optimizer):
    return _total(layers, rank, optimizer, kept=lambda layer, numbers: layer.weight.numel())


@misconception(
    "moments in float32",
    hint="Make one step of torch's AdamW on a bfloat16 parameter, and print the dtype of its averages. Which is it?",
    source="the rule of 8 bytes per parameter for Adam, from mixed precision; torch's AdamW keeps the parameter's dtype",
)
def moments_in_float32(layers, rank, optimizer):
    counts = _total(layers, rank, optimizer)
    return counts | {"optimizer_bytes": 4 * MOMENTS[optimizer] * counts["adapter"]}


@misconception(
    "counted twice",
    hint="A layer that a model calls twice is there twice in your sum. How much memory does its weight take?",
    source="issue trackers of several libraries: sizes of models in which a tied weight is counted at each of its places",
)
def counted_twice(layers, rank, optimizer):
    places = iter(range(len(layers)))
    return _total(layers, rank, optimizer, key=lambda layer: next(places))


@misconception(
    "told apart by their modules",
    hint="Two layers can hold one weight. Tie two, and compare `id(layer)` with `id(layer.weight)`: which of them tells you?",
    source="a line of reasoning: set(layers) removes what is listed twice; tied layers are two modules with one parameter",
)
def told_apart_by_modules(layers, rank, optimizer):
    return _total(layers, rank, optimizer, key=id)


EXERCISE = Exercise(
    number="6.2",
    name="cost",
    reference=cost,
    experiments=(LinearLayer(), Convolution(), FullWeights(), Gradients(), OptimizerState(), EveryWeightOnce()),
    misconceptions=(
        *(one_matrix_alone, rank_times_the_whole_weight, as_if_square, kernel_forgotten, groups_ignored, channels_alone),
        *(biases_counted, trainable_parameters_only, weight_without_its_groups),
        *(four_bytes_each, one_dtype_for_all, gradients_of_the_full_weight),
        *(one_moment_for_adamw, state_of_the_full_weight, moments_in_float32, counted_twice, told_apart_by_modules),
    ),
    hints=(
        "What shapes do A and B have if B @ A is to have the shape of the weight, and what shape has a convolution's weight?",
        "Print `layer.weight.shape` of a Linear and of a convolution with groups, `element_size()` of a float32 and of a "
        "bfloat16 tensor, and the tensors in `optimizer.state` after one step of SGD, of SGD with momentum and of AdamW.",
        "For each different weight, flattened to (out, rest): out x rest in full, rank x (out + rest) in the adapter, times "
        "element_size() of the weight for the gradients, and times 0, 1 or 2 of that for the optimizer.",
    ),
)
