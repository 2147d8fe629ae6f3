"""The head first: a linear probe in its place, then all of the model.

Source: Kumar et al. 2022 (LP-FT).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helpers.data import Examples
from helpers.features import drop_head, extract, linear_probe
from helpers.finetune.parts import unfreeze
from helpers.training import History, fit


def probe_head(model: nn.Module, head: str, inputs: Tensor | Sequence, labels: Tensor, penalty: float = 1e-3) -> None:
    """Give the head the weights of a linear probe on the features before it, in place.

    The head stays the same nn.Linear with the same Parameter objects, so an optimizer that holds them still does.
    Nothing else of the model changes: other weights, buffers, flags and modes.

    Args:
        model: any model whose last step is the nn.Linear called `head`.
        head: its name, "fc".
        inputs, labels: (n, ...) or a list of n, and (n,), as for `extract` and `linear_probe`.
        penalty: as for `linear_probe`.

    Raises:
        ValueError: `head` is not an nn.Linear of the model, not its last step, has no bias or a shared weight; or as
            `linear_probe`.
    """
    backbone = drop_head(model, head)
    layer = model.get_submodule(head)
    if layer.bias is None:
        raise ValueError(f"{head} must have a bias, as a linear probe does, got one without. Replace it: nn.Linear(...).")
    for name, module in model.named_modules():
        if module is not layer and any(p is layer.weight or p is layer.bias for p in module.parameters(recurse=False)):
            raise ValueError(f"{head} must share no parameters, got some that {name} has. Replace it: nn.Linear(...).")
    features = extract(backbone, inputs)
    if features.shape[1:] != (layer.in_features,):
        raise ValueError(
            f"{head} must be the last step of {type(model).__name__}, "
            f"got features of {features[0].numel()} numbers instead of {layer.in_features}."
        )
    probe = linear_probe(features, labels.to(features.device), layer.out_features, penalty)
    with torch.no_grad():
        layer.weight.copy_(probe.weight)
        layer.bias.copy_(probe.bias)


def lp_ft(model: nn.Module, head: str, train: Examples, *, steps: int, lr: float, penalty: float = 1e-3, **settings) -> History:
    """Linear probe, then fine-tune: the head becomes the probe on `train`, then all parameters train, in place.

    A random head sends large gradients into the backbone and changes its features before it fits; a probe does not.

    Args:
        model, head, penalty: as for `probe_head`.
        train: what both steps learn from.
        steps, lr, settings: as for `fit`.

    Source: Kumar et al. 2022.
    """
    probe_head(model, head, train.inputs, train.labels, penalty)
    unfreeze(model)
    return fit(model, train, steps=steps, lr=lr, **settings)
