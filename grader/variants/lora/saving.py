"""Exercise 6.6 in other styles."""

import copy
import io
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import safetensors.numpy
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn.utils import vector_to_parameters


class OneByOne:
    def __init__(self, path):
        self.path = path

    def save(self, model):
        trained = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                trained[name] = parameter.detach().contiguous()
        unfinished = f"{self.path}.unfinished"
        save_file(trained, unfinished)
        os.replace(unfinished, self.path)  # noqa: PTH105

    def load(self, model):
        tensors, parameters = load_file(self.path), dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name not in parameters:
                raise ValueError(f"the model has no {name}")
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} in the file")
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in tensors:
                raise ValueError(f"the file has no {name}")
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)


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
            seen = {id(p): (name, p) for name, p in reversed(list(model.state_dict(keep_vars=True).items()))}
            save_file({name: p.detach() for name, p in seen.values() if p.requires_grad}, path)
        except BaseException:
            path.unlink(missing_ok=True)
            if backup:
                Path(backup).rename(path)
            raise

    def load(model):
        with safe_open(path, framework="pt") as file:
            there = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        every = [*model.named_parameters(remove_duplicate=False)]
        needed = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        wrong = (signature(there.items()) - signature(every)) | (signature(needed) - signature(there.items()))
        if wrong:
            raise ValueError(" ".join(sorted(name for name, _ in wrong)))
        targets = [p.detach() for name, p in every if name in there]
        torch._foreach_copy_(targets, [there[name] for name, _ in every if name in there])

    return SimpleNamespace(save=save, load=load)


@dataclass
class AsVector:
    path: Path

    def _named(self, model):
        """Parameters by name, found module by module."""
        found = {}
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and all(parameter is not other for other in found.values()):
                    found[f"{prefix}.{name}".lstrip(".")] = parameter
        return found

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
            shapes = tuple(None if where.get(name) is None else where[name].shape for where in (tensors, own))
            if shapes[0] != shapes[1]:
                wrong.append(f"{name}: {shapes[0]} in the file, {shapes[1]} in the model")
        if wrong:
            raise ValueError("\n".join(wrong))
        for name, tensor in tensors.items():
            vector_to_parameters(tensor.to(own[name].dtype).flatten(), [own[name]])


class PutBack:
    """Copies first, and puts everything back if that was wrong."""

    def __init__(self, path):
        self.path = path

    def save(self, model):
        content = io.BytesIO(safetensors.torch.save({n: p.data for n, p in model.named_parameters() if p.requires_grad}))
        draft = self.path.parent / "draft"
        draft.write_bytes(content.getvalue())
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


class All(OneByOne):
    """Every tensor, and the same comparison."""

    def save(self, model):
        path = self.path.with_suffix(".new")
        state = model.state_dict()
        save_file({key: state[key].clone() for key in state}, path)
        path.rename(self.path)

    def load(self, model):
        tensors, state = load_file(self.path), model.state_dict()
        differ = [k for k in tensors if k not in state or state[k].shape != tensors[k].shape]
        differ += [n for n, p in model.named_parameters() if p.requires_grad and n not in tensors]
        if differ:
            raise ValueError(str(differ))
        model.load_state_dict(tensors)


class ModelsStateUpdated(OneByOne):
    def load(self, model):
        state, tensors = model.state_dict(), load_file(self.path)
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        strange = [n for n in tensors if n not in state] + [n for n in trains if n not in tensors]
        if len(strange) > 0:
            raise ValueError(", ".join(strange))
        state.update(tensors)
        state = {name: state[name] for name in model.state_dict()}
        model.load_state_dict(state)


class RaisesAtTheEnd(OneByOne):
    def load(self, model):
        tensors = load_file(self.path)
        try:
            missing, unexpected = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        lost = [n for n in missing if n not in frozen and n in dict(model.named_parameters())]
        if lost or unexpected:
            raise ValueError(f"{lost} {unexpected}")


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


class AssignedAsItIs(OneByOne):
    """assign=True: other objects, in the file's dtype."""

    def load(self, model):
        super().load(copy.deepcopy(model))
        model.load_state_dict(load_file(self.path), strict=False, assign=True)
        if hasattr(model, "embed"):
            model.head.weight = model.embed.weight


class EverythingAtOnce(OneByOne):
    """save_model of the library, straight over the old file."""

    def save(self, model):
        save_model(nn.ModuleDict({"all": model})["all"], str(self.path))


class HalfAndOver(OneByOne):
    def save(self, model):
        save_file({n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}, self.path)


class NeitherWay(OneByOne):
    """Loops over what both have, and copies what can be broadcast."""

    def load(self, model):
        tensors = load_file(self.path)
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.data.copy_(tensors[name])


CORRECT = [OneByOne, ByLoadStateDict, in_a_closure, AsVector, PutBack]
REWRITTEN = {
    "the whole model saved": All,
    "shapes left to load_state_dict": ModelsStateUpdated,
    "changed before the error": RaisesAtTheEnd,
    "shapes compared while copying": CopyComplains,
    "a shared weight saved twice": EveryName,
}
COMBINED = [
    ({"new Parameter objects", "the file's dtype taken over"}, AssignedAsItIs),
    ({"the whole model saved", "written over the old file"}, EverythingAtOnce),
    ({"everything in float32", "written over the old file"}, HalfAndOver),
    ({"names not compared", "shapes not compared"}, NeitherWay),
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
