"""Exercise 6.4: merged inside the block, every bit as it was afterwards."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn
from grader.near import near
from helpers import expect, lora

exercise = Exercise(__name__, "6.4", lora.merged)

SCALING = 3  # alpha / rank: a delta that is scaled again is three times as large


class _Error(Exception):
    """An error of the body."""


class _Interrupt(KeyboardInterrupt):
    """Somebody stops the cell."""


class _Network(nn.Module):
    """Three LoRA layers of one size, and a head without."""

    def __init__(self, trial: Trial, width: int) -> None:
        super().__init__()
        rank = trial.integer(2, 3)
        self.layers = nn.ModuleList(_layer(trial, nn.Linear(width, width), rank) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (n, width) -> (n, 3)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class _Language(nn.Module):
    """A language model in small. Its head, a LoRA layer, has a weight that equals the embedding's, or the same one."""

    def __init__(self, trial: Trial, tied: bool) -> None:
        super().__init__()
        words = width = 6  # so that all LoRA layers have one shape
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList([_layer(trial, nn.Linear(width, width), 2)])
        head = nn.Linear(width, words)
        head.weight = self.embed.weight if tied else nn.Parameter(self.embed.weight.detach().clone())
        self.layers.append(_layer(trial, head, 2))

    def forward(self, tokens: Tensor) -> Tensor:  # (n, words of a text) -> the same and a logit for each known word
        return self.layers[1](torch.tanh(self.layers[0](self.embed(tokens))))


@exercise.experiment("inside the block")
class InsideTheBlock(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        return {"model": _Network(trial, width), "x": trial.normal(5, width)}

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
        models = {how: _Network(trial, width) for how in ("end", "error", "interrupt")}
        return {"x": trial.normal(5, width), **models}

    def measure(self, subject, inputs):
        raw = {}
        for how, ending in (("end", None), ("error", _Error), ("interrupt", _Interrupt)):
            model, came = inputs[how], "nothing"
            before = _bits(model)
            try:
                with _manager(subject(model)):
                    merged = _bits(model) != before
                    if ending is not None:
                        raise ending
            except (_Error, _Interrupt) as error:
                came = "the error" if type(error) is ending else type(error).__name__
            raw[how] = _outputs(model, inputs["x"]) | {"came": came, "merged": merged}
        return raw

    def facts(self, raw, inputs):
        facts = {"in the block: base weights": "different" if all(raw[how]["merged"] for how in raw) else "as before"}
        for how, when in (("end", "after the block"), ("error", "after an error"), ("interrupt", "after an interrupt")):
            fresh = {"model": inputs[how], "x": inputs["x"]}
            facts[f"{when}: what delta added to `layer.base(x)`"] = _updates(raw[how]["base"], fresh)
            facts[f"{when}: what delta added to `layer(x)`"] = _updates(raw[how]["layer"], fresh)
        return facts | {"what came out of a block with an error": raw["error"]["came"]}


@exercise.experiment("old bits")
class OldBits(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"model": _Network(trial, 8).bfloat16()}

    def measure(self, subject, inputs):
        model = inputs["model"]
        before, bits = _weights(model), _bits(model)
        with _manager(subject(model)):
            dtypes = {str(weight.dtype) for weight in _weights(model)}
            inside = _bits(model)
        after = _weights(model)
        return {
            "merged": inside != bits,
            "dtypes": sorted(dtypes),
            "bits": _bits(model),
            "same": all(one is other for one, other in zip(before, after, strict=True)),
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
        partly = _Network(trial, width)
        _merge_by_hand(partly.layers[-1])  # the last, so that a loop meets the others first
        return {"model": _Network(trial, width), "partly": partly, "x": trial.normal(5, width)}

    def measure(self, subject, inputs):
        model, partly, x = inputs["model"], inputs["partly"], inputs["x"]
        with _manager(subject(model)):
            first = _outputs(model, x)
            nested = _raised(subject, model)
            then = _outputs(model, x)
        after = _outputs(model, x)
        return {"nested": nested, "first": first, "then": then, "after": after, "partly": _refusal(subject, partly)}

    def facts(self, raw, inputs):
        def changed(one: dict, other: dict) -> str | None:
            if raw["nested"] == "nothing":
                return None
            same = all(_updates(one[key], inputs) == _updates(other[key], inputs) for key in one)
            return "as before" if same else "different"

        return {
            "a block inside a block: raised": raw["nested"],
            "a block inside a block: then, in the outer one, the layers are": changed(raw["first"], raw["then"]),
            "a block inside a block: after both, the layers are": changed(_outputs(inputs["model"], inputs["x"]), raw["after"]),
            "one layer of three merged before: raised": raw["partly"]["came"],
            "one layer of three merged before: weights and flags that changed": raw["partly"]["changed"],
        }


@exercise.experiment("tied weight")
class TiedWeight(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        models = {"tied": _Language(trial, True), "equal": _Language(trial, False)}
        return {"tokens": trial.permutation(6)[:4], **models}

    def measure(self, subject, inputs):
        return {"tied": _refusal(subject, inputs["tied"]), "equal": _raised(subject, inputs["equal"])}

    def facts(self, raw, inputs):
        return {
            "the embedding's weight is that of a LoRA layer: raised": raw["tied"]["came"],
            "the embedding's weight is that of a LoRA layer: weights and flags that changed": raw["tied"]["changed"],
            "two weights with equal values: raised": raw["equal"],
        }


@exercise.experiment("nothing to merge")
class NothingToMerge(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))}

    def measure(self, subject, inputs):
        return {"came": _raised(subject, inputs["model"])}

    def facts(self, raw, inputs):
        return {"raised": raw["came"]}


def _layer(trial: Trial, base: nn.Linear, rank: int) -> lora.Linear:
    """A LoRA layer that has been trained: B is not zero."""
    layer = lora.Linear(base, rank, SCALING * rank)
    with torch.no_grad():
        layer.A.copy_(trial.normal(*layer.A.shape))
        layer.B.copy_(trial.normal(*layer.B.shape) / 2)
    return layer


def _layers(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.base.weight for layer in _layers(model)]


def _bits(model: nn.Module) -> list[list]:
    """The bits of each base weight, as bytes; values would call 0 and -0 equal."""
    return [weight.detach().contiguous().view(torch.uint8).tolist() for weight in _weights(model)]


def _merge_by_hand(layer: lora.Linear) -> None:
    layer.base.weight.data = layer.base.weight.data + layer.delta().detach()
    layer.merged = True


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
    try:
        with _manager(subject(model)):
            pass
    except (NotImplementedError, WrongReturn):
        raise
    except Exception as error:
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return "nothing"


def _refusal(subject, model: nn.Module) -> dict[str, str | None]:
    def state() -> list:
        return [_bits(model), [layer.merged for layer in _layers(model)]]

    before = state()
    came = _raised(subject, model)
    return {"came": came, "changed": None if came == "nothing" else "none" if state() == before else "some"}


def _check(model: nn.Module) -> list[lora.Linear]:
    """The LoRA layers, once it is certain that they can be merged."""
    layers = _layers(model)
    if not layers:
        raise ValueError("there is no LoRA layer")
    _check_flags(layers)
    _check_ties(model, layers)
    return layers


def _check_flags(layers: list[lora.Linear]) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError("a layer is merged already")


def _check_ties(model: nn.Module, layers: list[lora.Linear]) -> None:
    for layer in layers:
        users = [module for module in model.modules() if any(p is layer.base.weight for p in module._parameters.values())]
        if len(users) > 1:
            raise ValueError("a base weight is used by another module too")


def _add(layer: lora.Linear, factor: float = 1) -> Tensor:
    """Merge a layer, and return its old weight."""
    old = layer.base.weight.detach().clone()
    layer.base.weight.data = (old + factor * layer.delta().detach()).to(old.dtype)
    layer.merged = True
    return old


def _restore(layer: lora.Linear, old: Tensor) -> None:
    layer.base.weight.data = old
    layer.merged = False


@exercise.misconception("delta subtracted again")
@contextmanager
def delta_subtracted_again(model):
    layers = _check(model)
    for layer in layers:
        _add(layer)
    try:
        yield
    finally:
        for layer in layers:
            _restore(layer, layer.base.weight.data.sub_(layer.delta().detach()))


@exercise.misconception("flag never set")
@contextmanager
def flag_never_set(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    for layer in layers:
        layer.merged = False
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("flag left set")
@contextmanager
def flag_left_set(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            layer.base.weight.data = weight


@exercise.misconception("never undone")
@contextmanager
def never_undone(model):
    for layer in _check(model):
        _add(layer)
    yield


@exercise.misconception("not undone after an error")
@contextmanager
def not_undone_after_an_error(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    yield
    for layer, weight in zip(layers, old, strict=True):
        _restore(layer, weight)


@exercise.misconception("only errors caught")
@contextmanager
def only_errors_caught(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]

    def undo():
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)

    try:
        yield
    except Exception:
        undo()
        raise
    else:
        undo()


@exercise.misconception("error swallowed")
@contextmanager
def error_swallowed(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    try:
        yield
    except BaseException as error:
        print(f"the block ended with {error!r}")
    for layer, weight in zip(layers, old, strict=True):
        _restore(layer, weight)


@exercise.misconception("scaled again")
@contextmanager
def scaled_again(model):
    layers = _check(model)
    old = [_add(layer, layer.scaling) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("one delta for all")
@contextmanager
def one_delta_for_all(model):
    layers = _check(model)
    old, delta = [_add(layer, 0) for layer in layers], layers[0].delta().detach()
    for layer in layers:
        layer.base.weight.data += delta
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("one weight kept")
@contextmanager
def one_weight_kept(model):
    layers = _check(model)
    for layer in layers:
        old = _add(layer)
    try:
        yield
    finally:
        for layer in layers:
            _restore(layer, old.clone())


@exercise.misconception("merged twice")
@contextmanager
def merged_twice(model):
    layers = _layers(model)
    if len(layers) == 0:
        raise ValueError("there is no LoRA layer")
    _check_ties(model, layers)
    old = [_add(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("refusal that unmerges")
@contextmanager
def refusal_that_unmerges(model):
    layers = _layers(model)
    if layers:
        _check_ties(model, layers)
    old = [getattr(layer, "_before", None) for layer in layers]
    try:
        _check(model)
        old = [_add(layer) for layer in layers]
        for layer, weight in zip(layers, old, strict=True):
            object.__setattr__(layer, "_before", weight)
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            if weight is not None:
                _restore(layer, weight)


@exercise.misconception("changed before the error")
@contextmanager
def changed_before_the_error(model):
    layers, old = _layers(model), []
    if len(layers) == 0:
        raise ValueError("there is no LoRA layer")
    for layer in layers:
        _check_flags([layer])
        _check_ties(model, [layer])
        old.append(_add(layer))
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("tied weight merged")
@contextmanager
def tied_weight_merged(model):
    layers = _layers(model)
    if len(layers) == 0:
        raise ValueError("there is no LoRA layer")
    _check_flags(layers)
    old = [_add(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("equal taken for tied")
@contextmanager
def equal_taken_for_tied(model):
    layers = _check(model)
    every = sorted(model.parameters(), key=lambda p: (p.shape, float(p.sum())))
    if any(one.shape == other.shape and torch.equal(one, other) for one, other in pairwise(every)):
        raise ValueError("a base weight is used by another module too")
    old = [_add(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("the dtype of delta")
@contextmanager
def the_dtype_of_delta(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    for layer, weight in zip(layers, old, strict=True):
        layer.base.weight.data = weight + layer.delta().detach()
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("a new Parameter afterwards")
@contextmanager
def a_new_parameter_afterwards(model):
    layers = _check(model)
    old = [_add(layer) for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            layer.base.weight = nn.Parameter(weight)
            layer.merged = False


@exercise.misconception("the addition recorded")
@contextmanager
def the_addition_recorded(model):
    layers = _check(model)
    old = []
    for layer in layers:
        old.append(layer.base.weight.detach().clone())
        layer.base.weight.add_(layer.delta())
        layer.merged = True
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)


@exercise.misconception("no gradients in the block")
@contextmanager
def no_gradients_in_the_block(model):
    layers = _check(model)
    with torch.no_grad():
        old = [_add(layer) for layer in layers]
        try:
            yield
        finally:
            for layer, weight in zip(layers, old, strict=True):
                _restore(layer, weight)


@exercise.misconception("nothing merged, nothing said")
@contextmanager
def nothing_merged_nothing_said(model):
    layers = _layers(model)
    old = [_add(layer) for layer in (_check(model) if layers else [])]
    try:
        yield
    finally:
        for layer, weight in zip(layers, old, strict=True):
            _restore(layer, weight)
