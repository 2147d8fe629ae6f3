"""Exercise 4.4 in other styles."""

import copy
import operator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from helpers.features import drop_head, eval_mode, extract, linear_probe


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


CORRECT = [with_a_hook, trained_in_place, by_gradient_descent, by_scikit_learn, identity_for_a_moment]
REWRITTEN = {
    "features in train mode": batches_in_train_mode,
    "layer replaced": put_in_its_place,
}
BROKEN = {}
COMBINED = [
    ({"features in train mode", "penalty ignored"}, train_mode_and_no_penalty),
    ({"layer replaced", "always fc"}, fc_replaced),
]
EQUIVALENT = {}
