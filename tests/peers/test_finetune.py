"""Fine-tuning: parameter groups, joining an optimizer, freezing, the range test, early stopping."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from helpers.finetune import EarlyStopping, find_lr, freeze, parameter_groups, unfreeze, unfreeze_into

from . import falls_short, load

TIMM, FASTAI, LIGHTNING = "timm 1.0.31 ", "fastai 2.8.12 ", "lightning 2.6.6 "


@pytest.fixture
def net():
    """Two blocks with a BatchNorm each, new, and a head; 3 classes of 8 x 8 images."""
    layers = {"conv1": nn.Conv2d(1, 4, 3), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU(), "conv2": nn.Conv2d(4, 4, 3)}
    layers |= {"bn2": nn.BatchNorm2d(4), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 3)}
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture
def examples():
    return torch.randn(48, 1, 8, 8), torch.arange(48) % 3


# --- parameter groups ---------------------------------------------------------------------------------------------

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
STAGES = {"resnet18": ["conv1", *BLOCKS, "fc"], "mixer_s32_224": ["stem", *(f"blocks.{n}" for n in range(8)), "head"]}


def ours_groups(model, stages, lr):
    return parameter_groups(model, lr, factor=2.6, weight_decay=0.01, stages=stages)


def timm_groups(model, stages, lr):
    return load("timm.optim").param_groups_layer_decay(model, weight_decay=0.01, layer_decay=1 / 2.6)


def by_name(model, groups, value):
    """Parameter name -> `value` of its group; fails if a parameter is in no group or in two."""
    values = [(parameter, value(group)) for group in groups for parameter in group["params"]]
    assert len(values) == len({id(parameter) for parameter, _ in values}) == len(list(model.parameters()))
    by_id = {id(parameter): value for parameter, value in values}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", list(STAGES))
def test_groups_equal_timms_layer_decay(name):
    """Members, decay, and lr = base lr times timm's lr_scale."""
    model = load("timm").create_model(name, num_classes=5)
    ours = ours_groups(model, STAGES[name], 1e-3)
    theirs = timm_groups(model, STAGES[name], 1e-3)
    wanted = by_name(model, theirs, lambda group: (group["weight_decay"], pytest.approx(1e-3 * group["lr_scale"], rel=1e-9)))
    assert by_name(model, ours, lambda group: (group["weight_decay"], group["lr"])) == wanted


@pytest.mark.parametrize(
    "groups", [ours_groups, falls_short(timm_groups, TIMM + "gives an `lr_scale`, which torch's optimizers ignore.")]
)
def test_learning_rates_are_real_ones_and_keep_their_ratios_under_a_scheduler_of_torch(groups):
    model = load("timm").create_model("resnet18", num_classes=5)
    optimizer = torch.optim.AdamW(groups(model, STAGES["resnet18"], 1e-3), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, 10)
    for step in range(4):
        rates = by_name(model, optimizer.param_groups, lambda group: group["lr"])
        assert rates["layer4.1.conv1.weight"] == pytest.approx(rates["fc.weight"] / 2.6)
        assert rates["conv1.weight"] == pytest.approx(rates["fc.weight"] / 2.6**9)
        assert rates["fc.weight"] == pytest.approx(1e-3 * (1 + torch.tensor(torch.pi * step / 10).cos().item()) / 2)
        optimizer.step()
        scheduler.step()


def test_timms_own_scheduler_gives_the_learning_rates_that_ours_have_under_torchs():
    model = load("timm").create_model("resnet18", num_classes=5)
    theirs = torch.optim.AdamW(timm_groups(model, None, None), lr=1e-3)
    their_scheduler = load("timm.scheduler").CosineLRScheduler(theirs, t_initial=10)
    ours = torch.optim.AdamW(ours_groups(model, STAGES["resnet18"], 1e-3))
    our_scheduler = CosineAnnealingLR(ours, 10)
    for epoch in range(4):
        their_scheduler.step(epoch)
        rates = by_name(model, theirs.param_groups, lambda group: pytest.approx(group["lr"], rel=1e-6))
        assert by_name(model, ours.param_groups, lambda group: group["lr"]) == rates
        ours.step()
        our_scheduler.step()


def fastai_rates(parameters, lr):
    """The learning rates that fastai's optimizer gives to groups, from stem to head."""
    optimizer = load("fastai.optimizer").SGD(parameters, lr=lr)
    return [hyper["lr"] for hyper in optimizer.hypers]


def rates(groups):
    """Of each stage, from stem to head."""
    return list({group["name"]: group["lr"] for group in groups}.values())


@pytest.mark.slow  # importing fastai
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_pair_of_learning_rates_is_fastais_slice_a_geometric_sequence(count):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    ours = parameter_groups(model, lr=(1e-5, 1e-2), stages=[str(number) for number in range(count)])
    theirs = fastai_rates([list(layer.parameters()) for layer in model], slice(1e-5, 1e-2))
    assert rates(ours) == pytest.approx(theirs, rel=1e-9)
    assert theirs == pytest.approx(load("fastcore.basics").even_mults(1e-5, 1e-2, count))


@pytest.mark.slow  # importing fastai
def test_ulmfits_factor_is_its_closed_form_and_fastais_slice_from_lr_by_2_6_to_the_4():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    ours = rates(parameter_groups(model, lr=0.02, stages=list("01234")))
    assert ours == pytest.approx([0.02 * 2.6 ** (number - 4) for number in range(5)], rel=1e-12)
    theirs = fastai_rates([list(layer.parameters()) for layer in model], slice(0.02 / 2.6**4, 0.02))
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.slow  # importing fastai
def test_no_weight_decay_on_just_what_fastai_exempts_biases_and_norms():
    model = resnet18(weights=None)
    exempt = {id(parameter) for parameter in load("fastai.torch_core").norm_bias_params(model)}
    ours = by_name(model, parameter_groups(model, lr=1e-3), lambda group: group["weight_decay"] == 0)
    assert ours == {name: id(parameter) in exempt for name, parameter in model.named_parameters()}


# --- joining an optimizer -----------------------------------------------------------------------------------------


def ours_join(optimizer, module):
    unfreeze_into(optimizer, module.parameters(), lr=0.1)


def lightning_join(optimizer, module):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The provided params to be frozen already exist")
        load("lightning.pytorch.callbacks").BaseFinetuning.unfreeze_and_add_param_group(module, optimizer, lr=0.1)


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize(
    "join", [ours_join, falls_short(lightning_join, LIGHTNING + "compares values: a second new BatchNorm is dropped.")]
)
def test_every_new_batchnorm_joins_the_optimizer(net, join):
    assert_all_join(net, [net.bn1, net.bn2], join)


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize(
    "join", [ours_join, falls_short(lightning_join, LIGHTNING + "compares values: a second bias of zeros is dropped.")]
)
def test_every_bias_of_zeros_joins_the_optimizer(net, join):
    nn.init.zeros_(net.conv1.bias)
    nn.init.zeros_(net.conv2.bias)
    assert_all_join(net, [net.conv1, net.conv2], join)


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize("join", [ours_join, lightning_join])
def test_what_the_optimizer_holds_does_not_join_twice(net, join):
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=1.0)
    join(optimizer, net)
    ids = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))


def assert_all_join(net, modules, join):
    freeze(net)
    unfreeze(net, "fc")
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=1.0)
    for module in modules:
        join(optimizer, module)
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert ids == {id(parameter) for module in (net.fc, *modules) for parameter in module.parameters()}
    assert all(parameter.requires_grad for module in modules for parameter in module.parameters())


# --- freezing -----------------------------------------------------------------------------------------------------


def ours_freeze(model, part):
    frozen = freeze(model, part)
    return lambda: unfreeze(model, frozen)


def timm_freeze(model, part):
    utils = load("timm.utils")
    utils.freeze(model, [part], include_bn_running_stats=False)
    return lambda: utils.unfreeze(model, [part], include_bn_running_stats=False)


def lightning_freeze(model, part):
    base = load("lightning.pytorch.callbacks").BaseFinetuning
    base.freeze(model.get_submodule(part), train_bn=False)
    return lambda: base.make_trainable(model.get_submodule(part))


FREEZERS = [ours_freeze, timm_freeze, lightning_freeze]


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize("freezer", FREEZERS)
def test_a_part_is_frozen_and_nothing_else(freezer):
    model = resnet18(weights=None)
    freezer(model, "layer2")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags == {name: not name.startswith("layer2.") for name in flags}


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize(
    "freezer",
    [
        ours_freeze,
        falls_short(timm_freeze, TIMM + "unfreezes all of the part, whatever was frozen before."),
        falls_short(lightning_freeze, LIGHTNING + "unfreezes all of the part, whatever was frozen before."),
    ],
)
def test_to_undo_a_freeze_leaves_frozen_what_was_frozen_before(freezer):
    model = resnet18(weights=None)
    model.layer2[0].bn1.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    freezer(model, "layer2")()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.slow  # importing lightning
@pytest.mark.parametrize(
    "freezer",
    [
        ours_freeze,
        falls_short(timm_freeze, TIMM + "leaves the last gradient, by which the optimizer goes on."),
        falls_short(lightning_freeze, LIGHTNING + "leaves the last gradient, by which the optimizer goes on."),
    ],
)
def test_an_optimizer_does_not_move_what_was_frozen_after_backward(net, examples, freezer):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(examples[0]), examples[1]).backward()
    freezer(net, "conv1")
    before = net.conv1.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.conv1.weight, before)


# --- the range test -----------------------------------------------------------------------------------------------


def ours_find(net, inputs, labels, folder):
    batches = list(zip(inputs.split(8), labels.split(8), strict=True)) * 3
    find_lr(net, torch.optim.AdamW(net.parameters()), batches)


def fastai_find(net, inputs, labels, folder):
    """`Learner.lr_find` in its parts, so that the folder which it leaves behind when it fails can be removed."""
    basics = load("fastai.basics")
    data = TensorDataset(inputs, labels)
    loaders = basics.DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    learner = basics.Learner(loaders, net, loss_func=nn.CrossEntropyLoss(), path=folder)
    finder = load("fastai.callback.schedule").LRFinder(num_it=18)
    with fastai_quiet(), learner.no_bar(), learner.no_logging():
        try:
            learner.fit(4, cbs=finder)
        finally:
            finder.tmp_d.cleanup()


def lightning_find(net, inputs, labels, folder):
    lightning = load("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    with lightning_quiet():
        tuner = load("lightning.pytorch.tuner").Tuner(trainer(folder, max_epochs=3))
        tuner.lr_find(Module(), train_dataloaders=loader, num_training=18, update_attr=False)


def trainer(folder, **settings):
    settings |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return load("lightning").Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **settings)


def lightning_quiet():
    """Without its advice on workers, logging intervals and the like, which comes as warnings."""
    return warnings.catch_warnings(action="ignore")


def fastai_quiet():
    """Without the warning that it loads models by way of `numpy.core`, which numpy deprecates."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


@pytest.mark.slow  # importing fastai and lightning
@pytest.mark.parametrize("find", [ours_find, fastai_find, lightning_find])
def test_the_range_test_leaves_parameters_and_buffers_as_they_were(net, examples, tmp_path, find):
    before = copy.deepcopy(net.state_dict())
    find(net, *examples, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("find", [ours_find, falls_short(fastai_find, FASTAI + "ends in train mode."), lightning_find])
def test_the_range_test_leaves_every_mode_as_it_was(net, examples, tmp_path, find):
    net.bn1.eval()
    before = [module.training for module in net.modules()]
    find(net, *examples, tmp_path)
    assert [module.training for module in net.modules()] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "find", [ours_find, falls_short(fastai_find, FASTAI + "draws from the global random state."), lightning_find]
)
def test_the_range_test_leaves_the_random_state_as_it_was(net, examples, tmp_path, find):
    before = torch.get_rng_state()
    find(net, *examples, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "find", [ours_find, fastai_find, falls_short(lightning_find, LIGHTNING + "leaves the last step's gradients.")]
)
def test_the_range_test_leaves_no_gradient(net, examples, tmp_path, find):
    find(net, *examples, tmp_path)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "find",
    [
        ours_find,
        lightning_find,
        falls_short(fastai_find, FASTAI + "restores the model after a finished run only."),
    ],
)
def test_the_range_test_leaves_the_model_as_it_was_if_it_fails(net, examples, tmp_path, find):
    before = copy.deepcopy(net.state_dict())
    calls = iter(range(100))
    hook = net.register_forward_pre_hook(lambda *_: fail() if next(calls) == 5 else None)
    with pytest.raises(OSError):
        find(net, *examples, tmp_path)
    hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def fail():
    raise OSError("unreadable")


# --- early stopping -----------------------------------------------------------------------------------------------

SCORES = [0.2, 0.5, 0.4, 0.5, 0.6, 0.6, 0.1, 0.3, 0.2, 0.1]


def ours_stop(scores, patience, folder):
    """The epoch at which training ends, and the epoch whose weights it leaves."""
    model = nn.Linear(1, 1)
    stopping = EarlyStopping(model, patience)
    for epoch, score in enumerate(scores):
        nn.init.constant_(model.weight, epoch)
        if stopping.step(score):
            break
    stopping.restore()
    return epoch, model.weight.item()


def fastai_stop(scores, patience, folder):
    basics, tracker = load("fastai.basics"), load("fastai.callback.tracker")
    model, values = nn.Linear(1, 1), iter(scores)

    class Epoch(basics.Callback):
        def after_train(self):
            nn.init.constant_(model.weight, self.epoch)
            self.learn.last = self.epoch

    def score(*_):
        return torch.tensor(next(values))

    data = TensorDataset(torch.ones(2, 1), torch.ones(2, 1))
    loaders = basics.DataLoaders.from_dsets(data, data, bs=2, device="cpu", num_workers=0)
    callbacks = [Epoch(), tracker.SaveModelCallback("score"), tracker.EarlyStoppingCallback("score", patience=patience)]
    learner = basics.Learner(loaders, model, loss_func=nn.MSELoss(), metrics=score, path=folder, cbs=callbacks)
    with fastai_quiet(), learner.no_bar(), learner.no_logging():
        learner.fit(len(scores), lr=0.0)
    return learner.last, model.weight.item()


def lightning_stop(scores, patience, folder):
    lightning, callbacks = load("lightning"), load("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, _):
            return self.layer(batch[0]).sum()

        def on_train_epoch_end(self):
            nn.init.constant_(self.layer.weight, self.current_epoch)
            self.log("score", torch.tensor(scores[self.current_epoch]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, loader = Module(), DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=2)
    stopping = callbacks.EarlyStopping("score", min_delta=0, patience=patience, mode="max", check_on_train_epoch_end=True)
    with lightning_quiet():
        trainer(folder, max_epochs=len(scores), callbacks=[stopping]).fit(module, loader)
    return stopping.stopped_epoch or len(scores) - 1, module.layer.weight.item()


@pytest.mark.slow  # importing fastai and lightning
@pytest.mark.parametrize("peer", [fastai_stop, lightning_stop])
@pytest.mark.parametrize("patience", [1, 2, 3, 5, 20])
def test_early_stopping_ends_when_the_peers_end(tmp_path, peer, patience):
    assert ours_stop(SCORES, patience, tmp_path)[0] == peer(SCORES, patience, tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        ours_stop,
        fastai_stop,
        falls_short(lightning_stop, LIGHTNING + "keeps the best in a checkpoint at most."),
    ],
)
@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_leaves_the_best_weights(tmp_path, stop, patience):
    last, kept = stop(SCORES, patience, tmp_path)
    assert kept == max(range(last + 1), key=lambda epoch: SCORES[epoch])
