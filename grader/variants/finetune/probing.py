"""Exercise 4.4 in other styles."""

import copy
import operator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from helpers.features import drop_head, extract, linear_probe
from helpers.modes import eval_mode


def with_a_hook(model, head, inputs, labels, penalty):
    layer = operator.attrgetter(head)(model) if head.isidentifier() else model.get_submodule(head)
    table = []
    handle = layer.register_forward_pre_hook(lambda _, args: table.append(args[0].detach()))
    with eval_mode(model):
        for batch in inputs.split(7):
            model(batch)
    handle.remove()
    new = linear_probe(torch.cat(table), labels, layer.weight.shape[0], penalty)
    layer.load_state_dict(new.state_dict())


def trained_in_place(model, head, inputs, labels, penalty):
    layer = dict(model.named_modules())[head]
    backbone = drop_head(model, head).eval()
    features = backbone(inputs).detach()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(features), labels) + 0.5 * penalty * (layer.weight**2).sum()
        value.backward()
        return value

    optimizer.step(objective)


def by_gradient_descent(model, head, inputs, labels, penalty):
    twin = copy.deepcopy(model)
    twin.train(False)
    layer, parts = twin.get_submodule(head), {}
    layer.forward = lambda features: parts.setdefault("features", features)
    twin(inputs)
    features = parts["features"].detach()
    weight = torch.randn(layer.weight.shape).mul_(0.01).requires_grad_()
    bias = torch.zeros(layer.out_features, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": penalty}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, nesterov=True)
    for _ in range(400):
        weight.grad, bias.grad = torch.autograd.grad(F.cross_entropy(features @ weight.T + bias, labels), (weight, bias))
        optimizer.step()
    own = model.get_submodule(head)
    torch.nn.utils.vector_to_parameters(torch.cat([weight.flatten(), bias]).detach(), own.parameters())


def by_scikit_learn(model, head, inputs, labels, penalty):
    features = extract(drop_head(model, head), inputs, batch_size=8).numpy()
    fitted = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=2000).fit(features, labels.numpy())
    layer = model.get_submodule(head)
    weight, bias = np.zeros(tuple(layer.weight.shape)), np.full(layer.out_features, -30.0)
    weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    model.load_state_dict({f"{head}.weight": torch.tensor(weight), f"{head}.bias": torch.tensor(bias)}, strict=False)


def identity_for_a_moment(model, head, inputs, labels, penalty):
    *path, last = head.split(".")
    parent = model.get_submodule(".".join(path))
    layer = getattr(parent, last)
    setattr(parent, last, nn.Identity())
    try:
        with eval_mode(model), torch.inference_mode():
            features = model(inputs)
    finally:
        setattr(parent, last, layer)
    probe = linear_probe(features.clone(), labels, layer.out_features, penalty)
    for mine, theirs in zip(layer.parameters(), probe.parameters(), strict=True):
        mine.data[:] = theirs.data


def batches_in_train_mode(model, head, inputs, labels, penalty):
    backbone = drop_head(model, head).train()
    table = torch.cat([backbone(batch).detach() for batch in inputs.chunk(3)])
    layer = model.get_submodule(head)
    layer.load_state_dict(linear_probe(table, labels, layer.out_features, penalty).state_dict())


def put_in_its_place(model, head, inputs, labels, penalty):
    parent, _, name = head.rpartition(".")
    features = extract(drop_head(model, head), inputs)
    classes = getattr(model.get_submodule(parent), name).out_features
    setattr(model.get_submodule(parent), name, linear_probe(features, labels, classes, penalty))


def train_mode_and_no_penalty(model, head, inputs, labels, penalty):
    layer = model.get_submodule(head)
    layer.load_state_dict(linear_probe(drop_head(model, head)(inputs), labels, layer.out_features).state_dict())


def fc_replaced(model, head, inputs, labels, penalty):
    put_in_its_place(model, "fc", inputs, labels, penalty)


def _into(layer, probe):
    layer.load_state_dict(probe.state_dict())


def _probe_of(model, head, features, labels, penalty):
    return linear_probe(features, labels, model.get_submodule(head).out_features, penalty)


def with_c_as_the_penalty(model, head, inputs, labels, penalty):
    features, layer = extract(drop_head(model, head), inputs), model.get_submodule(head)
    fitted = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=2000).fit(features.numpy(), labels.numpy())
    with torch.no_grad():
        layer.weight.zero_()[fitted.classes_] = torch.tensor(fitted.coef_, dtype=torch.float32)
        layer.bias.fill_(-30.0)[fitted.classes_] = torch.tensor(fitted.intercept_, dtype=torch.float32)


def with_adamw(model, head, inputs, labels, penalty):
    features, layer = extract(drop_head(model, head), inputs), nn.Linear(inputs.shape[1], inputs.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=penalty)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
    _into(model.get_submodule(head), layer)


def with_moved_statistics(model, head, inputs, labels, penalty):
    twin = copy.deepcopy(model).train()
    twin(inputs)
    _into(model.get_submodule(head), _probe_of(model, head, extract(drop_head(twin, head), inputs), labels, penalty))


def with_dropout_on(model, head, inputs, labels, penalty):
    backbone = drop_head(model, head).eval()
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    _into(model.get_submodule(head), _probe_of(model, head, backbone(inputs).detach(), labels, penalty))


def the_last_linear_layer(model, head, inputs, labels, penalty):
    *_, name = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    _into(model.get_submodule(name), _probe_of(model, head, extract(drop_head(model, head), inputs), labels, penalty))


def the_attribute_of_that_name(model, head, inputs, labels, penalty):
    features = extract(drop_head(model, head), inputs)
    _into(getattr(model, head), _probe_of(model, head, features, labels, penalty))


def in_another_layer_of_parameters(model, head, inputs, labels, penalty):
    probe = _probe_of(model, head, extract(drop_head(model, head), inputs), labels, penalty)
    for name, parameter in probe.named_parameters():
        setattr(model.get_submodule(head), name, nn.Parameter(parameter.detach().clone()))


def then_in_train_mode(model, head, inputs, labels, penalty):
    identity_for_a_moment(model, head, inputs, labels, penalty)
    model.train()


def then_all_trainable(model, head, inputs, labels, penalty):
    identity_for_a_moment(model, head, inputs, labels, penalty)
    model.requires_grad_(True)


def then_a_pass_in_train_mode(model, head, inputs, labels, penalty):
    identity_for_a_moment(model, head, inputs, labels, penalty)
    with torch.no_grad():
        model(inputs)


def the_backbone_too(model, head, inputs, labels, penalty):
    identity_for_a_moment(model, head, inputs, labels, penalty)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "bn1.weight":
                parameter.mul_(0.99)


def as_many_rows_as_there_are(model, head, inputs, labels, penalty):
    probe = linear_probe(extract(drop_head(model, head), inputs), labels, None, penalty)
    layer = model.get_submodule(head)
    with torch.no_grad():
        layer.weight[: probe.out_features] = probe.weight
        layer.bias[: probe.out_features] = probe.bias


def cut_to_the_classes_there_are(model, head, inputs, labels, penalty):
    probe = linear_probe(extract(drop_head(model, head), inputs), labels, None, penalty)
    layer = model.get_submodule(head)
    layer.weight.data, layer.bias.data = probe.weight.data, probe.bias.data


def with_hooks_that_stay(model, head, inputs, labels, penalty):
    layer, table = model.get_submodule(head), []
    layer.register_forward_hook(lambda module, entered, left: table.append(entered[0]))
    with eval_mode(model), torch.no_grad():
        model(inputs)
    _into(layer, _probe_of(model, head, table[0], labels, penalty))


def with_a_forward_that_stays(model, head, inputs, labels, penalty):
    layer, table = model.get_submodule(head), {}

    def forward(features):
        table["features"] = features.detach()
        return F.linear(features, layer.weight, layer.bias)

    layer.forward = forward
    with eval_mode(model):
        model(inputs)
    _into(layer, _probe_of(model, head, table["features"], labels, penalty))


CORRECT = [with_a_hook, trained_in_place, by_gradient_descent, by_scikit_learn, identity_for_a_moment]
REWRITTEN = {
    "features in train mode": batches_in_train_mode,
    "layer replaced": put_in_its_place,
    "penalty on another scale": with_c_as_the_penalty,
}
BROKEN = {
    1: [with_c_as_the_penalty, with_adamw],
    2: [batches_in_train_mode, with_dropout_on, with_moved_statistics],
    3: [the_last_linear_layer, the_attribute_of_that_name],
    4: [put_in_its_place, in_another_layer_of_parameters],
    5: [then_in_train_mode, then_all_trainable, then_a_pass_in_train_mode, the_backbone_too],
    6: [as_many_rows_as_there_are, cut_to_the_classes_there_are],
    7: [with_hooks_that_stay, with_a_forward_that_stays],
}
COMBINED = [
    ({"features in train mode", "penalty ignored"}, train_mode_and_no_penalty),
    ({"layer replaced", "always fc"}, fc_replaced),
]
EQUIVALENT = {}
