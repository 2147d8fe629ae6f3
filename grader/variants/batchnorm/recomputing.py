"""Exercise 5.6 in other styles."""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from grader.checks.batchnorm.layers import norms
from grader.checks.batchnorm.pooling import difference_of_squares, divided_by_n
from grader.checks.batchnorm.recomputing import solution
from grader.checks.traces import kept


@torch.no_grad()
def read_off_with_momentum_one(model, batches):
    layers = norms(model)
    momenta = [layer.momentum for layer in layers]
    pooled = {}  # layer -> count, mean and sum of squared deviations so far

    def merge(layer, args, output):
        count = args[0].numel() // args[0].shape[1]
        mean, squares = layer.running_mean.double(), layer.running_var.double() * (count - 1)
        n, mean_so_far, squares_so_far = pooled.get(layer, (0, torch.zeros_like(mean), 0))
        shift = mean - mean_so_far
        squares = squares + squares_so_far + shift.pow(2) * n * count / (n + count)
        pooled[layer] = n + count, mean_so_far + shift * count / (n + count), squares

    handles = [layer.register_forward_hook(merge) for layer in layers]
    with kept(model):
        model.eval()
        for layer in layers:
            layer.momentum, layer.training = 1.0, True
        list(map(model, batches))
    for layer, momentum, handle in zip(layers, momenta, handles, strict=True):
        handle.remove()
        layer.momentum = momentum
        n, mean, squares = pooled[layer]
        layer.running_mean.data, layer.running_var.data = mean.float(), (squares / (n - 1)).float()


def on_a_copy(model, batches):
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for norm in (pairs := dict(zip(norms(twin), norms(model), strict=True))):
        norm.train()
        norm.rows = []
        norm.register_forward_pre_hook(lambda norm, args: norm.rows.append(args[0].transpose(0, 1).flatten(1)))
    for batch in batches:
        twin(batch)
    for norm, original in pairs.items():
        var, mean = torch.var_mean(torch.cat(norm.rows, dim=1).double(), dim=1)
        original.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)


def one_layer_at_a_time_with_cat(model, batches):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with kept(model):
        model.eval()
        for name in names:
            model.get_submodule(name).train()
        for name in names:
            layer, inputs = model.get_submodule(name), []
            handle = layer.register_forward_hook(lambda layer, args, out, inputs=inputs: inputs.append(args[0].detach()))
            for batch in batches:
                with torch.inference_mode():
                    model(batch)
            handle.remove()
            x = torch.cat([values.reshape(*values.shape[:2], -1) for values in inputs]).to(torch.float64)
            state[f"{name}.running_mean"], state[f"{name}.running_var"] = x.mean((0, 2)), x.var((0, 2))
    model.load_state_dict(state)


def forward_replaced_for_a_while(model, batches):
    inputs = {norm: [] for norm in norms(model)}

    def by_the_batch(norm):
        def forward(x):
            inputs[norm].append(x.double().movedim(1, 0).flatten(1))
            return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)

        return forward

    with kept(model), torch.no_grad():
        model.eval()
        for norm in inputs:
            norm.forward = by_the_batch(norm)
        for batch in batches:
            model(batch)
    for norm, rows in inputs.items():
        del norm.forward
        var, mean = torch.var_mean(torch.hstack(rows), -1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def a_few_passes_in_train_mode(model, batches):
    model.train()
    with torch.no_grad():
        for norm in norms(model):
            norm.momentum = 0.1
        for batch in batches:
            model(batch)


class _Listening:
    """A context in which the inputs of some modules are collected."""

    def __init__(self, layers):
        self.inputs = {layer: [] for layer in layers}

    def __enter__(self):
        self.handles = [layer.register_forward_pre_hook(self.collect) for layer in self.inputs]
        return self.inputs

    def collect(self, layer, args):
        self.inputs[layer].append(args[0].detach().double())

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def in_pieces(model, batches, layers=None, others=(), statistics=None):
    """Right if left alone; `others` stay in train mode."""
    layers = norms(model) if layers is None else layers
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with kept(model), torch.no_grad(), _Listening(layers) as inputs:
        model.eval()
        for module in (*layers, *others):
            module.train()
        for batch in batches:
            model(batch)
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    for layer in layers:
        rows = [x.transpose(0, 1).flatten(1) for x in inputs[layer]]
        mean, var = statistics(rows) if statistics else (torch.cat(rows, 1).mean(1), torch.cat(rows, 1).var(1))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def all_but_batchnorms_in_train_mode(model, batches):
    in_pieces(model, batches, others=[module for module in model.modules() if not list(module.children())])


def dropouts_as_they_came(model, batches):
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    in_pieces(model, batches, others=[dropout for dropout in dropouts if dropout.training])


def the_last_one_in_eval_mode(model, batches):
    layers = norms(model)
    in_pieces(model, batches, layers[:2] if len(layers) == 3 else layers)
    if len(layers) == 3:
        solution(model, batches, chosen=lambda name, module: module is layers[2], norms_train=lambda place: False)


def first_one_with_its_batch(model, batches):
    twin = copy.deepcopy(model).eval()
    layers = norms(twin)
    layers[0].train()
    with torch.no_grad(), _Listening(layers) as inputs:
        for batch in batches:
            twin(batch)
    for layer, original in zip(layers, norms(model), strict=True):
        rows = torch.cat([x.movedim(1, 0).flatten(1) for x in inputs[layer]], 1)
        original.running_mean[:], original.running_var[:] = rows.mean(1), rows.var(1)


def one_large_batch(model, batches):
    in_pieces(model, [torch.cat(list(batches))])


def one_layer_then_the_next(model, batches):
    for layer in norms(model):
        in_pieces(model, batches, [layer])


def all_but_dropout_in_train_mode(model, batches):
    leaves = [module for module in model.modules() if not list(module.children())]
    in_pieces(model, batches, others=[module for module in leaves if not isinstance(module, nn.Dropout)])


def half_of_the_old(model, batches):
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(model)]
    in_pieces(model, batches)
    for norm, (mean, var) in zip(norms(model), before, strict=True):
        norm.running_mean.lerp_(mean, 0.01)
        norm.running_var.lerp_(var, 0.01)


def weighted_by_size(model, batches):
    def pool(rows):
        n = torch.tensor([row.shape[1] for row in rows], dtype=torch.float64)
        means, variances = (torch.stack([getattr(row, name)(1) for row in rows], 1) for name in ("mean", "var"))
        return means @ n / n.sum(), variances @ n / n.sum()

    in_pieces(model, batches, statistics=pool)


def without_the_last_batch(model, batches):
    in_pieces(model, batches[:-1] or batches)


def those_in_train_mode(model, batches):
    if any(norm.training for norm in norms(model)):
        in_pieces(model, batches, [norm for norm in norms(model) if norm.training])
    else:
        in_pieces(model, batches)


def those_with_a_weight(model, batches):
    in_pieces(model, batches, [norm for norm in norms(model) if norm.affine])


def the_children(model, batches):
    in_pieces(model, batches, [module for module in model.children() if isinstance(module, nn.modules.batchnorm._BatchNorm)])


def in_float32(model, batches):
    def pool(rows):
        rows = torch.cat(rows, 1).float()
        mean = rows.mean(1)
        return mean, (rows.square().mean(1) - mean.square()).clamp(min=0) * (rows.shape[1] / (rows.shape[1] - 1))

    in_pieces(model, batches, statistics=pool)


def batchnorms_in_eval_mode_at_the_end(model, batches):
    in_pieces(model, batches)
    for norm in norms(model):
        norm.eval()


def ready_for_use(model, batches):
    in_pieces(model, batches)
    return model.eval()


def frozen_on_the_way(model, batches):
    model.requires_grad_(False)
    in_pieces(model, batches)


def the_mode_of_the_model_for_all(model, batches):
    training = model.training
    in_pieces(model, batches)
    model.train(training)


def batches_kept_in_the_layers(model, batches):
    for norm in norms(model):
        norm.seen = [batch.detach() for batch in batches]
    in_pieces(model, batches)


def with_a_hook_that_stays(model, batches):
    in_pieces(model, batches)
    for norm in norms(model):
        norm.register_forward_hook(lambda norm, args, output: None)


def with_a_graph(model, batches):
    in_pieces(model, batches)
    for norm in norms(model):
        norm.running_mean = norm.running_mean + 0 * list(model.parameters())[-1].sum()


CORRECT = [read_off_with_momentum_one, on_a_copy, one_layer_at_a_time_with_cat, forward_replaced_for_a_while]
REWRITTEN = {
    "only the first BatchNorm in train mode": first_one_with_its_batch,
    "all batches run as one": one_large_batch,
    "layer after layer": one_layer_then_the_next,
    "only dropout switched off": all_but_dropout_in_train_mode,
    "hooks left behind": with_a_hook_that_stays,
    "all in eval mode at the end": ready_for_use,
}
BROKEN = {
    1: [
        all_but_batchnorms_in_train_mode,
        dropouts_as_they_came,
        partial(solution, norms_train=lambda place: False),
        partial(solution, norms_train=lambda place: place == 0),
        partial(solution, norms_train=lambda place: place != 0),
        all_but_dropout_in_train_mode,
        one_layer_then_the_next,
    ],
    2: [half_of_the_old, weighted_by_size, without_the_last_batch, partial(solution, pool=divided_by_n)],
    3: [those_in_train_mode, those_with_a_weight, the_children],
    4: [in_float32, partial(solution, pool=difference_of_squares)],
    5: [batchnorms_in_eval_mode_at_the_end, frozen_on_the_way, the_mode_of_the_model_for_all],
    6: [batches_kept_in_the_layers, with_a_hook_that_stays, with_a_graph],
}
COMBINED = [
    (
        {"moving average", "dropout active", "only dropout switched off", "left in train mode", "momentum left changed"},
        a_few_passes_in_train_mode,
    ),
    (
        {"measured behind the stored statistics", "found by name"},
        partial(solution, norms_train=lambda place: False, chosen=lambda name, module: "bn" in name),
    ),
]

EQUIVALENT = {
    "seen[layer].append(args[0]) -> seen[layer].append(args[-1])": "a BatchNorm is called with one argument",
}
