"""Exercise 6.6 in other styles."""

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

from grader.checks.lora.adapter_files import Solution


class ByLoadStateDict:
    """Asks a twin first, and lets load_state_dict do the work."""

    def __init__(self, path):
        self.path = Path(path)

    def save(self, model):
        keep = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        data = safetensors.torch.save({name: tensor for name, tensor in model.state_dict().items() if name in keep})
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
            save_file({name: p.detach() for name, p in named.values() if p.requires_grad}, path)
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
            save_file({k: v.data for k, v in self._named(model).items() if v.requires_grad}, draft, metadata={"format": "pt"})
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
        draft.write_bytes(safetensors.torch.save({n: p.data for n, p in model.named_parameters() if p.requires_grad}))
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
            if tensors[name].numel() != parameter.numel():
                raise ValueError(f"{name} does not fit")
            parameter.data.copy_(tensors[name].view_as(parameter))


class EveryName(ByLoadStateDict):
    def save(self, model):
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        state = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) in trains}
        data = safetensors.torch.save({name: tensor.detach() + 0 for name, tensor in state.items()})
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


CORRECT = [ByLoadStateDict, in_a_closure, AsVector, PutBack]
REWRITTEN = {
    "shapes compared while copying": CopyComplains,
    "a shared weight saved twice": EveryName,
}
BROKEN = {}
COMBINED = [
    ({"new Parameter objects", "the file's dtype taken over"}, AssignedAsTheyAre),
    ({"everything in float32", "written over the old file"}, InFloat32OverTheOldFile),
]

EQUIVALENT = {
    "trained = {name: p.detach().contiguous() for name, … -> "
    "trained = {name: p.contiguous() for name, …": "the file is the same with or without a graph",
    "draft = self.path.with_name(self.path.name + '.part') -> "
    "draft = self.path.with_name('.part')": "a draft of another name in the same folder",
    "… ValueError(f'{name} has shape {tuple(tensor.shape)} in the file, {tuple(parameters[name].shape)} … -> "
    "… ValueError(f'{name} has shape {tensor.shape} in the file, {tuple(parameters[name].shape)} …": "same shape, other words",
    "… {tuple(tensor.shape)} in the file, {tuple(parameters[name].shape)} here') -> "
    "… {tuple(tensor.shape)} in the file, {parameters[name].shape} here')": "same shape, other words",
}
