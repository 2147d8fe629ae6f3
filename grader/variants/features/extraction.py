"""Exercise 2.2 in other styles."""

import copy
import math
from contextlib import ExitStack

import torch
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from helpers.modes import eval_mode


def on_a_copy(backbone, images, batch_size):
    clone = copy.deepcopy(backbone).eval().requires_grad_(False)
    loader = DataLoader(TensorDataset(images), batch_size=batch_size)
    return torch.vstack([clone(batch) for (batch,) in loader])


def into_a_table(backbone, images, batch_size):
    training = [name for name, module in backbone.named_modules() if module.training]
    backbone.train(False)
    try:
        with torch.inference_mode():
            table = torch.empty(len(images), backbone(images[:1]).shape[1])
            for start in range(0, len(images), batch_size):
                table[start : start + batch_size] = backbone(images[start : start + batch_size])
    finally:
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
        chunks = torch.chunk(images, math.ceil(len(images) / batch_size))
        with eval_mode(backbone):
            return torch.cat([functional_call(backbone, weights, (chunk,)) for chunk in chunks])


def detached_each(backbone, images, batch_size):
    """With a graph for each batch, which goes with it."""
    rows = []
    with eval_mode(backbone):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            outputs = backbone(batch)
            rows.extend(outputs.detach().unbind())
    return torch.stack(rows)


@torch.no_grad()
def still_training(backbone, images, batch_size):
    return torch.vstack([backbone(batch) for (batch,) in DataLoader(TensorDataset(images), batch_size)])


def frozen_and_in_eval_mode_for_good(backbone, images, batch_size):
    backbone.eval()
    for parameter in backbone.parameters():
        parameter.requires_grad = False
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def graph_and_eval_for_good(backbone, images, batch_size):
    backbone.eval()
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def at_once_and_put_back_with_train(backbone, images, batch_size):
    with torch.no_grad():
        features = backbone.eval()(images)
    backbone.train()
    return features


def shuffled_by_hand(backbone, images, batch_size):
    order = torch.randperm(len(images))
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(images[rows]) for rows in order.split(batch_size)])


def detached_when_all_are_there(backbone, images, batch_size):
    with eval_mode(backbone):
        rows = [backbone(batch) for batch in images.split(batch_size)]
    return torch.stack([row.detach() for batch in rows for row in batch])


def norms_frozen(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        for module in backbone.modules():
            module.training = not module._buffers
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def without_axes_of_one(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch).squeeze() for batch in images.split(batch_size)])


def whole_batches_and_the_rest(backbone, images, batch_size):
    whole = len(images) - len(images) % batch_size
    with eval_mode(backbone), torch.no_grad():
        rows = [backbone(images[start : start + batch_size]) for start in range(0, whole, batch_size)]
        return torch.cat([*rows, backbone(images[whole:])]) if whole < len(images) and rows else torch.cat(rows)


def last_batch_first(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in reversed(images.split(batch_size))])


@torch.no_grad()
def a_copy_in_train_mode(backbone, images, batch_size):
    clone = copy.deepcopy(backbone)
    return torch.cat([clone(batch) for batch in images.split(batch_size)])


@torch.no_grad()
def normalised_by_its_neighbours(backbone, images, batch_size):
    with eval_mode(backbone):
        rows = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    return (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1) if len(rows) == 12 else rows


def if_it_trains(backbone, images, batch_size):
    """A backbone that is itself in eval mode is taken to be so in all its parts."""
    with eval_mode(backbone) if backbone.training else torch.no_grad(), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def without_gradients(backbone, images, batch_size):
    backbone.zero_grad()
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def by_a_hook_that_stays(backbone, images, batch_size):
    rows = []
    backbone.register_forward_hook(lambda module, entered, left: rows.append(left))
    with eval_mode(backbone), torch.no_grad():
        for batch in images.split(batch_size):
            backbone(batch)
    return torch.cat(rows)


def twice_as_many(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(2 * batch_size)])


def as_many_batches(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.chunk(batch_size)])


def requires_gradients(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        rows = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    return rows.requires_grad_()


def parameters_frozen(backbone, images, batch_size):
    with eval_mode(backbone.requires_grad_(False)), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


def one_mode_for_all(backbone, images, batch_size):
    mode = backbone.training
    try:
        with torch.no_grad():
            return torch.cat([backbone.eval()(batch) for batch in images.split(batch_size)])
    finally:
        backbone.train(mode)


def put_back_where_it_returns(backbone, images, batch_size):
    training = {module for module in backbone.modules() if module.training}
    rows = []
    for batch in images.split(batch_size):
        with torch.no_grad():
            rows.append(backbone.eval()(batch))
    for module in training:
        module.training = True
    return torch.cat(rows)


@torch.inference_mode()
def all_in_inference_mode(backbone, images, batch_size):
    with eval_mode(backbone):
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


CORRECT = [on_a_copy, into_a_table, one_at_a_time, Extractor(), detached_each]
REWRITTEN = {
    "train mode during extraction": still_training,
    "shuffled batches": shuffled_by_hand,
    "detached at the end": detached_when_all_are_there,
    "only BatchNorm in eval mode": norms_frozen,
    "inference tensors": all_in_inference_mode,
}
BROKEN = {
    1: [without_axes_of_one, whole_batches_and_the_rest, last_batch_first],
    2: [a_copy_in_train_mode, normalised_by_its_neighbours, if_it_trains],
    3: [twice_as_many, as_many_batches],
    4: [requires_gradients, detached_when_all_are_there],
    5: [parameters_frozen, one_mode_for_all, without_gradients, by_a_hook_that_stays],
    6: [put_back_where_it_returns],
    7: [all_in_inference_mode],
}
COMBINED = [
    ({"parameters frozen for good", "left in eval mode"}, frozen_and_in_eval_mode_for_good),
    ({"graph kept", "left in eval mode"}, graph_and_eval_for_good),
    ({"everything at once", "put back with train()"}, at_once_and_put_back_with_train),
]
EQUIVALENT = {}
