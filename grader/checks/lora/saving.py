"""Exercise 6.6: save what was trained, and nothing else, and load it into another copy of the same model."""

import builtins
import copy
import errno
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grader.experiment import Exercise, Experiment, Trial, WrongReturn
from grader.near import near
from helpers import expect
from helpers.adapters import AdapterFile

exercise = Exercise(__name__, "6.6", AdapterFile)

State = dict[str, Tensor]
SAVED, AS_BEFORE = "those saved", "as they were before"


class _Adapted(nn.Module):
    """A frozen layer and an adapter, under the names of exercise 6.1."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, width))
        self.B = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class _Network(nn.Module):
    """Frozen but for the adapters of its blocks and the head. Every number of it is random."""

    def __init__(self, width: int, ranks: list[int], bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width).requires_grad_(False)
        self.blocks = nn.ModuleList(_Adapted(width, rank) for rank in ranks)
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


class _Shared(nn.Module):
    """A trained weight that two modules share, an adapter, and trained parameters of other dtypes."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.block = _Adapted(width, rank)
        self.scale = nn.Parameter(torch.randn(width, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.bfloat16))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight


def _network(trial: Trial) -> _Network:
    return _Network(trial.integer(5, 8), [trial.integer(2, 4)] * 2)


def _another(model: nn.Module) -> nn.Module:
    """Another copy of the same pre-trained model: what is frozen is equal, what trains has other numbers."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return other


@exercise.experiment("comes back")
class ComesBack(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        trained = _network(trial)
        models = {"trained": trained, "earlier": _another(trained), "other": _another(trained)}
        return models | {"x": trial.normal(5, trained.head.in_features)}

    def measure(self, subject, inputs):
        with _folder() as folder:
            path = folder / "digits.adapter"
            _file(subject, path).save(inputs["earlier"])  # a file that is there already
            _file(subject, path).save(inputs["trained"])
            _file(subject, path).load(inputs["other"])
        with torch.no_grad():
            return {"state": _state(inputs["other"]), "outputs": inputs["other"](inputs["x"])}

    def facts(self, raw, inputs):
        known = {SAVED: inputs["trained"], AS_BEFORE: inputs["other"], "those saved earlier": inputs["earlier"]}
        known = {label: _state(model) for label, model in known.items()}
        with torch.no_grad():
            wanted = inputs["trained"](inputs["x"])
        last = {name.replace("blocks.1.", "blocks.0."): tensor for name, tensor in known[SAVED].items() if ".base" not in name}
        first = {name: tensor for name, tensor in raw["state"].items() if ".base" not in name}
        return {
            "A and B of the first layer after load": _which(
                first, known | {"those saved of the last layer": last}, "blocks.0."
            ),
            "A and B of the last layer after load": _which(raw["state"], known, "blocks.1."),
            "weight and bias of the head after load": _which(raw["state"], known, "head."),
            "outputs after load": "those of the trained model" if near(raw["outputs"], wanted) else "different",
        }


@exercise.experiment("only what trains")
class OnlyWhatTrains(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        trained = _Shared(trial.integer(5, 8), trial.integer(2, 4))
        return {"trained": trained, "other": _another(trained)}

    def measure(self, subject, inputs):
        with _folder() as folder:
            path = folder / "digits.adapter"
            _file(subject, path).save(inputs["trained"])
            held = _held(path)
            with _raised(ValueError) as came:
                _file(subject, path).load(inputs["other"])
        return {"held": held, "came": came, "state": _state(inputs["other"])}

    def facts(self, raw, inputs):
        held, model = raw["held"], inputs["trained"]
        kind = held if isinstance(held, str) else "in the safetensors format"
        facts = dict.fromkeys(
            ("trained tensors that it lacks", "other tensors in it", "a weight that two modules share", "dtypes"), None
        )
        if not isinstance(held, str):
            shared = {"embed.weight", "head.weight"}
            others = set(_state(model)) - shared
            trains = {name for name in others if dict(model.named_parameters())[name].requires_grad}
            facts = {
                "trained tensors that it lacks": "some" if trains - set(held) else "none",
                "other tensors in it": "some" if set(held) - trains - shared else "none",
                "a weight that two modules share": ("missing", "once", "twice")[len(shared & set(held))],
                "dtypes": _dtypes(held, model),
            }
        whole = not raw["came"] and _equal(raw["state"], _state(model))
        back = "bit for bit" if whole else f"no: {raw['came']}" if raw["came"] else "not all of it"
        return {"the file": kind} | facts | {"another copy gets it back": back}


@exercise.experiment("names that differ")
class NamesThatDiffer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width, ranks = trial.integer(5, 8), [trial.integer(2, 4)] * 2
        with_bias, without = _Network(width, ranks), _Network(width, ranks, bias=False)
        return {"with": with_bias, "without": without}

    def measure(self, subject, inputs):
        return {
            "surplus": _misfit(subject, inputs["with"], copy.deepcopy(inputs["without"])),
            "lacking": _misfit(subject, inputs["without"], copy.deepcopy(inputs["with"])),
        }

    def facts(self, raw, inputs):
        states = {"surplus": _state(inputs["without"]), "lacking": _state(inputs["with"])}
        saved = {"surplus": states["lacking"], "lacking": states["surplus"]}
        raised = [case for case in states if raw[case]["came"] != "nothing"]
        changed = any(not _equal(raw[case]["state"], states[case]) for case in raised)
        return {
            "the file has `head.bias`, the model has not": _spell(raw["surplus"], saved["surplus"], "head.bias"),
            "the model trains `head.bias`, the file lacks it": _spell(raw["lacking"], saved["lacking"], "head.bias"),
            "parameters that had changed before the error": ("some" if changed else "none") if raised else None,
        }

    def notes(self, raw, inputs):
        return {
            "the file has `head.bias`, the model has not": raw["surplus"]["message"],
            "the model trains `head.bias`, the file lacks it": raw["lacking"]["message"],
        }


@exercise.experiment("shapes that differ")
class ShapesThatDiffer(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width, ranks = trial.integer(5, 8), [trial.integer(2, 4)] * 2
        return {"one": _Network(width, [ranks[0], 1]), "more": _Network(width, ranks)}

    def measure(self, subject, inputs):
        return {"shape": _misfit(subject, inputs["one"], inputs["more"])}

    def facts(self, raw, inputs):
        raised = raw["shape"]["came"] != "nothing"
        changed = "none" if _equal(raw["shape"]["state"], _state(inputs["more"])) else "some"
        names = "blocks.1.A", "blocks.1.B"
        return {
            "rank 1 in the file, more in the model, in the last layer": _spell(raw["shape"], _state(inputs["one"]), *names),
            "parameters that had changed before the error": changed if raised else None,
        }

    def notes(self, raw, inputs):
        return {"rank 1 in the file, more in the model, in the last layer": raw["shape"]["message"]}


@exercise.experiment("goes on training")
class GoesOnTraining(Experiment):
    def draw(self, trial: Trial) -> dict:
        trained = _network(trial)
        return {"trained": trained, "other": _another(trained)}

    def measure(self, subject, inputs):
        model = inputs["other"]
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
        with _folder() as folder:
            path = folder / "digits.adapter"
            _file(subject, path).save(inputs["trained"])
            _file(subject, path).load(model)
        loaded = _state(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trainable:
            torch.stack([parameter.sum() for parameter in trainable]).sum().backward()
        optimizer.step()
        return {"loaded": loaded, "stepped": _state(model)}

    def facts(self, raw, inputs):
        known = {SAVED: _state(inputs["trained"]), AS_BEFORE: _state(inputs["other"])}
        moved = {name for name, tensor in raw["loaded"].items() if not torch.equal(raw["stepped"][name], tensor)}
        trains = {name for name, parameter in inputs["other"].named_parameters() if parameter.requires_grad}
        reach = {"all that trains": trains, "nothing of the model": set()}
        return {
            "A and B of the last layer after load": _which(raw["loaded"], known, "blocks.1."),
            "the optimizer's next step moves": next((word for word, names in reach.items() if names == moved), "some of it"),
        }


@exercise.experiment("the models own")
class TheModelsOwn(Experiment):
    def draw(self, trial: Trial) -> dict:
        trained = _network(trial)
        return {"trained": trained, "other": _another(trained).double().requires_grad_(False)}

    def measure(self, subject, inputs):
        with _folder() as folder:
            path = folder / "digits.adapter"
            _file(subject, path).save(inputs["trained"])
            with _raised(ValueError) as came:
                _file(subject, path).load(inputs["other"])
        flags = [parameter.requires_grad for parameter in inputs["other"].parameters()]
        dtypes = sorted({str(parameter.dtype) for parameter in inputs["other"].parameters()})
        return {"came": came, "state": _state(inputs["other"]), "flags": flags, "dtypes": dtypes}

    def facts(self, raw, inputs):
        known = {SAVED: _state(inputs["trained"]), AS_BEFORE: _state(inputs["other"])}
        return {
            "load": came if (came := raw["came"]) else "raises nothing",
            "A and B of the last layer after load": _which(raw["state"], known, "blocks.1."),
            "dtype of the float64 copy after load": "float64" if raw["dtypes"] == ["torch.float64"] else "another, or several",
            "parameters of the frozen copy that train after load": "some" if any(raw["flags"]) else "none",
        }


@exercise.experiment("failed save")
class FailedSave(Experiment):
    def draw(self, trial: Trial) -> dict:
        first = _network(trial)
        return {"first": first, "second": _another(first), "other": _another(first)}

    def measure(self, subject, inputs):
        with _folder() as folder:
            path = folder / "digits.adapter"
            _file(subject, path).save(inputs["first"])
            _file(subject, path).load(copy.deepcopy(inputs["other"]))  # if this raises, it is not about a full disk
            there = path.exists()
            came = "nothing"
            file = _file(subject, path)
            with _full_disk() as failed:
                try:
                    file.save(inputs["second"])
                except NotImplementedError:
                    raise
                except Exception:
                    came = "an error"
            try:
                _file(subject, path).load(inputs["other"])
                readable = True
            except Exception:
                readable = False
            still = path.exists()
        state = _state(inputs["other"])
        return {"there": there, "failed": bool(failed), "came": came, "still": still, "readable": readable, "state": state}

    def facts(self, raw, inputs):
        if raw["there"] and not raw["failed"]:  # written in a way that could not be made to fail
            return {"what the caller gets": "an error", "the file afterwards": "the old one"}
        known = {"the old one": _state(inputs["first"]), "the new one": _state(inputs["second"])}
        file = _which(raw["state"], known, "blocks.1.", "not what was saved") if raw["readable"] else "damaged"
        return {
            "what the caller gets": raw["came"],
            "the file afterwards": file if raw["still"] else "there is none",
        }


def _file(subject, path: Path):
    file = subject(path)
    missing = [name for name in ("save", "load") if not callable(getattr(file, name, None))]
    if missing:
        raise WrongReturn(
            f"AdapterFile must have methods save and load, got {expect.describe(file)} without {' and '.join(missing)}."
        )
    return file


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a file still mapped cannot be removed on Windows
        yield Path(folder)


def _state(model: nn.Module) -> State:
    """Copies of all parameters under all their names."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _which(state: State, known: dict[str, State], part: str, otherwise: str = "different") -> str:
    """The first of the known states that the tensors of one part are from."""
    for label, other in known.items():
        names = [name for name in other if name.startswith(part)]
        if all(name in state and near(state[name], other[name]) for name in names):
            return label
    return otherwise


def _held(path: Path) -> dict[str, str] | str:
    """Name -> dtype of what the file at `path` holds, or why that cannot be said."""
    if not path.is_file():
        return "there is none at `path`"
    try:
        with safe_open(path, "pt") as file:
            return {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return "in another format"


def _dtypes(held: dict[str, str], model: nn.Module) -> str:
    own = {name: str(parameter.dtype) for name, parameter in model.named_parameters(remove_duplicate=False)}
    same = all(dtype == own[name] for name, dtype in held.items() if name in own)
    return "those of the model" if same else "different"


@contextmanager
def _raised(kind: type[Exception]) -> Iterator[list[str]]:
    """Collects an exception of that kind; others, and the stub's, pass."""
    came: list[str] = []
    try:
        yield came
    except kind:
        came.append(f"raises {kind.__name__}")


def _misfit(subject, saved: nn.Module, model: nn.Module) -> dict:
    """What comes of loading into `model` what was saved from a model with other trained tensors."""
    came, message = "nothing", ""
    with _folder() as folder:
        path = folder / "digits.adapter"
        _file(subject, path).save(saved)
        file = _file(subject, path)
        try:
            file.load(model)
        except NotImplementedError:
            raise  # the stub's
        except Exception as error:
            came = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            message = " ".join(str(error).split())[:200]
            names = str(error)
            return {"came": came, "message": message, "names": names, "state": _state(model)}
    return {"came": came, "message": message, "names": "", "state": _state(model)}


def _spell(seen: dict, saved: State, *names: str) -> str:
    """What was raised, and whether it names one of these tensors; or what was loaded of a file that does not fit."""
    if seen["came"] == "ValueError":
        return (
            "raises ValueError and names it" if any(name in seen["names"] for name in names) else "raises ValueError, no name"
        )
    if seen["came"] != "nothing":
        return f"raises {seen['came']}"
    loaded = [torch.equal(seen["state"][name], saved[name]) for name in ("blocks.0.A", "blocks.0.B", "head.weight")]
    if not any(loaded):
        return "raises nothing, and loads nothing"
    rows = "blocks.1.A"
    if saved[rows].shape == seen["state"][rows].shape:
        return "raises nothing, and loads what fits" if all(loaded) else "raises nothing, and loads some of what fits"
    spread = torch.equal(seen["state"][rows], saved[rows].expand_as(seen["state"][rows]))
    return f"raises nothing, and {'fills all rows with the one' if spread else 'loads what fits'}"


@contextmanager
def _full_disk() -> Iterator[list[str]]:
    """Whatever this thread writes into binary files ends half-way, as on a full disk; yields a list that is filled then."""
    thread, failed, undo = threading.get_ident(), [], []
    message = "No space left on device"

    class Full(io.FileIO):
        def write(self, data):
            failed.append(str(self.name))
            super().write(memoryview(data).cast("B")[: len(data) // 2])
            raise OSError(errno.ENOSPC, message)

    def patch(place, name, make):
        original = getattr(place, name)
        undo.append((place, name, original))
        setattr(place, name, make(original))

    def opening(original):
        def open_(file, mode="r", *args, opener=None, **settings):
            if threading.get_ident() == thread and "b" in mode and set(mode) & set("wxa+"):
                return Full(file, mode, opener=opener)
            return original(file, mode, *args, opener=opener, **settings)

        return open_

    def serializing(original):
        def serialize_file(tensors, filename, *args, **settings):
            failed.append(str(filename))
            original(tensors, filename, *args, **settings)
            os.truncate(filename, Path(filename).stat().st_size // 2)
            raise SafetensorError(f"Error while serializing: I/O error: {message}")

        return serialize_file

    try:
        for module in ("safetensors.torch", "safetensors.numpy"):
            if module in sys.modules:
                patch(sys.modules[module], "serialize_file", serializing)
        opened = opening(builtins.open)
        for place in {id(place): place for place in (builtins, io, sys.modules["_io"])}.values():
            patch(place, "open", lambda _: opened)
        yield failed
    finally:
        for place, name, original in undo:
            setattr(place, name, original)


class _File:
    """A right solution, in pieces that a misconception replaces."""

    def __init__(self, path):
        self.path = path

    def save(self, model):
        self.write({name: tensor.detach().contiguous() for name, tensor in self.chosen(model).items()})

    def chosen(self, model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def write(self, tensors):
        draft = self.path.with_name(self.path.name + ".part")
        save_file(tensors, draft)
        draft.replace(self.path)

    def load(self, model):
        tensors = load_file(self.path)
        self.compare_names(model, tensors)
        self.compare_shapes(model, tensors)
        self.put(model, tensors)

    def own(self, model):
        return dict(model.named_parameters())

    def compare_names(self, model, tensors):
        differ = sorted(tensors.keys() - self.own(model).keys() | self.chosen(model).keys() - tensors.keys())
        if differ:
            raise ValueError(f"file and model differ in {differ}")

    def compare_shapes(self, model, tensors):
        own = self.own(model)
        differ = [name for name, tensor in tensors.items() if name in own and tensor.shape != own[name].shape]
        if differ:
            raise ValueError(f"file and model differ in the shapes of {differ}")

    @torch.no_grad()
    def put(self, model, tensors):
        own = self.own(model)
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])


@exercise.misconception("the whole model saved")
class TheWholeModelSaved(_File):
    def save(self, model):
        self.write({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def own(self, model):
        return dict(model.named_parameters(remove_duplicate=False))


@exercise.misconception("the head forgotten")
class TheHeadForgotten(_File):
    def chosen(self, model):
        return {name: tensor for name, tensor in super().chosen(model).items() if name.endswith((".A", ".B"))}

    def compare_names(self, model, tensors):
        super().compare_names(model, {name: tensor for name, tensor in tensors.items() if name.endswith((".A", ".B"))})


@exercise.misconception("names without their layer")
class NamesWithoutTheirLayer(_File):
    def chosen(self, model):
        return {name.split(".")[-1]: parameter for name, parameter in super().chosen(model).items()}

    def own(self, model):
        return {name.split(".")[-1]: parameter for name, parameter in _unfrozen(model)}

    def compare_shapes(self, model, tensors):
        for name, parameter in _unfrozen(model):
            if tensors[name.split(".")[-1]].shape != parameter.shape:
                raise ValueError("another shape")

    @torch.no_grad()
    def put(self, model, tensors):
        for name, parameter in _unfrozen(model):
            parameter.copy_(tensors[name.split(".")[-1]])


def _unfrozen(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All but the pre-trained layers, by name, whatever trains now."""
    return [(name, p) for name, p in model.named_parameters() if "stem" not in name and ".base." not in name]


@exercise.misconception("load_state_dict with strict=False, and nothing else")
class StrictFalse(_File):
    def load(self, model):
        model.load_state_dict(load_file(self.path), strict=False)


@exercise.misconception("shapes left to load_state_dict")
class ShapesLeftToLoadStateDict(_File):
    def load(self, model):
        tensors = load_file(self.path)
        self.compare_names(model, tensors)
        model.load_state_dict(tensors, strict=False)


@exercise.misconception("names not compared")
class NamesNotCompared(_File):
    def compare_names(self, model, tensors):
        pass


@exercise.misconception("a tensor too many goes unnoticed")
class ATensorTooMany(_File):
    def compare_names(self, model, tensors):
        for name in self.chosen(model):
            if name not in tensors:
                raise ValueError(f"not in the file: {name}")


@exercise.misconception("a tensor too few goes unnoticed")
class ATensorTooFew(_File):
    def compare_names(self, model, tensors):
        for name in tensors:
            if name not in self.own(model):
                raise ValueError(f"not in the model: {name}")


@exercise.misconception("shapes not compared")
class ShapesNotCompared(_File):
    def compare_shapes(self, model, tensors):
        pass


@exercise.misconception("changed before the error")
class ChangedBeforeTheError(_File):
    @torch.no_grad()
    def load(self, model):
        tensors = load_file(self.path)
        for name, parameter in model.named_parameters():
            if name in tensors and tensors[name].shape == parameter.shape:
                parameter.copy_(tensors[name])
        self.compare_names(model, tensors)
        self.compare_shapes(model, tensors)


@exercise.misconception("shapes compared while copying")
class ShapesComparedWhileCopying(_File):
    @torch.no_grad()
    def load(self, model):
        tensors, own = load_file(self.path), self.own(model)
        self.compare_names(model, tensors)
        for name, parameter in own.items():
            if name in tensors:
                self.compare_shapes(model, {name: tensors[name]})
                parameter.copy_(tensors[name])


@exercise.misconception("new Parameter objects")
class NewParameterObjects(_File):
    def put(self, model, tensors):
        for name, tensor in tensors.items():
            old = model.get_parameter(name)
            new = nn.Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad)
            for parent in model.modules():
                for child, parameter in list(parent.named_parameters(recurse=False)):
                    if parameter is old:
                        setattr(parent, child, new)


@exercise.misconception("the file's dtype taken over")
class TheFilesDtype(_File):
    def put(self, model, tensors):
        for name, tensor in tensors.items():
            model.get_parameter(name).data = tensor


@exercise.misconception("only into what trains")
class OnlyIntoWhatTrains(_File):
    def own(self, model):
        return self.chosen(model)


@exercise.misconception("a shared weight saved twice")
class ASharedWeightTwice(_File):
    def own(self, model):
        return dict(model.named_parameters(remove_duplicate=False))

    def chosen(self, model):
        return {name: parameter.clone() for name, parameter in self.own(model).items() if parameter.requires_grad}


@exercise.misconception("everything in float32")
class EverythingInFloat32(_File):
    def save(self, model):
        self.write({name: tensor.detach().float().contiguous() for name, tensor in self.chosen(model).items()})


@exercise.misconception("a pickle in place of safetensors")
class APickle(_File):
    def write(self, tensors):
        draft = self.path.with_name(self.path.name + ".part")
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, draft)
        draft.replace(self.path)

    def load(self, model):
        tensors = torch.load(self.path)
        self.compare_names(model, tensors)
        self.compare_shapes(model, tensors)
        self.put(model, tensors)


@exercise.misconception("written over the old file")
class WrittenOverTheOldFile(_File):
    def write(self, tensors):
        save_file(tensors, self.path)
