"""A snapshot of a model tells what has changed since, and puts it back."""

import pytest
import torch
from torch import nn

from grader.checks import traces
from grader.near import same


def drawn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net(torch.randn(4, 3)).sum().backward()
    return net


@pytest.fixture
def model():
    return drawn()


def nothing(_):
    pass


def moved_buffers(net):
    net.train()[1](torch.randn(4, 3))
    net[1].eval()


def other_values(net):
    with torch.no_grad():
        net[0].weight += 1


CHANGES = {
    nothing: set(),
    moved_buffers: {"buffers that moved"},
    other_values: {"parameters that moved"},
    lambda net: net.requires_grad_(True): {"parameters whose requires_grad changed"},
    lambda net: net.eval(): {"modules switched to eval mode"},
    lambda net: net.train(): {"modules switched to train mode"},
    lambda net: net.zero_grad(): {"gradients that changed"},
    lambda net: setattr(net[0].bias, "grad", torch.ones(3)): {"gradients that changed"},
    lambda net: setattr(net, "1", nn.Identity().eval()): {
        *("parameters that moved", "buffers that moved", "parameters whose requires_grad changed", "gradients that changed"),
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told_and_put_back(model, change):
    before, snapshot = drawn(), traces.of(model)
    change(model)
    facts = traces.changes(before, traces.of(model), *traces.KINDS)
    assert {fact for fact, how_much in facts.items() if how_much == "some"} == CHANGES[change]
    if isinstance(model[1], nn.BatchNorm1d):
        traces.put_back(model, snapshot)
        assert set(traces.changes(before, traces.of(model), *traces.KINDS).values()) == {"none"}


def test_names_that_may_change_are_left_out(model):
    before = drawn()
    other_values(model)
    assert traces.changed(before, traces.of(model), "parameters") == ["0.weight"]
    assert traces.changed(before, traces.of(model), "parameters", but="0.") == []


def test_kept_puts_back_what_is_named_whatever_happens(model):
    with pytest.raises(RuntimeError), traces.kept(model, "modes", "buffers"):
        moved_buffers(model)
        other_values(model)
        model.eval()
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not model[1].running_mean.any()


def test_a_parameter_that_came_later_keeps_its_gradient(model):
    snapshot = traces.of(model)
    model.append(nn.Linear(3, 3))
    model[3].weight.grad = torch.ones(3, 3)
    traces.put_back(model, snapshot)
    assert model[3].weight.grad is not None


@pytest.mark.parametrize(
    ("value", "expected", "are"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), True),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1), False),
        (torch.tensor([1]), torch.tensor([1]), True),
        (None, None, True),
        (True, 1, False),
        (torch.ones(1), None, False),
    ],
)
def test_the_same_is_to_the_last_bit(value, expected, are):
    assert same(value, expected) is are
