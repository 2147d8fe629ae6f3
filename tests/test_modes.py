"""Eval mode for a while: afterwards each module is in the mode that it had."""

import pytest
from torch import nn

from helpers.modes import eval_mode, kept_modes


@pytest.fixture
def model():
    """Train mode, but for a BatchNorm and the part that a dropout is in; one layer stands in two places."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.BatchNorm1d(4).eval(), nn.Sequential(nn.Dropout(), shared).eval())
    model[2][0].train()
    shared.train()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_is_in_eval_mode_inside_and_in_its_own_afterwards(model):
    before = modes(model)
    assert len(set(before)) == 2
    with eval_mode(model):
        assert not any(modes(model))
    assert modes(model) == before


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_comes_out_and_the_modes_are_put_back(model, kind):
    before = modes(model)
    with pytest.raises(kind, match="stop"), eval_mode(model):
        raise kind("stop")
    assert modes(model) == before


def test_one_inside_the_other_and_a_body_that_switches_modes(model):
    before = modes(model)
    with eval_mode(model):
        with eval_mode(model[2]), eval_mode(model):
            model.train()
        assert not any(modes(model))
    assert modes(model) == before


def test_train_and_eval_of_a_models_own_are_not_called(model):
    class Own(nn.Sequential):
        def train(self, mode=True):
            raise AssertionError

        eval = train

    own = Own(model)
    with eval_mode(own):
        assert not any(modes(own))
    assert modes(own) == [True, *modes(model)]


def test_modes_are_kept_whatever_the_body_does(model):
    before = modes(model)
    with kept_modes(model):
        assert modes(model) == before
        model.eval()
    assert modes(model) == before


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module"), eval_mode("resnet18"):
        pass
