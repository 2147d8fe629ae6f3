"""Exercise 6.6: save what was trained, and nothing else, and load it into another copy of the same model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.lora.adapter_files import Network, Shared, Solution, another_copy, cloned, every_name, no_names, sizes
from grader.checks.lora.full_disk import full_disk
from grader.checks.refusals import raised
from grader.experiment import Exercise, Experiment, Trial, WrongReturn
from grader.near import near, which
from helpers import expect
from helpers.adapters import AdapterFile

exercise = Exercise(__name__, "6.6", AdapterFile)

SAVED, AS_BEFORE = "those saved", "as they were before"


@exercise.experiment("comes back")
class ComesBack(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        trained = Network(*sizes(trial))
        models = {"trained": trained, "earlier": another_copy(trained), "another": another_copy(trained)}
        return models | {"x": trial.normal(5, trained.head.in_features)}

    def measure(self, subject, inputs):
        with _path() as path:
            _file(subject, path).save(inputs["earlier"])  # a file that is there already
            _file(subject, path).save(inputs["trained"])
            _file(subject, path).load(inputs["another"])
        with torch.no_grad():
            return {"parameters": _parameters(inputs["another"]), "outputs": inputs["another"](inputs["x"])}

    def facts(self, raw, inputs):
        saved, earlier, before = (_parameters(inputs[key]) for key in ("trained", "earlier", "another"))
        known = {SAVED: saved, AS_BEFORE: before, "those saved earlier": earlier}
        last = saved | {f"blocks.0.{name}": saved[f"blocks.1.{name}"] for name in "AB"}
        with torch.no_grad():
            outputs = inputs["trained"](inputs["x"])
        return {
            "A and B of the first layer after load": _whose(
                raw["parameters"], known | {"those saved of the last layer": last}, "blocks.0."
            ),
            "A and B of the last layer after load": _whose(raw["parameters"], known, "blocks.1."),
            "weight and bias of the head after load": _whose(raw["parameters"], known, "head."),
            "outputs after load": "those of the trained model" if near(raw["outputs"], outputs) else "different",
        }


@exercise.experiment("only what trains")
class OnlyWhatTrains(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        trained = Shared(trial.integer(5, 8), trial.integer(2, 4))
        return {"trained": trained, "another": another_copy(trained)}

    def measure(self, subject, inputs):
        with _path() as path:
            _file(subject, path).save(inputs["trained"])
            kind, dtypes = _content(path)
            error, _ = raised(lambda: _file(subject, path).load(inputs["another"]), ValueError)
        return {"kind": kind, "dtypes": dtypes, "error": error, "traces": traces.of(inputs["another"])}

    def facts(self, raw, inputs):
        tensors = ("trained tensors that it lacks", "other tensors in it", "a weight that two modules share", "dtypes")
        facts = {"the file": raw["kind"]} | dict.fromkeys(tensors)
        if (dtypes := raw["dtypes"]) is not None:
            own = dict(inputs["trained"].named_parameters(remove_duplicate=False))
            shared = {"embed.weight", "head.weight"}
            trained = {name for name, parameter in own.items() if parameter.requires_grad} - shared
            as_own = all(dtype == str(own[name].dtype) for name, dtype in dtypes.items() if name in own)
            facts |= {
                "trained tensors that it lacks": traces.some(trained - dtypes.keys()),
                "other tensors in it": traces.some(dtypes.keys() - trained - shared),
                "a weight that two modules share": ("missing", "once", "twice")[len(shared & dtypes.keys())],
                "dtypes": "those of the model" if as_own else "different",
            }
        back = "not all of it" if traces.changed(inputs["trained"], raw["traces"], "parameters") else "bit for bit"
        if raw["error"] != "nothing":
            back = f"no: raises {raw['error']}"
        return facts | {"another copy gets it back": back}


class _DoesNotFit(Experiment):
    """Files of models that train other tensors than the model into which they are loaded."""

    points = 2
    cases: ClassVar[dict[str, tuple[str, str, list[str]]]]  # fact -> saved model, loading model, tensors that differ

    def measure(self, subject, inputs):
        raw = {}
        for case, (saved, loading, _) in self.cases.items():
            model = copy.deepcopy(inputs[loading])
            with _path() as path:
                _file(subject, path).save(inputs[saved])
                file = _file(subject, path)
                error, message = raised(lambda: file.load(model))  # noqa: B023
            raw[case] = {"error": error, "message": message, "traces": traces.of(model)}
        return raw

    def facts(self, raw, inputs):
        facts, changed = {}, []
        for case, (saved, loading, names) in self.cases.items():
            facts[case] = _outcome(raw[case], _parameters(inputs[saved]), names)
            if raw[case]["error"] != "nothing":
                changed.append(traces.changed(inputs[loading], raw[case]["traces"], "parameters"))
        return facts | {"parameters that had changed before the error": traces.some(filter(None, changed)) if changed else None}

    def notes(self, raw, inputs):
        return {case: " ".join(raw[case]["message"].split())[:200] for case in self.cases}


@exercise.experiment("names that differ")
class NamesThatDiffer(_DoesNotFit):
    cases: ClassVar = {
        "the file has `head.bias`, the model has not": ("with bias", "without", ["head.bias"]),
        "the model trains `head.bias`, the file lacks it": ("without", "with bias", ["head.bias"]),
    }

    def draw(self, trial: Trial) -> dict:
        width, ranks = sizes(trial)
        return {"with bias": Network(width, ranks), "without": Network(width, ranks, bias=False)}


@exercise.experiment("shapes that differ")
class ShapesThatDiffer(_DoesNotFit):
    cases: ClassVar = {
        "rank 1 in the file, more in the model, in the last layer": ("rank 1", "more", ["blocks.1.A", "blocks.1.B"]),
    }

    def draw(self, trial: Trial) -> dict:
        width, ranks = sizes(trial)
        return {"rank 1": Network(width, [ranks[0], 1]), "more": Network(width, ranks)}


@exercise.experiment("goes on training")
class GoesOnTraining(Experiment):
    def draw(self, trial: Trial) -> dict:
        trained = Network(*sizes(trial))
        return {"trained": trained, "another": another_copy(trained)}

    def measure(self, subject, inputs):
        model = inputs["another"]
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
        with _path() as path:
            _file(subject, path).save(inputs["trained"])
            _file(subject, path).load(model)
        loaded = _parameters(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if trainable:
            torch.stack([parameter.sum() for parameter in trainable]).sum().backward()
        optimizer.step()
        return {"loaded": loaded, "stepped": _parameters(model)}

    def facts(self, raw, inputs):
        known = {SAVED: _parameters(inputs["trained"]), AS_BEFORE: _parameters(inputs["another"])}
        moved = {name for name, tensor in raw["loaded"].items() if not torch.equal(raw["stepped"][name], tensor)}
        trains = {name for name, parameter in inputs["another"].named_parameters() if parameter.requires_grad}
        reach = "all that trains" if moved == trains else "some of it" if moved else "nothing of the model"
        return {
            "A and B of the last layer after load": _whose(raw["loaded"], known, "blocks.1."),
            "the optimizer's next step moves": reach,
        }


@exercise.experiment("the model's own")
class TheModelsOwn(Experiment):
    def draw(self, trial: Trial) -> dict:
        trained = Network(*sizes(trial))
        return {"trained": trained, "another": another_copy(trained).double().requires_grad_(False)}

    def measure(self, subject, inputs):
        with _path() as path:
            _file(subject, path).save(inputs["trained"])
            error, _ = raised(lambda: _file(subject, path).load(inputs["another"]), ValueError)
        return {"error": error, "traces": traces.of(inputs["another"])}

    def facts(self, raw, inputs):
        known = {SAVED: _parameters(inputs["trained"]), AS_BEFORE: _parameters(inputs["another"])}
        parameters = raw["traces"]["parameters"]
        double = all(parameter.dtype == torch.float64 for parameter in parameters.values())
        return {
            "load": f"raises {raw['error']}",
            "A and B of the last layer after load": _whose(parameters, known, "blocks.1."),
            "dtype of the float64 copy after load": "float64" if double else "another, or several",
            "parameters of the frozen copy that train after load": traces.some(filter(None, raw["traces"]["flags"].values())),
        }


@exercise.experiment("failed save")
class FailedSave(Experiment):
    def draw(self, trial: Trial) -> dict:
        first = Network(*sizes(trial))
        return {"first": first, "second": another_copy(first), "another": another_copy(first)}

    def measure(self, subject, inputs):
        with _path() as path:
            _file(subject, path).save(inputs["first"])
            _file(subject, path).load(copy.deepcopy(inputs["another"]))  # if this raises, it is not about a full disk
            there = path.exists()
            file = _file(subject, path)
            with full_disk() as failed:
                error, _ = raised(lambda: file.save(inputs["second"]))
            unreadable, _ = raised(lambda: _file(subject, path).load(inputs["another"]))
            return {
                "could not be made to fail": there and not failed,
                "error": error,
                "still there": path.exists(),
                "readable": unreadable == "nothing",
                "parameters": _parameters(inputs["another"]),
            }

    def facts(self, raw, inputs):
        if raw["could not be made to fail"]:
            return {"what the caller gets": "an error", "the file afterwards": "the old one"}
        known = {"the old one": _parameters(inputs["first"]), "the new one": _parameters(inputs["second"])}
        file = "there is none"
        if raw["still there"]:
            file = _whose(raw["parameters"], known, "blocks.1.", "not what was saved") if raw["readable"] else "damaged"
        return {
            "what the caller gets": "nothing" if raw["error"] == "nothing" else "an error",
            "the file afterwards": file,
        }


@contextmanager
def _path() -> Iterator[Path]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a file still mapped cannot be removed on Windows
        yield Path(folder) / "digits.adapter"


def _file(subject, path: Path):
    file = subject(path)
    missing = [name for name in ("save", "load") if not callable(getattr(file, name, None))]
    if missing:
        raise WrongReturn(
            f"AdapterFile must have methods save and load, got {expect.describe(file)} without {' and '.join(missing)}."
        )
    return file


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters under all their names."""
    return traces.of(model)["parameters"]


def _whose(parameters: dict[str, Tensor], known: dict[str, dict[str, Tensor]], part: str, otherwise: str = "different") -> str:
    """Which of the known models the tensors of one part are from."""

    def numbers(parameters: dict[str, Tensor]) -> list[float]:
        tensors = [tensor for name, tensor in sorted(parameters.items()) if name.startswith(part)]
        return [number for tensor in tensors for number in tensor.flatten().tolist()]

    return which(numbers(parameters), {label: numbers(of_model) for label, of_model in known.items()}, otherwise)


def _content(path: Path) -> tuple[str, dict[str, str] | None]:
    """What kind of file there is, and the dtypes of the tensors in it, by name."""
    if not path.is_file():
        return "there is none at `path`", None
    try:
        with safe_open(path, "pt") as file:
            dtypes = {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return "in another format", None
    return "in the safetensors format", dtypes


def _outcome(raw: dict, saved: dict[str, Tensor], names: list[str]) -> str:
    """What was raised, and whether it names one of these tensors; or what was loaded of a file that does not fit."""
    if raw["error"] == "ValueError":
        return f"raises ValueError{' and names it' if any(name in raw['message'] for name in names) else ', no name'}"
    if raw["error"] != "nothing":
        return f"raises {raw['error']}"
    loaded = raw["traces"]["parameters"]
    equal = [torch.equal(loaded[name], saved[name]) for name in ("blocks.0.A", "blocks.0.B", "head.weight")]
    if not any(equal):
        return "raises nothing, and loads nothing"
    rows, row = loaded["blocks.1.A"], saved["blocks.1.A"]
    if row.shape == rows.shape:
        return f"raises nothing, and loads {'what fits' if all(equal) else 'some of what fits'}"
    filled = torch.equal(rows, row.expand_as(rows))
    return f"raises nothing, and {'fills all rows with the one' if filled else 'loads what fits'}"


def adapters_alone(self, model):
    return {name: parameter for name, parameter in Solution.chosen(self, model).items() if name.endswith((".A", ".B"))}


def in_new_parameters(self, model, tensors):
    own = self.own(model)
    new = {own[name]: nn.Parameter(tensor.to(own[name].dtype), own[name].requires_grad) for name, tensor in tensors.items()}
    for module in model.modules():
        module._parameters.update({key: new[old] for key, old in module._parameters.items() if old in new})


def as_in_the_file(self, model, tensors):
    for name, tensor in tensors.items():
        model.get_parameter(name).data = tensor


exercise.misconceptions_of(
    Solution,
    {
        "the whole model saved": {"own": every_name, "chosen": every_name, "written": cloned},
        "the head forgotten": {"chosen": adapters_alone},
        "load_state_dict with strict=False, and nothing else": {
            "load": lambda self, model: model.load_state_dict(self.read(), strict=False)
        },
        "shapes left to load_state_dict": {
            "misshapen": no_names,
            "put": lambda self, model, tensors: model.load_state_dict(tensors, strict=False),
        },
        "names not compared": {"surplus": no_names, "lacking": no_names},
        "a tensor too many goes unnoticed": {"surplus": no_names},
        "a tensor too few goes unnoticed": {"lacking": no_names},
        "shapes not compared": {"misshapen": no_names},
        "new Parameter objects": {"put": in_new_parameters},
        "the file's dtype taken over": {"put": as_in_the_file},
        "only into what trains": {"own": lambda self, model: {n: p for n, p in model.named_parameters() if p.requires_grad}},
        "everything in float32": {"written": lambda self, tensor: tensor.float().contiguous()},
        "a pickle in place of safetensors": {
            "write": lambda self, tensors, path: torch.save(tensors, path),
            "read": lambda self: torch.load(self.path),
        },
        "written over the old file": {"draft": lambda self: self.path},
    },
)


@exercise.misconception("names without their layer")
class NamesWithoutTheirLayer(Solution):
    def own(self, model):
        """By the last component of the name; of those that have it in common, the last."""
        return {name.split(".")[-1]: parameter for name, parameter in self.trained_once(model)}

    @torch.no_grad()
    def put(self, model, tensors):
        for name, parameter in self.trained_once(model):
            parameter.copy_(tensors[name.split(".")[-1]])

    def trained_once(self, model):
        """All but the pre-trained layers, by name, whatever trains now."""
        return [(name, p) for name, p in model.named_parameters() if "stem" not in name and ".base." not in name]


@exercise.misconception("changed before the error")
class ChangedBeforeTheError(Solution):
    def load(self, model):
        tensors = self.read()
        unfit = self.surplus(model, tensors) | self.misshapen(model, tensors)
        self.put(model, {name: tensor for name, tensor in tensors.items() if name not in unfit})
        super().load(model)


@exercise.misconception("shapes compared while copying")
class ShapesComparedWhileCopying(Solution):
    def misshapen(self, model, tensors):
        return set()

    def put(self, model, tensors):
        for name, tensor in tensors.items():
            if super().misshapen(model, {name: tensor}):
                raise ValueError(f"file and model differ in the shape of {name}")
            super().put(model, {name: tensor})


@exercise.misconception("a shared weight saved twice")
class ASharedWeightSavedTwice(Solution):
    own, written = every_name, cloned
