"""Exercise 2.2a: eval mode for a while, and every module back in its own."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from grader.checks.networks import named
from grader.experiment import Exercise, Experiment, Subject, Trial, WrongReturn, wrong_return
from helpers.modes import eval_mode

exercise = Exercise(__name__, "2.2a", eval_mode, core=3)


def _model() -> nn.Sequential:
    """Modules of several kinds, three deep, none of them in two places."""
    inner = named(line=nn.Linear(4, 4), norm=nn.LayerNorm(4), drop=nn.Dropout())
    block = named(norm=nn.BatchNorm1d(4), inner=inner, table=nn.ModuleDict({"drop": nn.Dropout(), "norm": nn.BatchNorm1d(4)}))
    return named(stem=named(line=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)), block=block, head=nn.Linear(4, 3))


def _models(trial: Trial) -> dict[str, nn.Module]:
    """A model in each of the states that it may be in; "mixed" is at random, but for what tells mistakes apart."""
    models = {start: _model() for start in ("all in train mode", "all in eval mode", "a part in eval mode", "mixed")}
    models["all in eval mode"].eval()
    models["a part in eval mode"].block.inner.eval()
    models["a part in eval mode"].stem.norm.eval()
    mixed = models["mixed"]
    for module in mixed.modules():
        module.training = trial.integer(0, 1) == 1
    mixed.training, mixed.block.training, mixed.block.norm.training, mixed.block.inner.drop.training = False, True, False, True
    return models


class _FrozenForGood(nn.Sequential):
    """A part that nobody shall switch: its `train` does nothing, and `eval` calls `train`."""

    def train(self, mode: bool = True) -> nn.Module:
        return self


class _Evaluated(nn.Sequential):
    """A model whose `eval` means something else."""

    def eval(self) -> float:
        return 0.9


class _Raised(BaseException):
    """Of a body, where every kind of exception is meant."""


def _with(subject: Subject, model: nn.Module, body: Callable[[], None] = lambda: None) -> None:
    """Run `body` inside the `with`."""
    manager = subject(model)
    if not all(hasattr(type(manager), name) for name in ("__enter__", "__exit__")):
        question = " Is @contextmanager above it?" if isinstance(manager, Iterator) else ""
        raise WrongReturn(str(wrong_return("eval_mode must return what `with` can take", manager)) + question)
    with manager:
        body()


def _modes(*models: nn.Module) -> list[bool]:
    return [module.training for model in models for module in model.modules()]


def _changes(before: list[bool], after: list[bool] | None) -> str | None:
    """What became of modes, in a word; None if nothing can be seen."""
    if after is None:
        return None
    changed = {now for was, now in zip(before, after, strict=True) if was != now}
    words = {(): "as before", (False,): "some left in eval mode", (True,): "some put into train mode"}
    return words.get(tuple(changed), "some left in eval mode, some put into train mode")


def _works(subject: Subject, models: Iterable[nn.Module]) -> tuple[bool, bool]:
    """Whether all is in eval mode inside, and whether modes come back, if nothing out of the way happens.

    Where the answer is no, other experiments cannot see what they ask for.
    """
    inside, comes_back = [], True
    for model in models:
        before = _modes_of(model)
        _with(subject, model, lambda model=model: inside.extend(_modes(model)))
        comes_back &= _modes_of(model) == before
        _put_back(model, before)
    return not any(inside), comes_back


def _kind(module: nn.Module) -> str:
    kinds = {"dropout": nn.Dropout, "BatchNorm": nn.BatchNorm1d}
    return next((name for name, kind in kinds.items() if isinstance(module, kind)), "modules of other kinds")


def _kinds(models: Iterable[nn.Module], flags: Iterable[list[bool]]) -> list[str]:
    """The kinds of the modules that a flag is up for."""
    flagged = set()
    for model, flags_of_model in zip(models, flags, strict=True):
        for module, flag in zip(model.modules(), flags_of_model, strict=True):
            if flag:
                flagged.add("the model itself" if module is model else _kind(module))
    return sorted(flagged)


@exercise.experiment("eval mode inside", 1)
class EvalModeInside(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"models": list(_models(trial).values())}

    def measure(self, subject, inputs):
        inside = []
        for model in inputs["models"]:
            _with(subject, model, lambda model=model: inside.append(_modes(model)))
        if len(inside) < len(inputs["models"]):
            raise WrongReturn("the body of the `with` must run, got a context manager that skips it.")
        return {"inside": inside}

    def facts(self, raw, inputs):
        return {"in train mode inside the `with`": _kinds(inputs["models"], raw["inside"])}


@exercise.experiment("each its own mode", 2)
class EachItsOwnMode(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        return {"models": _models(trial)}

    def measure(self, subject, inputs):
        for model in inputs["models"].values():
            _with(subject, model)
        return {start: _modes(model) for start, model in inputs["models"].items()}

    def facts(self, raw, inputs):
        models = inputs["models"]
        facts = {f"modes of a model that was {s}, after it": _changes(_modes(models[s]), raw[s]) for s in models}
        flags = [[was != now for was, now in zip(_modes(models[s]), raw[s], strict=True)] for s in models]
        return facts | {"what did not come back": _kinds(models.values(), flags)}


class _Raises(Experiment):
    """What becomes of an exception, and of the modes after it."""

    kinds: ClassVar[dict[str, type[BaseException]]]

    def draw(self, trial: Trial) -> dict:
        models = _models(trial)
        return {"models": [models["a part in eval mode"], models["mixed"]]}

    def measure(self, subject, inputs):
        comes_out, after = {}, {}
        _, comes_back = _works(subject, inputs["models"])
        for name, kind in self.kinds.items():
            before = [_modes_of(model) for model in inputs["models"]]
            comes_out[name] = [self.comes_out(subject, model, kind) for model in inputs["models"]]
            after[name] = _modes(*inputs["models"]) if comes_back else None
            for model, modes in zip(inputs["models"], before, strict=True):
                _put_back(model, modes)
        return {"comes out": comes_out, "after": after}

    def comes_out(self, subject: Subject, model: nn.Module, kind: type[BaseException]) -> str:
        raised = kind("in the body of a `with`")

        def body() -> None:
            raise raised

        try:
            _with(subject, model, body)
        except WrongReturn:
            raise
        except BaseException as error:
            if isinstance(error, NotImplementedError):
                raise
            return "it" if error is raised else f"{type(error).__name__} in its place"
        return "nothing"

    def facts(self, raw, inputs):
        before, facts = _modes(*inputs["models"]), {}
        for name in self.kinds:
            facts[f"what comes out of the `with` after {name}"] = " or ".join(sorted(set(raw["comes out"][name])))
            facts[f"modes after {name}"] = _changes(before, raw["after"][name])
        return facts


@exercise.experiment("an exception in the body", 3)
class AnExceptionInTheBody(_Raises):
    kinds: ClassVar = {"an exception": ValueError}


@exercise.experiment("Ctrl-C in the body", 4)
class CtrlCInTheBody(_Raises):
    kinds: ClassVar = {"Ctrl-C": KeyboardInterrupt}

    def measure(self, subject, inputs):
        raw = super().measure(subject, inputs)
        if _Raises.comes_out(self, subject, _model(), ValueError) != "it":  # then this is nothing of Ctrl-C's
            raw["comes out"]["Ctrl-C"] = ["it", "it"]
        return raw


@exercise.experiment("one inside the other", 5)
class OneInsideTheOther(Experiment):
    """A `with` of the whole model around one of the whole and two of a part of it, and the other way round."""

    def draw(self, trial: Trial) -> dict:
        models = _models(trial)
        return {"model": models["a part in eval mode"], "models": list(models.values())}

    def measure(self, subject, inputs):
        model, inside = inputs["model"], []

        def twice() -> None:
            _with(subject, model, lambda: _with(subject, model.block))
            _with(subject, model.block.inner)
            inside.extend(_modes(model))

        _with(subject, model, twice)
        _with(subject, model.block, lambda: _with(subject, model))
        all_in_eval_mode, comes_back = _works(subject, inputs["models"])
        return {"inside": inside if all_in_eval_mode and comes_back else None, "after": _modes(model) if comes_back else None}

    def facts(self, raw, inputs):
        return {
            "modes inside the outer `with`, after the inner one": _changes([False] * len(raw["inside"] or []), raw["inside"]),
            "modes after the outer `with`": _changes(_modes(inputs["model"]), raw["after"]),
        }


@exercise.experiment("modes changed in the body", 5)
class ModesChangedInTheBody(Experiment):
    def draw(self, trial: Trial) -> dict:
        models = _models(trial)
        return {"model": models["mixed"], "models": list(models.values())}

    def measure(self, subject, inputs):
        model = inputs["model"]
        _with(subject, model, lambda: model.train() and None)
        return {"after": _modes(model) if _works(subject, inputs["models"])[1] else None}

    def facts(self, raw, inputs):
        return {"modes after a body that calls train()": _changes(_modes(inputs["model"]), raw["after"])}


@exercise.experiment("a module in two places", 6)
class AModuleInTwoPlaces(Experiment):
    """Once the shared module is in train mode and what holds it is not, and once the other way round."""

    def draw(self, trial: Trial) -> dict:
        models = []
        for mode in (True, False):
            shared = named(line=nn.Linear(4, 4), drop=nn.Dropout())
            model = named(first=nn.Sequential(nn.Linear(4, 4), shared), second=nn.Sequential(shared, nn.Tanh()))
            shared.train(mode)
            model.second.training = not mode
            models.append(model)
        return {"shared": models, "models": list(_models(trial).values())}

    def measure(self, subject, inputs):
        for model in inputs["shared"]:
            _with(subject, model)
        return {"after": _modes(*inputs["shared"]) if _works(subject, inputs["models"])[1] else None}

    def facts(self, raw, inputs):
        return {"modes of modules in two places": _changes(_modes(*inputs["shared"]), raw["after"])}


@exercise.experiment("train() of its own", 7)
class TrainOfItsOwn(Experiment):
    def draw(self, trial: Trial) -> dict:
        part = _FrozenForGood(nn.Linear(4, 4), nn.BatchNorm1d(4))
        still = _FrozenForGood(nn.Linear(4, 4), nn.Dropout())
        for module in (still, still[1]):
            module.training = False
        model = named(stem=nn.Linear(4, 4), part=part, still=still)
        own = [model, _Evaluated(nn.Linear(4, 4), nn.Dropout())]
        return {"own": own, "models": list(_models(trial).values())}

    def measure(self, subject, inputs):
        inside: list[bool] = []
        for model in inputs["own"]:
            _with(subject, model, lambda model=model: inside.extend(_modes(model)))
        all_in_eval_mode, comes_back = _works(subject, inputs["models"])
        return {"inside": inside if all_in_eval_mode else None, "after": _modes(*inputs["own"]) if comes_back else None}

    def facts(self, raw, inputs):
        inside = None if raw["inside"] is None else "some in train mode" if any(raw["inside"]) else "all in eval mode"
        return {
            "modes inside, where train() or eval() is the module's own": inside,
            "modes after it, where train() or eval() is the module's own": _changes(_modes(*inputs["own"]), raw["after"]),
        }


@exercise.experiment("nothing but modes", 8)
class NothingButModes(Experiment):
    """Of a model of which a part is frozen."""

    def draw(self, trial: Trial) -> dict:
        model = _models(trial)["mixed"]
        model.block.inner.requires_grad_(False)
        return {"model": model, "x": trial.normal(3, 4)}

    def measure(self, subject, inputs):
        model, graphs = inputs["model"], []
        _with(subject, model, lambda: graphs.append(model.head(inputs["x"]).requires_grad))
        return {"graphs": graphs, "flags": [parameter.requires_grad for parameter in model.parameters()]}

    def facts(self, raw, inputs):
        flags = [parameter.requires_grad for parameter in inputs["model"].parameters()]
        return {
            "the body can compute gradients": "yes" if all(raw["graphs"]) else "no",
            "parameters whose requires_grad changed": "none" if raw["flags"] == flags else "some",
        }


def _modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _put_back(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _into_eval_mode(model: nn.Module) -> None:
    for module in model.modules():
        module.training = False


@contextmanager
def solution(model, *, into=_into_eval_mode, remember=_modes_of, put_back=_put_back):
    """A right solution, in pieces that a misconception replaces."""
    modes = remember(model)
    into(model)
    try:
        yield
    finally:
        put_back(model, modes)


def _norms_into_eval_mode(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _back_by_train(model, modes):
    for module, mode in modes.items():
        module.train(mode)


exercise.misconceptions_of(
    solution,
    {
        "left in eval mode": {"put_back": lambda model, modes: None},
        "put back with train()": {"put_back": lambda model, modes: model.train()},
        "one mode for all": {"put_back": lambda model, modes: model.train(modes[model])},
        "only the model's own mode": {"into": lambda model: setattr(model, "training", False)},
        "only BatchNorm in eval mode": {"into": _norms_into_eval_mode},
        "put back with train(mode)": {"into": nn.Module.eval, "put_back": _back_by_train},
    },
)


@exercise.misconception("no finally")
@contextmanager
def no_finally(model):
    modes = _modes_of(model)
    _into_eval_mode(model)
    yield
    _put_back(model, modes)


@exercise.misconception("exception swallowed")
@contextmanager
def exception_swallowed(model):
    modes = _modes_of(model)
    _into_eval_mode(model)
    try:
        yield
    except Exception as error:
        print(error)
    finally:
        _put_back(model, modes)


@exercise.misconception("kept on the module")
@contextmanager
def kept_on_the_module(model):
    for module in model.modules():
        module.was_training = module.training
        module.training = False
    try:
        yield
    finally:
        for module in model.modules():
            module.training = module.was_training
