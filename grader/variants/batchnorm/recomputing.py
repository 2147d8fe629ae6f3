"""Exercise 5.6 in other styles."""

import copy
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]


class _Sums:
    """Counts, sums and squares in float64."""

    def __init__(self):
        self.n, self.total, self.squares = 0, 0, 0

    def add(self, x):
        rows = x.detach().double().movedim(1, 0).flatten(1)
        self.n += rows.size(1)
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)

    def write(self, norm):
        mean = self.total / self.n
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((self.squares - self.n * mean**2) / (self.n - 1))


def hooks_that_add_up(model, batches):
    was = [(module, module.training) for module in model.modules()]
    sums = {norm: _Sums() for norm in _norms(model)}
    with ExitStack() as stack:
        model.eval()
        for norm in sums:
            norm.train()
            hook = norm.register_forward_pre_hook(lambda norm, args: sums[norm].add(args[0]))
            stack.callback(hook.remove)
        with torch.no_grad():
            for batch in batches:
                model(batch)
    for module, mode in was:
        module.training = mode
    for norm, seen in sums.items():
        seen.write(norm)


@torch.no_grad()
def read_off_with_momentum_one(model, batches):
    norms = _norms(model)
    settings = [(norm.momentum, norm.training) for norm in norms]
    others = {m: m.training for m in model.modules() if m not in norms}
    counts = dict.fromkeys(norms, 0)
    pooled = {}

    def merge(norm, args, output):
        n = args[0].numel() // args[0].shape[1]
        mean, squares = norm.running_mean.double(), norm.running_var.double() * (n - 1)
        if norm in pooled:
            known, other, more = counts[norm], *pooled[norm]
            shift = mean - other
            mean = other + shift * n / (known + n)
            squares = squares + more + shift.pow(2) * known * n / (known + n)
        pooled[norm] = mean, squares
        counts[norm] += n

    for module in others:
        module.training = False
    handles = []
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
        handles.append(norm.register_forward_hook(merge))
    list(map(model, batches))
    for handle in handles:
        handle.remove()
    for norm, (momentum, mode) in zip(norms, settings, strict=True):
        norm.momentum, norm.training = momentum, mode
        mean, squares = pooled[norm]
        norm.running_mean.data, norm.running_var.data = mean.float(), (squares / (counts[norm] - 1)).float()
    for module, mode in others.items():
        module.training = mode


def on_a_copy(model, batches):
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for norm in (pairs := dict(zip(_norms(twin), _norms(model), strict=True))):
        norm.train()
        norm.kept = []
        norm.register_forward_pre_hook(lambda norm, args: norm.kept.append(args[0].transpose(0, 1).flatten(1)))
    for batch in batches:
        twin(batch)
    for norm, original in pairs.items():
        var, mean = torch.var_mean(torch.cat(norm.kept, dim=1).double(), dim=1)
        original.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)


def one_layer_at_a_time_with_cat(model, batches):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    model.eval()
    for name in names:
        model.get_submodule(name).train()
    found = {}
    for name in names:
        inputs = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda m, args, out, inputs=inputs: inputs.append(args[0].detach())
        )
        for batch in batches:
            with torch.inference_mode():
                model(batch)
        handle.remove()
        x = torch.cat([values.reshape(*values.shape[:2], -1) for values in inputs]).to(torch.float64)
        found[name] = x.mean((0, 2)), x.var((0, 2))
    for name, (mean, var) in found.items():
        prefix = f"{name}." if name else ""
        state[prefix + "running_mean"], state[prefix + "running_var"] = mean.clone(), var.clone()
    model.load_state_dict(state)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode


def forward_replaced_for_a_while(model, batches):
    norms = _norms(model)
    modes = {module: module.training for module in model.modules()}
    sums = [_Sums() for _ in norms]

    def by_plain_arithmetic(norm, seen):
        def forward(x):
            seen.add(x)
            column = (-1, *[1] * (x.dim() - 2))
            over = [axis for axis in range(x.dim()) if axis != 1]
            y = (x - x.mean(over).view(column)) * torch.rsqrt(x.var(over, correction=0) + norm.eps).view(column)
            return y if norm.weight is None else y * norm.weight.view(column) + norm.bias.view(column)

        return forward

    try:
        model.eval()
        for norm, seen in zip(norms, sums, strict=True):
            norm.forward = by_plain_arithmetic(norm, seen)
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for norm in norms:
            del norm.forward
        for module in modes:
            module.training = modes[module]
    for norm, seen in zip(norms, sums, strict=True):
        seen.write(norm)


class WithoutRunningBuffers:
    """Takes the buffers away: a BatchNorm that has none normalises with its batch, also in eval mode."""

    def __call__(self, model, batches):
        kept = {norm: dict(norm._buffers) for norm in _norms(model)}
        mode = {module: module.training for module in model.modules()}
        seen = {norm: _Sums() for norm in kept}
        hooks = [norm.register_forward_pre_hook(lambda norm, args: seen[norm].add(args[0])) for norm in kept]
        for norm in kept:
            norm.running_mean = norm.running_var = None
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        for norm, buffers in kept.items():
            norm._buffers.update(buffers)
            seen[norm].write(norm)
        for module, training in mode.items():
            module.training = training
        for hook in hooks:
            hook.remove()


without_running_buffers = WithoutRunningBuffers()


@contextmanager
def _batch_mode(model, chosen=lambda name, module: True, momentum=0.1, rest=False):
    """The chosen BatchNorms in train mode with that momentum, inside the `with`."""
    modes = {module: module.training for module in model.modules()}
    norms = {m: m.momentum for name, m in model.named_modules() if isinstance(m, _BatchNorm) and chosen(name, m)}
    model.train(rest)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(module in norms)
    for norm in norms:
        norm.momentum = momentum
    with torch.no_grad():
        yield list(norms)
    for norm in norms:
        norm.momentum = norms[norm]
    for module, mode in modes.items():
        module.training = mode


def _pool(norms, run):
    """Exact statistics of what the norms see in `run()`."""
    sums = {norm: _Sums() for norm in norms}
    hooks = [norm.register_forward_pre_hook(lambda norm, args: sums[norm].add(args[0])) for norm in norms]
    run()
    for hook in hooks:
        hook.remove()
    for norm, seen in sums.items():
        seen.write(norm)


def as_for_averaged_weights_and_then_eval(model, batches):
    model.eval()
    for norm in _norms(model):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.eval()


def a_few_passes_in_train_mode(model, batches):
    model.train()
    with torch.no_grad():
        for norm in _norms(model):
            norm.momentum = 0.1
        for batch in batches:
            model(batch)


def images_called_bn_in_eval_mode(model, batches):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    norms = [m for name, m in model.named_modules() if "bn" in name and type(m) is nn.BatchNorm2d]
    with torch.no_grad():
        _pool(norms, lambda: [model(batch) for batch in batches])
    for module, mode in modes.items():
        module.training = mode


def momentum_one_and_dropout_on(model, batches):
    with _batch_mode(model, momentum=1.0, rest=True):
        for batch in batches:
            model(batch)


CORRECT = [
    *(hooks_that_add_up, read_off_with_momentum_one, on_a_copy, one_layer_at_a_time_with_cat),
    *(forward_replaced_for_a_while, without_running_buffers),
]
REWRITTEN = {}
COMBINED = [
    (
        {"mean of the batches' statistics", "momentum left changed", "all in eval mode at the end"},
        as_for_averaged_weights_and_then_eval,
    ),
    ({"moving average", "dropout active", "left in train mode", "momentum left changed"}, a_few_passes_in_train_mode),
    ({"measured behind the stored statistics", "only BatchNorm2d", "found by name"}, images_called_bn_in_eval_mode),
    ({"last batch only", "dropout active"}, momentum_one_and_dropout_on),
]

EQUIVALENT = {
    "… seen[layer].append(args[0])) for layer in layers] -> "
    "… seen[layer].append(args[-1])) for layer in layers]": "a BatchNorm is called with one argument",
    "try: ⏎ model.eval() ⏎ for layer in layers: ⏎ … ⏎ for batch in batches: ⏎ model(batch) ⏎ finally: -> "
    "model.eval() ⏎ for layer in layers: ⏎ … ⏎ for batch in batches: ⏎ model(batch)": "a model that raises is out of scope",
}
