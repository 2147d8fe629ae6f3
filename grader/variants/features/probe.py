"""Exercise 2.3 in other styles."""

from functools import partial

import numpy as np
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from grader.checks.features.probe import solution


def by_gradient_descent(features, labels, classes, penalty, on_weights=1.0, on_bias=0.0):
    head = nn.Linear(features.shape[1], classes)
    decayed = (head.weight, on_weights), (head.bias, on_bias)
    groups = [{"params": [parameter], "weight_decay": times * penalty} for parameter, times in decayed]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9, nesterov=True)
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
    decay = penalty * np.r_[np.ones(len(w) - 1), 0][:, None]
    step = 1 / (np.linalg.norm(x, 2) ** 2 / (2 * len(x)) + penalty)
    for _ in range(4000):
        w -= step * (x.T @ (softmax(x @ w, axis=1) - y) / len(x) + decay * w)
    head = nn.Linear(features.shape[1], classes)
    head.load_state_dict({"weight": torch.tensor(w[:-1].T).float(), "bias": torch.tensor(w[-1]).float()})
    return head


def until_the_gradient_is_small(features, labels, classes, penalty):
    head = nn.Linear(features.shape[1], classes)
    for _ in range(3000):
        loss = F.cross_entropy(head(features), labels) + penalty / 2 * (head.weight**2).sum()
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        if torch.cat([gradient.flatten() for gradient in gradients]).norm() < 1e-3:
            break
        with torch.no_grad():
            for parameter, gradient in zip(head.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
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


CORRECT = [by_gradient_descent, by_hand, until_the_gradient_is_small, by_scikit_learn]
REWRITTEN = {
    "penalty on the bias too": partial(by_gradient_descent, on_bias=1),
    "penalty not halved": partial(by_gradient_descent, on_weights=2),
    "penalty forgotten": partial(by_gradient_descent, on_weights=0),
}
BROKEN = {}
COMBINED = [
    ({"penalty not halved", "penalty on the bias too"}, partial(by_gradient_descent, on_weights=2, on_bias=2)),
    ({"sum in place of mean", "no bias"}, partial(solution, loss=partial(F.cross_entropy, reduction="sum"), bias=False)),
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
