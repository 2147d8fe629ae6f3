"""Feature extraction: freeze a backbone, take off its head, run it once, train a linear probe on what it gives.

    features = backbone(inputs)                                       computed once, kept on disk, (n, width)
    probe    = argmin over W, b of  mean cross_entropy(features W' + b, labels) + penalty / 2 * |W|^2

A backbone is frozen when neither its parameters nor its buffers move: `requires_grad=False` stops the first,
eval mode the second. Both are needed.

Source: Donahue et al. 2014, "DeCAF"; Kornblith et al. 2019, section 3, for the probe as a measure of a backbone.
"""

import copy
import hashlib
import inspect
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import expect
from helpers.modes import eval_mode
from helpers.progress import progress_bar


def drop_head(model: nn.Module, name: str = "fc") -> nn.Module:
    """A copy of `model` that ends where the layer `name` would begin: inputs -> features, (n, in_features).

    The model itself keeps its head. The copy has nn.Identity in the head's place, so whatever else `forward` does it
    still does: this holds where `nn.Sequential(*model.children())` would lose what stands between the children.

    Args:
        model: any model whose last step is the nn.Linear called `name`.
        name: the head, as `model.named_modules()` spells it: "fc", "head", "classifier.1".

    Raises:
        ValueError: `name` is not an nn.Linear of this model; the message lists those there are.
    """
    modules = dict(expect.module("model", model).named_modules())
    if not name or not isinstance(modules.get(name), nn.Linear):
        linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"not an nn.Linear of {type(model).__name__}: {name!r}. Choose from {linear}.")
    backbone = copy.deepcopy(model)
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return backbone


def extract(model: nn.Module, inputs: Tensor | Sequence, batch_size: int = 256, progress: bool = False) -> Tensor:
    """Run `model` over `inputs` in eval mode and without gradients; keep nothing but its outputs.

    The model is left bit-identical: parameters, buffers, `requires_grad`, and each module's train or eval mode.
    An output depends on its own input alone, whatever else is in the batch.

    Args:
        model: maps n inputs to (n, ...). Without its head it gives features, with it logits.
        inputs: a tensor (n, ...), n >= 1, on any device, its batches are moved to the model's; or a list of n texts,
            paths or images, as a backbone of `helpers.backbones` takes them.
        batch_size: at most that many inputs are in the model at once.
        progress: show a progress bar.

    Returns:
        (n, ...) outputs in the order of the inputs, on the device of the inputs (the CPU for a list), without a graph.
    """
    expect.module("model", model)
    expect.whole_number("batch_size", batch_size, advice="256 suits most models on a CPU.")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    home = _check_inputs(inputs)
    starts = progress_bar(range(0, len(inputs), batch_size), "extracting", show=progress)
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(take(inputs, slice(start, start + batch_size), device)).to(home) for start in starts])


def take(inputs: Tensor | Sequence, rows: slice | Tensor, device: torch.device) -> Tensor | list:
    """Some of the inputs: rows of a tensor, moved to `device`, or items of a list."""
    if isinstance(inputs, Tensor):
        return inputs[rows].to(device)
    return list(inputs[rows]) if isinstance(rows, slice) else [inputs[row] for row in rows.tolist()]


def linear_probe(features: Tensor, labels: Tensor, classes: int | None = None, penalty: float = 1e-3) -> nn.Linear:
    """Multinomial logistic regression on fixed features: the head that a frozen backbone gets.

        minimise  mean over rows of cross_entropy(W f + b, label)  +  penalty / 2 * sum of W squared

    The bias is not penalised. The objective is convex, so the answer depends neither on a start nor on an optimizer.
    It is solved in float64 by L-BFGS; scikit-learn's `LogisticRegression(C=1 / (n * penalty))` has the same optimum.

    Args:
        features: (n, width), detached; a graph behind them is not followed.
        labels: (n,), whole numbers from 0 to classes - 1.
        classes: how many outputs the head has; None takes `labels.max() + 1`, which is wrong if the last class
            happens to be missing from `labels`.
        penalty: weight of the penalty, above 0. More means a smoother, less certain probe.

    Returns:
        An nn.Linear(width, classes) in the dtype and on the device of `features`.

    Raises:
        ValueError: shapes that do not fit, labels out of range, features that are not finite, or a penalty of 0 or less.
    """
    classes = _check_probe_inputs(features, labels, classes, penalty)
    x = features.detach().double()
    center = x.mean(0)  # centring conditions the problem; with a free bias it does not change the optimum
    x = x - center
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    head = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=features.device, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias - weight @ center)
    return head


def cache_key(backbone: nn.Module, inputs: Tensor | Sequence, settings: Mapping[str, object]) -> str:
    """A name for what a backbone makes of inputs: equal for equal contents, in every process, and else another one.

    The SHA-256 of the backbone's structure, parameters, buffers and `preprocessing`, the inputs' contents (of files: their
    bytes) and the settings, whatever their order. What it cannot see is code: a change of the backbone's `forward`.

    Args:
        backbone: any model. Buffers that its state dict leaves out count, too.
        inputs: a tensor, or a list of texts, paths, PIL images or tensors. Their shapes and dtypes count.
        settings: what JSON can spell.

    Returns:
        64 hexadecimal digits.
    """
    described = [type(expect.module("backbone", backbone)).__qualname__, repr(backbone)]
    described += [str(getattr(backbone, "preprocessing", "")), dict(settings)]
    parts = [json.dumps(described, sort_keys=True).encode()]
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):  # a state dict leaves some buffers out
        parts += [name.encode(), *_content(tensor)]
    items = [inputs] if isinstance(inputs, Tensor) else inputs
    parts.append(f"{'one tensor' if isinstance(inputs, Tensor) else len(items)}".encode())
    return _sha256([*parts, *(part for item in items for part in _content(item))])


def cached_features(
    folder: str | Path,
    compute: Callable[..., Tensor],
    backbone: nn.Module,
    inputs: Tensor | Sequence,
    settings: Mapping[str, object] | None = None,
) -> Tensor:
    """`compute(backbone, inputs, **settings)`, read from `folder` if exactly that was computed before.

    The name of an entry is the SHA-256 of all that features depend on: what `cache_key` has of backbone, inputs and
    settings, and `compute`'s code. Change any of them and it is another entry, so no entry can be stale. What it cannot
    see is a change of what `compute` calls or of the backbone's `forward`: empty the folder after one.

    An entry is written to a temporary file and then renamed, so an interruption leaves none, and holds the SHA-256
    of its own numbers, so a damaged one is noticed, computed again and replaced.

    Args:
        folder: where entries are kept, made if missing. One file for each, of the features' own size.
        compute: a function such as `extract`; gives one tensor.
        backbone: any model.
        inputs: a tensor, or a list of texts, paths, PIL images or tensors.
        settings: keyword arguments of `compute` that JSON can spell.

    Returns:
        The features, on the CPU and without a graph.
    """
    if not inspect.isfunction(compute):
        raise TypeError(f"compute must be a function, got {expect.describe(compute)}. Give it its arguments as settings.")
    settings = dict(settings or {})
    key = _sha256([cache_key(backbone, inputs, settings).encode(), *_code(compute)])
    path = Path(folder) / f"{key}.safetensors"
    features = _read_entry(path, key)
    if features is None:
        features = expect.tensor("what compute gives", compute(backbone, inputs, **settings), ("n", "..."))
        features = features.detach().cpu().contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{key}.{uuid.uuid4().hex}.part")
        try:
            save_file({"features": features}, draft, {"key": key, "sha256": _sha256(_content(features))})
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return features


def _read_entry(path: Path, key: str) -> Tensor | None:
    """An entry of the cache; None if there is none, or if it is not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            features, metadata = file.get_tensor("features"), file.metadata()
    except (SafetensorError, OSError):
        return None
    return features if metadata == {"key": key, "sha256": _sha256(_content(features))} else None


def _code(compute: Callable) -> list[bytes]:
    """What makes one function itself."""
    code = compute.__code__
    constants = [repr(constant) for constant in code.co_consts if not inspect.iscode(constant)]
    return [json.dumps([compute.__module__, compute.__qualname__, code.co_code.hex(), code.co_names, constants]).encode()]


def _content(item: object) -> list[bytes]:
    """What makes one input itself, in bytes; its kind and shape come first."""
    if isinstance(item, Tensor):
        raw = item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return [f"{item.dtype} {tuple(item.shape)}".encode(), raw]
    if isinstance(item, str):
        return [b"text", item.encode()]
    if isinstance(item, Path):
        return [b"file", item.read_bytes()]
    if isinstance(item, Image.Image):
        return [f"{item.mode} {item.size} {item.getpalette()}".encode(), item.tobytes()]
    raise TypeError(f"inputs must be tensors, texts, paths or PIL images, got {expect.describe(item)}.")


def _sha256(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts run into the same bytes
        digest.update(part)
    return digest.hexdigest()


def _check_inputs(inputs: Tensor | Sequence) -> torch.device:
    """The device that outputs go back to."""
    if isinstance(inputs, Tensor):
        return expect.tensor("inputs", inputs, ("n", "...")).device
    if not isinstance(inputs, list | tuple) or len(inputs) == 0:
        raise TypeError(f"inputs must be a tensor of shape (n, ...) or a list of n inputs, got {expect.describe(inputs)}.")
    return torch.device("cpu")


def _check_probe_inputs(features: Tensor, labels: Tensor, classes: int | None, penalty: float) -> int:
    if isinstance(features, Tensor) and features.ndim == 4:
        raise ValueError(
            f"features must have shape (n, width), got {tuple(features.shape)}. Pool first: features.mean((2, 3))."
        )
    n, _ = expect.tensor("features", features, ("n", "width")).shape
    if expect.tensor("labels", labels, (n,)).is_floating_point():
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}. Convert them: labels.long().")
    if not features.isfinite().all():
        rows = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"features must be finite, got {rows} rows with NaN or infinity. Look at the inputs first.")
    expect.positive("penalty", penalty, advice="Without one, separable features have no optimum.")
    classes = int(labels.max()) + 1 if classes is None else expect.whole_number("classes", classes)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1} for {classes} classes, "
            f"got {int(labels.min())} to {int(labels.max())}. Raise `classes`, or renumber the labels."
        )
    return classes
