"""Exercise 6.4: merged inside the block, every bit as it was afterwards."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn
from grader.near import near
from helpers import expect, lora

exercise = Exercise(__name__, "6.4", lora.merged)

SCALING = 3  # alpha / rank: a delta that is scaled again is three times as large


class _Error(Exception):
    """An error of the body."""


class _Interrupt(KeyboardInterrupt):
    """Somebody stops the cell."""


def _network(trial: Trial, width: int) -> nn.Module:
    """Three LoRA layers of one size, which lie deeper than its children, and a head without."""
    rank = trial.integer(2, 3)
    layers = nn.Sequential(*(_layer(trial, nn.Linear(width, width), rank) for _ in range(3)))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(width, 3)})


def _language_model(trial: Trial, tied: bool) -> nn.Module:
    """In small. Its head, a LoRA layer, has a weight that equals the embedding's, or the same one."""
    words = width = 6  # so that all LoRA layers have one shape
    embed = nn.Embedding(words, width)
    layer = _layer(trial, nn.Linear(width, width), 2)
    head = nn.Linear(width, words)
    head.weight = embed.weight if tied else nn.Parameter(embed.weight.detach().clone())
    return nn.Sequential(embed, layer, _layer(trial, head, 2))


def _layer(trial: Trial, base: nn.Linear, rank: int) -> lora.Linear:
    """A LoRA layer that has been trained: B is not zero."""
    layer = lora.Linear(base, rank, SCALING * rank)
    with torch.no_grad():
        layer.A.copy_(trial.normal(*layer.A.shape))
        layer.B.copy_(trial.normal(*layer.B.shape) / 2)
    return layer


@exercise.experiment("inside the block")
class InsideTheBlock(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        return {"model": _network(trial, width), "x": trial.normal(5, width)}

    def measure(self, subject, inputs):
        model, x = inputs["model"], inputs["x"]
        with _manager(subject(model)):
            gradients = torch.is_grad_enabled()
            return _outputs(model, x) | {"gradients": gradients}

    def facts(self, raw, inputs):
        return {
            "`layer.base(x)`, what delta added to it, in multiples": _updates(raw["base"], inputs),
            "`layer(x)`, what delta added to it, in multiples": _updates(raw["layer"], inputs),
            "gradients, if you ask for them in the block": "recorded" if raw["gradients"] else "not recorded",
        }


@exercise.experiment("after the block")
class AfterTheBlock(Experiment):
    points = 3

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        models = {how: _network(trial, width) for how in ("end", "error", "interrupt")}
        return {"x": trial.normal(5, width), **models}

    def measure(self, subject, inputs):
        raw = {}
        for how, ending in (("end", None), ("error", _Error), ("interrupt", _Interrupt)):
            model, error_outside = inputs[how], "nothing"
            before = _bits(model)
            try:
                with _manager(subject(model)):
                    merged = _bits(model) != before
                    if ending is not None:
                        raise ending
            except (_Error, _Interrupt) as error:
                error_outside = "the error" if type(error) is ending else type(error).__name__
            raw[how] = _outputs(model, inputs["x"]) | {"error outside": error_outside, "merged": merged}
        return raw

    def facts(self, raw, inputs):
        facts = {"in the block: base weights": "different" if all(raw[how]["merged"] for how in raw) else "as before"}
        for how, when in (("end", "after the block"), ("error", "after an error"), ("interrupt", "after an interrupt")):
            fresh = {"model": inputs[how], "x": inputs["x"]}
            facts[f"{when}: what delta added to `layer.base(x)`"] = _updates(raw[how]["base"], fresh)
            facts[f"{when}: what delta added to `layer(x)`"] = _updates(raw[how]["layer"], fresh)
        return facts | {"what came out of a block with an error": raw["error"]["error outside"]}


@exercise.experiment("old bits")
class OldBits(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _network(trial, 8).bfloat16()}

    def measure(self, subject, inputs):
        model = inputs["model"]
        before, bits = _weights(model), _bits(model)
        with _manager(subject(model)):
            dtypes = {str(weight.dtype) for weight in _weights(model)}
            merged = _bits(model) != bits
        after = _weights(model)
        return {
            "merged": merged,
            "dtypes": sorted(dtypes),
            "bits": _bits(model),
            "same": all(weight is was for weight, was in zip(after, before, strict=True)),
            "frozen": all(weight.is_leaf and not weight.requires_grad for weight in after),
        }

    def facts(self, raw, inputs):
        objects = "the Parameters that were there" if raw["same"] else "different"
        return {
            "in the block: base weights": "different" if raw["merged"] else "as before",
            "in the block: dtype of the base weights": " and ".join(raw["dtypes"]),
            "afterwards: base weights whose bits differ": "none" if raw["bits"] == _bits(inputs["model"]) else "some",
            "afterwards: base weights": objects if raw["frozen"] or not raw["same"] else f"{objects}, but they need a gradient",
        }


@exercise.experiment("not twice")
class NotTwice(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        partly = _network(trial, width)
        layer = _layers(partly)[-1]  # the last, so that a loop meets the others first
        layer.base.weight.data += layer.delta().detach()
        layer.merged = True
        return {"model": _network(trial, width), "partly": partly, "x": trial.normal(5, width)}

    def measure(self, subject, inputs):
        model, partly, x = inputs["model"], inputs["partly"], inputs["x"]
        with _manager(subject(model)):
            inside = _outputs(model, x)
            nested = _raised(subject, model)
            again = _outputs(model, x)
        after = _outputs(model, x)
        return {"nested": nested, "inside": inside, "again": again, "after": after, "partly": _refusal(subject, partly)}

    def facts(self, raw, inputs):
        def changed(before: dict, after: dict) -> str | None:
            if raw["nested"] == "nothing":
                return None
            same = all(_updates(before[key], inputs) == _updates(after[key], inputs) for key in before)
            return "as before" if same else "different"

        return {
            "a block inside a block: raised": raw["nested"],
            "a block inside a block: then, in the outer one, the layers are": changed(raw["inside"], raw["again"]),
            "a block inside a block: after both, the layers are": changed(_outputs(inputs["model"], inputs["x"]), raw["after"]),
            "one layer of three merged before: raised": raw["partly"]["raised"],
            "one layer of three merged before: weights and flags that changed": raw["partly"]["changed"],
        }


@exercise.experiment("tied weight")
class TiedWeight(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"tied": _language_model(trial, True), "equal": _language_model(trial, False)}

    def measure(self, subject, inputs):
        return {"tied": _refusal(subject, inputs["tied"]), "equal": _raised(subject, inputs["equal"])}

    def facts(self, raw, inputs):
        return {
            "the embedding's weight is that of a LoRA layer: raised": raw["tied"]["raised"],
            "the embedding's weight is that of a LoRA layer: weights and flags that changed": raw["tied"]["changed"],
            "two weights with equal values: raised": raw["equal"],
        }


@exercise.experiment("nothing to merge")
class NothingToMerge(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))}

    def measure(self, subject, inputs):
        return {"raised": _raised(subject, inputs["model"])}

    def facts(self, raw, inputs):
        return raw


def _layers(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.base.weight for layer in _layers(model)]


def _bits(model: nn.Module) -> list[list]:
    """The bits of each base weight, as bytes; values would call 0 and -0 equal."""
    return [weight.detach().contiguous().view(torch.uint8).tolist() for weight in _weights(model)]


def _manager(value: object) -> AbstractContextManager:
    if not (hasattr(type(value), "__enter__") and hasattr(type(value), "__exit__")):
        question = " Is it decorated with @contextmanager?" if isinstance(value, Iterator) else ""
        question = question or (" Is there a return, or a yield?" if value is None else "")
        raise WrongReturn(f"merged must return a context manager, got {expect.describe(value)}.{question}")
    return value


def _outputs(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What each base layer and each LoRA layer makes of the same inputs."""
    with torch.no_grad():
        layers = _layers(model)
        return {"base": [layer.base(x) for layer in layers], "layer": [layer(x) for layer in layers]}


def _updates(outputs: list[Tensor], inputs: dict) -> list[Fact]:
    """How often each layer's delta was added to what its base computed before; 'another' if it is no multiple."""
    x = inputs["x"]
    with torch.no_grad():
        return [
            _multiple(output - layer.base(x), F.linear(x, layer.delta()))
            for output, layer in zip(outputs, _layers(inputs["model"]), strict=True)
        ]


def _multiple(update: Tensor, delta: Tensor) -> Fact:
    times = float((update * delta).sum() / delta.square().sum())
    alike = near(update, times * delta, scale=float(delta.abs().max()))
    return round(times, 2) + 0.0 if alike else "another update"


def _raised(subject, model: nn.Module) -> str:
    """What the block raises that does nothing."""

    def block() -> None:
        with _manager(subject(model)):
            pass

    return raised(block)[0]


def _refusal(subject, model: nn.Module) -> dict[str, str | None]:
    """What that block raises, and whether weights and flags changed although it was refused."""

    def state() -> list:
        return [_bits(model), [layer.merged for layer in _layers(model)]]

    before = state()
    error = _raised(subject, model)
    return {"raised": error, "changed": None if error == "nothing" else "none" if state() == before else "some"}


def some_layer(model: nn.Module, layers: list[lora.Linear]) -> None:
    if not layers:
        raise ValueError("there is no LoRA layer")


def none_merged(model: nn.Module, layers: list[lora.Linear]) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError("a layer is merged already")


def none_tied(model: nn.Module, layers: list[lora.Linear]) -> None:
    for layer in layers:
        users = [module for module in model.modules() if any(p is layer.base.weight for p in module._parameters.values())]
        if len(users) > 1:
            raise ValueError("a base weight is used by another module too")


class Solution:
    """A right solution, in pieces that a misconception replaces."""

    checks = some_layer, none_merged, none_tied
    flag_inside, flag_afterwards = True, False

    def __init__(self, model):
        self.model, self.layers = model, _layers(model)

    def __enter__(self):
        for check in self.checks:
            check(self.model, self.layers)
        for layer in self.layers:
            self.merge(layer)

    def __exit__(self, kind, error, trace):
        if self.undone_after(kind):
            for layer in self.layers:
                self.restore(layer)
                layer.merged = self.flag_afterwards

    def merge(self, layer):
        layer.old = layer.base.weight.detach().clone()
        self.add(layer.base.weight, self.update(layer))
        layer.merged = self.flag_inside

    def update(self, layer):
        return layer.delta()

    def add(self, weight, update):
        weight.data += update.detach()

    def undone_after(self, kind):
        """Whether the merge is undone if the block ends with an exception of that kind, which may be None."""
        return True

    def restore(self, layer):
        layer.base.weight.data = layer.old


def none_equal(model: nn.Module, layers: list[lora.Linear]) -> None:
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    if any(torch.equal(*pair) for pair in combinations(parameters, 2)):
        raise ValueError("a base weight is used by another module too")


def added_in_float32(self, weight, update):
    weight.data = weight.data + update.detach()


exercise.misconceptions_of(
    Solution,
    {
        "delta subtracted again": {"restore": lambda self, layer: layer.base.weight.data.sub_(layer.delta().detach())},
        "flag never set": {"flag_inside": False},
        "flag left set": {"flag_afterwards": True},
        "never undone": {"undone_after": lambda self, kind: False},
        "not undone after an error": {"undone_after": lambda self, kind: kind is None},
        "error swallowed": {"__exit__": lambda self, *error: Solution.__exit__(self, *error) or True},
        "scaled again": {"update": lambda self, layer: layer.scaling * layer.delta()},
        "one delta for all": {"update": lambda self, layer: self.layers[0].delta()},
        "one weight kept": {"restore": lambda self, layer: layer.base.weight.data.copy_(self.layers[-1].old)},
        "merged twice": {"checks": (some_layer, none_tied)},
        "tied weight merged": {"checks": (some_layer, none_merged)},
        "equal taken for tied": {"checks": (some_layer, none_merged, none_equal)},
        "nothing merged, nothing said": {"checks": (none_merged, none_tied)},
        "the dtype of delta": {"add": added_in_float32},
        "the addition recorded": {"add": lambda self, weight, update: weight.add_(update)},
    },
)


@exercise.misconception("a new Parameter afterwards")
class ANewParameterAfterwards(Solution):
    def restore(self, layer):
        layer.base.weight = nn.Parameter(layer.old)


@exercise.misconception("only errors caught")
class OnlyErrorsCaught(Solution):
    def undone_after(self, kind):
        return kind is None or issubclass(kind, Exception)


@exercise.misconception("refusal that unmerges")
class RefusalThatUnmerges(Solution):
    def __enter__(self):
        try:
            super().__enter__()
        except ValueError:
            self.layers = [layer for layer in self.layers if hasattr(layer, "old")]
            self.__exit__(None, None, None)
            raise


@exercise.misconception("changed before the error")
class ChangedBeforeTheError(Solution):
    def __enter__(self):
        some_layer(self.model, self.layers)
        for layer in self.layers:
            none_merged(self.model, [layer])
            none_tied(self.model, [layer])
            self.merge(layer)


@exercise.misconception("no gradients in the block")
@contextmanager
def no_gradients_in_the_block(model):
    with torch.no_grad(), Solution(model):
        yield
