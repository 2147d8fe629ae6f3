"""Exercise 4.6 in other styles."""

import copy
import io
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR


def state_dicts_in_a_finally(model, optimizer, batches, lowest, highest):
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    modes = [module.training for module in model.modules()]
    start = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    try:
        model.train()
        for k, (inputs, labels) in enumerate(batches):
            lr = lowest * (highest / lowest) ** (k / (len(batches) - 1))
            for group, own in zip(optimizer.param_groups, start, strict=True):
                group["lr"] = lr * own / max(start)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            if not torch.isfinite(loss):
                break
            lrs.append(lr)
            losses.append(loss.item())
            if loss.item() > 4 * min(losses):
                break
            loss.backward()
            optimizer.step()
    finally:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        for module, training in zip(model.modules(), modes, strict=True):
            module.training = training
    return lrs, losses


def a_schedule_on_copies(model, optimizer, batches, lowest, highest):
    net, opt = copy.deepcopy([model, optimizer])
    top = max(group["lr"] for group in opt.param_groups)
    rates = np.geomspace(lowest, highest, num=len(batches))
    schedule = LambdaLR(opt, lambda k: rates[min(k, len(rates) - 1)] / top)
    net.train()
    seen = []
    for x, y in batches:
        lr = max(schedule.get_last_lr())
        value = opt.step(lambda x=x, y=y: _closure(net, opt, x, y))  # the loss before the step
        if math.isnan(value) or math.isinf(value):
            break
        seen.append((float(lr), float(value)))
        if value > 4 * min(loss for _, loss in seen):
            break
        schedule.step()
    return [lr for lr, _ in seen], [loss for _, loss in seen]


def _closure(net, opt, x, y):
    opt.zero_grad(set_to_none=False)
    loss = nn.CrossEntropyLoss()(net(x), y)
    loss.backward()
    return loss.detach()


def written_to_memory(model, optimizer, batches, lowest, highest):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    was_training = {name for name, module in model.named_modules() if module.training}
    largest = max(optimizer.param_groups, key=lambda group: group["lr"])
    for group in optimizer.param_groups:
        group["lr"] *= lowest / largest["lr"] if group is not largest else 1
    largest["lr"] = lowest
    growth = ExponentialLR(optimizer, (highest / lowest) ** (1 / (len(batches) - 1)))
    model.train()
    lrs, losses, smallest = [], [], math.inf
    for inputs, labels in batches:
        loss = F.nll_loss(model(inputs).log_softmax(-1), labels)
        model.zero_grad()
        loss.backward()
        if loss != loss or loss == math.inf:
            break
        lrs += [largest["lr"]]
        losses += [loss.item()]
        smallest = min(smallest, losses[-1])
        if losses[-1] > 4 * smallest:
            break
        optimizer.step()
        growth.step()
    model.zero_grad()
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    for name, module in model.named_modules():
        module.training = name in was_training
    return [lrs, losses]


def tensor_by_tensor(model, optimizer, batches, lowest, highest):
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    state = {
        p: {k: copy.copy(v) if isinstance(v, float) else copy.deepcopy(v) for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    modes = {module: module.training for module in model.modules()}
    own = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    lrs = torch.logspace(math.log10(lowest), math.log10(highest), len(batches), dtype=torch.float64).tolist()
    losses = []
    for module in modes:
        module.training = True
    for lr, (x, y) in zip(lrs, batches, strict=True):
        for group, share in zip(optimizer.param_groups, (own / own.max()).tolist(), strict=True):
            group.update(lr=lr * share)
        loss = F.cross_entropy(model(x), y)
        if not math.isfinite(loss):
            break
        losses.append(loss.item())
        if losses[-1] / min(losses) > 4:
            break
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            parameter.grad = gradient
        optimizer.step()
    with torch.no_grad():
        for tensor, was in zip(tensors, before, strict=True):
            tensor.copy_(was)
            tensor.grad = None
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, lr in zip(optimizer.param_groups, own.tolist(), strict=True):
        group["lr"] = lr
    for module, mode in modes.items():
        module.training = mode
    return lrs[: len(losses)], losses


class OptimizerOfItsOwn:
    """A second optimizer of the same kind, over a copy of the model."""

    def __new__(cls, model, optimizer, batches, lowest, highest):
        twin = copy.deepcopy(model).train()
        pairs = dict(zip(model.parameters(), twin.parameters(), strict=True))
        groups = [group | {"params": [pairs[p] for p in group["params"]]} for group in optimizer.param_groups]
        second = type(optimizer)(groups)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        own = [group["lr"] for group in second.param_groups]
        noted = {}
        for k, (inputs, labels) in enumerate(batches):
            lr = math.exp(math.log(lowest) + k * (math.log(highest) - math.log(lowest)) / (len(batches) - 1))
            loss = F.cross_entropy(twin(inputs), labels)
            if loss.isfinite():
                noted[lr] = loss.item()
            if not loss.isfinite() or loss > 4 * min(noted.values()):
                break
            for group, rate in zip(second.param_groups, own, strict=True):
                group["lr"] = rate / max(own) * lr
            second.zero_grad()
            loss.backward()
            second.step()
        return list(noted), list(noted.values())


def _loop(net, opt, batches, rates, stop=True):
    """The plain loop of the variants below, on whatever they hand it."""
    own = [group["lr"] for group in opt.param_groups]
    losses = []
    for module in net.modules():
        module.training = True
    for (x, y), lr in zip(batches, rates, strict=True):
        for group, start in zip(opt.param_groups, own, strict=True):
            group["lr"] = float(lr) * start / max(own)
        loss = F.cross_entropy(net(x), y)
        if stop and not loss.isfinite():
            break
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if stop and losses[-1] > 4 * min(losses):
            break
    return [float(lr) for lr in rates[: len(losses)]], losses


def steps_of_one_size(model, optimizer, batches, lowest, highest):
    size = (highest - lowest) / (len(batches) - 1)
    return _loop(*copy.deepcopy((model, optimizer)), batches, [lowest + k * size for k in range(len(batches))])


def falling(model, optimizer, batches, lowest, highest):
    return _loop(*copy.deepcopy((model, optimizer)), batches, np.geomspace(highest, lowest, len(batches)))


def measured_once_more(model, optimizer, batches, lowest, highest):
    net, opt = copy.deepcopy((model, optimizer))
    rates = np.geomspace(lowest, highest, len(batches))
    own = np.array([group["lr"] for group in opt.param_groups])
    lrs, losses = [], []
    net.train()
    for lr, batch in zip(rates, batches, strict=True):
        for group, share in zip(opt.param_groups, own / own.max(), strict=True):
            group["lr"] = float(lr * share)
        _closure(net, opt, *batch)
        opt.step()
        loss = _closure(net, opt, *batch)
        if not loss.isfinite():
            break
        lrs.append(lr)
        losses.append(loss)
        if loss > 4 * min(losses):
            break
    return lrs, losses


def cleared_once(model, optimizer, batches, lowest, highest):
    net, opt = copy.deepcopy((model, optimizer))
    opt.zero_grad()
    opt.zero_grad = lambda: None
    return _loop(net, opt, batches, np.geomspace(lowest, highest, len(batches)))


def to_the_last_batch(model, optimizer, batches, lowest, highest):
    return _loop(*copy.deepcopy((model, optimizer)), batches, np.geomspace(lowest, highest, len(batches)), stop=False)


def largest_so_far(model, optimizer, batches, lowest, highest):
    rates = np.geomspace(lowest, highest, len(batches))
    lrs, losses = _loop(*copy.deepcopy((model, optimizer)), batches, rates, stop=False)
    above = [k for k in range(len(losses)) if losses[k] > 4 * np.nanmin(losses[: k + 1])]
    end = above[0] + 1 if above else len(losses)
    return lrs[:end], losses[:end]


def trainable_tensors_kept(model, optimizer, batches, lowest, highest):
    modes = [module.training for module in model.modules()]
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    saved = copy.deepcopy(optimizer.state_dict())
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    model.load_state_dict(kept, strict=False)
    optimizer.load_state_dict(saved)
    model.zero_grad()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.train(mode) if not list(module.children()) else setattr(module, "training", mode)
    return result


def rates_put_back_by_hand(model, optimizer, batches, lowest, highest):
    twin = copy.deepcopy(model)
    own = [group["lr"] for group in optimizer.param_groups]
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    for group, lr in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = lr
    model.load_state_dict(twin.state_dict())
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        module.training = other.training
    for parameter in model.parameters():
        parameter.grad = None
    return result


def copied_one_level_deep(model, optimizer, batches, lowest, highest):
    kept, saved = model.state_dict().copy(), copy.deepcopy(optimizer.state_dict())
    modes = {module: module.training for module in model.modules()}
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    model.load_state_dict(kept)
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    for module, mode in modes.items():
        module.training = mode
    return result


def optimizer_copied_one_level_deep(model, optimizer, batches, lowest, highest):
    twin, saved = copy.deepcopy(model), dict(optimizer.state_dict())
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    optimizer.load_state_dict(saved)
    model.load_state_dict(twin.state_dict())
    optimizer.zero_grad()
    for module, before in zip(model.modules(), twin.modules(), strict=True):
        module.training = before.training
    return result


def model_kept_and_nothing_else(model, optimizer, batches, lowest, highest):
    kept = copy.deepcopy(model.state_dict())
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    model.load_state_dict(kept)
    return result


def both_kept_without_a_copy(model, optimizer, batches, lowest, highest):
    kept = model.state_dict(), optimizer.state_dict()
    modes = [module.training for module in model.modules()]
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    model.zero_grad()
    return result


def equal_steps_to_the_last_batch(model, optimizer, batches, lowest, highest):
    rates = torch.linspace(lowest, highest, len(batches)).tolist()
    return _loop(*copy.deepcopy((model, optimizer)), batches, rates, stop=False)


def modes_and_gradients_left(model, optimizer, batches, lowest, highest):
    kept = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    result = _loop(model, optimizer, batches, np.geomspace(lowest, highest, len(batches)))
    model.load_state_dict(kept)
    optimizer.load_state_dict(saved)
    return result


CORRECT = [
    *(state_dicts_in_a_finally, a_schedule_on_copies, written_to_memory, tensor_by_tensor, OptimizerOfItsOwn),
]
REWRITTEN = {
    "learning rates in equal steps": steps_of_one_size,
    "from highest to lowest": falling,
    "loss noted after the step": measured_once_more,
    "gradients add up": cleared_once,
    "no early stop": to_the_last_batch,
    "NaN passes the comparison": largest_so_far,
    "only the parameters put back": trainable_tensors_kept,
    "moments left": rates_put_back_by_hand,
    "model kept without a copy": copied_one_level_deep,
    "moments kept without a copy": optimizer_copied_one_level_deep,
}
COMBINED = [
    ({"optimizer forgotten", "modes left", "gradients left"}, model_kept_and_nothing_else),
    ({"model kept without a copy", "moments kept without a copy"}, both_kept_without_a_copy),
    ({"learning rates in equal steps", "no early stop"}, equal_steps_to_the_last_batch),
    ({"modes left", "gradients left"}, modes_and_gradients_left),
]
EQUIVALENT = {}
