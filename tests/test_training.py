import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from helpers.data import Examples
from helpers.training import History, accuracy, evaluate, fit, seed_everything


@pytest.fixture
def task():
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 1, 8, 8)
    inputs[:, 0, 0] += 4 * nn.functional.one_hot(labels, 8)
    return Examples(inputs, labels, ("a", "b", "c"))


def test_fit_learns(task, digits_net):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = evaluate(model, task)
    history = fit(model, task, steps=100, lr=0.05, batch_size=20, progress=False)
    assert evaluate(model, task) > max(0.95, before)
    assert np.mean(history.loss[-10:]) < 0.3 * np.mean(history.loss[:5])


def test_same_seed_trains_the_same_model(task, digits_net):
    one, other = copy.deepcopy(digits_net), copy.deepcopy(digits_net)
    for model in (one, other):
        fit(model, task, steps=5, lr=0.01, batch_size=7, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_frozen_parts_stay_bit_identical_buffers_included(task, digits_net):
    digits_net.requires_grad_(False)
    digits_net.fc.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in digits_net.state_dict().items()}
    fit(digits_net, task, steps=4, lr=0.1, progress=False)
    changed = {name for name, tensor in digits_net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_fit_leaves_modes_as_it_found_them_even_after_an_error(task, digits_net):
    digits_net.bn.eval()
    before = [m.training for m in digits_net.modules()]
    fit(digits_net, task, steps=2, lr=0.1, progress=False)
    assert [m.training for m in digits_net.modules()] == before
    with pytest.raises(IndexError):
        fit(digits_net, task._replace(labels=task.labels + 7), steps=2, lr=0.1, progress=False)
    assert [m.training for m in digits_net.modules()] == before


def test_learning_rate_rises_then_falls_to_zero(task, digits_net):
    lr = fit(digits_net, task, steps=50, lr=0.02, progress=False).lr
    assert max(lr) == pytest.approx(0.02) and lr.index(max(lr)) in (4, 5)
    assert lr[0] == pytest.approx(0.02 / 5) and lr[-1] < 0.001
    assert lr[5:] == sorted(lr[5:], reverse=True)


def test_every_example_is_used_once_per_pass(task):
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:, 0, 1, 1].tolist()))
    fit(model, task, steps=6, lr=0.1, batch_size=20, progress=False)
    assert sorted(seen[:60]) == sorted(seen[60:]) == sorted(task.inputs[:, 0, 1, 1].tolist())


def test_history_holds_validation_accuracy_and_draws_itself(task, digits_net):
    import matplotlib.pyplot as plt

    history = fit(digits_net, task, steps=30, lr=0.01, validation=task, progress=False)
    assert history.accuracy == {30: evaluate(digits_net, task)}
    assert history.seconds > 0
    fig, ax = plt.subplots()
    history.plot(ax)
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "cross-entropy (nats)"
    assert len(ax.lines) == 2
    plt.close(fig)
    assert History().loss == []


def test_seed_everything_seeds_all_three():
    seed_everything(7)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    seed_everything(7)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


def test_accuracy_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 1.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0."),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0."),
        ({"lr": -1.0}, "lr must be a number above 0, got -1.0. 1e-3 is where to start with AdamW."),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, got 1.5."),
        (
            {"train": Examples(torch.zeros(0, 1), torch.zeros(0), ())},
            "train must hold at least 1 example, got none. Look at how it was selected.",
        ),
    ],
)
def test_fit_tells_bad_input_in_one_sentence(task, digits_net, change, message):
    with pytest.raises(ValueError) as error:
        fit(digits_net, **({"train": task, "steps": 1, "lr": 0.1, "progress": False} | change))
    assert str(error.value) == message


def test_a_model_with_nothing_to_train_is_told(task, digits_net):
    digits_net.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        fit(digits_net, task, steps=1, lr=0.1)
    wanted = "nothing to train: all 6 parameters are frozen. Unfreeze the head: model.fc.requires_grad_(True)."
    assert str(error.value) == wanted


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (torch.randn(4, 2), torch.zeros(3), ValueError, "labels must have shape (4,), got (3,)."),
        (torch.randn(4), torch.zeros(4), ValueError, "logits must have shape (n, classes), got (4,)."),
        (torch.randn(0, 3), torch.zeros(0), ValueError, "logits must have shape (n, classes), got (0, 3)."),
        ([[1, 2]], torch.zeros(1), TypeError, "logits must be a tensor of shape (n, classes), got a list."),
    ],
)
def test_accuracy_tells_bad_input_in_one_sentence(logits, labels, kind, message):
    with pytest.raises(kind) as error:
        accuracy(logits, labels)
    assert str(error.value) == message
