"""Files for what was trained: adapters and a head, without the pre-trained model that they belong to.

    AdapterFile("digits.safetensors").save(model)       # every parameter with requires_grad
    AdapterFile("digits.safetensors").load(another)     # the same pre-trained model, the same adapters injected
    save_peft(model, "digits")                          # the two files that the peft library reads
    load_peft(plain, "digits")                          # injects them, too

A file of this kind means something beside its model alone: the same weights, the same adapters, the same alpha.
"""

import json
import re
import uuid
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import expect, finetune, lora
from helpers.files import write_text


class AdapterFile:
    """One file in the safetensors format with what was trained of a model: A and B of its adapters, and the head.

    The names in it are those of `model.named_parameters()`, and a weight that two modules share stands there once, under
    the first of its names. Numbers keep their dtype. Where a module trains whole, its buffers are in the file too: the
    statistics of a BatchNorm in the head. Those of a BatchNorm that is frozen are not, so see that they stay (chapter 05).

    With the tensors goes what they cannot say: rank, alpha and scaling of each adapter. Of several adapters, those that
    are active are trained, and so saved.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def save(self, model: nn.Module) -> None:
        """Write every parameter that trains, and the buffers beside them. A merged model writes what it would unmerged.

        The file is written beside its place and then renamed: what interrupts it leaves the old one.

        Raises:
            ValueError: nothing trains.
        """
        trained = _trained(expect.module("model", model))
        if not trained:
            raise ValueError(
                f"nothing to save: all {len(list(model.parameters()))} parameters are frozen. "
                "What is saved is what has requires_grad, so save before you freeze."
            )
        # One entry: safetensors writes several in no particular order, and equal files should have equal bytes.
        _write(self.path, trained, {"lora": json.dumps(_described(model))})

    def load(self, model: nn.Module) -> None:
        """Put the file's numbers into the parameters and buffers of those names, in place.

        The Parameter objects stay, so that an optimizer which holds them goes on with them, and so do dtype, device,
        `requires_grad` and all that the file does not name. Merged layers are merged anew.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or does not fit: a tensor that the model has no place for, one that the
                model trains and the file lacks, another shape, another scaling. The model is as it was.
        """
        tensors, metadata = _read(self.path)
        places = dict(expect.module("model", model).named_parameters()) | _buffers(model)
        _must_fit(self.path, tensors, places, _trained(model))
        _must_be_alike(self.path, json.loads(metadata.get("lora", "{}")), lora.layers(model))
        _put(model, [(places[name], tensor) for name, tensor in tensors.items()])

    def metadata(self) -> dict[str, dict]:
        """What the file says of the adapters in it: layer -> adapter -> rank, alpha, scaling, dora."""
        return json.loads(_read(self.path)[1].get("lora", "{}"))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, and buffers of the modules of which every parameter does."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = _buffers(model)
    for prefix, module in model.named_modules():
        parameters = list(module.parameters())
        if parameters and all(parameter.requires_grad for parameter in parameters):
            tensors |= {name: buffers[name] for name, _ in module.named_buffers(prefix) if name in buffers}
    return tensors


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _described(model: nn.Module) -> dict[str, dict]:
    return {
        name: {
            key: {
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "scaling": adapter.scaling,
                "dora": adapter.magnitude is not None,
            }
            for key, adapter in layer.adapters.items()
            if key in layer.active
        }
        for name, layer in lora.layers(model).items()
    }


def _must_fit(path: Path, tensors: dict[str, Tensor], places: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    surplus = [name for name in tensors if name not in places]
    if surplus:
        raise ValueError(f"{path.name} holds {_some(surplus)}, which the model lacks. Inject the adapters it was saved with.")
    lacking = [name for name in trained if name not in tensors]
    if lacking:
        raise ValueError(f"{path.name} lacks {_some(lacking)}, which the model trains. Freeze it, or take another file.")
    for name in [name for name in places if name in tensors]:
        if tensors[name].shape != places[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(places[name].shape)}, got {tuple(tensors[name].shape)} in {path.name}. "
                "Inject adapters of the rank that was saved."
            )


def _must_be_alike(path: Path, saved: dict[str, dict], layers: dict[str, lora.Layer]) -> None:
    for name, layer in layers.items():
        for key, adapter in layer.adapters.items():
            scaling = saved.get(name, {}).get(key, {}).get("scaling", adapter.scaling)
            if scaling != adapter.scaling:
                raise ValueError(
                    f"the adapter of {name} must be scaled by {scaling:g} as in {path.name}, got {adapter.scaling:g}. "
                    "Inject it with the alpha that was saved."
                )


def _put(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first; merged layers are unmerged meanwhile."""
    merged = [layer for layer in lora.layers(model).values() if layer.merged]
    for layer in merged:
        layer.unmerge()
    with torch.no_grad():
        for place, tensor in pairs:
            place.copy_(tensor)
    for layer in merged:
        layer.merge()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: the folder is made, and the file is there whole or not at all."""
    # Copies, because safetensors takes neither strides nor two tensors in one memory.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(copies, draft, metadata)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file of adapters at {path}. Save one first: AdapterFile(path).save(model).")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got one that cannot be read ({error}). Save it again.") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- peft's files -------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."  # of every key
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {kind.base_type: kind for kind in lora.Layer.kinds}
PLAIN = {  # settings of peft that have no counterpart here unless they are these
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base's weight as it is


def save_peft(model: nn.Module, folder: str | Path) -> None:
    """Write the active adapter, and what else trains, as the `peft` library does: one JSON and one safetensors file.

    `peft.PeftModel.from_pretrained(base, folder)` reads them, with `base` the model without LoRA layers, and computes what
    `model` computes. What trains outside adapters goes into `modules_to_save`: whole modules, with their buffers.

    Args:
        model: with LoRA layers, merged or not, with one active adapter.
        folder: gets adapter_config.json and adapter_model.safetensors, and is made if missing.

    Raises:
        ValueError: no LoRA layer, several active adapters, or something that peft computes differently or has no name for:
            a convolution with groups, dilation or a padding mode, an embedding with max_norm, adapters with DoRA or
            rsLoRA beside others without, a parameter that trains and is in no module of its own.
    """
    layers = lora.layers(expect.module("model", model))
    adapters = {name: _active(name, layer) for name, layer in layers.items() if layer.active}
    if not adapters:
        raise ValueError("the model must have LoRA layers with an active adapter, got none. Call helpers.lora.inject first.")
    for name, adapter in adapters.items():
        _must_be_known_to_peft(name, layers[name].base, adapter.A, dora=adapter.magnitude is not None)
    whole = _modules_to_save(model, layers, adapters)
    config = _config(model, layers, adapters, whole)
    tensors = {name: _to_peft(layers[name].base, adapter) for name, adapter in adapters.items()}
    tensors |= {name: model.get_submodule(name).state_dict() for name in whole}
    flat = {f"{PREFIX}{name}.{key}": tensor for name, part in tensors.items() for key, tensor in part.items()}
    _write(Path(folder) / TENSORS, flat, {"format": "pt"})
    write_text(Path(folder) / CONFIG, json.dumps(config, indent=2) + "\n")


def load_peft(model: nn.Module, folder: str | Path, adapter: str = "default") -> list[str]:
    """Inject the adapter that the `peft` library or `save_peft` wrote into `folder`, in place, with its numbers.

    Afterwards the adapter trains, and so do the modules of `modules_to_save`; everything else is frozen.

    Args:
        model: the pre-trained model, without LoRA layers.
        folder: with adapter_config.json and adapter_model.safetensors.
        adapter: how to call it here.

    Returns:
        The names of the layers that have the adapter.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: a setting, a tensor or a layer that has no counterpart here; the model is as it was.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}. Name the folder that save_pretrained or save_peft wrote.")
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    _must_be_plain(config)
    tensors, rest = _from_peft(_read(Path(folder) / TENSORS)[0])
    places, train = _places(expect.module("model", model), rest, config.get("modules_to_save") or [])
    bases = _bases(model, tensors)
    settings = {name: _settings(name, bases[name], tensors[name], config) for name in bases}

    made = {base: KINDS[type(base)](base, adapter=adapter, **settings[name]) for name, base in bases.items()}
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in made:
                setattr(parent, child, made[module])
    finetune.train_only(model, train)
    lora.activate(model, adapter)
    pairs = [(places[name], tensor) for name, tensor in rest.items()]
    for name, base in bases.items():
        own = _to_peft(base, made[base].adapter)
        pairs += [(own[key], tensor) for key, tensor in tensors[name].items()]
    _put(model, pairs)
    return list(bases)


def _to_peft(base: nn.Module, adapter: lora.Adapter) -> dict[str, Tensor]:
    """Views of an adapter's tensors, as peft names and shapes them."""
    ones = [1] * (base.weight.ndim - 2)
    if isinstance(base, nn.Embedding):
        tensors = {"lora_embedding_A": adapter.A, "lora_embedding_B": adapter.B}
    else:
        kernels = adapter.A.view(-1, *base.weight.shape[1:])
        tensors = {"lora_A.weight": kernels, "lora_B.weight": adapter.B.view(*adapter.B.shape, *ones)}
    if adapter.magnitude is not None:
        tensors["lora_magnitude_vector"] = adapter.magnitude.view(1, -1, *ones) if ones else adapter.magnitude.view(-1)
    return tensors


def _from_peft(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of adapters, by layer and key, and all others, by name."""
    adapters, rest = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)", key)
        if match:
            adapters.setdefault(match[1], {})[match[2]] = tensor
        elif key.startswith(PREFIX):
            rest[key.removeprefix(PREFIX)] = tensor
        else:
            raise ValueError(f"every key of {TENSORS} must begin with {PREFIX!r}, got {key!r}. Was it written by peft?")
    return adapters, rest


# what save_peft asks


def _active(name: str, layer: lora.Layer) -> lora.Adapter:
    if len(layer.active) > 1:
        raise ValueError(
            f"one adapter must be active, got {list(layer.active)} in {name}. Activate one, and save them in turn."
        )
    return layer.adapters[layer.active[0]]


def _must_be_known_to_peft(name: str, base: nn.Module, A: Tensor, dora: bool) -> None:  # noqa: N803
    odd = []
    if isinstance(base, nn.Embedding):
        odd += [f"max_norm={base.max_norm}"] if base.max_norm is not None else []
        if base.padding_idx is not None:  # peft's row of it is updated, and by DoRA scaled; ours stays
            odd += [f"padding_idx={base.padding_idx} with DoRA"] if dora else []
            odd += (
                [f"padding_idx={base.padding_idx} where A is not 0"]
                if A[:, base.padding_idx : base.padding_idx + 1].any()
                else []
            )
    elif not isinstance(base, nn.Linear):
        wanted = {"groups": 1, "dilation": (1,) * len(base.kernel_size), "padding_mode": "zeros"}
        odd += [f"{key}={getattr(base, key)!r}" for key, value in wanted.items() if getattr(base, key) != value]
    if odd:
        raise ValueError(f"peft would compute something else for {name}, because of {', '.join(odd)}. Take AdapterFile for it.")


def _modules_to_save(model: nn.Module, layers: dict[str, lora.Layer], adapters: dict[str, lora.Adapter]) -> list[str]:
    """The outermost modules that hold, by themselves, parameters that train and are in no adapter."""
    ids = {id(parameter) for adapter in adapters.values() for parameter in adapter.parameters()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in ids]
    for name in names:
        if "." not in name or any(name.startswith(f"{layer}.") for layer in layers):
            raise ValueError(f"peft has no place for {name}, which trains, outside modules. Freeze it, or take AdapterFile.")
    holders = {name.rpartition(".")[0] for name in names}
    whole = sorted(name for name in holders if not any(name.startswith(f"{outer}.") for outer in holders))
    for name in whole:  # peft compares ends of names for these, and parts of names to leave layers out
        hit = [longer for longer, _ in model.named_modules() if longer.endswith(name) and longer != name]
        hit += [layer for layer in layers if f".{name}." in f".{layer}."]
        if hit:
            raise ValueError(f"peft would take {hit[0]} for {name}, which trains. Rename one of them, or take AdapterFile.")
    return whole


def _config(model: nn.Module, layers: dict[str, lora.Layer], adapters: dict[str, lora.Adapter], whole: list[str]) -> dict:
    """What peft needs to inject the same adapters; its defaults for all else."""
    flags = {
        "use_rslora": [name for name, adapter in adapters.items() if adapter.rank_stabilised],
        "use_dora": [name for name, adapter in adapters.items() if adapter.magnitude is not None],
    }
    for flag, names in flags.items():
        if names and len(names) < len(adapters):
            without = next(name for name in adapters if name not in names)
            raise ValueError(f"{flag} must hold for all adapters or none, got it for {names[0]} and not for {without}.")
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: adapter.alpha for name, adapter in adapters.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    # A list of names also matches ends of longer names; where there are such, an expression says what is meant.
    inside = tuple(f"{name}." for name in layers)
    plain = [name for name, _ in model.named_modules() if name not in adapters and not name.startswith(inside)]
    longer = any(full.endswith(f".{name}") for full in plain for name in adapters)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(adapter.dropout.p for adapter in adapters.values()),
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
        "bias": "none",
        **{flag: bool(names) for flag, names in flags.items()},
        "target_modules": "|".join(map(re.escape, adapters)) if longer else list(adapters),
        "modules_to_save": whole or None,
    }


# what load_peft asks


def _must_be_plain(config: dict) -> None:
    for key, plain in PLAIN.items():
        if (config.get(key, plain) or plain) != plain:
            raise ValueError(f"{key} must be {plain!r} in {CONFIG}, got {config[key]!r}. Load it with peft itself.")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(f"init_lora_weights must be one of {list(STARTS)}, got {start!r}, which changes the base's weights.")


def _places(model: nn.Module, rest: dict[str, Tensor], whole: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Where the tensors outside adapters go, by name, and the modules that hold them."""
    modules = [name for name, _ in model.named_modules() if any(name.endswith(end) for end in whole)]  # as peft compares
    inside = tuple(f"{name}." for name in modules)
    every = dict(model.named_parameters(remove_duplicate=False)) | _buffers(model)
    places = {name: tensor for name, tensor in every.items() if name.startswith(inside)}
    surplus = [name for name in rest if name not in places]
    if surplus:
        raise ValueError(f"{TENSORS} holds {_some(surplus)}, which no module of modules_to_save has. Take the same model.")
    lacking = [name for name in places if name not in rest]
    if lacking:
        raise ValueError(f"{TENSORS} lacks {_some(lacking)} of modules_to_save. Take the model that it was trained in.")
    for name, tensor in rest.items():
        if tensor.shape != places[name].shape:
            raise ValueError(f"{name} must have shape {tuple(places[name].shape)}, got {tuple(tensor.shape)} in {TENSORS}.")
    return places, modules


def _bases(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The layers of those names, in the model's order, once it is certain that they can be adapted."""
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(
            f"{TENSORS} has adapters for {_some(unknown)}, which the model lacks. Take the model that it was trained in."
        )
    for name in names:
        base = modules[name]
        if type(base) not in KINDS or (isinstance(base, nn.Embedding) and (base.sparse or base.scale_grad_by_freq)):
            kinds = ", ".join(f"nn.{kind.__name__}" for kind in KINDS)
            raise ValueError(f"{name} must be one of {kinds}, got {expect.describe(base)}. Take the model without LoRA layers.")
    return {name: module for name, module in modules.items() if name in names}


def _settings(name: str, base: nn.Module, tensors: dict[str, Tensor], config: dict) -> dict:
    """The arguments of the LoRA layer, once it is certain that the tensors fit it."""
    dora, embedding = bool(config.get("use_dora")), isinstance(base, nn.Embedding)
    tensor = tensors.get("lora_embedding_A" if embedding else "lora_A.weight")
    if tensor is None:
        raise ValueError(f"{TENSORS} must have the A of {name}, got {', '.join(sorted(tensors))}. Was it saved whole?")
    _must_be_known_to_peft(name, base, tensor, dora)
    patterns = config.get("alpha_pattern") or {}
    settings = {
        "rank": len(tensor),
        "alpha": next((alpha for key, alpha in patterns.items() if _matches(key, name)), config["lora_alpha"]),
        "rank_stabilised": bool(config.get("use_rslora")),
        "dropout": 0.0 if embedding else config.get("lora_dropout", 0.0),
        "dora": dora,
    }
    kind = KINDS[type(base)]
    wanted = _to_peft(base, kind.start(kind.matrix(base.weight.detach().to("meta")), **settings))
    shapes = [{key: tuple(tensor.shape) for key, tensor in some.items()} for some in (wanted, tensors)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the adapter of {name} must have {shapes[0]}, got {shapes[1]}. Take the model that it was trained in."
        )
    return settings


def _matches(key: str, name: str) -> bool:
    """Whether peft takes a key of rank_pattern or alpha_pattern for this layer."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
