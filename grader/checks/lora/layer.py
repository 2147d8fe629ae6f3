"""Exercise 6.1: a linear layer that stays as it is, and two small matrices beside it that train."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.lora import adapters
from grader.checks.lora.adapters import Layer, attempt, beside_base, failed, gradients, layer_of
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near, which
from helpers.lora import Linear

exercise = Exercise(__name__, "6.1", Linear, name="LoRALinear", core=4)


def _inputs(trial: Trial, bias: bool = True) -> dict:
    """A linear layer, a rank, an alpha, and numbers for A and B. No two of the sizes are equal."""
    numbers = adapters.rank_and_alpha(trial)
    rank = numbers["rank"]
    inside, outside = rank + trial.integer(1, 2), rank + trial.integer(3, 4)
    inputs = adapters.beside(nn.Linear(inside, outside, bias=bias), trial.normal(4, inside), trial)
    return numbers | inputs | {"A": trial.normal(rank, inside), "B": trial.normal(outside, rank)}


@exercise.experiment("fresh layer", 2)
class FreshLayer(adapters.FreshLayer):
    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        with _filled_with_nan():
            layer = layer_of(subject, inputs)
        y = _output(layer, inputs["x"], inputs)
        raw = {"y": y.detach(), "gradients": gradients((y * inputs["g"]).sum(), _adapter(layer, inputs))}
        if _fill(layer, inputs):
            raw["filled"] = _output(layer, inputs["x"], inputs).detach()
            _fill(layer, inputs, times=0)
            raw["zero"] = _output(layer, inputs["x"], inputs).detach()
        return raw

    def facts(self, raw, inputs):
        reached = "A or B" if any(gradient.any() for gradient in raw["gradients"]) else "neither A nor B"
        used = "zero" in raw and not near(raw["filled"], raw["zero"])  # what does not reach the outputs has no gradient
        return super().facts(raw, inputs) | {
            "a gradient reaches": reached if used else None,
            "once A and B are zero, its outputs are": beside_base(raw["zero"], inputs["y"]) if "zero" in raw else None,
        }


@exercise.experiment("the update", 1)
class TheUpdate(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        updates = {"update": _update(subject, inputs), "of rank 1": _update(subject, inputs | _cut(inputs, rank=1))}
        return {name: update for name, update in updates.items() if update is not None}

    def facts(self, raw, inputs):
        if len(raw) < 2:
            return dict.fromkeys(("the update is, but for a factor", "the factor", "with rank 1 it is"))
        product, factor = _product(raw["update"], inputs)
        name = None if factor is None else adapters.factor_name(factor, inputs)
        thin = _cut(inputs, rank=1)
        product_of_one, factor_of_one = _product(raw["of rank 1"], thin)
        alike = product_of_one == product and factor_of_one is not None
        alike = alike and name == adapters.factor_name(factor_of_one, inputs | thin, first=name)
        return {
            "the update is, but for a factor": product,
            "the factor": name,
            "with rank 1 it is": None if factor is None else "the same" if alike else "different",
        }

    def notes(self, raw, inputs):
        factor = _product(raw["update"], inputs)[1] if "update" in raw else None
        if factor is None:
            return {}
        return {"the factor": f"{factor:.3g} with rank {inputs['rank']} and alpha {inputs['alpha']}"}


@exercise.experiment("gradients", 4)
class Gradients(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return _inputs(trial, bias=False)

    def measure(self, subject, inputs):
        layer = layer_of(subject, inputs)
        if not _fill(layer, inputs):
            return {}
        raw = {"matrix": _matrix(layer, inputs)}
        x = inputs["x"].clone().requires_grad_(True)
        y = _output(layer, x, inputs)
        raw["gradients"] = gradients((y * inputs["g"]).sum(), [*_adapter(layer, inputs), x])
        _fill(layer, inputs, times=0)
        return raw | {"without": _matrix(layer, inputs)}

    def facts(self, raw, inputs):
        if not raw:
            return dict.fromkeys(("a gradient reaches A", "a gradient reaches B", "the input's gradient comes through"))
        g, weight, (a, b, x) = inputs["g"], inputs["base"].weight.detach(), raw["gradients"]
        ways = {
            "base and update": g @ raw["matrix"],
            "base alone": g @ weight,
            "the update alone": g @ (raw["matrix"] - weight),
            "neither base nor update": torch.zeros_like(x),
        }
        used = not near(raw["matrix"], raw["without"])
        reached = {name: ("yes" if gradient.any() else "no") if used else None for name, gradient in (("A", a), ("B", b))}
        return {f"a gradient reaches {name}": word for name, word in reached.items()} | {
            "the input's gradient comes through": which(x, ways, otherwise="something else"),
        }


@exercise.experiment("what trains", 3)
class WhatTrains(Experiment):
    def draw(self, trial: Trial) -> dict:
        return _inputs(trial)

    def measure(self, subject, inputs):
        parameters = layer_of(subject, inputs).parameters()
        return {"trainable": [parameter.detach().clone() for parameter in parameters if parameter.requires_grad]}

    def facts(self, raw, inputs):
        names = [self._name(tensor, inputs) for tensor in raw["trainable"]]
        return {
            "trainable parameters with the shape of A": names.count("A"),
            "trainable parameters with the shape of B": names.count("B"),
            "the layer's base.weight is": "trainable" if "weight" in names else "frozen",
            "the layer's base.bias is": "trainable" if "bias" in names else "frozen",
            "trainable besides": next((name for name in ("other tensors", "vectors") if name in names), "nothing"),
        }

    @staticmethod
    def _name(tensor: Tensor, inputs: dict) -> str:
        fitting = next((name for name in ("A", "B") if _fits(tensor, inputs[name])), None)
        of_base = adapters.name_in_base(tensor, dict(inputs["base"].named_parameters()))
        return fitting or of_base or ("vectors" if tensor.ndim == 1 else "other tensors")


@exercise.experiment("base itself", 6)
class BaseItself(Experiment):
    def draw(self, trial: Trial) -> dict:
        inputs = _inputs(trial)
        return inputs | {"new": trial.normal(*inputs["base"].weight.shape)}

    def measure(self, subject, inputs):
        weight = inputs["base"].weight
        layer = layer_of(subject, inputs)
        _fill(layer, inputs)
        with torch.no_grad():
            for used in (layer.train(), layer.eval()):
                _output(used, inputs["x"], inputs)
            used = weight.detach().clone()
            weight.copy_(inputs["new"])
            _fill(layer, inputs, times=0)
            return {"weight": used, "y": _output(layer, inputs["x"], inputs)}

    def facts(self, raw, inputs):
        base, x = inputs["base"], inputs["x"]
        bases_outputs = {"the new numbers": F.linear(x, inputs["new"], base.bias).detach(), "the old numbers": inputs["y"]}
        followed = (name for name, y in bases_outputs.items() if beside_base(raw["y"], y) != "different")
        return {
            "base.weight, once the layer was used, is": "as before" if torch.equal(raw["weight"], base.weight) else "changed",
            "with new numbers in base.weight the outputs follow": next(followed, "neither the new nor the old"),
        }


@exercise.experiment("any dimensions", 5)
class AnyDimensions(Experiment):
    def draw(self, trial: Trial) -> dict:
        inputs = _inputs(trial)
        width = inputs["base"].in_features
        turned = trial.normal(2, width, 3).transpose(1, 2)  # not contiguous
        return inputs | {"xs": [*(trial.normal(*shape, width) for shape in ((5,), (), (2, 3), (2, 1, 3, 2), (0,))), turned]}

    def measure(self, subject, inputs):
        layer = layer_of(subject, inputs)
        _fill(layer, inputs)
        return {
            "rows": [_output(layer, x.reshape(-1, x.shape[-1]), inputs).detach() for x in inputs["xs"]],
            "outputs": [attempt(lambda x=x: layer(x).detach().clone()) for x in inputs["xs"]],
        }

    def facts(self, raw, inputs):
        alike = list(map(_as_in_rows, raw["outputs"], inputs["xs"], raw["rows"]))
        word = "each vector as in a matrix" if all(alike) else "not each as in a matrix"
        return {"inputs of 1 to 5 dimensions": word if alike[0] else None}  # of a matrix twice: no input is alike

    def notes(self, raw, inputs):
        error = next(filter(None, map(failed, raw["outputs"])), None)
        return {"inputs of 1 to 5 dimensions": error} if error else {}


@exercise.experiment("dtype and device", 7)
class DtypeAndDevice(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = _inputs(trial)
        base = inputs["base"]
        return inputs | {
            "in float64": copy.deepcopy(base).double(),
            "elsewhere": nn.Linear(base.in_features, base.out_features, device="meta"),
        }

    def measure(self, subject, inputs):
        layer, double = layer_of(subject, inputs), inputs["x"].double()
        _fill(layer, inputs)
        raw = {"moved": attempt(lambda: str(layer.to(torch.float64)(double).dtype))}
        in_float64 = layer_of(subject, inputs | {"base": inputs["in float64"]})
        return raw | {
            "dtypes": [str(parameter.dtype) for parameter in _adapter(in_float64, inputs)],
            "made": attempt(lambda: str(in_float64(double).dtype)),
            "devices": attempt(lambda: self._devices(subject, inputs)),
        }

    def facts(self, raw, inputs):
        dtype, device = None, None
        if raw["dtypes"]:
            dtype = "float64" if set(raw["dtypes"]) == {"torch.float64"} else "another dtype"
            # A layer that cannot be made of a base without numbers may be right on a real device.
            device = "base's device" if failed(raw["devices"]) or set(raw["devices"]) == {"meta"} else "another device"
        return {
            "after .to(torch.float64) it returns": _dtype(raw["moved"]),
            "made from a float64 base, A and B are of": dtype,
            "and it returns": _dtype(raw["made"]) if dtype == "float64" else None,
            "made from a base on another device, A and B are on": device,
        }

    def notes(self, raw, inputs):
        results = {"after .to(torch.float64) it returns": raw["moved"], "and it returns": raw["made"]}
        return {fact: failed(result) for fact, result in results.items() if failed(result)}

    @staticmethod
    def _devices(subject, inputs: dict) -> list[str]:
        layer = layer_of(subject, inputs | {"base": inputs["elsewhere"]})
        return [parameter.device.type for parameter in _adapter(layer, inputs)]


@exercise.experiment("the start", 8)
class TheStart(Experiment):
    """How A or B, whichever is not zero, is drawn: seen by its extremes and its spread, of some thousand numbers."""

    def draw(self, trial: Trial) -> dict:
        inside, outside, rank = 400 + trial.integer(0, 9), 300 + trial.integer(0, 9), 16
        numbers = {"A": trial.normal(rank, inside), "B": trial.normal(outside, rank)}
        return numbers | {"base": nn.Linear(inside, outside), "rank": rank, "alpha": 8}

    def measure(self, subject, inputs):
        with _filled_with_nan():
            layer = layer_of(subject, inputs)
        starts = [parameter.detach().clone() for parameter in _adapter(layer, inputs)]
        uninitialised = any(start.isnan().any() for start in starts)
        return {"starts": [] if uninitialised else starts, "uninitialised": uninitialised}

    def facts(self, raw, inputs):
        words = {_start(*start) for start in zip(raw["starts"], self._sides(raw, inputs), strict=True) if start[0].any()}
        word = words.pop() if len(words) == 1 else "in different ways" if words else None
        return {"what is not zero at first is": "uninitialised memory" if raw["uninitialised"] else word}

    @staticmethod
    def _sides(raw, inputs):
        """What may be called the columns of each: of a matrix that is kept the other way round, either."""
        for start, name in zip(raw["starts"], ("A", "B"), strict=False):
            yield start.shape[1:] if start.shape == inputs[name].shape else start.shape


# --- what the experiments observe -----------------------------------------------------------------------------------


def _output(layer: nn.Module, x: Tensor, inputs: dict) -> Tensor:
    shape = len(x), inputs["B"].shape[0]
    return expect_tensor(layer(x), shape, f"the output for an input of shape {tuple(x.shape)}")


def _matrix(layer: nn.Module, inputs: dict) -> Tensor:
    """What the layer multiplies its input by, (out_features, in_features), whatever it adds."""
    a = inputs["A"]
    y = _output(layer, F.pad(torch.eye(a.shape[1], device=a.device), (0, 0, 0, 1)), inputs).detach()
    return (y[:-1] - y[-1]).T.clone()


def _update(subject, inputs: dict) -> Tensor | None:
    """What A and B add to the matrix in eval mode, if they can be filled."""
    layer = layer_of(subject, inputs)
    matrices = []
    for times in (1, 0):
        if not _fill(layer.train(), inputs, times):
            return None
        matrices.append(_matrix(layer.eval(), inputs))
    return matrices[0] - matrices[1]


def _cut(inputs: dict, rank: int) -> dict:
    """The numbers for A and B, cut to another rank."""
    return {"rank": rank, "A": inputs["A"][:rank], "B": inputs["B"][:, :rank]}


@contextmanager
def _filled_with_nan() -> Iterator[None]:
    """Inside the `with`, torch fills with NaN what nobody has filled."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _start(numbers: Tensor, sides: tuple[int, ...]) -> str:
    """How the numbers of a matrix were drawn. nn.Linear draws from -b to b, b = columns ** -0.5; columns is one of `sides`."""
    numbers = numbers.double()
    low, high, spread = float(numbers.min()), float(numbers.max()), float(numbers.std())
    if spread < 1e-6 * max(abs(low), abs(high)):
        return "a constant"
    fourth = float((((numbers - numbers.mean()) / spread) ** 4).mean())  # 1.8 of a uniform distribution, 3 of a normal one
    if 2.5 < fourth < 3.5:
        return "normal, with a standard deviation of 1" if 0.9 < spread < 1.1 else "normal, with another standard deviation"
    if low >= 0:
        return "never negative"
    bounds = [side**-0.5 for side in sides]
    if fourth < 2 and any(0.97 * bound < min(-low, high) and max(-low, high) < 1.001 * bound for bound in bounds):
        return "as nn.Linear draws its weight"
    return "drawn from another range"


def _fits(tensor: Tensor, matrix: Tensor) -> bool:
    """Whether it has the shape of the matrix, or of its transpose: how a matrix is kept is free."""
    return tensor.shape in (matrix.shape, matrix.T.shape)


def _adapter(layer: nn.Module, inputs: dict) -> list[nn.Parameter]:
    """The trainable parameters that have the shapes of A and of B; nothing if there is not one of each."""
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    fitting = [[parameter for parameter in trainable if _fits(parameter, inputs[name])] for name in ("A", "B")]
    return [parameter for (parameter,) in fitting] if all(len(parameters) == 1 for parameters in fitting) else []


def _fill(layer: nn.Module, inputs: dict, times: float = 1.0) -> bool:
    """Write the numbers drawn for A and B into the layer; False if it has no such parameters."""
    parameters = _adapter(layer, inputs)
    with torch.no_grad():
        for parameter, name in zip(parameters, ("A", "B"), strict=False):
            matrix = inputs[name] if parameter.shape == inputs[name].shape else inputs[name].T
            parameter.copy_(times * matrix)
    return bool(parameters)


def _product(update: Tensor, inputs: dict) -> tuple[str, float | None]:
    """What an update is made of, and the factor before it."""
    a, b = inputs["A"], inputs["B"]
    if near(update, 0):
        return "nothing", None
    if (factor := adapters.ratio(update, b @ a)) is not None:
        return "B A", factor
    reshaped_a, reshaped_b = a.reshape(a.T.shape).T, b.reshape(b.T.shape).T
    for product in (b @ reshaped_a, reshaped_b @ a, reshaped_b @ reshaped_a):
        if (factor := adapters.ratio(update, product)) is not None:
            return "B A of matrices reshaped, not transposed", factor
    return "something else", None


def _as_in_rows(y: Tensor | dict, x: Tensor, rows: Tensor) -> bool:
    """Whether the output for x holds the same vectors as the one for a matrix of x's vectors."""
    return isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1] and y.numel() == rows.numel() and near(y.view_as(rows), rows)


def _dtype(result: str | dict) -> str:
    return "an error" if failed(result) else result.removeprefix("torch.")


# --- the misconceptions ---------------------------------------------------------------------------------------------


def _added_into_base(layer, x):
    layer.base.weight.data += layer.delta().detach()
    return layer.base(x)


CHANGES = adapters.CHANGES | {
    "rsLoRA's factor": {"scale": lambda layer, rank, alpha: alpha / rank**0.5},
    "standard normal numbers": {"drawn": lambda layer, tensor: nn.init.normal_(tensor)},
    "normal numbers": {"drawn": lambda layer, tensor: nn.init.normal_(tensor, std=0.02)},
    "starts as a constant": {"drawn": lambda layer, tensor: nn.init.constant_(tensor, 0.01)},
    "never negative": {"drawn": lambda layer, tensor: nn.init.uniform_(tensor)},
    "uninitialised memory": {"drawn": lambda layer, tensor: tensor},
    "1 / rank alone": {"scale": lambda layer, rank, alpha: 1 / rank},
    "rank / alpha": {"scale": lambda layer, rank, alpha: rank / alpha},
    "base trains too": {"frozen": lambda layer: []},
    "the update under no_grad": {"update": torch.no_grad()(Layer.update)},
    "base under no_grad": {"unchanged": torch.no_grad()(Layer.unchanged)},
    "not registered": {"trained": lambda layer, tensor: tensor.requires_grad_()},
    "the sum is scaled": {"forward": lambda layer, x: layer.scaling * (layer.base(x) + x @ layer.A.T @ layer.B.T)},
    "added twice": {
        "forward": lambda layer, x: F.linear(x, layer.base.weight + layer.delta(), layer.base.bias) + layer.update(x)
    },
    "a random bias in B": {
        "shapes": lambda layer, rank: Layer.shapes(layer, rank) | {"inner": (rank,), "outer": (layer.base.out_features,)},
        "random": ("A", "inner", "outer"),
        "constant": lambda layer: layer.scaling * (layer.B @ layer.inner + layer.outer),
    },
    "base copied": {"adapted": lambda layer, base: copy.deepcopy(base)},
    "added into base.weight": {"forward": _added_into_base},
    "float32 on the CPU": {"empty": lambda layer, *shape: torch.empty(shape)},
    "float32 on base's device": {"empty": lambda layer, *shape: layer.base.weight.new_empty(shape, dtype=torch.float32)},
    "samples in rows only": {"update": lambda layer, x: torch.mm(x, layer.delta().T)},
    "reshaped, not transposed": {"delta": lambda layer: layer.scaling * layer.B @ layer.A.view(layer.A.T.shape).T},
}
exercise.misconceptions_of(Layer, CHANGES)
