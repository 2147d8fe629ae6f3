"""Exercise 2.2 in other styles."""

import copy
import math
import pickle
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
    table, start = None, 0
    with torch.inference_mode():
        while start < images.shape[0]:
            rows = backbone(images[start : start + batch_size])
            if table is None:
                table = torch.empty(images.shape[0], rows.shape[1])
            table[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
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


def on_a_pickled_copy(backbone, images, batch_size):
    frozen = pickle.loads(pickle.dumps(backbone))
    frozen.train(mode=False)
    rows = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows += list(frozen(images[start : start + batch_size]))
    return torch.stack(rows)


class Extractor:
    """A class with `__call__`, and gradients stopped by detaching copies of the weights."""

    def __call__(self, backbone, images, batch_size):
        weights = {name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()}
        was = {module for module in backbone.modules() if module.training}
        backbone.eval()
        rows = []
        for chunk in torch.chunk(images, math.ceil(len(images) / batch_size)):
            rows.extend(functional_call(backbone, weights, (chunk,)).unbind())
        for module in was:
            module.training = True
        return torch.stack(rows)


def still_training(backbone, images, batch_size):
    rows = []
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=False)
    with torch.inference_mode():
        for (batch,) in loader:
            rows.append(backbone(batch).clone())
    return torch.cat(rows).clone()


def train_mode_and_short(backbone, images, batch_size):
    with torch.no_grad():
        whole = len(images) - len(images) % batch_size
        return torch.cat([backbone(images[i : i + batch_size]) for i in range(0, whole, batch_size)])


def graph_and_eval_for_good(backbone, images, batch_size):
    backbone.eval()
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def at_once_and_put_back_with_train(backbone, images, batch_size):
    with torch.no_grad():
        features = backbone.eval()(images)
    backbone.train()
    return features


CORRECT = [on_a_copy, into_a_table, one_at_a_time, on_a_pickled_copy, Extractor()]
REWRITTEN = {
    "train mode during extraction": still_training,
}
COMBINED = [
    ({"train mode during extraction", "last batch dropped"}, train_mode_and_short),
    ({"graph kept", "left in eval mode"}, graph_and_eval_for_good),
    ({"everything at once", "put back with train()"}, at_once_and_put_back_with_train),
]

EQUIVALENT = {
    "try: ⏎ with torch.no_grad(): ⏎ batches = … in modes.items(): ⏎ module.training = training -> "
    "with torch.no_grad(): ⏎ batches = … ⏎ module.training = training ⏎ return result": "a raising backbone is out of scope",
}
