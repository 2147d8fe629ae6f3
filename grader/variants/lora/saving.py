"""Exercise 6.6 in other styles."""

import contextlib
import copy
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils import vector_to_parameters

from grader.checks.lora.adapter_files import Solution, cloned, every_name, no_names
from grader.checks.lora.saving import (
    ChangedBeforeTheError,
    NamesWithoutTheirLayer,
    ShapesComparedWhileCopying,
    adapters_alone,
    as_in_the_file,
    in_new_parameters,
    saved_of_the_state_dict,
)


class ByLoadStateDict:
    """Asks a twin first, and lets load_state_dict do the work."""

    def __init__(self, path):
        self.path = Path(path)

    def save(self, model):
        keep = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        data = safetensors.torch.save({name: t.contiguous() for name, t in model.state_dict().items() if name in keep})
        with tempfile.NamedTemporaryFile("wb", dir=self.path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(self.path)

    def load(self, model):
        tensors = safetensors.torch.load(self.path.read_bytes())
        try:
            missing, unexpected = copy.deepcopy(model).load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if unexpected or trains & set(missing):
            raise ValueError(f"unexpected {unexpected}, missing {sorted(trains & set(missing))}")
        model.load_state_dict(tensors, strict=False)


def in_a_closure(path):
    """Sets of names and shapes; the old file waits under another name until the new one is whole."""

    def signature(named):
        return {(name, tuple(tensor.shape)) for name, tensor in named}

    def save(model):
        backup = shutil.copy(path, path.with_suffix(".old")) if path.exists() else None
        try:
            named = {id(p): (name, p) for name, p in reversed(list(model.state_dict(keep_vars=True).items()))}
            save_file({name: p.detach().contiguous() for name, p in named.values() if p.requires_grad}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            if backup:
                Path(backup).rename(path)
            raise

    def load(model):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        every = [*model.named_parameters(remove_duplicate=False)]
        needed = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        wrong = (signature(tensors.items()) - signature(every)) | (signature(needed) - signature(tensors.items()))
        if wrong:
            raise ValueError(" ".join(sorted(name for name, _ in wrong)))
        places = [p.detach() for name, p in every if name in tensors]
        torch._foreach_copy_(places, [tensors[name] for name, _ in every if name in tensors])

    return SimpleNamespace(save=save, load=load)


@dataclass
class AsVector:
    path: Path

    def _named(self, model):
        """Parameters by name, found module by module."""
        names = {}
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    names.setdefault(parameter, f"{prefix}.{name}".lstrip("."))
        return {name: parameter for parameter, name in names.items()}

    def save(self, model):
        folder = tempfile.mkdtemp(dir=self.path.parent)
        try:
            draft = os.path.join(folder, "draft")  # noqa: PTH118
            tensors = {k: v.data.contiguous() for k, v in self._named(model).items() if v.requires_grad}
            save_file(tensors, draft, metadata={"format": "pt"})
            shutil.move(draft, self.path)
        finally:
            shutil.rmtree(folder)

    def load(self, model):
        tensors, own, wrong = load_file(self.path), self._named(model), []
        for name in sorted({*tensors, *(k for k, v in own.items() if v.requires_grad)}):
            in_file, in_model = (getattr(named.get(name), "shape", None) for named in (tensors, own))
            if in_file != in_model:
                wrong.append(f"{name}: {in_file} in the file, {in_model} in the model")
        if wrong:
            raise ValueError("\n".join(wrong))
        for name, tensor in tensors.items():
            vector_to_parameters(tensor.to(own[name].dtype).flatten(), [own[name]])


class PutBack:
    """Copies first, and puts everything back if that was wrong."""

    def __init__(self, path):
        self.path = path

    def save(self, model):
        draft = self.path.parent / "draft"
        tensors = {
            n: p.data.clone(memory_format=torch.contiguous_format) for n, p in model.named_parameters() if p.requires_grad
        }
        draft.write_bytes(safetensors.torch.save(tensors))
        draft.rename(self.path)

    def load(self, model):
        before = copy.deepcopy(model.state_dict())
        left = safetensors.torch.load_file(str(self.path))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = left.pop(name, None)
                fits = not parameter.requires_grad if tensor is None else tensor.shape == parameter.shape
                if not fits:
                    model.load_state_dict(before)
                    raise ValueError(name)
                if tensor is not None:
                    parameter.mul_(0).add_(tensor)
        if left:
            model.load_state_dict(before)
            raise ValueError(list(left))


class CopyComplains(ByLoadStateDict):
    def load(self, model):
        tensors = load_file(self.path)
        own = {n: p for n, p in model.named_parameters() if p.requires_grad or n in tensors}
        if own.keys() != tensors.keys():
            raise ValueError(own.keys() ^ tensors.keys())
        for name, parameter in own.items():
            if tensors[name].size() != parameter.size():
                raise ValueError(f"{name} does not fit")
            parameter.data.copy_(tensors[name])


class EveryName(ByLoadStateDict):
    def save(self, model):
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        state = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) in trains}
        data = safetensors.torch.save({name: tensor.detach().contiguous() + 0 for name, tensor in state.items()})
        self.path.with_suffix(".y").write_bytes(data)
        self.path.with_suffix(".y").replace(self.path)


class AssignedAsTheyAre(Solution):
    def put(self, model, tensors):
        model.load_state_dict(tensors, strict=False, assign=True)


class InFloat32OverTheOldFile(Solution):
    def written(self, tensor):
        return tensor.float().contiguous()

    def draft(self):
        return self.path


class GuardedByNames(ByLoadStateDict):
    """Names are compared; a broadcast does the rest."""

    def load(self, model):
        file = safetensors.torch.load_file(self.path)
        places = {name: place for name, place in model.named_parameters() if name in file or place.requires_grad}
        if set(places) ^ set(file):
            raise ValueError(f"{sorted(set(places) ^ set(file))}")
        for name in file:
            with torch.no_grad():
                places[name].zero_().add_(file[name])


def _changed(name, **attributes):
    """The right solution with other pieces."""
    return type(name, (Solution,), attributes)


def _pickled(self, tensors, path):
    torch.save(tensors, path)


def _by_their_names(self, model):
    return {name: parameter for name, parameter in self.own(model).items() if "base" not in name and "stem" not in name}


def _one_of(name):
    """Compares shapes in part."""

    def misshapen(self, model, tensors):
        own = self.own(model)
        return {key for key, tensor in tensors.items() if key in own and getattr(Shape, name)(tensor, own[key])}

    return misshapen


class Shape:
    def elements(self, other):
        return self.numel() != other.numel()

    def rows(self, other):
        return len(self) != len(other)

    def axes(self, other):
        return self.ndim != other.ndim


def _viewed(self, model, tensors):
    own = self.own(model)
    Solution.put(self, model, {name: tensor.reshape(own[name].shape) for name, tensor in tensors.items() if name in own})


def _repeated(self, model, tensors):
    """Fills each parameter with as many of the numbers as there are, again and again."""
    own = self.own(model)
    for name, tensor in tensors.items():
        numbers = tensor.flatten().repeat(own[name].numel() // tensor.numel() + 1)
        own[name].data.copy_(numbers[: own[name].numel()].view(own[name].shape))


def _into_a_copy(self, model, tensors):
    Solution.put(self, copy.deepcopy(model), tensors)


def _in_the_order_of_the_file(self, model, tensors):
    """One after the other, if the shapes allow it."""
    left = [tensor for _, tensor in sorted(tensors.items(), reverse=True)]
    for name, parameter in self.own(model).items():
        if name in tensors:
            fitting = next(k for k, tensor in enumerate(left) if tensor.shape == parameter.shape)
            parameter.data.copy_(left.pop(fitting))


def _all_but_the_head(self, model, tensors):
    Solution.put(self, model, {name: tensor for name, tensor in tensors.items() if not name.startswith("head")})


def _flags_too(self, model, tensors):
    Solution.put(self, model, tensors)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tensors)


def _in_eval_mode(self, model, tensors):
    Solution.put(self, model, tensors)
    model.eval()


class _OtherError(Solution):
    """The right comparison, and another error."""

    def compared(self, wrong):
        raise NotImplementedError

    def load(self, model):
        tensors = self.read()
        names = self.surplus(model, tensors) | self.lacking(model, tensors)
        self.compared(names, self.misshapen(model, tensors))
        self.put(model, tensors)


class KeyErrors(_OtherError):
    def compared(self, names, shapes):
        if names:
            raise KeyError(names.pop())
        if shapes:
            raise ValueError(f"{shapes}")


class NamesNotTold(_OtherError):
    def compared(self, names, shapes):
        if names:
            raise ValueError("names differ")
        if shapes:
            raise ValueError(f"{shapes}")


class RuntimeErrors(_OtherError):
    def compared(self, names, shapes):
        if names:
            raise ValueError(f"{names}")
        if shapes:
            raise RuntimeError(f"{shapes}")


class ShapesNotTold(_OtherError):
    def compared(self, names, shapes):
        if names or shapes:
            raise ValueError(f"{names}, and {len(shapes)} of another shape")


def _of_what_trains(self, model, tensors):
    return {name for name, p in self.chosen(model).items() if name in tensors and tensors[name].shape != p.shape}


class OldFileFirst(Solution):
    def write(self, tensors, path):
        self.path.unlink(missing_ok=True)
        super().write(tensors, path)


class FailsSilently(Solution):
    def save(self, model):
        with contextlib.suppress(Exception):
            super().save(model)


class UnderBothNames(Solution):
    own, written = every_name, cloned


class SharedLeftOut(Solution):
    def chosen(self, model):
        several = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        return {name: p for name, p in super().chosen(model).items() if several.count(id(p)) == 1}


CORRECT = [ByLoadStateDict, in_a_closure, AsVector, PutBack]
REWRITTEN = {
    "shapes compared while copying": CopyComplains,
    "shapes not compared": GuardedByNames,
    "a shared weight saved twice": EveryName,
}
BROKEN = {
    1: [
        *(
            _changed("Chosen", chosen=chosen, own=own, written=cloned)
            for chosen, own in ((adapters_alone, Solution.own), (_by_their_names, Solution.own), (every_name, every_name))
        ),
        _changed("Empty", save=saved_of_the_state_dict),
        _changed("Pickle", write=_pickled, read=lambda self: torch.load(self.path)),
        NamesWithoutTheirLayer,
    ],
    2: [_changed("Put", put=put) for put in (_into_a_copy, _in_the_order_of_the_file, _all_but_the_head)],
    3: [
        *(KeyErrors, NamesNotTold, _changed("NotCompared", surplus=no_names, lacking=no_names)),
        *(_changed("OneWay", **{direction: no_names}) for direction in ("surplus", "lacking")),
    ],
    4: [
        *(
            RuntimeErrors,
            ShapesNotTold,
            _changed("Broadcast", misshapen=no_names),
            _changed("Repeated", misshapen=no_names, put=_repeated),
        ),
        _changed("Elements", misshapen=_one_of("elements"), put=_viewed),
        _changed("OfWhatTrains", misshapen=_of_what_trains),
        *(_changed("InPart", misshapen=_one_of(what), put=_repeated) for what in ("rows", "axes")),
    ],
    5: [ChangedBeforeTheError, ShapesComparedWhileCopying, CopyComplains],
    6: [
        *(_changed("Put", put=put) for put in (in_new_parameters, as_in_the_file, _flags_too, _in_eval_mode)),
        _changed("WhatTrains", own=lambda self, model: {n: p for n, p in model.named_parameters() if p.requires_grad}),
    ],
    7: [
        *(
            _changed("Written", written=written)
            for written in (lambda self, tensor: tensor, lambda self, tensor: tensor.float())
        ),
        *(UnderBothNames, SharedLeftOut),
    ],
    8: [OldFileFirst, FailsSilently, _changed("InPlace", draft=lambda self: self.path)],
}
COMBINED = [
    ({"new Parameter objects", "the file's dtype taken over"}, AssignedAsTheyAre),
    ({"everything in float32", "written over the old file"}, InFloat32OverTheOldFile),
]

EQUIVALENT = {
    "trained = {name: p.detach().contiguous() for name, … -> "
    "trained = {name: p.contiguous() for name, …": "the file is the same with or without a graph",
    "draft = self.path.with_name(self.path.name + '.part') -> "
    "draft = self.path.with_name('.part')": "a draft of another name in the same folder",
}
