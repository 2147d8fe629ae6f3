import copy
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import Examples
from helpers.features import drop_head, extract
from helpers.finetune import EarlyStopping
from helpers.training import History, accuracy, evaluate, fit, frozen_modules, seed_everything, train_mode

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py


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
    first, second = copy.deepcopy(digits_net), copy.deepcopy(digits_net)
    for model in (first, second):
        fit(model, task, steps=5, lr=0.01, batch_size=7, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_frozen_parts_stay_bit_identical_buffers_included(task, digits_net):
    digits_net.requires_grad_(False)
    digits_net.fc.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in digits_net.state_dict().items()}
    fit(digits_net, task, steps=4, lr=0.1, progress=False)
    changed = {name for name, tensor in digits_net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


@pytest.mark.cpu(reason="a label out of range ends CUDA for the whole process")
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
    used = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.register_forward_pre_hook(lambda _, args: used.extend(args[0][:, 0, 1, 1].tolist()))
    fit(model, task, steps=6, lr=0.1, batch_size=20, progress=False)
    assert sorted(used[:60]) == sorted(used[60:]) == sorted(task.inputs[:, 0, 1, 1].tolist())


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


@pytest.mark.cpu(reason="gradients of a convolution on a GPU need not have the same bits twice")
def test_fit_is_adamw_on_the_documented_schedule_to_the_last_bit(task, digits_net):
    twin = copy.deepcopy(digits_net)
    history = fit(digits_net, task, steps=13, lr=0.03, batch_size=25, weight_decay=0.2, seed=5, device="cpu", progress=False)
    seed_everything(5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.03, weight_decay=0.2)
    losses, lrs, queue = [], [], torch.randperm(60)
    for step in range(13):
        lr = 0.03 * min(step + 1, 0.5 + 0.5 * np.cos(np.pi * max(0, step - 1) / 13))
        optimizer.param_groups[0]["lr"] = lr
        if len(queue) < 25:
            queue = torch.randperm(60)
        rows, queue = queue[:25], queue[25:]
        loss = F.cross_entropy(twin(task.inputs[rows]), task.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        lrs.append(lr)
    assert (history.loss, history.lr) == (losses, lrs)
    assert all(torch.equal(a, b) for a, b in zip(digits_net.state_dict().values(), twin.state_dict().values(), strict=True))


def test_groups_keep_their_own_learning_rate_and_weight_decay(task, digits_net):
    settings = []

    def before_step(step, optimizer, scheduler):
        assert scheduler.optimizer is optimizer
        settings.append((step, [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]))

    groups = [{"params": digits_net.conv.parameters(), "lr": 0.001}, {"params": [digits_net.fc.weight], "weight_decay": 0.5}]
    history = fit(digits_net, task, steps=8, lr=0.1, groups=groups, before_step=before_step, device="cpu", progress=False)
    assert [step for step, _ in settings] == list(range(8))
    assert [group[1][0] for _, group in settings] == history.lr
    for _, ((low, decay), (high, own_decay)) in settings:
        assert low == pytest.approx(high / 100) and (decay, own_decay) == (1e-4, 0.5)
    assert "weight_decay" not in groups[0]  # the caller's are not written into


def test_what_is_in_no_group_does_not_train(task, digits_net):
    before = {name: tensor.clone() for name, tensor in digits_net.named_parameters()}
    fit(digits_net, task, steps=2, lr=0.1, groups=[{"params": [digits_net.fc.weight]}], progress=False)
    changed = [name for name, tensor in digits_net.named_parameters() if not torch.equal(tensor, before[name])]
    assert changed == ["fc.weight"]


def test_accuracy_is_measured_every_so_many_steps_and_changes_nothing(task, digits_net):
    twin = copy.deepcopy(digits_net)
    history = fit(digits_net, task, steps=7, lr=0.02, validation=task, every=3, progress=False)
    assert list(history.accuracy) == [3, 6, 7]
    assert history.loss == fit(twin, task, steps=7, lr=0.02, progress=False).loss
    assert history.accuracy[7] == evaluate(digits_net, task)


def test_groups_may_hold_what_adamw_takes_one_parameter_or_pairs_with_names(task, digits_net):
    weight, bias = digits_net.fc.weight, digits_net.fc.bias
    before = weight.detach().clone(), bias.detach().clone()
    fit(digits_net, task, steps=2, lr=0.1, groups=[{"params": weight}, {"params": [("fc.bias", bias)]}], progress=False)
    assert not torch.equal(weight, before[0]) and not torch.equal(bias, before[1])


def test_early_stopping_needs_no_more_than_step_and_restore(task, digits_net):
    class Second:
        scores, restored = (), False

        def step(self, score):
            self.scores = (*self.scores, score)
            return len(self.scores) == 2

        def restore(self):
            self.restored = True

    mine = Second()
    history = fit(digits_net, task, steps=9, lr=0.1, validation=task, every=2, early_stopping=mine, progress=False)
    assert len(history.loss) == 4 and mine.restored and list(history.accuracy.values()) == list(mine.scores)


def test_early_stopping_ends_the_run_in_the_best_state(task, digits_net):
    worse = task._replace(labels=(task.labels + 1) % 3)  # the better the model gets, the lower the score
    states = {}

    def before_step(step, optimizer, scheduler):
        states[step] = {name: tensor.clone() for name, tensor in digits_net.state_dict().items()}

    stopping = EarlyStopping(digits_net, patience=2)
    settings = {"before_step": before_step, "validation": worse, "every": 10, "early_stopping": stopping, "progress": False}
    history = fit(digits_net, task, steps=400, lr=0.05, **settings)
    best = max(history.accuracy, key=history.accuracy.get)
    assert list(history.accuracy) == list(range(10, best + 30, 10)) and len(history.loss) == best + 20 < 400
    assert all(torch.equal(tensor, states[best][name]) for name, tensor in digits_net.state_dict().items())
    assert evaluate(digits_net, worse) == stopping.best == history.accuracy[best]


def test_a_run_that_is_not_stopped_ends_in_the_best_state_too(task, digits_net):
    stopping = EarlyStopping(digits_net, patience=100)
    history = fit(digits_net, task, steps=25, lr=0.3, validation=task, every=4, early_stopping=stopping, progress=False)
    assert evaluate(digits_net, task) == max(history.accuracy.values())


# --- modes --------------------------------------------------------------------------------------------------------


def in_train_mode(model):
    train_mode(model)
    assert {module for module in model.modules() if not module.training} == frozen_modules(model)
    return [name for name, module in model.named_modules() if module.training]


def block(**settings):
    return nn.Sequential(
        OrderedDict(conv=nn.Conv1d(1, 2, 3), norm=nn.BatchNorm1d(2, **settings), drop=nn.Dropout(0.5), relu=nn.ReLU())
    )


def test_modules_without_parameters_follow_the_nearest_around_them():
    model = nn.Sequential(OrderedDict(low=block(affine=False), top=block(), drop=nn.Dropout(0.5)))
    model.low.eval()
    everything = [name for name, _ in model.named_modules()]
    assert in_train_mode(model) == everything
    model.low.requires_grad_(False)
    assert in_train_mode(model) == [name for name in everything if not name.startswith("low")]
    model.top.norm.requires_grad_(False)
    assert "top.norm" not in in_train_mode(model) and model.top.drop.training
    model.requires_grad_(False)
    assert in_train_mode(model) == []
    assert in_train_mode(nn.Sequential(nn.Dropout(0.5))) == ["", "0"]


def test_the_statistics_of_a_frozen_part_never_move():
    low = nn.Sequential(block(affine=False), nn.InstanceNorm1d(2, track_running_stats=True))
    model = nn.Sequential(OrderedDict(low=low.requires_grad_(False), top=nn.BatchNorm1d(2, affine=False), fc=nn.Linear(7, 3)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_mode(model)
    model(torch.randn(5, 1, 9))
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    assert changed == ["top.running_mean", "top.running_var", "top.num_batches_tracked"]


def test_a_module_with_frozen_parameters_of_its_own_does_not_silence_what_it_holds():
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.drop, model.head = nn.Dropout(0.5), nn.Linear(2, 2)
    assert in_train_mode(model) == ["drop", "head"]


@pytest.mark.parametrize("first", [True, False])
def test_a_module_used_in_a_frozen_and_in_a_training_part_trains(first):
    drop = nn.Dropout(0.5)
    parts = [nn.Sequential(nn.Linear(2, 2), drop), nn.Sequential(nn.Linear(2, 2), drop)]
    parts[first].requires_grad_(False)
    model = nn.Sequential(*parts)
    assert in_train_mode(model).count("0.1") == 1 and drop.training


def test_fit_trains_a_head_on_a_frozen_part_as_on_its_features(task):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False), nn.Dropout(0.5))
    backbone(task.inputs)
    model = nn.Sequential(OrderedDict(backbone=backbone.requires_grad_(False), fc=nn.Linear(8, 3)))
    head, features = copy.deepcopy(model.fc), task._replace(inputs=extract(drop_head(model), task.inputs))
    history = fit(model, task, steps=10, lr=0.05, batch_size=20, progress=False)
    assert history.loss == pytest.approx(fit(head, features, steps=10, lr=0.05, batch_size=20, progress=False).loss, rel=1e-5)
    torch.testing.assert_close(model.fc.weight, head.weight)


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
        (
            {"groups": [{"params": [nn.Parameter(torch.zeros(1))]}]},
            "groups must hold parameters of the model, got 1 that are not in it. Make them after its modules have changed.",
        ),
        (
            {"groups": [torch.zeros(2)]},
            'groups must be dicts with "params", got a tensor of shape (2,). See parameter_groups.',
        ),
        ({"groups": []}, "groups must hold parameters of the model, got no group. Make them after its modules have changed."),
        ({"every": 0}, "every must be a whole number of at least 1, got 0."),
        ({"every": 2}, "every and early_stopping need something to measure, got no validation. Pass validation=examples."),
        (
            {"early_stopping": EarlyStopping(nn.Linear(1, 1), 1), "validation": 1},
            "early_stopping must know when to measure, got no `every`. Pass every=20, say.",
        ),
        (
            {"early_stopping": EarlyStopping(nn.Linear(1, 1), 1), "validation": 1, "every": 1},
            "early_stopping must belong to the model that trains, got that of another: EarlyStopping(model, patience).",
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
