"""BatchNorm: freezing it, and recomputing its statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import FrozenBatchNorm2d

from helpers.batchnorm import freeze, recompute_statistics, unfreeze

from . import falls_short, load


def shift(model):
    """Other values than a new BatchNorm's, so that nothing is equal by coincidence."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.01
            layer.num_batches_tracked += 7
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    return model


@pytest.fixture
def net():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return shift(nn.Sequential(*layers)).train()


@pytest.fixture
def images():
    return torch.randn(6, 1, 9, 9)


# --- freezing -----------------------------------------------------------------------------------------------------


def ours_freeze(model):
    freeze(model)
    return model


def timm_freeze(model):
    return load("timm.layers").freeze_batch_norm_2d(model)


def fastai_freeze(model):
    load("fastai.callback.training").set_bn_eval(model.requires_grad_(False))  # what its BnFreeze does before an epoch
    return model


def lightning_freeze(model):
    load("lightning.pytorch.callbacks").BaseFinetuning.freeze(model, train_bn=False)
    return model


FASTAI_UNDONE = "fastai 2.8.12 puts BatchNorm into eval mode, which the next train() undoes."
LIGHTNING_HALF = "lightning 2.6.6 stops the statistics, but in train mode the batch still normalises."


@pytest.mark.slow  # importing fastai and lightning
@pytest.mark.parametrize(
    "freezer",
    [ours_freeze, timm_freeze, falls_short(fastai_freeze, FASTAI_UNDONE), falls_short(lightning_freeze, LIGHTNING_HALF)],
)
def test_frozen_batchnorm_computes_in_train_mode_what_it_computes_in_eval_mode(net, images, freezer):
    wanted = copy.deepcopy(net).eval()(images)
    frozen = freezer(net).train()
    torch.testing.assert_close(frozen(images), wanted, rtol=1e-5, atol=1e-6)


def test_frozen_batchnorm_equals_eval_mode_exactly_and_torchvisions_to_rounding(images):
    layer = shift(nn.BatchNorm2d(1))
    theirs = FrozenBatchNorm2d(1)
    theirs.load_state_dict(layer.state_dict())
    wanted = copy.deepcopy(layer).eval()(images)
    freeze(layer)
    assert torch.equal(layer.train()(images), wanted)
    torch.testing.assert_close(layer(images), theirs(images), rtol=1e-6, atol=1e-6)


KINDS = {1: (nn.BatchNorm1d, (4, 3)), 2: (nn.BatchNorm2d, (4, 3, 2, 2)), 3: (nn.BatchNorm3d, (4, 3, 2, 2, 2))}
TIMM_ONLY_2D = "timm 1.0.31 freezes BatchNorm2d and SyncBatchNorm, and passes over 1d and 3d without a word."


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_ours_freezes_every_dimension(dimensions):
    assert_frozen(ours_freeze, dimensions)


@pytest.mark.parametrize("dimensions", [falls_short(1, TIMM_ONLY_2D), 2, falls_short(3, TIMM_ONLY_2D)])
def test_timm_freezes_every_dimension(dimensions):
    assert_frozen(timm_freeze, dimensions)


def assert_frozen(freezer, dimensions):
    kind, shape = KINDS[dimensions]
    model = shift(nn.Sequential(kind(3)))
    frozen = freezer(model).train()
    before = frozen[0].running_mean.clone()
    frozen(torch.randn(shape))
    assert torch.equal(frozen[0].running_mean, before)


@pytest.mark.slow  # importing fastai
@pytest.mark.parametrize(
    "freezer",
    [ours_freeze, falls_short(fastai_freeze, "fastai 2.8.12 asks a layer without parameters for its first.", StopIteration)],
)
def test_batchnorm_without_affine_parameters_can_be_frozen(freezer):
    model = freezer(nn.Sequential(nn.BatchNorm1d(3, affine=False)))
    assert not model[0].training


@pytest.mark.slow  # importing fastai
@pytest.mark.parametrize(
    "freezer", [ours_freeze, falls_short(fastai_freeze, "fastai 2.8.12 looks at children only, so not at the model itself.")]
)
def test_a_layer_by_itself_can_be_frozen(freezer):
    assert not freezer(nn.BatchNorm1d(3)).training


@pytest.mark.parametrize(
    "freezer",
    [ours_freeze, falls_short(timm_freeze, "timm 1.0.31 replaces a shared layer at its first place only.")],
)
def test_a_layer_in_two_places_is_frozen_in_both(freezer):
    layer = shift(nn.BatchNorm2d(3))
    model = freezer(nn.Sequential(layer, nn.ReLU(), layer)).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def ours_there_and_back(model):
    freeze(model)
    unfreeze(model)
    return model


def timm_there_and_back(model):
    layers = load("timm.layers")
    return layers.unfreeze_batch_norm_2d(layers.freeze_batch_norm_2d(model))


TIMM_ANEW = "timm 1.0.31 unfreezes into a new BatchNorm2d: "


@pytest.mark.parametrize("there_and_back", [ours_there_and_back, falls_short(timm_there_and_back, TIMM_ANEW + "momentum 0.1.")])
def test_unfreezing_gives_the_momentum_back(net, there_and_back):
    assert there_and_back(net)[1].momentum == 0.01


@pytest.mark.parametrize(
    "there_and_back", [ours_there_and_back, falls_short(timm_there_and_back, TIMM_ANEW + "num_batches_tracked 0.")]
)
def test_unfreezing_gives_the_count_of_batches_back(net, there_and_back):
    assert there_and_back(net)[1].num_batches_tracked == 7


@pytest.mark.parametrize(
    "there_and_back", [ours_there_and_back, falls_short(timm_there_and_back, TIMM_ANEW + "it has a weight and a bias.")]
)
def test_unfreezing_adds_no_parameters(there_and_back):
    assert not list(there_and_back(nn.Sequential(nn.BatchNorm2d(3, affine=False))).parameters())


@pytest.mark.parametrize(
    "there_and_back", [ours_there_and_back, falls_short(timm_there_and_back, TIMM_ANEW + "an optimizer holds the old one.")]
)
def test_unfreezing_leaves_the_parameters_that_an_optimizer_holds(net, there_and_back):
    parameters = list(net.parameters())
    assert all(after is before for after, before in zip(there_and_back(net).parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "there_and_back", [ours_there_and_back, falls_short(timm_there_and_back, TIMM_ANEW + "its parameters train.")]
)
def test_unfreezing_leaves_frozen_what_was_frozen_before(net, there_and_back):
    net[1].requires_grad_(False)
    assert not there_and_back(net)[1].weight.requires_grad


# --- recomputing --------------------------------------------------------------------------------------------------


def ours_recompute(model, batches):
    recompute_statistics(model, batches)


def ours_sequential(model, batches):
    recompute_statistics(model, batches, passes="sequential")


def fvcore_recompute(model, batches, iterations=None):
    load("fvcore.nn.precise_bn").update_bn_stats(model, batches, num_iters=iterations or len(batches))


def torch_recompute(model, batches):
    update_bn(batches, model)


def rows(sizes, mean=1.0, std=2.0, width=64):
    """Batches of those sizes, each with a mean of its own."""
    return [mean + std * (torch.randn(size, width) + number) for number, size in enumerate(sizes)]


def statistics(batches):
    """Mean and unbiased variance of all rows together, in float64."""
    together = torch.cat(batches).double()
    return together.mean(0), together.var(0)


UNEVEN = (2, 3, 16)
TORCH_MEAN = "torch 2.14: update_bn takes the mean of the batches' means and variances: "
FVCORE = "fvcore 0.1.5.post20221221 "


@pytest.mark.parametrize(
    "recompute",
    [
        ours_recompute,
        ours_sequential,
        fvcore_recompute,
        falls_short(torch_recompute, TORCH_MEAN + "2 rows count as much as 16."),
    ],
)
def test_the_mean_of_uneven_batches_is_the_mean_of_all_rows(recompute):
    layer, batches = nn.BatchNorm1d(64), rows(UNEVEN)
    recompute(layer, batches)
    torch.testing.assert_close(layer.running_mean.double(), statistics(batches)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "recompute",
    [
        ours_recompute,
        ours_sequential,
        falls_short(fvcore_recompute, FVCORE + "stores the biased variance."),
        falls_short(torch_recompute, TORCH_MEAN + "what differs between batches is left out."),
    ],
)
@pytest.mark.parametrize("sizes", [UNEVEN, (7, 7, 7)])
def test_the_variance_is_the_unbiased_variance_of_all_rows(recompute, sizes):
    layer, batches = nn.BatchNorm1d(64), rows(sizes)
    recompute(layer, batches)
    torch.testing.assert_close(layer.running_var.double(), statistics(batches)[1], rtol=1e-5, atol=1e-5)


def test_one_pass_equals_fvcore_in_every_layer_of_a_network_but_for_the_bias(net):
    batches = [torch.randn(size, 1, 9, 9) + size for size in UNEVEN]
    theirs = copy.deepcopy(net)
    recompute_statistics(net, batches)
    fvcore_recompute(theirs, batches)
    for place, pixels in ((1, 7 * 7), (4, 5 * 5)):
        n = sum(UNEVEN) * pixels
        torch.testing.assert_close(net[place].running_mean, theirs[place].running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net[place].running_var, theirs[place].running_var * n / (n - 1), rtol=1e-5, atol=1e-5)


def test_one_pass_on_equal_batches_equals_torchs_update_bn_after_the_closed_form_correction(net):
    """Variance of all = mean of the batches' biased variances + biased variance of their means, then unbiased."""
    batches = [torch.randn(4, 1, 9, 9) + 3 * number for number in range(5)]
    theirs = copy.deepcopy(net)
    means = {place: [] for place in (1, 4)}
    for place, per_batch in means.items():
        theirs[place].register_forward_pre_hook(lambda _, args, per_batch=per_batch: per_batch.append(args[0].mean((0, 2, 3))))
    update_bn(batches, theirs)
    recompute_statistics(net, batches)
    for place, pixels in ((1, 7 * 7), (4, 5 * 5)):
        batch, n = 4 * pixels, 5 * 4 * pixels
        between = torch.stack(means[place]).var(0, correction=0)
        var = (theirs[place].running_var * (batch - 1) / batch + between) * n / (n - 1)
        torch.testing.assert_close(net[place].running_mean, theirs[place].running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net[place].running_var, var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recompute",
    [
        ours_recompute,
        ours_sequential,
        falls_short(fvcore_recompute, FVCORE + "subtracts E[x]² from E[x²] in float32: a variance below 0."),
    ],
)
def test_a_large_mean_with_a_small_spread_gives_a_variance_and_no_nan(recompute):
    layer, batches = nn.BatchNorm1d(64), [100 + 0.01 * torch.randn(size, 64) for size in UNEVEN]
    recompute(layer, batches)
    assert (layer.running_var > 0).all()
    torch.testing.assert_close(layer.running_var.double(), statistics(batches)[1], rtol=0.01, atol=0)
    assert layer.eval()(torch.cat(batches)).isfinite().all()


@pytest.mark.parametrize(
    "recompute",
    [
        ours_recompute,
        ours_sequential,
        torch_recompute,
        falls_short(fvcore_recompute, FVCORE + "passes over a model in eval mode, as documented."),
    ],
)
def test_a_model_in_eval_mode_is_recomputed(recompute):
    layer, batches = nn.BatchNorm1d(64).eval(), rows((7, 7))
    recompute(layer, batches)
    torch.testing.assert_close(layer.running_mean.double(), statistics(batches)[0], rtol=1e-5, atol=1e-5)


class Broken(list):
    """Batches that cannot all be read."""

    def __iter__(self):
        yield self[0]
        raise OSError("unreadable")


def fvcore_short(model, batches):
    fvcore_recompute(model, batches, iterations=1 + len(batches))


@pytest.mark.parametrize(
    ("recompute", "batches"),
    [
        (ours_recompute, Broken),
        (ours_sequential, Broken),
        *(
            pytest.param(peer, kind, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))
            for peer, kind, reason in (
                (fvcore_recompute, Broken, FVCORE + "leaves momentum at 1."),
                (fvcore_short, list, FVCORE + "leaves momentum at 1 if the loader is shorter than num_iters."),
                (torch_recompute, Broken, "torch 2.14: update_bn leaves momentum at None."),
            )
        ),
    ],
)
def test_an_error_leaves_the_layer_as_it_was(recompute, batches):
    layer = shift(nn.BatchNorm1d(64))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((OSError, AssertionError)):
        recompute(layer, batches(rows((7, 7))))
    assert layer.momentum == 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("recompute", [ours_recompute, torch_recompute, falls_short(fvcore_recompute, FVCORE + "refuses it.")])
def test_a_layer_in_two_places_is_recomputed(recompute):
    layer = nn.BatchNorm1d(64)
    recompute(nn.Sequential(layer, nn.ReLU(), layer), rows((7, 7)))
    assert layer.running_mean.any()


@pytest.mark.parametrize(
    "recompute", [ours_recompute, fvcore_recompute, falls_short(torch_recompute, "torch 2.14: update_bn calls model.train().")]
)
def test_every_module_keeps_its_mode(net, recompute):
    net[4].eval()
    before = [module.training for module in net.modules()]
    recompute(net, [torch.randn(4, 1, 9, 9)])
    assert [module.training for module in net.modules()] == before


@pytest.mark.parametrize(
    "recompute",
    [ours_recompute, torch_recompute, falls_short(fvcore_recompute, FVCORE + "assigns new tensors.")],
)
def test_the_buffers_change_in_place(recompute):
    layer = nn.BatchNorm1d(64)
    buffer = layer.running_mean
    recompute(layer, rows((7, 7)))
    assert layer.running_mean is buffer


@pytest.mark.parametrize(
    "recompute",
    [
        ours_recompute,
        ours_sequential,
        falls_short(torch_recompute, "torch 2.14: update_bn resets the statistics in silence.", pytest.fail.Exception),
    ],
)
def test_no_batches_are_an_error(recompute):
    with pytest.raises(ValueError):
        recompute(nn.BatchNorm1d(64), [])


@pytest.mark.parametrize(
    "recompute",
    [
        ours_sequential,
        falls_short(fvcore_recompute, FVCORE + "has one pass only."),
    ],
)
def test_the_cut_into_batches_does_not_matter_to_deeper_layers(net, recompute):
    inputs, twin = torch.randn(21, 1, 9, 9) * torch.linspace(0.1, 3, 21).view(-1, 1, 1, 1), copy.deepcopy(net)
    recompute(net, list(inputs.split(UNEVEN)))
    recompute(twin, list(inputs.split(7)))
    torch.testing.assert_close(net[4].running_var, twin[4].running_var, rtol=1e-4, atol=1e-5)
