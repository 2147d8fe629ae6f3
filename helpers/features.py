"""Feature extraction: freeze a backbone, take off its head, run it once, train a linear probe on what it gives.

    features = backbone(images)                                       computed once, (n, width)
    probe    = argmin over W, b of  mean cross_entropy(features W' + b, labels) + penalty / 2 * |W|^2

A backbone is frozen when neither its parameters nor its buffers move: `requires_grad=False` stops the first,
eval mode the second. Both are needed.

Source: Donahue et al. 2014, "DeCAF"; Kornblith et al. 2019, section 3, for the probe as a measure of a backbone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from helpers import expect


def freeze(model: nn.Module) -> nn.Module:
    """Stop every parameter of `model` from training and put every module into eval mode, in place; return the model.

    A later `model.train()` undoes the second half: BatchNorm statistics would move again.
    """
    return expect.module("model", model).requires_grad_(False).eval()


def remove_head(model: nn.Module, name: str = "fc") -> nn.Linear:
    """Replace the head of `model` by nn.Identity, in place, and return the head that was there.

    The model then maps inputs to features; their width is the head's `in_features`.

    Args:
        model: any model whose last step is the nn.Linear called `name`. What else the forward does, it still does.
        name: the head's attribute, as `model.named_modules()` spells it: "fc", "head", "classifier.1".

    Raises:
        ValueError: `name` is not an nn.Linear of this model; the message lists those there are.
    """
    modules = dict(expect.module("model", model).named_modules())
    head = modules.get(name)
    if not isinstance(head, nn.Linear):
        linear = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"not an nn.Linear of {type(model).__name__}: {name!r}. Choose from {linear}.")
    parent, _, attribute = name.rpartition(".")
    setattr(modules[parent], attribute, nn.Identity())
    return head


def extract(model: nn.Module, inputs: Tensor, batch_size: int = 256, progress: bool = False) -> Tensor:
    """Run `model` over `inputs` in eval mode and without gradients; keep nothing but its outputs.

    The model is left bit-identical: parameters, buffers, `requires_grad`, and each module's train or eval mode.
    An output depends on its own input alone, whatever else is in the batch.

    Args:
        model: maps (n, ...) to (n, ...). Without its head it gives features, with it logits.
        inputs: (n, ...), n >= 1, on any device; batches are moved to the model's.
        batch_size: at most that many inputs are in the model at once.
        progress: show a progress bar.

    Returns:
        (n, ...) outputs in the order of the inputs, on the device of the inputs, without a graph.
    """
    expect.module("model", model)
    expect.tensor("inputs", inputs, ("n", "..."))
    expect.whole_number("batch_size", batch_size, advice="256 suits most models on a CPU.")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), inputs.device)
    batches = tqdm(inputs.split(batch_size), desc="extracting", disable=not progress, leave=False)
    with eval_mode(model), torch.no_grad():
        return torch.cat([model(batch.to(device)).to(inputs.device) for batch in batches])


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with`; afterwards every module is back in the mode it had, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
