"""Exercise 6.4: merged inside the block, every bit as it was afterwards."""

import copy
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.lora.lora_networks import (
    Solution,
    bits_of,
    language_model,
    layers_of,
    lora_layer,
    manager_of,
    network,
    none_equal,
    none_merged,
    none_tied,
    some_layer,
    weights_of,
)
from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Fact, Trial, WrongReturn
from grader.near import near
from helpers import lora

exercise = Exercise(__name__, "6.4", lora.merged, core=4)


class _Error(Exception):
    """An error of the body."""


class _Interrupt(KeyboardInterrupt):
    """Somebody stops the cell."""


class _Blocks(Experiment):
    """Runs blocks that end in several ways, each with a network of its own."""

    points = 2
    endings: ClassVar[dict[str, type[BaseException] | None]]

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        return {how: network(trial, width) for how in self.endings} | {"x": trial.normal(5, width)}

    def measure(self, subject, inputs):
        return {how: self._run(subject, inputs[how], ending, inputs["x"]) for how, ending in self.endings.items()}

    @staticmethod
    def _run(subject, model: nn.Module, ending: type[BaseException] | None, x: Tensor) -> dict:
        def block() -> None:
            nonlocal merged
            with manager_of(subject(model)):
                merged = bits_of(model) != before
                if ending is not None:
                    raise ending

        before, merged, error_outside = bits_of(model), False, "nothing"
        try:
            block()
        except (NotImplementedError, WrongReturn):
            raise
        except (Exception, _Interrupt) as error:
            if ending is None:
                raise
            error_outside = "that error" if type(error) is ending else type(error).__name__
        return _outputs(model, x) | {"error outside": error_outside, "merged": merged}

    def after(self, raw, inputs, how: str) -> dict[str, Fact]:
        """What is left of delta afterwards."""
        fresh = {"model": inputs[how], "x": inputs["x"]}
        return {
            "what delta added to `layer.base(x)`": _updates(raw[how]["base"], fresh),
            "what delta added to `layer(x)`": _updates(raw[how]["layer"], fresh),
            "`layer.merged`": raw[how]["flags"],
        }

    def undone(self, raw, inputs, how: str) -> bool:
        added, added_twice, flags = self.after(raw, inputs, how).values()
        return (added, added_twice, flags) == ([0.0] * 3, [1.0] * 3, "all False")


@exercise.experiment("inside the block", 1)
class InsideTheBlock(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        alone, twice = (lora_layer(trial, nn.Linear(width, width), 2) for _ in range(2))
        model = network(trial, width)
        model["layers"][1].requires_grad_(False)  # an adapter that no longer trains
        return {"model": model, "alone": alone, "twice": nn.Sequential(twice, nn.ReLU(), twice), "x": trial.normal(5, width)}

    def measure(self, subject, inputs):
        model, alone, x = inputs["model"], inputs["alone"], inputs["x"]
        with manager_of(subject(model)):
            raw = _outputs(model, x)
        with manager_of(subject(alone)):
            raw["alone"] = _outputs(alone, x)["base"]
        try:
            with manager_of(subject(inputs["twice"])):
                return raw | {"twice": _outputs(inputs["twice"], x)["base"]}
        except ValueError:  # no harm is done
            return raw

    def facts(self, raw, inputs):
        return {
            "`layer.base(x)`, what delta added to it, in multiples": _updates(raw["base"], inputs),
            "`layer(x)`, what delta added to it, in multiples": _updates(raw["layer"], inputs),
            "`layer.merged`": raw["flags"],
            "a model that is a LoRA layer itself: what delta added": _updates(
                raw["alone"], inputs | {"model": inputs["alone"]}
            ),
            "a layer at two places of a model: what delta added": _updates(raw["twice"], inputs | {"model": inputs["twice"]})
            if "twice" in raw
            else [1.0],
        }


@exercise.experiment("after the block", 2)
class AfterTheBlock(_Blocks):
    endings: ClassVar = {"end": None}

    def facts(self, raw, inputs):
        return {"base weights in the block changed": raw["end"]["merged"]} | self.after(raw, inputs, "end")


@exercise.experiment("old bits", 2)
class OldBits(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        return {str(dtype).rpartition(".")[2]: network(trial, width).to(dtype) for dtype in (torch.bfloat16, torch.float32)}

    def measure(self, subject, inputs):
        raw = {}
        for name, model in inputs.items():
            bits = bits_of(model)
            with manager_of(subject(model)):
                merged = bits_of(model) != bits
            dtypes = sorted({str(weight.dtype).rpartition(".")[2] for weight in weights_of(model)})
            raw[name] = {"merged": merged, "bits": bits_of(model), "dtypes": dtypes}
        return raw

    def facts(self, raw, inputs):
        facts = {}
        for name, model in inputs.items():
            seen = raw[name]["merged"] and raw[name]["dtypes"] == [name]
            facts[f"{name}: base weights in the block"] = "different" if raw[name]["merged"] else "as before"
            facts[f"{name}: dtype afterwards"] = " and ".join(raw[name]["dtypes"])
            same = "none" if raw[name]["bits"] == bits_of(model) else "some"
            facts[f"{name}: base weights whose bits differ afterwards"] = same if seen else None
        return facts


@exercise.experiment("after an error", 3)
class AfterAnError(_Blocks):
    endings: ClassVar = {"end": None, "error": _Error}

    def facts(self, raw, inputs):
        after = self.after(raw, inputs, "error")
        after = after if self.undone(raw, inputs, "end") else dict.fromkeys(after)  # wrong without an error, too
        return after | {"what came out of a block with an error": raw["error"]["error outside"]}


@exercise.experiment("not twice", 4)
class NotTwice(Experiment):
    points = 2
    partly = "the first", "the second", "the third"

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 6)
        models = {which: network(trial, width) for which in self.partly}
        for model, layer in zip(models.values(), range(3), strict=True):
            chosen = layers_of(model)[layer]
            chosen.base.weight.data += chosen.delta().detach()
            chosen.merged = True
        return {"model": network(trial, width), "x": trial.normal(5, width), **models}

    def measure(self, subject, inputs):
        raw = {which: _refusal(subject, inputs[which]) for which in self.partly}
        model, x = inputs["model"], inputs["x"]
        with manager_of(subject(model)):
            inside = _outputs(model, x)
        raw |= {"inside": inside, "after one": _outputs(model, x)}
        if inside["flags"] == "all True" and raw["after one"]["flags"] == "all False":  # else it shows in one block
            with manager_of(subject(model)):
                nested = _raised(subject, model)
                again = _outputs(model, x)
            raw |= {"nested": nested, "again": again, "after": _outputs(model, x)}
        return raw

    def facts(self, raw, inputs):
        def changed(before: dict, after: dict) -> str | None:
            if raw["nested"] == "nothing":
                return None
            updates = all(_updates(before[key], inputs) == _updates(after[key], inputs) for key in ("base", "layer"))
            return "as before" if updates and before["flags"] == after["flags"] else "different"

        refused = {raw[which]["raised"] for which in self.partly}
        left = {raw[which]["changed"] for which in self.partly} - {None}
        nested, inside, after = None, None, None
        if "nested" in raw and _updates(raw["after one"]["base"], inputs) == [0.0] * 3:
            nested = raw["nested"]
            inside, after = changed(raw["inside"], raw["again"]), changed(raw["after one"], raw["after"])
        return {
            "one layer of three merged before: raised": refused.pop() if len(refused) == 1 else "not for each of the three",
            "one layer of three merged before: weights and flags that changed": max(left, default=None),
            "a block inside a block: raised": nested,
            "a block inside a block: then, in the outer one, the layers are": inside,
            "a block inside a block: after both, the layers are": after,
        }


@exercise.experiment("the Parameters", 5)
class TheParameters(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": network(trial, 8).bfloat16()}

    def measure(self, subject, inputs):
        model = inputs["model"]
        before = weights_of(model)
        with manager_of(subject(model)):
            dtypes = sorted({str(weight.dtype) for weight in weights_of(model)})
        after = weights_of(model)
        return {
            "dtypes": dtypes,
            "same": all(weight is was for weight, was in zip(after, before, strict=True)),
            "graph": any(not weight.is_leaf for weight in after),
            "frozen": not any(weight.requires_grad for weight in after),
        }

    def facts(self, raw, inputs):
        return {
            "in the block: dtype of the base weights": " and ".join(raw["dtypes"]),
            "afterwards: base weights": "the Parameters that were there" if raw["same"] else "different Parameters",
            "afterwards: they are": "part of a graph" if raw["graph"] else "frozen" if raw["frozen"] else "trainable",
        }


@exercise.experiment("an interrupt", 6)
class AnInterrupt(_Blocks):
    points = 1
    endings: ClassVar = {"end": None, "error": _Error, "interrupt": _Interrupt}

    def facts(self, raw, inputs):
        facts = self.after(raw, inputs, "interrupt")
        facts |= {"what came out of the block": raw["interrupt"]["error outside"]}
        as_wanted = self.undone(raw, inputs, "end") and self.undone(raw, inputs, "error")
        return facts if as_wanted and raw["error"]["error outside"] == "that error" else dict.fromkeys(facts)


@exercise.experiment("nothing else", 7)
class NothingElse(Experiment):
    def draw(self, trial: Trial) -> dict:
        model = network(trial, trial.integer(4, 6))
        model["layers"][0].eval()  # modes and flags that are not those of a new model
        model["head"].bias.requires_grad_(False)
        return {"model": model, "without": copy.deepcopy(model)}

    def measure(self, subject, inputs):
        model = inputs["model"]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        with torch.no_grad(), manager_of(subject(inputs["without"])):
            recorded = [torch.is_grad_enabled()]
        with manager_of(subject(model)):
            recorded.append(torch.is_grad_enabled())
            inside = traces.of(model)
        lost = [parameter for parameter in trained if parameter.grad is None or (parameter.grad != 1).any()]
        return {"recorded": recorded, "inside": inside, "after": traces.of(model), "lost": lost}

    def facts(self, raw, inputs):
        model = inputs["model"]

        def changed(when: str, kind: str) -> list[str]:
            return [name for name in traces.changed(model, raw[when], kind) if not name.endswith("base.weight")]

        how = "as around it" if raw["recorded"] == [False, True] else "always" if all(raw["recorded"]) else "never"
        facts = {"gradients are recorded in the block": how, "gradients that changed": traces.some(raw["lost"])}
        for kind, what in (("parameters", "other parameters"), ("flags", "their requires_grad"), ("modes", "modes")):
            facts[f"{what} that changed"] = traces.some(changed("inside", kind) + changed("after", kind))
        return facts


@exercise.experiment("nothing to merge", 8)
class NothingToMerge(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"model": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))}

    def measure(self, subject, inputs):
        return {"raised": _raised(subject, inputs["model"])}

    def facts(self, raw, inputs):
        return raw


@exercise.experiment("tied weight", 9)
class TiedWeight(Experiment):
    points = 2
    cases: ClassVar = {"embedding": "an embedding", "linear": "a plain nn.Linear", "LoRA": "another LoRA layer"}

    def draw(self, trial: Trial) -> dict:
        others = {"embedding": nn.Embedding(6, 6), "linear": nn.Linear(6, 6), "LoRA": lora_layer(trial, nn.Linear(6, 6), 2)}
        models = {case: language_model(trial, other) for case, other in others.items()}
        elsewhere = language_model(trial, nn.Linear(6, 6), tied=False)
        elsewhere.append(nn.Linear(6, 7)).append(nn.Linear(6, 7))
        elsewhere[-1].weight = elsewhere[-2].weight
        return models | {"equal": language_model(trial, nn.Embedding(6, 6), tied=False), "elsewhere": elsewhere}

    def measure(self, subject, inputs):
        refusals = {case: _refusal(subject, inputs[case]) for case in self.cases}
        return refusals | {case: _raised(subject, inputs[case]) for case in ("equal", "elsewhere")}

    def facts(self, raw, inputs):
        facts = {}
        for case, what in self.cases.items():
            facts[f"{what} has the weight of a LoRA layer: raised"] = raw[case]["raised"]
            facts[f"{what} has the weight of a LoRA layer: weights and flags that changed"] = raw[case]["changed"]
        return facts | {
            "two weights with equal values: raised": raw["equal"],
            "two modules share a weight, no LoRA layer has it: raised": raw["elsewhere"],
        }


def _outputs(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What each base layer and each LoRA layer makes of the same inputs, and what the flags say."""
    layers = layers_of(model)
    flags = {layer.merged for layer in layers}
    said = f"all {flags.pop()}" if len(flags) == 1 else "not all the same"
    with torch.no_grad():
        return {"base": [layer.base(x) for layer in layers], "layer": [layer(x) for layer in layers], "flags": said}


def _updates(outputs: list[Tensor], inputs: dict) -> list[Fact]:
    """How often each layer's delta was added to what its base computed before; 'another' if it is no multiple."""
    x = inputs["x"]
    with torch.no_grad():
        return [
            _multiple(output - layer.base(x), F.linear(x, layer.delta()))
            for output, layer in zip(outputs, layers_of(inputs["model"]), strict=True)
        ]


def _multiple(update: Tensor, delta: Tensor) -> Fact:
    times = float((update * delta).sum() / delta.square().sum())
    alike = near(update, times * delta, scale=float(delta.abs().max()))
    return round(times, 2) + 0.0 if alike else "another update"


def _raised(subject, model: nn.Module) -> str:
    """What the block raises that does nothing."""

    def block() -> None:
        with manager_of(subject(model)):
            pass

    return raised(block)[0]


def _refusal(subject, model: nn.Module) -> dict[str, str | None]:
    """What that block raises, and whether weights and flags changed although it was refused."""

    def state() -> list:
        return [bits_of(model), [layer.merged for layer in layers_of(model)]]

    before = state()
    error = _raised(subject, model)
    return {"raised": error, "changed": None if error == "nothing" else "none" if state() == before else "some"}


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


@exercise.misconception("old weight not copied")
class OldWeightNotCopied(Solution):
    def merge(self, layer):
        super().merge(layer)
        layer.old = layer.base.weight.data


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
