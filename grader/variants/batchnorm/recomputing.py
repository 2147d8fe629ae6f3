"""Exercise 5.6 in other styles."""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from grader.checks.batchnorm.layers import norms
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


CORRECT = [read_off_with_momentum_one, on_a_copy, one_layer_at_a_time_with_cat, forward_replaced_for_a_while]
REWRITTEN = {}
BROKEN = {}
COMBINED = [
    ({"moving average", "dropout active", "left in train mode", "momentum left changed"}, a_few_passes_in_train_mode),
    (
        {"measured behind the stored statistics", "found by name"},
        partial(solution, norms_train=False, chosen=lambda name, module: "bn" in name),
    ),
]

EQUIVALENT = {
    "… seen[layer].append(args[0])) for layer in layers] -> "
    "… seen[layer].append(args[-1])) for layer in layers]": "a BatchNorm is called with one argument",
    "try: ⏎ model.eval() ⏎ for layer in layers: ⏎ … ⏎ for batch in batches: ⏎ model(batch) ⏎ finally: -> "
    "model.eval() ⏎ for layer in layers: ⏎ … ⏎ for batch in batches: ⏎ model(batch)": "a model that raises is out of scope",
}
