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


def to_the_mean_of_squared_errors(features, labels, classes, penalty):
    """Regression on zeros and ones, in closed form."""
    x, y = features.double(), F.one_hot(labels, classes).double()
    center, mean = x.mean(0), y.mean(0)
    x = x - center
    weight = torch.linalg.solve(x.T @ x / len(x) + penalty / 2 * torch.eye(x.shape[1]).to(x), x.T @ (y - mean) / len(x)).T
    return partial(F.linear, weight=weight.to(features), bias=(mean - weight @ center).to(features))


def by_class_weights(features, labels, classes, penalty):
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return solution(features, labels, classes, penalty, loss=partial(F.cross_entropy, weight=len(labels) / counts))


def penalty_on_the_norm(features, labels, classes, penalty):
    """The norm of the weights in place of its square."""
    head = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + penalty / 2 * head.weight.norm()
        loss.backward()
        return loss

    optimizer.step(objective)
    return head


def decay_of_adamw(features, labels, classes, penalty):
    """On the weights alone."""
    head = nn.Linear(features.shape[1], classes)
    groups = [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.03, weight_decay=penalty)
    for _ in range(400):
        loss = nn.CrossEntropyLoss()(head(features), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def bias_of_the_frequencies(features, labels, classes, penalty):
    """Where it would be without features, and left there."""
    bias = (torch.bincount(labels, minlength=classes) + 1.0).log()
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return partial(F.linear, weight=weight.detach(), bias=bias)


def two_hundred_small_steps(features, labels, classes, penalty):
    head = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(200):
        loss = F.cross_entropy(head(features), labels) + penalty / 2 * head.weight.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def only_classes_that_occur(features, labels, classes, penalty):
    """The labels are numbered anew."""
    _, renumbered = labels.unique(return_inverse=True)
    return solution(features, renumbered, int(renumbered.max()) + 1, penalty)


CORRECT = [by_gradient_descent, by_hand, until_the_gradient_is_small, by_scikit_learn]
REWRITTEN = {
    "penalty on the bias too": partial(by_gradient_descent, on_bias=1),
    "penalty not halved": partial(by_gradient_descent, on_weights=2),
    "penalty forgotten": partial(by_gradient_descent, on_weights=0),
    "weight decay of AdamW": decay_of_adamw,
    "hardly trained": two_hundred_small_steps,
}
BROKEN = {
    1: [to_the_mean_of_squared_errors, by_class_weights],
    2: [penalty_on_the_norm, decay_of_adamw, partial(solution, times=0.5)],
    3: [bias_of_the_frequencies, partial(solution, on_bias=0.5)],
    4: [partial(solution, steps=15), two_hundred_small_steps],
    5: [only_classes_that_occur],
}
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
