import copy
import inspect
import io
import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

from helpers.backbones import glyphnet
from helpers.batchnorm import (
    MEANINGS,
    adabn,
    batch_norm,
    drift,
    freeze,
    moved,
    pooled_statistics,
    recompute_statistics,
    unfreeze,
    what_is_frozen,
)
from helpers.data import digits
from helpers.features import drop_head, eval_mode, extract, linear_probe
from helpers.training import accuracy

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py

KINDS = {
    "1d, (n, channels)": (nn.BatchNorm1d, ()),
    "1d, (n, channels, length)": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (2, 3)),
    "3d": (nn.BatchNorm3d, (2, 2, 2)),
    "sync": (nn.SyncBatchNorm, (2, 3)),
    "with activation": (BatchNormAct2d, (2, 3)),
}
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(MEANINGS, size)]
LAZY = "a parameter without a shape cannot be a tensor of the fake GPU"
properties = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def shift(model, seed=0):
    """Other values than a fresh BatchNorm's, so that nothing is equal by coincidence."""
    generator = torch.Generator().manual_seed(seed)
    for layer in batch_norms(model):
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            layer.num_batches_tracked.fill_(7)
        for parameter in layer.parameters():
            parameter.data.copy_(1 + 0.3 * torch.randn(layer.num_features, generator=generator))
    return model


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def layer_and_input(kind, **options):
    build, rest = KINDS[kind]
    return shift(build(3, **options)), 2 + 3 * torch.randn(4, 3, *rest)


@pytest.fixture
def net():
    """Two BatchNorms with dropout between them, in train mode."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    return shift(nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 3)))


@pytest.fixture
def images():
    return torch.randn(12, 1, 6, 6)


def everything(model):
    """All that a freeze or a measurement may not leave changed, as plain values."""
    entries = []
    for name, module in model.named_modules():
        plain = {key: value for key, value in module.__dict__.items() if isinstance(value, bool | int | float | str | None)}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        entries.append((name, type(module), module.training, plain, hooks, sorted(module.__dict__)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        entries.append((name, id(tensor), tensor.requires_grad, tensor.detach().cpu().numpy().tobytes(), tensor.grad))
    return entries


def stored(model):
    return [(layer.running_mean.clone(), layer.running_var.clone()) for layer in batch_norms(model)]


def assert_near(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# --- batch_norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS)[:5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.5}]
)
def test_batch_norm_is_torchs_forward_with_its_buffers_and_its_gradients(kind, training, options):
    layer, x = layer_and_input(kind, **options)
    twin = copy.deepcopy(layer.train(training))
    x.requires_grad_()
    for _ in range(3):
        ours, theirs = batch_norm(x, layer), twin(x)
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(list(layer.buffers()), list(twin.buffers()))
    for leaf, twin_leaf in zip((x, *layer.parameters()), (x, *twin.parameters()), strict=True):
        slopes = (
            torch.autograd.grad((ours**3).sum(), leaf, retain_graph=True),
            torch.autograd.grad((theirs**3).sum(), twin_leaf, retain_graph=True),
        )
        assert_near(*slopes, tolerance=1e-3)


@pytest.mark.skipif("bias" not in inspect.signature(_BatchNorm).parameters, reason="this torch has none")
def test_batch_norm_without_a_bias_of_its_own_is_torchs():
    layer = shift(nn.BatchNorm1d(3, bias=False))
    x = torch.randn(5, 3)
    torch.testing.assert_close(batch_norm(x, copy.deepcopy(layer)), layer(x))


def test_batch_norm_moves_nothing_where_tracking_is_switched_off():
    layer, x = layer_and_input("2d")
    layer.track_running_stats = False
    assert moved(layer, lambda: batch_norm(x, layer)) == []
    torch.testing.assert_close(batch_norm(x, layer.eval()), layer(x))


def test_batch_norm_of_one_value_per_channel_is_an_error():
    wanted = r"x must give at least 2 values per channel, got shape \(1, 3\). Use a larger batch."
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        batch_norm(torch.ones(1, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^x must have shape \(n, 3, ...\), got \(2, 4\).$"):
        batch_norm(torch.ones(2, 4), nn.BatchNorm1d(3))


# --- moved ----------------------------------------------------------------------------------------------------------


def test_a_forward_pass_without_gradients_moves_the_buffers_of_a_frozen_network(net, images):
    net.requires_grad_(False)
    with torch.no_grad():
        names = moved(net, lambda: net.train()(images))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert names == [f"{layer}.{buffer}" for layer in (1, 5) for buffer in buffers]
    assert moved(net, lambda: net.eval()(images)) == []


def test_moved_names_parameters_before_buffers_and_what_is_shared_once(images):
    layer = nn.BatchNorm2d(1)
    model = nn.Sequential(layer, layer, nn.Conv2d(1, 1, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step():
        model(images).square().sum().backward()
        optimizer.step()

    wanted = ["0.weight", "0.bias", "2.weight", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert moved(model, step) == wanted


def test_moved_sees_buffers_that_a_state_dict_leaves_out_and_takes_nan_for_equal_to_nan():
    model = nn.Module()
    model.register_buffer("scratch", torch.tensor([1.0, torch.nan]), persistent=False)
    assert moved(model, lambda: model.scratch.mul_(1)) == []
    assert moved(model, lambda: model.scratch.add_(1)) == ["scratch"]
    assert moved(model, lambda: model.scratch.fill_(torch.nan)) == ["scratch"]


def test_moved_goes_by_values_not_by_objects():
    model = nn.Linear(2, 2)

    def replace():
        model.weight = nn.Parameter(model.weight.detach().clone())

    assert moved(model, replace) == []
    assert moved(model, lambda: model.double()) == ["weight", "bias"]
    assert moved(model, lambda: setattr(model, "bias", None)) == ["bias"]
    assert moved(model, lambda: model.register_buffer("flag", torch.tensor(True))) == ["flag"]
    assert moved(model, lambda: model.flag.logical_not_()) == ["flag"]


@pytest.mark.real(reason=LAZY)
def test_moved_names_what_a_lazy_layer_only_now_knows():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    assert moved(model, lambda: model) == []
    names = [f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert moved(model, lambda: model(torch.randn(4, 3))) == names


# --- what_is_frozen -------------------------------------------------------------------------------------------------


def leave(layer):
    return layer


def no_gradients(layer):
    return layer.requires_grad_(False)


def no_tracking(layer):
    layer.track_running_stats = False
    return layer


def keras_before_tensorflow_2(layer):
    return no_tracking(no_gradients(layer))


def eval_that_train_undoes(layer):
    return layer.eval()


def eval_that_lasts(layer):
    layer.eval().train = lambda mode=True: layer
    return layer


def into_eval_mode(layer, args):
    layer.eval()


def eval_by_a_hook(layer):
    layer.register_forward_pre_hook(into_eval_mode)
    return layer


def gradients_made_zero(layer):
    for parameter in layer.parameters():
        parameter.register_hook(torch.zeros_like)
    return layer


def weight_alone(layer):
    layer.weight.requires_grad_(False)
    return layer


def momentum_of_zero(layer):  # the counter counts on, mean and variance stand still
    layer.momentum = 0.0
    return layer


def torchvisions(layer):
    frozen = FrozenBatchNorm2d(layer.num_features)
    frozen.load_state_dict(layer.state_dict())
    return frozen


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (leave, (False, False, False)),
        (no_gradients, (True, False, False)),
        (no_tracking, (False, True, False)),
        (keras_before_tensorflow_2, (True, True, False)),
        (eval_that_train_undoes, (False, False, False)),
        (eval_that_lasts, (False, True, True)),
        (eval_by_a_hook, (False, True, True)),
        (gradients_made_zero, (True, False, False)),
        (weight_alone, (False, False, False)),
        (momentum_of_zero, (False, True, False)),
        (torchvisions, (True, True, True)),
    ],
)
def test_what_is_frozen_tells_apart_the_ways_to_freeze(recipe, wanted):
    layer, x = layer_and_input("2d")
    assert tuple(what_is_frozen(recipe(layer), x).values()) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", SUBSETS)
def test_freeze_freezes_what_it_says(kind, what):
    layer, x = layer_and_input(kind)
    if what:
        freeze(layer, *what)
    frozen = what_is_frozen(layer, x)
    assert [meaning for meaning in frozen if frozen[meaning]] == [
        meaning for meaning in MEANINGS if meaning in what or (meaning == "statistics" and "normalisation" in what)
    ]


def test_what_is_frozen_leaves_the_layer_bit_identical():
    layer, x = layer_and_input("with activation")
    layer.eval()
    layer.act.train()
    layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    gradient = layer.bias.grad.clone()
    output = layer(x)
    before = everything(layer)
    what_is_frozen(layer, x)
    assert str(everything(layer)) == str(before)
    assert torch.equal(layer.bias.grad, gradient)
    output.sum().backward()  # and a graph made before can still be used


def test_what_is_frozen_puts_everything_back_when_the_layer_raises():
    layer = shift(nn.BatchNorm1d(3)).eval()
    before = everything(layer)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        what_is_frozen(layer, torch.randn(4, 3, 2, 2))
    assert everything(layer) == before


def test_what_is_frozen_sees_through_weights_of_zero():
    layer, x = layer_and_input("2d")
    nn.init.zeros_(layer.weight)
    assert not what_is_frozen(layer, x)["normalisation"]
    freeze(layer, "normalisation")
    assert what_is_frozen(layer, x) == {"affine": False, "statistics": True, "normalisation": True}


def test_what_is_frozen_of_layers_that_lack_something():
    x = 1 + torch.randn(5, 3)
    assert what_is_frozen(nn.BatchNorm1d(3, affine=False), x) == {"affine": True, "statistics": False, "normalisation": False}
    without = nn.BatchNorm1d(3, track_running_stats=False)
    assert what_is_frozen(without, x) == {"affine": False, "statistics": True, "normalisation": False}


def test_what_is_frozen_needs_an_input_that_shows_it():
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ValueError) as raised:
        what_is_frozen(layer, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 0.5**0.5)
    assert str(raised.value) == (
        "x must have other statistics than those stored, got the same within 1%, so the output would not show which of them "
        "normalise. Shift it: x + 1."
    )
    with pytest.raises(
        ValueError, match=r"^x must give at least 2 values per channel, got shape \(1, 2\). Use a larger batch.$"
    ):
        what_is_frozen(layer, torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"^layer must be a BatchNorm, got a Linear. Pass one of the model's layers.$"):
        what_is_frozen(nn.Linear(2, 2), torch.ones(2, 2))


# --- freeze ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_layer_in_train_mode_is_eval_mode_bit_for_bit(kind, affine):
    layer, x = layer_and_input(kind, affine=affine)
    wanted = copy.deepcopy(layer).eval()(x)
    for what in ((), ("normalisation",), ("normalisation", "statistics")):
        undo = freeze(layer, *what)
        assert torch.equal(layer.train()(x), wanted)
        layer.training = True
        assert torch.equal(layer(x), wanted)
        assert not layer.training
        undo()
        assert layer.training
    assert not torch.equal(layer(x), wanted)


@pytest.mark.parametrize("what", SUBSETS[1:])
def test_training_moves_only_what_is_not_frozen(net, images, what):
    freeze(net, *what)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)

    def epoch():
        net.train()(images).square().mean().backward()
        optimizer.step()

    names = [name.removeprefix("1.") for name in moved(net, epoch) if name.startswith("1.")]
    affine = [] if "affine" in what else ["weight", "bias"]
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    assert names == affine + ([] if {"statistics", "normalisation"} & {*what} else statistics)


def test_statistics_frozen_alone_still_normalise_with_the_batch_in_train_and_with_the_stored_in_eval_mode():
    layer, x = layer_and_input("2d")
    twin = copy.deepcopy(layer)
    freeze(layer, "statistics")
    assert torch.equal(layer.train()(x), twin.train()(x))
    twin = shift(nn.BatchNorm2d(3)).eval()
    assert torch.equal(layer.eval()(x), twin(x))


@pytest.mark.parametrize("what", SUBSETS[1:])
def test_undo_and_unfreeze_give_back_the_very_same_network(net, images, what):
    net[1].eval()
    net[1].momentum = None
    net[5].bias.requires_grad_(False)
    net[5].track_running_stats = False
    before = everything(net)
    freeze(net, *what)()
    assert everything(net) == before
    freeze(net, *what)
    unfreeze(net)
    assert everything(net) == before
    unfreeze(net)
    assert everything(net) == before


def test_unfreeze_goes_back_before_the_first_freeze_and_undo_before_its_own(net):
    start = everything(net)
    freeze(net, "affine")
    frozen_once = everything(net)
    undo = freeze(net, "normalisation", "affine")
    assert net[1].extra_repr().endswith("frozen=affine+normalisation")
    undo()
    assert everything(net) == frozen_once
    freeze(net)
    freeze(net, "statistics")
    unfreeze(net)
    assert everything(net) == start
    undo()  # nothing is frozen any more, so there is nothing to undo
    assert everything(net) == start


def test_a_part_of_a_network_can_be_frozen(net):
    freeze(net[1])
    net.train()
    assert not net[1].training and net[5].training
    unfreeze(net)
    assert net[1].training and type(net[1]) is nn.BatchNorm2d


def test_an_unfrozen_layer_is_in_the_mode_that_the_network_is_in_by_then(net):
    undo = freeze(net.train())
    net.eval()
    undo()
    assert not net[1].training
    freeze(net)
    net.train()
    unfreeze(net)
    assert net[1].training
    undo = freeze(net)
    with eval_mode(net):
        pass
    undo()
    assert net[1].training


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


PICKLES = pytest.mark.real(reason="a tensor of the fake GPU cannot be pickled")
REWRITTEN = {"copied": copied, "pickled": pickled, "saved": saved, "both": lambda model: copied(pickled(model))}


@pytest.mark.parametrize(
    "again", [pytest.param(f, marks=() if f is copied else PICKLES, id=name) for name, f in REWRITTEN.items()]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_frozen_network_is_frozen_and_can_be_unfrozen(kind, again):
    layer, x = layer_and_input(kind)
    model = nn.Sequential(layer)
    layer.bias.requires_grad_(False)
    wanted = copy.deepcopy(model).eval()(x)
    freeze(model)
    twin = again(model).train()
    assert torch.equal(twin(x), wanted)
    assert all(what_is_frozen(twin[0], x).values())
    unfreeze(twin)
    assert type(twin[0]) is type(layer)._base
    assert twin[0].training and twin[0].track_running_stats
    assert [parameter.requires_grad for parameter in twin[0].parameters()] == [True, False]
    assert all(what_is_frozen(model[0], x).values()), "the original is another object"


def test_a_frozen_network_has_the_same_state_dict_and_shows_what_is_frozen(net):
    before = net.state_dict()
    freeze(net, "normalisation")
    assert isinstance(net[1], nn.BatchNorm2d)
    assert repr(net[1]).startswith("FrozenBatchNorm2d(4, ") and repr(net[1]).endswith("frozen=normalisation)")
    assert list(net.state_dict()) == list(before)
    net.load_state_dict(before)


def test_a_layer_in_two_places_and_a_parameter_of_two_layers_come_back_as_they_were():
    layer, sharing = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    sharing.weight = layer.weight
    model = nn.Sequential(layer, layer, sharing)
    before = everything(model)
    freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze(model)
    assert everything(model) == before


def test_freeze_leaves_instance_norm_alone():
    model = nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.BatchNorm1d(3))
    freeze(model)
    assert model.train()[0].training and model[0].weight.requires_grad
    x = torch.randn(4, 3, 5)
    assert moved(model, lambda: model(x)) == ["0.running_mean", "0.running_var"]  # it counts no batches


@pytest.mark.slow  # importing what torch.compile needs
@pytest.mark.real(reason="a tensor of the fake GPU cannot be compiled or exported")
def test_frozen_networks_compile_trace_and_split(net, images):
    from torchvision.models.feature_extraction import create_feature_extractor

    freeze(net)
    net.train()[3].p = 0.0
    wanted = net(images)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(images), wanted)
    torch.testing.assert_close(torch.export.export(net, (images,)).module(check_guards=False)(images), wanted)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images), wanted)
    torch.testing.assert_close(create_feature_extractor(net, ["7"])(images)["7"], wanted)


def test_what_cannot_be_frozen_is_said_and_nothing_changes(net):
    net.append(nn.BatchNorm1d(3, track_running_stats=False))
    before = everything(net)
    with pytest.raises(ValueError) as raised:
        freeze(net, "affine", "stats")
    assert str(raised.value) == (
        "what must be one of ['affine', 'statistics', 'normalisation'], got 'stats'. Leave it out to freeze all of it."
    )
    with pytest.raises(ValueError) as raised:
        freeze(net)
    assert str(raised.value) == (
        'normalisation needs stored statistics, got none in 8: track_running_stats=False. Freeze "affine" alone.'
    )
    assert everything(net) == before
    freeze(net, "affine")()
    assert everything(net) == before


@pytest.mark.parametrize("action", [freeze, unfreeze, lambda model: recompute_statistics(model, [torch.ones(2, 3)])])
def test_a_model_without_batch_norm_is_an_error(action):
    with pytest.raises(ValueError) as raised:
        action(nn.Sequential(nn.LayerNorm(3)))
    assert str(raised.value) == ("model must have a BatchNorm, got a Sequential without one. Leave other norms as they are.")
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got 3. Pass the model itself.$"):
        action(3)


@pytest.mark.real(reason=LAZY)
def test_a_lazy_batch_norm_has_to_know_its_channels_first():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError) as raised:
        freeze(model)
    assert str(raised.value) == (
        "BatchNorms must know their channels, got a lazy one that does not: 0. Run a batch through the model first."
    )
    model(torch.randn(4, 3))
    freeze(model)


# --- pooled_statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [(), (5,), (2, 3), (2, 2, 2)])
def test_pooled_statistics_are_those_of_the_concatenation(rest):
    x = torch.randn(9, 3, *rest) * 2 + 1
    mean, var = pooled_statistics(x.split((1, 5, 3)))
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, flat.var(1).float(), rtol=1e-6, atol=0.0)


def test_pooled_statistics_of_a_large_mean_and_a_small_spread():
    x = 100 + 0.01 * torch.randn(3000, 2)
    mean, var = pooled_statistics(x.split(7))
    torch.testing.assert_close(mean, x.double().mean(0).float(), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(var, x.double().var(0).float(), rtol=1e-6, atol=0.0)


def test_pooled_statistics_read_once_and_keep_the_precision_of_their_input():
    x = torch.randn(8, 3)
    assert [values.dtype for values in pooled_statistics(iter(x.half().split(3)))] == [torch.float32] * 2
    mean, var = pooled_statistics(batch for batch in x.double().split(3))
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(var, x.double().var(0), rtol=1e-14, atol=0.0)


def test_pooled_statistics_say_what_is_wrong_with_batches():
    for batches, wanted in [
        ([], "batches must hold at least one, got none. An iterator can be read once."),
        ([torch.ones(1, 2)], "a variance needs at least 2 values per channel, got 1 at batches. Give more inputs."),
        ([torch.ones(2, 2), torch.ones(2, 3)], "each batch must have shape (n, 2, ...), got (2, 3)."),
        (
            [torch.full((2, 2), torch.nan)],
            "statistics must be finite, got NaN or infinity at batches. Look for it in the inputs first.",
        ),
        (
            torch.ones(4, 2),
            "batches must be a list or another iterable of batches, got a tensor of shape (4, 2). Cut it: batches.split(128).",
        ),
    ]:
        with pytest.raises(ValueError) as raised:
            pooled_statistics(batches)
        assert str(raised.value) == wanted


# --- recompute_statistics, one pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", ["one", "sequential"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
def test_recomputed_statistics_are_those_of_all_inputs(kind, passes, options):
    layer, _ = layer_and_input(kind, **options)
    x = 2 + 3 * torch.randn(11, 3, *KINDS[kind][1])
    recompute_statistics(layer, x.split(4), passes)
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean, flat.mean(1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, flat.var(1).float(), rtol=1e-5, atol=0.0)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("passes", ["one", "sequential"])
def test_a_large_mean_with_a_small_spread_is_no_problem(passes):
    x = 100 + 0.01 * torch.randn(600, 3, 2, 2)
    layer = nn.BatchNorm2d(3)
    recompute_statistics(layer, x.split(7), passes)
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean, flat.mean(1).float(), rtol=2e-7, atol=0.0)  # 2e-7 * 100 is 0.002 std
    torch.testing.assert_close(layer.running_var, flat.var(1).float(), rtol=2e-5, atol=0.0)


def test_many_batches_are_merged_as_few_are():
    x = torch.randn(400, 3)
    layer = nn.BatchNorm1d(3)
    recompute_statistics(layer, x.split(2))
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-5, atol=0.0)
    assert layer.num_batches_tracked == 200


def by_hand(net, batches):
    """The one pass in plain arithmetic: every BatchNorm normalises with its batch, dropout does nothing."""
    inputs = [[], []]
    for x in batches:
        for parts, index in zip(inputs, (1, 5), strict=True):
            x = net[index - 1](x if index == 1 else x.relu())
            parts.append(x)
            x = batch_norm(x, copy.deepcopy(net[index]).train())
    return [(pooled.mean((0, 2, 3)), pooled.var((0, 2, 3))) for pooled in map(torch.cat, inputs)]


@pytest.mark.parametrize("modes", ["train", "eval", "mixed", "frozen"])
def test_each_layer_pools_what_it_sees_whatever_mode_the_network_is_in(net, images, modes):
    net.train(modes != "eval")
    if modes == "mixed":
        net[5].eval()
    batches = images.split(5)
    wanted = by_hand(net, batches)
    if modes == "frozen":
        freeze(net)
    recompute_statistics(net, batches)
    assert_near(stored(net), wanted)


@pytest.mark.parametrize("passes", ["one", "sequential"])
def test_recomputing_changes_the_statistics_and_nothing_else(net, images, passes):
    net[1].momentum, net[5].momentum = None, 0.3
    net[3].eval()
    freeze(net[5], "affine", "normalisation")
    before = everything(net)
    names = moved(net, lambda: recompute_statistics(net, images.split(5), passes))
    assert names == [f"{layer}.{name}" for layer in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")]
    for was, now in zip(before, everything(net), strict=True):
        assert was == now or (was[0] in names and was[:3] == now[:3])


def test_an_adapted_frozen_network_keeps_its_new_statistics_when_it_is_unfrozen(net, images):
    freeze(net)
    recompute_statistics(net, images.split(6))
    before = stored(net)
    unfreeze(net)
    torch.testing.assert_close(stored(net), before, rtol=0, atol=0)


def test_one_batch_gives_what_torch_gives_with_a_momentum_of_one(images):
    net = shift(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.BatchNorm2d(1)))
    twin = copy.deepcopy(net)
    for layer in batch_norms(twin):
        layer.momentum = 1.0
    twin.train()(images)
    recompute_statistics(net, [images])
    torch.testing.assert_close(stored(net), stored(twin))


def test_counts_are_those_of_torchs_update_bn_and_variances_hold_what_is_between_batches():
    layer, twin = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    batches = [torch.tensor([[-1.0], [1.0]]), torch.tensor([[9.0], [11.0]])]  # 2 within either, 100 between their means
    update_bn(batches, twin)
    recompute_statistics(layer, batches)
    assert layer.num_batches_tracked == twin.num_batches_tracked == 2
    assert layer.running_mean.item() == twin.running_mean.item() == 5
    assert twin.running_var.item() == 2
    assert layer.running_var.item() == pytest.approx(torch.cat(batches).var().item())


@pytest.mark.parametrize("passes", ["one", "sequential"])
def test_any_iterable_of_batches_with_a_short_last_one_will_do(net, images, passes):
    twin = copy.deepcopy(net)
    loader = DataLoader(images, batch_size=5)
    recompute_statistics(net, loader, passes)
    recompute_statistics(twin, list(images.split(5)), passes)
    torch.testing.assert_close(stored(net), stored(twin))


def test_one_pass_reads_an_iterator_once(net, images):
    twin = copy.deepcopy(net)
    batches = iter(images.split(5))
    recompute_statistics(net, batches)
    assert next(batches, None) is None
    recompute_statistics(twin, images.split(5))
    torch.testing.assert_close(stored(net), stored(twin), rtol=0, atol=0)


class Labelled(nn.Module):
    """Takes a dictionary, and calls its BatchNorm by keyword."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, batch):
        return self.bn(input=batch["values"])


@pytest.mark.parametrize("passes", ["one", "sequential"])
def test_a_batch_may_be_whatever_the_model_takes(passes):
    model, x = Labelled(), torch.randn(8, 3)
    recompute_statistics(model, [{"values": x, "labels": torch.ones(8)}], passes)
    torch.testing.assert_close(model.bn.running_mean, x.mean(0))


@pytest.mark.parametrize("passes", ["one", "sequential"])
@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_the_network_bit_identical(net, images, passes, stop):
    class Loader:
        def __iter__(self):
            yield images[:5]
            yield images[5:10]
            if len(starts) == 1 or passes == "one":
                raise stop
            starts.append(1)

    starts = []
    net[5].eval()
    freeze(net[1], "normalisation")
    before = everything(net)
    with pytest.raises(stop):
        recompute_statistics(net, Loader(), passes)
    assert everything(net) == before


@pytest.mark.parametrize("passes", ["one", "sequential"])
def test_inputs_that_are_not_finite_leave_the_network_as_it_was(net, images, passes):
    images[7, 0, 0, 0] = torch.inf
    before = everything(net)
    with pytest.raises(ValueError) as raised:
        recompute_statistics(net, images.split(5), passes)
    assert str(raised.value) == "statistics must be finite, got NaN or infinity at 1. Look for it in the inputs first."
    assert everything(net) == before


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_statistics_of_other_precisions_are_rounded_once(kind):
    dtype = getattr(torch, kind)
    layer = nn.BatchNorm1d(3).to(dtype)
    x = (2 + 3 * torch.randn(500, 3)).to(dtype)
    recompute_statistics(layer, x.split(9))
    torch.testing.assert_close(layer.running_mean, x.double().mean(0).to(dtype), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(layer.running_var, x.double().var(0).to(dtype), rtol=1e-12, atol=0.0)


def test_a_shared_layer_pools_all_its_calls():
    layer = shift(nn.BatchNorm1d(2))
    model = nn.Sequential(layer, nn.Linear(2, 2), layer)
    x = torch.randn(6, 2)
    second = model[1](batch_norm(x, copy.deepcopy(layer)))
    recompute_statistics(model, [x])
    torch.testing.assert_close(layer.running_var, torch.cat([x, second]).var(0))
    assert layer.num_batches_tracked == 2


def test_layers_that_store_nothing_or_are_not_reached_stay_as_they_are(images):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.without, self.used = nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1)
            self.unused, self.instance = nn.BatchNorm2d(1), nn.InstanceNorm2d(1, track_running_stats=True)

        def forward(self, x):
            return self.instance(self.used(self.without(x)))

    for passes in ("one", "sequential"):
        net = shift(Net())
        names = moved(net, lambda net=net, passes=passes: recompute_statistics(net, [2 * images, images], passes))
        assert {name.split(".")[0] for name in names} == {"used"}


def test_statistics_switched_off_but_kept_are_recomputed():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    layer.track_running_stats = False
    recompute_statistics(layer, [x])
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    assert not layer.track_running_stats


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: [], "batches must hold at least one, got none. An iterator can be read once."),
        (
            lambda: [torch.ones(5, 1, 6, 6), torch.ones(1, 1, 3, 3)],
            "each batch must give at least 2 values per channel, got shape (1, 4, 1, 1) at 1. "
            'Use larger batches, or passes="sequential".',
        ),
        (
            lambda: DataLoader(TensorDataset(torch.ones(4, 1, 6, 6), torch.ones(4).long()), batch_size=2),
            "each batch must be what the model takes, got inputs with labels. "
            "Leave the labels out: [inputs for inputs, labels in batches].",
        ),
        (
            lambda: torch.ones(5, 1, 6, 6),
            "batches must be a list or another iterable of batches, got a tensor of shape (5, 1, 6, 6). "
            "Cut it: batches.split(128).",
        ),
    ],
)
def test_batches_that_cannot_be_used_are_named(net, make, wanted):
    before = everything(net)
    with pytest.raises(ValueError) as raised:
        recompute_statistics(net, make())
    assert str(raised.value) == wanted
    assert everything(net) == before


def test_models_and_settings_that_cannot_be_used_are_named(net, images):
    stuck = copy.deepcopy(net)
    stuck[1].register_forward_pre_hook(into_eval_mode)
    elsewhere = SimpleNamespace(model=nn.ModuleList([nn.BatchNorm1d(3)]))
    elsewhere.model.forward = lambda x: x
    for model, passes, wanted in [
        (net, "two", "passes must be 'one' or 'sequential', got 'two'."),
        (
            nn.BatchNorm2d(1, track_running_stats=False),
            "one",
            "a BatchNorm must store statistics, got a BatchNorm2d where all have track_running_stats=False. "
            "There is nothing to do: they normalise with the batch in every mode.",
        ),
        (
            stuck,
            "one",
            "1 must normalise with its batch while it is measured, got a layer that something keeps in eval mode. "
            'Take that away, or use passes="sequential".',
        ),
        (elsewhere.model, "one", "batches must reach a BatchNorm, got none that did. Call the model that runs them."),
    ]:
        with pytest.raises(ValueError) as raised:
            recompute_statistics(model, [images], passes)
        assert str(raised.value) == wanted


# --- recompute_statistics, sequential -------------------------------------------------------------------------------


def test_sequential_statistics_are_those_that_each_layer_finds_in_eval_mode(net, images):
    recompute_statistics(net, images.split(5), passes="sequential")
    net.eval()
    with torch.no_grad():
        for index in (1, 5):
            x = net[:index](images)
            torch.testing.assert_close(net[index].running_mean, x.mean((0, 2, 3)))
            torch.testing.assert_close(net[index].running_var, x.var((0, 2, 3)))
    assert all(layer.mean_shift < 1e-6 and layer.std_ratio < 1 + 1e-6 for layer in drift(net, [images]))


def test_one_pass_depends_on_the_cut_and_sequential_passes_do_not(net, images):
    def last(size, passes):
        model = copy.deepcopy(net)
        recompute_statistics(model, images.split(size), passes)
        return model[5].running_var

    assert (last(2, "one") / last(6, "one") - 1).abs().max() > 0.01
    assert_near(last(2, "sequential"), last(6, "sequential"))
    assert_near(last(2, "sequential"), last(12, "sequential"))


def test_sequential_passes_take_batches_of_one_value_per_channel():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(6, 2)
    recompute_statistics(model, x.split(1), passes="sequential")
    torch.testing.assert_close(model[0].running_var, x.var(0))
    with pytest.raises(ValueError, match=r"^a variance needs at least 2 values per channel, got 1 at 0. Give more inputs.$"):
        recompute_statistics(model, [x[:1]], passes="sequential")


def test_shuffling_makes_no_difference_to_sequential_passes(net, images):
    twin = copy.deepcopy(net)
    recompute_statistics(net, DataLoader(images, batch_size=5, shuffle=True), passes="sequential")
    recompute_statistics(twin, [images], passes="sequential")
    assert_near(stored(net), stored(twin))


def test_sequential_passes_end_at_the_layer_that_is_measured(net, images):
    calls = dict.fromkeys((0, 4, 7), 0)
    for index in calls:
        net[index].register_forward_hook(lambda *args, index=index: calls.__setitem__(index, calls[index] + 1))
    recompute_statistics(net, images.split(4), passes="sequential")
    assert calls == {0: 7, 4: 4, 7: 1}  # 3 batches for each of 2 layers, and one more to see that there is no third


def test_a_layer_in_two_places_sees_its_own_first_call_in_sequential_passes():
    layer = shift(nn.BatchNorm1d(2))
    between = shift(nn.BatchNorm1d(2), seed=1)
    model = nn.Sequential(layer, between, nn.ReLU(), layer)
    x = torch.randn(9, 2)
    first, middle = nn.BatchNorm1d(2).eval(), copy.deepcopy(between).eval()
    first.load_state_dict(layer.state_dict())
    with torch.no_grad():
        first.running_mean, first.running_var = x.mean(0), x.var(0)
        y = first(x)
        middle.running_mean, middle.running_var = y.mean(0), y.var(0)
        pooled = torch.cat([x, middle(y).relu()])
    for size in (2, 9):
        recompute_statistics(model, x.split(size), passes="sequential")
        assert_near([layer.running_mean, layer.running_var], [pooled.mean(0), pooled.var(0)])
        assert_near([between.running_mean, between.running_var], [y.mean(0), y.var(0)])


def test_sequential_passes_are_not_caught_by_the_model(images):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(1)

        def forward(self, x):
            try:
                return self.bn(x)
            except Exception:
                return None

    model = Careful()
    recompute_statistics(model, images.split(5), passes="sequential")
    torch.testing.assert_close(model.bn.running_mean, images.mean((0, 2, 3)))


def test_sequential_passes_need_batches_that_can_be_read_again(net, images):
    with pytest.raises(ValueError) as raised:
        recompute_statistics(net, (batch for batch in images.split(5)), passes="sequential")
    assert str(raised.value) == (
        'batches must be readable once for each layer with passes="sequential", got a generator. Pass a list or a DataLoader.'
    )


def test_sequential_passes_need_one_order_of_layers():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            if len(x) == 2:
                return self.a(x)
            return self.b(self.a(x)) if len(x) == 3 else self.a(self.b(x))

    model = Turning()
    for sizes, wanted in [((3, 4), "b in place of a"), ((3, 2), "nothing in place of b")]:
        before = everything(model)
        with pytest.raises(ValueError) as raised:
            recompute_statistics(model, torch.randn(sum(sizes), 2).split(sizes), passes="sequential")
        assert str(raised.value) == f'layers must run in the same order for every batch, got {wanted}. Use passes="one".'
        assert everything(model) == before


# --- adabn and drift ------------------------------------------------------------------------------------------------


def test_adabn_undoes_another_scale_and_offset_of_each_input():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    source = torch.randn(50, 4)
    recompute_statistics(model, [source], passes="sequential")
    target = source * torch.tensor([3.0, 0.5, 2.0, 10.0]) + torch.tensor([0.0, 5.0, -7.0, 1.0])
    before = everything(model)
    adapted = adabn(model, target.split(20))
    assert everything(model) == before
    wanted = model.eval()(source)
    torch.testing.assert_close(adapted.eval()(target), wanted, rtol=1e-3, atol=1e-3)
    assert (model(target) - wanted).abs().mean() > 0.5
    assert all(layer.mean_shift < 1e-6 and layer.std_ratio < 1 + 1e-6 for layer in drift(adapted, [target]))


def test_adabn_takes_an_iterator_when_asked_for_one_pass(net, images):
    adapted = adabn(net, iter(images.split(6)), passes="one")
    recompute_statistics(net, images.split(6))
    torch.testing.assert_close(stored(adapted), stored(net))


def test_drift_is_measured_in_stored_standard_deviations():
    layer = nn.BatchNorm1d(2, eps=1.0)
    layer.running_mean.copy_(torch.tensor([1.0, 5.0]))
    layer.running_var.copy_(torch.tensor([3.0, 8.0]))  # with eps, std 2 and 3
    x = torch.tensor([[3.0, 5.0], [7.0, 5.0]])  # means 5 and 5, variances 8 and 0, with eps 9 and 1
    (measured,) = drift(layer, x.split(1))
    assert measured.name == ""
    assert measured.mean_shift == pytest.approx((((5 - 1) / 2) ** 2 / 2) ** 0.5)
    logs = np.log([3 / 2, 1 / 3])
    assert measured.std_ratio == pytest.approx(np.exp(np.sqrt((logs**2).mean())))


def test_drift_sees_the_network_in_eval_mode_and_leaves_it_alone(net, images):
    net.insert(0, nn.BatchNorm2d(1, track_running_stats=False))
    net.train()
    before = everything(net)
    drifts = drift(net, [images])
    assert everything(net) == before
    assert [layer.name for layer in drifts] == ["2", "6"]
    with torch.no_grad():
        x = net.eval()[:6](images)
    stored_std = (net[6].running_var + net[6].eps).sqrt()
    shift = (x.mean((0, 2, 3)) - net[6].running_mean) / stored_std
    assert drifts[1].mean_shift == pytest.approx(shift.square().mean().sqrt().item(), rel=1e-5)


def test_drift_of_a_frozen_network_is_that_of_the_network(net, images):
    before = drift(net, images.split(5))
    freeze(net)
    assert drift(net, images.split(5)) == before


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """A random network of vectors with BatchNorms that are set in random ways, and the width of its input."""
    width = first = draw(st.integers(1, 4))
    modules = []
    for _ in range(draw(st.integers(1, 3))):
        layer = nn.BatchNorm1d(
            width,
            eps=draw(st.sampled_from([1e-5, 1e-2])),
            momentum=draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
            affine=draw(st.booleans()),
        )
        modules += [layer, draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Dropout]))()]
        if draw(st.booleans()):
            modules.append(layer)
        wider = draw(st.integers(1, 4))
        modules.append(nn.Linear(width, wider))
        width = wider
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    model = shift(nn.Sequential(*modules, nn.BatchNorm1d(width)), seed)
    for module in model.modules():
        module.training = draw(st.booleans())
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    for layer in batch_norms(model):
        layer.track_running_stats = draw(st.booleans())
    return model, first


def cuts(n):
    """Sizes of batches that come to n."""
    return st.lists(st.integers(1, n), min_size=1, max_size=n).map(lambda sizes: _fill(sizes, n))


def _fill(sizes, n):
    kept = []
    for size in sizes:
        if sum(kept) + size <= n:
            kept.append(size)
    return [*kept, n - sum(kept)] if sum(kept) < n else kept


what = st.lists(st.sampled_from(MEANINGS), max_size=3)


@properties
@given(networks(), st.lists(what, min_size=1, max_size=3), st.booleans())
def test_freeze_then_unfreeze_is_an_identity(network, whats, last_first):
    model, _ = network
    before = everything(model)
    undos = [freeze(model, *words) for words in whats]
    if last_first:
        for undo in reversed(undos):
            undo()
    else:
        unfreeze(model)
    assert everything(model) == before


@properties
@given(networks(), what, st.integers(2, 5))
def test_frozen_is_eval_mode_bit_for_bit_after_train(network, words, n):
    model, width = network
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(n, width)
    wanted = copy.deepcopy(model).eval()(x)
    freeze(model, *words, "normalisation")
    assert torch.equal(model.train()(x), wanted)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert moved(model, lambda: model.train()(x)) == []


@properties
@given(networks(), st.integers(3, 12).flatmap(lambda n: st.tuples(cuts(n), cuts(n))))
def test_sequential_statistics_do_not_depend_on_the_cut(network, two_cuts):
    model, width = network
    x = torch.randn(sum(two_cuts[0]), width).double()
    first, second = copy.deepcopy(model).double(), model.double()
    recompute_statistics(first, x.split(two_cuts[0]), passes="sequential")
    recompute_statistics(second, x.split(two_cuts[1]), passes="sequential")
    torch.testing.assert_close(stored(first), stored(second), rtol=1e-7, atol=1e-9)


@properties
@given(
    st.integers(2, 200).flatmap(cuts),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**16),
)
def test_pooled_statistics_are_those_of_the_concatenation_for_any_cut(sizes, rest, offset, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = offset + scale * torch.randn(sum(sizes), 2, *rest, generator=generator)
    mean, var = pooled_statistics(x.split(sizes))
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1).float(), rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(var, flat.var(1).float(), rtol=1e-6, atol=0.0)


# --- the numbers in the docstring -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cpu(reason="the numbers of the docstring are those of a CPU")
def test_the_cut_matters_to_the_last_layers_as_much_as_the_docstring_says():
    train, test = digits("train"), digits("test")
    order = torch.randperm(len(train.inputs), generator=torch.Generator().manual_seed(0))
    inputs = train.inputs[order]
    cut = {str(size): inputs.split(size) for size in (2, 8, 32, 128)}
    cut["all"] = [inputs]
    by_class = train.inputs[train.labels.argsort(stable=True)]
    cut["sorted by class, 80"] = by_class.split(80)
    exact = adabn(glyphnet(), inputs.split(128))
    factors, scores = {}, {}
    for name, batches in cut.items():
        model = adabn(glyphnet(), batches, passes="one")
        layer, reference = model.layer4[0].bn2, exact.layer4[0].bn2
        log_ratio = ((layer.running_var + layer.eps) / (reference.running_var + layer.eps)).log() / 2
        factors[name] = log_ratio.square().mean().sqrt().exp().item()
        if name in ("2", "128"):
            scores[name] = probed(model, train, test)
        torch.testing.assert_close(model.bn1.running_mean, exact.bn1.running_mean, rtol=1e-3, atol=1e-3)
    wanted = {"2": 0.16, "8": 0.03, "32": 0.007, "128": 0.002, "all": 0.0002, "sorted by class, 80": 0.12}
    assert {name: factor - 1 for name, factor in factors.items()} == pytest.approx(wanted, rel=0.3)
    assert scores == pytest.approx({"2": 0.988, "128": 0.988}, abs=0.003)
    assert probed(glyphnet(), train, test) == pytest.approx(0.983, abs=0.003)


def probed(model, train, test):
    backbone = drop_head(model)
    probe = linear_probe(extract(backbone, train.inputs), train.labels)
    return accuracy(probe(extract(backbone, test.inputs)), test.labels)
