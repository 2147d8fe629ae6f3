"""Exercise 2.2 in other styles."""

import copy
import math
from contextlib import ExitStack

import torch
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


def on_a_copy(backbone, images, batch_size):
    clone = copy.deepcopy(backbone).eval().requires_grad_(False)
    loader = DataLoader(TensorDataset(images), batch_size=batch_size)
    return torch.vstack([clone(batch) for (batch,) in loader])


def into_a_table(backbone, images, batch_size):
    training = [name for name, module in backbone.named_modules() if module.training]
    backbone.train(False)
    with torch.inference_mode():
        table = torch.empty(len(images), backbone(images[:1]).shape[1])
        for start in range(0, len(images), batch_size):
            table[start : start + batch_size] = backbone(images[start : start + batch_size])
    for name in training:
        backbone.get_submodule(name).training = True
    return table.clone()


@torch.no_grad()
def one_at_a_time(backbone, images, batch_size):
    with ExitStack() as stack:
        for module in backbone.modules():
            stack.callback(setattr, module, "training", module.training)
        for module in backbone.modules():
            module.training = False
        return torch.stack([backbone(image.unsqueeze(0)).squeeze(0) for image in images])


class Extractor:
    """A class with `__call__`, and gradients stopped by detaching copies of the weights."""

    def __call__(self, backbone, images, batch_size):
        weights = {name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()}
        was = {module for module in backbone.modules() if module.training}
        backbone.eval()
        chunks = torch.chunk(images, math.ceil(len(images) / batch_size))
        rows = torch.cat([functional_call(backbone, weights, (chunk,)) for chunk in chunks])
        for module in was:
            module.training = True
        return rows


@torch.no_grad()
def still_training(backbone, images, batch_size):
    return torch.vstack([backbone(batch) for (batch,) in DataLoader(TensorDataset(images), batch_size)])


def graph_and_eval_for_good(backbone, images, batch_size):
    backbone.eval()
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def at_once_and_put_back_with_train(backbone, images, batch_size):
    with torch.no_grad():
        features = backbone.eval()(images)
    backbone.train()
    return features


CORRECT = [on_a_copy, into_a_table, one_at_a_time, Extractor()]
REWRITTEN = {"train mode during extraction": still_training}
BROKEN = {}
COMBINED = [
    ({"graph kept", "left in eval mode"}, graph_and_eval_for_good),
    ({"everything at once", "put back with train()"}, at_once_and_put_back_with_train),
]

EQUIVALENT = {
    "try: ⏎ with torch.no_grad(): ⏎ batches = … in modes.items(): ⏎ module.training = training -> "
    "with torch.no_grad(): ⏎ batches = … ⏎ module.training = training ⏎ return result": "a raising backbone is out of scope",
}
