"""Exercise 2.3 in other styles."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F


def by_gradient_descent(features, labels, classes, penalty):
    head = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.SGD(
        [{"params": [head.weight], "weight_decay": penalty}, {"params": [head.bias]}], lr=0.3, momentum=0.9, nesterov=True
    )
    for _ in range(600):
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return head


def by_hand(features, labels, classes, penalty):
    x = np.c_[features.numpy().astype(float), np.ones(len(features))]
    y = np.eye(classes)[labels.numpy()]
    w = np.zeros((x.shape[1], classes))
    keep = np.full((x.shape[1], 1), penalty)
    keep[-1] = 0
    step = 1 / (np.linalg.norm(x, 2) ** 2 / (2 * len(x)) + penalty)
    for _ in range(4000):
        scores = x @ w
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        w -= step * (x.T @ (p - y) / len(x) + keep * w)
    head = nn.Linear(features.shape[1], classes)
    head.load_state_dict({"weight": torch.tensor(w[:-1].T).float(), "bias": torch.tensor(w[-1]).float()})
    return head


def until_the_gradient_is_small(features, labels, classes, penalty):
    weight = (0.01 * torch.randn(classes, features.shape[1])).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    for _ in range(3000):
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * (weight**2).sum()
        gradients = torch.autograd.grad(loss, [weight, bias])
        if torch.cat([g.flatten() for g in gradients]).norm() < 1e-3:
            break
        with torch.no_grad():
            for tensor, gradient in zip((weight, bias), gradients, strict=True):
                tensor -= 0.1 * gradient
    head = nn.Linear(features.shape[1], classes)
    head.weight.data, head.bias.data = weight.detach(), bias.detach()
    return head


def by_scikit_learn(features, labels, classes, penalty):
    seen = sorted(set(labels.tolist()))
    model = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-8, max_iter=2000).fit(features.numpy(), labels.numpy())
    head = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-20.0)  # never seen, never said
        head.weight[seen] = torch.from_numpy(model.coef_).float()
        head.bias[seen] = torch.from_numpy(model.intercept_).float()
    return head


def by_adam(features, labels, classes, penalty):
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        scores = features.matmul(weight.t()).add(bias)
        nll = -(scores.log_softmax(-1) * F.one_hot(labels, classes)).sum(-1).mean()
        (nll + weight.pow(2).sum().mul(penalty).div(2)).backward()
        optimizer.step()
        schedule.step()
    head = nn.Linear(features.shape[1], classes)
    head.weight, head.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return head


def _descend(features, labels, classes, loss, decay, bias_decay=0.0, steps=800, lr=0.3):
    head = nn.Linear(features.shape[1], classes)
    groups = [{"params": head.weight, "weight_decay": decay}, {"params": head.bias, "weight_decay": bias_decay}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(head(features), labels).backward()
        optimizer.step()
    return head


def decay_for_all(features, labels, classes, penalty):
    return _descend(features, labels, classes, F.cross_entropy, penalty, penalty)


def decay_twice(features, labels, classes, penalty):
    return _descend(features, labels, classes, F.cross_entropy, 2 * penalty)


def penalty_of_one_example(features, labels, classes, penalty):
    return by_adam(features, labels, classes, penalty / len(labels))


def decay_twice_for_all(features, labels, classes, penalty):
    return _descend(features, labels, classes, F.cross_entropy, 2 * penalty, 2 * penalty)


def double_softmax_decay_twice(features, labels, classes, penalty):
    return _descend(features, labels, classes, lambda z, y: F.cross_entropy(z.softmax(1), y), 2 * penalty, steps=3000)


def seen_classes_and_decay_for_all(features, labels, classes, penalty):
    return _descend(features, labels, len(labels.unique()), F.cross_entropy, penalty, penalty)


CORRECT = [by_gradient_descent, by_hand, until_the_gradient_is_small, by_scikit_learn, by_adam]
REWRITTEN = {
    "penalty on the bias too": decay_for_all,
    "penalty not halved": decay_twice,
    "sum in place of mean": penalty_of_one_example,
}
COMBINED = [
    ({"penalty not halved", "penalty on the bias too"}, decay_twice_for_all),
    ({"softmax before cross-entropy", "penalty not halved"}, double_softmax_decay_twice),
    ({"classes counted from the labels", "penalty on the bias too"}, seen_classes_and_decay_for_all),
]

EQUIVALENT = {
    "head = nn.Linear(features.shape[1], classes, device=features.device) -> "
    "head = nn.Linear(features.shape[1], classes)": "works on the CPU only, which costs no points",
    "nn.init.zeros_(head.weight) -> pass": "the objective is convex: every start ends at the same head",
    "nn.init.zeros_(head.weight) -> head.weight": "the objective is convex: every start ends at the same head",
    "nn.init.zeros_(head.bias) -> pass": "the objective is convex: every start ends at the same head",
    "nn.init.zeros_(head.bias) -> head.bias": "the objective is convex: every start ends at the same head",
    "… torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_change=1e-10, line_search_fn='strong_wolfe') -> "
    "… torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn='strong_wolfe')": "1e-9 is strict enough, too",
    "… tolerance_change=1e-10, line_search_fn='strong_wolfe') -> "
    "… tolerance_change=1e-10)": "ends at the same head: gradients below 4e-5 on the chapter's features",
    "… torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_change=1e-10, … -> "
    "… torch.optim.LBFGS(head.parameters(), max_iter=501, tolerance_change=1e-10, …": "one step more or less of 500",
    "… torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_change=1e-10, … -> "
    "… torch.optim.LBFGS(head.parameters(), max_iter=499, tolerance_change=1e-10, …": "one step more or less of 500",
    "… max_iter=500, tolerance_change=1e-10, line_search_fn='strong_wolfe') -> "
    "… max_iter=500, tolerance_change=2e-10, line_search_fn='strong_wolfe')": "stops at 2e-10 instead of 1e-10",
}
