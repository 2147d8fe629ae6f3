"""Exercise 5.4: freeze every BatchNorm of a network so that train() does not undo it, and undo it exactly."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from grader.checks.batchnorm.freezes import (
    Undo,
    among_the_children,
    called_bn,
    from_the_top,
    in_eval_mode_once,
    named_after_norms,
    never_to_be_undone,
    of_these_classes,
    solution,
    with_the_default_eps,
    without_momentum,
)
from grader.checks.batchnorm.layers import Branches, arrives, backward, classes_put_back, norms
from grader.checks.networks import with_statistics
from grader.checks.traces import kept
from grader.experiment import Exercise, Experiment, Trial, wrong_return
from grader.near import near, same, which
from helpers.batchnorm import freeze

exercise = Exercise(__name__, "5.4", freeze, core=5)


class _Freezing(Experiment):
    """Draws a small network in train mode, and passes `look` the subject as `freeze`, and the inputs by their names."""

    def draw(self, trial: Trial) -> dict:
        channels = trial.integer(3, 5)
        top, deeper = (with_statistics(nn.BatchNorm2d(channels, eps=0.1), trial) for _ in range(2))  # an eps that matters
        layer1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 1), bn=deeper))
        layers = OrderedDict(conv=nn.Conv2d(1, channels, 2), bn=top, relu=nn.ReLU(), layer1=layer1)
        return {"model": nn.Sequential(layers), "x": 3 + 2 * trial.normal(trial.integer(4, 6), 1, 4, 4)}

    def measure(self, subject, inputs):
        def freeze(model: nn.Module) -> Undo:
            undo = subject(model)
            if isinstance(undo, nn.Module) or not callable(undo):
                raise wrong_return("freeze must return a function without arguments", undo)
            return undo

        with classes_put_back():
            return self.look(freeze, **inputs)


def _affine(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the BatchNorms of the network that is drawn."""
    return [*model.bn.parameters(), *model.layer1.bn.parameters()]


@exercise.experiment("whatever train says", 1)
class WhateverTrainSays(_Freezing):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"found_in_eval_mode": copy.deepcopy(inputs["model"]).eval()}

    def look(self, freeze, model, found_in_eval_mode, x):
        outputs = {}

        def run(when: str, model: nn.Module) -> None:
            with kept(model, "buffers"):  # what moves is another experiment's question
                outputs[when] = model(x)

        with torch.no_grad():
            freeze(model)
            run("right after freeze", model)
            model.eval()
            run("after model.train()", model.train())
            model.layer1.train()
            run("after model.layer1.train()", model)
            model.train()
            model.bn.train()
            run("after model.bn.train()", model)
            freeze(found_in_eval_mode)
            run("of a model in eval mode, after train()", found_in_eval_mode.train())
        return outputs

    def facts(self, raw, inputs):
        model, x = inputs["model"], inputs["x"]
        with torch.no_grad(), kept(model, "buffers"):
            known = {"what eval mode computes": model.eval()(x)}
            default = copy.deepcopy(model)
            default.bn.eps = default.layer1.bn.eps = nn.BatchNorm2d(1).eps
            known["what eval mode computes, with the default eps"] = default(x)
            model.layer1.train()
            known["what layer1 computes in train mode"] = model(x)
            known["what train mode computes"] = model.train()(x)
        with torch.no_grad():
            model.eval().bn.train()
            known["what bn computes in train mode"] = model(x)
        words = {when: which(output, known) for when, output in raw.items()}
        seen = "what eval mode computes"
        # The first that is otherwise: those after it would only repeat it.
        otherwise = next((f"{when}, {word}" for when, word in words.items() if word != seen), seen)
        return {"whatever is put into train mode, the model computes": otherwise}


@exercise.experiment("nothing moves", 2)
class NothingMoves(_Freezing):
    def look(self, freeze, model, x):
        freeze(model)
        with torch.no_grad():
            before = model.eval()(x)
            model.train()
            for step in range(3):
                model(x + step)
            after = model.eval()(x)
        return {"before": before, "after": after}

    def facts(self, raw, inputs):
        return {"the running statistics of BatchNorms": "stay" if near(raw["before"], raw["after"]) else "move"}


@exercise.experiment("no gradients", 2)
class NoGradients(_Freezing):
    def look(self, freeze, model, x):
        freeze(model)
        backward(model.train()(x))
        return {"gradients": any(map(arrives, _affine(model)))}

    def facts(self, raw, inputs):
        return {"gradients of weights and biases of BatchNorms": "some" if raw["gradients"] else "none"}


class _Subclass(nn.BatchNorm2d):
    """As many networks define one for themselves."""


@exercise.experiment("every BatchNorm", 3)
class EveryBatchNorm(_Freezing):
    points = 2
    words: ClassVar = {
        "bn_one": "BatchNorm1d",
        "bn_two": "BatchNorm2d",
        "bn_three": "BatchNorm3d",
        "bn_sync": "SyncBatchNorm",
        "bn_own": "a subclass of BatchNorm2d",
        "bn_plain": "BatchNorm2d without weight and bias",
        "block": "block.downsample.1",
        "deep": "deep.0.0.bn",
    }

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)

        def norm(kind: type[_BatchNorm] = nn.BatchNorm2d, **options: bool) -> nn.Module:
            return with_statistics(kind(c, **options), trial)

        branches = {
            "bn_one": norm(nn.BatchNorm1d),
            "bn_two": norm(),
            "bn_three": norm(nn.BatchNorm3d),
            "bn_sync": norm(nn.SyncBatchNorm),
            "bn_own": norm(_Subclass),
            "bn_plain": norm(affine=False),
            "block": nn.Sequential(OrderedDict(downsample=nn.Sequential(nn.Conv2d(c, c, 1), norm()))),
            "deep": nn.Sequential(nn.Sequential(nn.Sequential(OrderedDict(bn=norm())))),
        }
        sizes = {"bn_one": (), "bn_three": (2, 2, 2)}
        x = {name: 3 + 2 * trial.normal(6, c, *sizes.get(name, (3, 2))) for name in branches}
        return {"model": Branches(branches), "x": x}

    def look(self, freeze, model, x):
        affine = {name: list(norms(branch)[0].parameters()) for name, branch in model.items()}
        freeze(model)
        outputs = model.train()(x)
        for output in outputs.values():
            backward(output)
        return {
            "outputs": {name: output.detach() for name, output in outputs.items()},
            "gradients": [name for name, parameters in affine.items() if any(map(arrives, parameters))],
        }

    def facts(self, raw, inputs):
        with torch.no_grad():
            frozen = inputs["model"].eval()(inputs["x"])
        missed = [name for name in self.words if not near(raw["outputs"][name], frozen[name])]
        facts = {"those that use their batch": missed, "those whose weight and bias train": raw["gradients"]}
        # Where none is frozen, that is no matter of kinds and names.
        none_is = {"those that use their batch": len(self.words), "those whose weight and bias train": len(self.words) - 1}
        return {
            what: None if len(names) == none_is[what] else ", ".join(map(self.words.get, names)) or "none"
            for what, names in facts.items()
        }


@exercise.experiment("all else", 4)
class AllElse(_Freezing):
    def draw(self, trial: Trial) -> dict:
        c = 2 * trial.integer(1, 2)
        layers = OrderedDict(conv=nn.Conv2d(1, c, 2), bn=with_statistics(nn.BatchNorm2d(c), trial), norm=nn.GroupNorm(2, c))
        layers["instance"] = nn.InstanceNorm2d(c, affine=True, track_running_stats=True)
        layers["conv"].bias.requires_grad_(False)
        dropout = nn.Sequential(OrderedDict(bn=with_statistics(nn.BatchNorm2d(1), trial), dropout=nn.Dropout(0.5)))
        dropout.resting = nn.Dropout(0.5).eval()
        stranger = with_statistics(nn.BatchNorm2d(1), trial)
        return super().draw(trial) | {"model": nn.Sequential(layers), "dropout": dropout, "stranger": stranger}

    def look(self, freeze, model, dropout, stranger, x):
        bn, instance, mean = model.bn, model.instance, model.bn.running_mean.clone()
        freeze(model)
        backward(model.train()(x))
        freeze(dropout)
        with torch.no_grad():
            return {
                "modes": [dropout.dropout.training, dropout.resting.training],
                "frozen": torch.equal(bn.running_mean, mean) or not any(map(arrives, bn.parameters())),
                "trains": all(map(arrives, (model.conv.weight, *model.norm.parameters(), *instance.parameters()))),
                "moves": bool(instance.running_mean.any()),
                "stays": arrives(model.conv.bias),
                "dropped": [[dropout.train(mode)(x) for _ in range(2)] for mode in (True, False)],
                "stranger": [stranger.train(mode)(x) for mode in (False, True)],
            }

    def facts(self, raw, inputs):
        with torch.no_grad():
            stranger = [inputs["stranger"].train(mode)(inputs["x"]) for mode in (False, True)]
        in_train, in_eval = ("off" if near(*pair) else "at work" for pair in raw["dropped"])
        facts = {
            "right after freeze, dropouts have": "their own modes" if raw["modes"] == [True, False] else "other modes",
            "dropout in train mode": in_train,
            "dropout in eval mode": in_eval,
            "gradients of the convolution and of other norms": "as before" if raw["trains"] else "missing",
            "the statistics of an InstanceNorm": "move" if raw["moves"] else "stand still",
            "gradients of a bias that was frozen before": "some" if raw["stays"] else "none",
            "a BatchNorm of another model": "as before" if all(map(near, raw["stranger"], stranger)) else "changed as well",
        }
        return facts if raw["frozen"] else dict.fromkeys(facts)  # who freezes nothing spares all else, too


class _Undoing(_Freezing):
    """One BatchNorm in train mode, one in eval mode: what they do while they are frozen, at once after undo, and later."""

    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)
        branches = {
            "bn_train": with_statistics(nn.BatchNorm2d(c, momentum=0.4), trial),
            "bn_eval": with_statistics(nn.BatchNorm2d(c, momentum=0.7), trial).eval(),
        }
        return {"model": Branches(branches), "x": {name: 3 + 2 * trial.normal(6, c, 3, 2) for name in branches}}

    def look(self, freeze, model, x):
        with torch.no_grad():
            with kept(model, "buffers"):  # what moves while it is frozen is another experiment's question
                undo = freeze(model)
                frozen = model(x)
                undo()
            with kept(model, "buffers"):
                at_once = model(x)
            with kept(model, "buffers"):
                undo = freeze(model)
                model.train()(x)
                undo()
            again = model.train()(x)
            return {"frozen": frozen, "at once": at_once, "again": again, "after": model.eval()(x)}

    def known(self, inputs: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The outputs with the stored statistics, with the batch's, and with the stored ones after one batch."""
        model, x = inputs["model"], inputs["x"]
        with torch.no_grad():
            return model.eval()(x), model.train()(x), model.eval()(x)


@exercise.experiment("trains again", 5)
class TrainsAgain(_Undoing):
    points = 2

    def facts(self, raw, inputs):
        stored, batch, moved = self.known(inputs)

        def both(outputs: dict[str, Tensor]) -> Tensor:
            return torch.stack([outputs["bn_train"], outputs["bn_eval"]])

        known = {"its batch": both(batch), "its stored statistics": both(stored)}
        pace = {"as before": both(moved), "not": both(stored)}
        facts = {
            "after undo and train(), each uses": which(both(raw["again"]), known),
            "after undo and train(), the running statistics move": which(both(raw["after"]), pace, "at another pace"),
        }
        return facts if not near(raw["frozen"]["bn_train"], batch["bn_train"]) else dict.fromkeys(facts)


@exercise.experiment("mode after undo", 6)
class ModeAfterUndo(_Undoing):
    def facts(self, raw, inputs):
        stored, batch, _ = self.known(inputs)

        def uses(name: str) -> str:
            return which(raw["at once"][name], {"its batch": batch[name], "its stored statistics": stored[name]})

        facts = {
            "right after undo, one that was in train mode uses": uses("bn_train"),
            "right after undo, one that was in eval mode uses": uses("bn_eval"),
        }
        frozen = not near(raw["frozen"]["bn_train"], batch["bn_train"])
        follows = all(near(raw["again"][name], batch[name]) for name in batch)
        return facts if frozen and follows else dict.fromkeys(facts)


@exercise.experiment("flags as before", 5)
class FlagsAsBefore(_Freezing):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["model"].bn.weight.requires_grad_(False)
        return inputs

    def look(self, freeze, model, x):
        layers, affine = [model.bn, model.layer1.bn], _affine(model)
        undo = freeze(model)
        backward(model(x))
        meanwhile = any(map(arrives, affine))
        model.zero_grad()
        with torch.no_grad():
            model.conv.weight += 1
        stored = [buffer.clone() for layer in layers for buffer in layer.buffers()]
        undo()
        stayed = all(map(same, stored, [buffer for layer in layers for buffer in layer.buffers()]))
        backward(model.train()(x))
        weight, *others = _affine(model)
        return {
            "meanwhile": meanwhile,
            "trained": all(map(arrives, others)),
            "frozen": arrives(weight),
            "learned": model.conv.weight.detach().clone(),
            "statistics": stayed,
        }

    def facts(self, raw, inputs):
        facts = self.flags(raw, inputs)
        return dict.fromkeys(facts) if raw["meanwhile"] else facts  # flags that were never changed are as before

    def flags(self, raw: dict, inputs: dict) -> dict[str, str]:
        return {
            "weights and biases that trained before freeze": "train" if raw["trained"] else "do not all train",
            "a weight that was frozen before freeze": "trains" if raw["frozen"] else "does not train",
        }


@exercise.experiment("learned in between", 8)
class LearnedInBetween(FlagsAsBefore):
    def flags(self, raw, inputs):
        learned = near(raw["learned"], inputs["model"].conv.weight + 1)
        return {
            "what a convolution learned in between": "is kept" if learned else "is lost",
            "running statistics, right before undo and right after": "the same" if raw["statistics"] else "different",
        }


@exercise.experiment("two places, and none", 7)
class TwoPlacesAndNone(_Freezing):
    def draw(self, trial: Trial) -> dict:
        c = trial.integer(2, 4)
        bn, shared, alone = (with_statistics(nn.BatchNorm2d(c), trial) for _ in range(3))
        blocks = {name: nn.Sequential(OrderedDict(bn=norm)) for name, norm in (("a", bn), ("b", shared), ("c", shared))}
        x = 3 + 2 * trial.normal(6, c, 3, 2)
        return {"model": Branches(blocks), "alone": alone, "x": dict.fromkeys(blocks, x)}

    def look(self, freeze, model, alone, x):
        def run() -> tuple[dict[str, Tensor], dict[str, bool]]:
            with kept(model, "buffers"), kept(alone, "buffers"):
                outputs = model.train()(x) | {"alone": alone.train()(x["a"])}
                for output in outputs.values():
                    backward(output)
            parameters = {name: block.bn.parameters() for name, block in model.items()} | {"alone": alone.parameters()}
            return {name: y.detach() for name, y in outputs.items()}, {n: all(map(arrives, p)) for n, p in parameters.items()}

        undo_model, undo_alone = freeze(model), freeze(alone)
        with torch.no_grad():
            frozen, _ = run()
        undo_model()
        undo_alone()
        again, gradients = run()
        return {"frozen": frozen, "again": again, "gradients": gradients}

    def facts(self, raw, inputs):
        model, alone, x = inputs["model"], inputs["alone"], inputs["x"]
        with torch.no_grad():
            batch = model.train()(x) | {"alone": alone.train()(x["a"])}
        words = {
            "b": "one that two blocks share",
            "c": "one that two blocks share",
            "alone": "a model that is a BatchNorm itself",
        }

        def missed(right: Callable[[str], bool]) -> str | None:
            """None if it is not so of an ordinary BatchNorm either."""
            return (", ".join(dict.fromkeys(words[n] for n in words if not right(n))) or "none") if right("a") else None

        return {
            "those that use their batch": missed(lambda name: not near(raw["frozen"][name], batch[name])),
            "after undo, still frozen": missed(lambda name: near(raw["again"][name], batch[name]) and raw["gradients"][name]),
        }


exercise.misconceptions_of(
    solution,
    {
        "eval() once": {"fix": in_eval_mode_once},
        "requires_grad=False alone": {"fixed": lambda model, layers: []},
        "statistics that stand still": {"fix": without_momentum},
        "nothing is frozen": {"fixed": lambda model, layers: [], "flagged": lambda model, layers: []},
        "other norms too": {"find": named_after_norms},
        "found by class name": {"find": lambda model: [layer for layer in norms(model) if "BatchNorm" in type(layer).__name__]},
        "SyncBatchNorm forgotten": {"find": of_these_classes},
        "in train mode after undo": {"finish": nn.Module.train},
        "only the children": {"find": among_the_children},
        "in eval mode after undo": {"finish": nn.Module.eval},
        "BatchNorm2d only": {"find": lambda model: [layer for layer in norms(model) if isinstance(layer, nn.BatchNorm2d)]},
        "found by name": {"find": called_bn},
        "the whole model in eval mode": {"fixed": lambda model, layers: model.modules()},
        "the whole model frozen": {"flagged": lambda model, layers: [model]},
        "only the model's own train()": {"fixed": lambda model, layers: [model], "fix": from_the_top},
        "affine still trains": {"flagged": lambda model, layers: []},
        "another eps": {"fix": with_the_default_eps},
        "undo unfreezes everything": {"finish": lambda layer: layer.requires_grad_(True)},
        "undo to the default momentum": {"finish": lambda layer: setattr(layer, "momentum", 0.1)},
        "stuck in eval mode after undo": {"fix": never_to_be_undone},
    },
)


@exercise.misconception("everything put back")
def everything_put_back(model):
    state, let_go = copy.deepcopy(model.state_dict()), solution(model)

    def undo() -> None:
        let_go()
        model.load_state_dict(state)

    return undo
