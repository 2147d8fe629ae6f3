import contextlib
import copy
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from helpers.backbones import glyphnet, stages
from helpers.data import Examples
from helpers.features import drop_head, extract, linear_probe
from helpers.finetune import (
    EarlyStopping,
    GradualUnfreezing,
    LearningRates,
    find_lr,
    freeze,
    lp_ft,
    parameter_groups,
    probe_head,
    put_back,
    report,
    train_last,
    train_only,
    unfreeze,
    unfreeze_into,
)
from helpers.training import evaluate, fit, train_mode

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py

few = settings(max_examples=25, deadline=None, derandomize=True)


class Tiny(nn.Module):
    """Three stages, a normalisation between two of them, a parameter of its own, a tied weight and a buffer not saved."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 6))
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(6, 3)
        self.again = self.stem  # the same module under a second name
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x * self.scale)) + self.token))


STAGES = ("stem", "body", "head")


@pytest.fixture
def tiny():
    model = Tiny()
    model(torch.randn(20, 4) + 1)  # statistics that are not those of a fresh layer
    return model


@pytest.fixture
def task():
    labels = torch.arange(48) % 3
    return Examples(torch.randn(48, 4) + 3 * F.one_hot(labels, 4), labels, ("a", "b", "c"))


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trainable(model):
    return [name for name, flag in flags(model).items() if flag]


def state(model):
    """Everything of a model that could change, as copies."""
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return tensors, grads, flags(model), [module.training for module in model.modules()]


def assert_same(after, before):
    for mine, theirs in zip(after[:2], before[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert (tensor is None) == (theirs[name] is None) and (tensor is None or torch.equal(tensor, theirs[name])), name
    assert after[2:] == before[2:]


def same_parameters(first, second):
    return [id(parameter) for parameter in first] == [id(parameter) for parameter in second]


# --- what trains --------------------------------------------------------------------------------------------------


def test_train_last_counts_stages_and_takes_what_stands_between_them(tiny):
    every = list(flags(tiny))
    assert train_last(tiny, 1, STAGES) == trainable(tiny) == ["head.weight", "head.bias"]
    assert train_last(tiny, 0, STAGES) == trainable(tiny) == []
    assert train_last(tiny, 3, STAGES) == trainable(tiny) == every
    assert "norm.weight" in every and "norm.weight" not in train_only(tiny, list(STAGES))
    net = glyphnet()
    assert train_last(net, 6) == [name for name, _ in net.named_parameters()]
    assert {name.split(".")[0] for name in train_last(net, 2)} == {"layer4", "fc"}
    with pytest.raises(
        ValueError, match=r"^count must be a whole number from 0 to 3, got 4. That is how many stages there are.$"
    ):
        train_last(tiny, 4, STAGES)


def test_train_only_keeps_the_gradients_of_what_goes_on_training(tiny):
    for parameter in tiny.parameters():
        parameter.grad = torch.ones_like(parameter)
    names = train_only(tiny, "head")
    assert {name for name, parameter in tiny.named_parameters() if parameter.grad is not None} == set(names)


def test_train_only_trains_exactly_the_parts(tiny):
    assert train_only(tiny, "head") == trainable(tiny) == ["head.weight", "head.bias"]
    assert train_only(tiny, ["norm.bias", tiny.body]) == trainable(tiny) == ["norm.bias", "body.0.weight"]
    assert train_only(tiny, []) == trainable(tiny) == []
    assert train_only(tiny, tiny) == trainable(tiny) == list(flags(tiny))


def test_a_name_matches_no_longer_name():
    model = nn.Sequential(OrderedDict(layer1=nn.Linear(2, 2), layer10=nn.Linear(2, 2), a=nn.Linear(2, 2)))
    assert train_only(model, "layer1") == ["layer1.weight", "layer1.bias"]
    assert train_only(model, "a") == ["a.weight", "a.bias"]


def test_a_shared_parameter_is_found_under_each_of_its_names(tiny):
    assert train_only(tiny, "again.weight") == ["stem.weight"]
    assert train_only(tiny, "again") == ["stem.weight", "stem.bias"]
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "decoder": nn.Linear(4, 5)})
    tied["decoder"].weight = tied["embedding"].weight
    assert train_only(tied, "decoder") == ["embedding.weight", "decoder.bias"]
    assert freeze(tied, "decoder.weight") == ["embedding.weight"]


def test_freeze_and_unfreeze_name_what_changed(tiny):
    assert freeze(tiny, "body") == ["body.0.weight"]
    assert freeze(tiny, "body") == []
    assert freeze(tiny) == ["token", "stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert unfreeze(tiny, ["head", "body"]) == ["body.0.weight", "head.weight", "head.bias"]
    assert freeze(tiny, (module for module in tiny.children())) == ["body.0.weight", "head.weight", "head.bias"]


def test_freezing_touches_neither_buffers_nor_modes(tiny):
    tiny.norm.eval()
    tensors, _, _, modes = state(tiny)
    train_only(tiny, "head")
    after = state(tiny)
    assert all(torch.equal(after[0][name], tensor) for name, tensor in tensors.items()) and after[3] == modes


def test_setting_the_flag_on_a_module_is_no_unfreezing(tiny):
    freeze(tiny)
    tiny.head.requires_grad = True
    assert trainable(tiny) == []


@pytest.mark.parametrize("drops", [False, True])
def test_a_stale_gradient_moves_what_only_looks_frozen(tiny, drops):
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1, momentum=0.9)
    tiny(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    before = tiny.stem.weight.clone()
    _ = freeze(tiny, "stem") if drops else tiny.stem.requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        tiny(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(tiny.stem.weight, before) == drops


NAMES = [name for name, _ in Tiny().named_parameters()]
PARTS = [*NAMES, "stem", "again", "again.bias", "norm", "body", "body.0", "head"]


@few
@given(st.sets(st.sampled_from(NAMES)), st.none() | st.lists(st.sampled_from(PARTS), max_size=4))
def test_freeze_then_unfreeze_is_an_identity_and_the_other_way_round(frozen, parts):
    model = Tiny()
    freeze(model, frozen)
    before = flags(model)
    unfreeze(model, freeze(model, parts))
    assert flags(model) == before
    freeze(model, unfreeze(model, parts))
    assert flags(model) == before


@few
@given(st.sets(st.sampled_from(NAMES)), st.lists(st.sampled_from(PARTS), max_size=4))
def test_the_names_returned_are_those_that_changed(frozen, parts):
    model = Tiny()
    freeze(model, frozen)
    before = flags(model)
    changed = freeze(model, parts)
    assert changed == [name for name, flag in flags(model).items() if flag != before[name]]
    assert train_only(model, parts) == trainable(model)


@pytest.mark.parametrize("action", [freeze, unfreeze, train_only])
@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ("haed", ValueError, "not a part of Tiny with parameters: 'haed'. Choose from ['head']."),
        (["head", "fc"], ValueError, "not a part of Tiny with parameters: 'fc'. Choose from ['stem', 'norm', 'body', "),
        (["head", "body.2"], ValueError, "not a part of Tiny with parameters: 'body.2'. Choose from ['body.0', 'body'"),
        ("", ValueError, "not a part of Tiny with parameters: ''. Choose from ['stem', 'norm', "),
        (nn.Linear(2, 2), ValueError, "not a part of this Tiny: a Linear. Pass its name instead."),
        (["head", 3], TypeError, "parts must be modules of the model or names, got 3."),
        (3, TypeError, "parts must be modules of the model or names, got 3."),
    ],
)
def test_a_part_that_is_not_there_is_told_before_anything_changes(tiny, action, parts, kind, message):
    freeze(tiny, "stem")
    before = state(tiny)
    with pytest.raises(kind) as error:
        action(tiny, parts)
    assert str(error.value).startswith(message)
    assert_same(state(tiny), before)


# --- the report ---------------------------------------------------------------------------------------------------


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_report_counts_the_bytes_that_training_takes(tiny, dtype):
    tiny.body.to(dtype)
    freeze(tiny, ["stem.bias", "head"])
    counted = report(tiny, STAGES)
    optimizer = torch.optim.AdamW(tiny.parameters())
    for parameter in tiny.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert counted.gradient_bytes == bytes_of(p.grad for p in tiny.parameters() if p.grad is not None)
    assert counted.adamw_bytes == bytes_of(tensor for values in optimizer.state.values() for tensor in values.values())
    assert counted.stages == {"stem": (6 + 24 + 12, 6 + 30 + 12), "body": (36, 36), "head": (0, 21)}
    assert (counted.trainable, counted.all) == (78, sum(p.numel() for p in tiny.parameters()))


def test_the_report_names_frozen_batchnorms_that_move(tiny):
    assert report(tiny).moving == []
    freeze(tiny, ["norm", "body"])
    assert report(tiny).moving == ["norm", "body.1"]
    before = tiny.norm.running_mean.clone(), tiny.body[1].running_mean.clone()
    tiny(torch.randn(9, 4))
    assert not torch.equal(tiny.norm.running_mean, before[0]) and not torch.equal(tiny.body[1].running_mean, before[1])
    tiny.norm.track_running_stats = False
    assert report(tiny).moving == ["body.1"]
    train_mode(tiny)
    assert report(tiny).moving == []


def test_the_report_is_a_table_of_at_most_88_columns():
    model = glyphnet(classes=10)
    train_only(model, "fc")
    wanted = """\
stage   trainable      all
conv1           0      176
layer1          0    4,672
layer2          0   14,528
layer3          0   57,728
layer4          0  230,144
fc          1,290    1,290
total       1,290  308,538
5,160 bytes of gradients, 10,328 bytes of AdamW state
statistics will move: bn1 and 11 more, frozen but in train mode"""
    assert str(report(model)) == wanted
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(3, 3), nn.Linear(100_000, 1_000_000))
        for _ in range(30):
            huge = nn.Sequential(OrderedDict(encoder=huge))
        huge = nn.Sequential(OrderedDict(encoder=huge, norm=nn.BatchNorm1d(3)))
        deep = nn.Sequential(OrderedDict({"a" * 60: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))}))
        deep.requires_grad_(False)
    assert max(len(line) for line in f"{report(huge)}\n{report(deep)}".splitlines()) <= 88


# --- parameter groups ---------------------------------------------------------------------------------------------


def test_each_stage_has_the_next_ones_learning_rate_by_26(tiny):
    groups = parameter_groups(tiny, 0.1, stages=STAGES)
    assert [(group["name"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("stem", 0.01, 2),  # the token, 1 x 6, and the weight
        ("stem", 0.0, 3),  # its bias, and the norm that follows
        ("body", 0.01, 1),
        ("head", 0.01, 1),
        ("head", 0.0, 1),
    ]
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 2.6**2] * 2 + [0.1 / 2.6] + [0.1] * 2, rel=1e-12)
    assert same_parameters(groups[0]["params"], [tiny.token, tiny.stem.weight])


def test_a_pair_of_learning_rates_is_a_geometric_sequence(tiny):
    rates = dict.fromkeys(STAGES)
    for group in parameter_groups(tiny, (1e-4, 1e-2), factor=7.0):
        rates[group["name"]] = group["lr"]
    assert list(rates.values()) == pytest.approx([1e-4, 1e-3, 1e-2], rel=1e-12)
    assert (rates["stem"], rates["head"]) == (1e-4, 1e-2)
    assert {group["lr"] for group in parameter_groups(nn.Linear(2, 2), (1e-4, 1e-2))} == {1e-2}
    assert [group["lr"] for group in parameter_groups(tiny, (1e-2, 1e-2))] == pytest.approx([1e-2] * 5)


def test_a_frozen_stage_keeps_its_depth(tiny):
    freeze(tiny, ["body", "head.weight"])
    groups = parameter_groups(tiny, 1.0, factor=10, stages=STAGES)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({"stem": 0.01, "head": 1.0})
    assert same_parameters(groups[-1]["params"], [tiny.head.bias])
    freeze(tiny)
    assert parameter_groups(tiny, 1.0) == []


def test_stages_may_be_some_modules_only_and_in_another_order_than_they_are_used(tiny):
    assert [group["name"] for group in parameter_groups(tiny, 1.0, stages="head", weight_decay=0)] == ["head"]
    backwards = nn.Sequential(OrderedDict(head=nn.Linear(2, 2), stem=nn.Linear(2, 2)))  # registered head first
    rates = {group["name"]: group["lr"] for group in parameter_groups(backwards, 1.0, 2.0, 0, ("stem", "head"))}
    assert rates == {"stem": 0.5, "head": 1.0}


def test_a_stage_does_not_begin_at_a_longer_name():
    model = nn.Sequential(OrderedDict(layer10=nn.Linear(2, 2), layer1=nn.Linear(2, 2)))
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in parameter_groups(model, 1.0, 2.0, 0)}
    assert rates == {"layer10": (0.5, 2), "layer1": (1.0, 2)}


def test_a_tied_weight_is_in_one_group_and_a_stage_without_others_still_counts():
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(5, 5), body=nn.Linear(5, 5), out=nn.Linear(5, 5, bias=False)))
    model.out.weight = model.embed.weight
    groups = parameter_groups(model, 1.0, factor=2, weight_decay=0)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [("embed", 0.25, 1), ("body", 0.5, 2)]


def test_the_default_stages_of_a_backbone_with_a_head():
    model = nn.Sequential(OrderedDict(backbone=drop_head(glyphnet()), head=nn.Linear(128, 10)))
    assert stages(model) == (*(f"backbone.{name}" for name in glyphnet().stages), "head")
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, 1.0, 2.0)}
    assert rates == {name: 0.5 ** (5 - k) for k, name in enumerate(stages(model))}
    assert sum(len(group["params"]) for group in parameter_groups(model, 1.0)) == len(list(model.parameters()))


LAYERS = (
    lambda: nn.Linear(2, 2),
    lambda: nn.Linear(2, 2, bias=False),
    lambda: nn.LayerNorm(2),
    lambda: nn.BatchNorm1d(2, affine=False),
    lambda: nn.ReLU(),
    lambda: nn.PReLU(),
    lambda: nn.Embedding(2, 2),
)
layers = st.sampled_from(LAYERS).map(lambda make: make())
models = st.recursive(layers, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: nn.Sequential(*parts)))


@few
@given(st.data())
def test_groups_are_a_partition_of_the_trainable_parameters(data):
    model = nn.Sequential(data.draw(models), data.draw(models), nn.Linear(2, 2))
    names = [name for name, _ in model.named_modules() if name]
    if data.draw(st.booleans(), "tie"):
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        linear[-1].weight = linear[0].weight
    chosen = data.draw(st.none() | st.lists(st.sampled_from(names), unique=True, max_size=5), "stages")
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    groups = parameter_groups(model, 0.1, 2.0, 0.05, chosen)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["params"] and set(group) == {"params", "lr", "weight_decay", "name"} for group in groups)
    assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.05) for group in groups for parameter in group["params"])
    order = list(stages(model) if chosen is None else chosen) or ["model"]
    for group in groups:
        assert group["lr"] == pytest.approx(0.1 / 2.0 ** (len(order) - 1 - order.index(group["name"])))
    pairs = [(group["name"], group["weight_decay"]) for group in groups]
    assert len(pairs) == len(set(pairs))
    begins = {stage: [name.startswith(f"{stage}.") for name, _ in model.named_parameters()] for stage in order}
    begins = {stage: places.index(True) for stage, places in begins.items() if any(places)}
    stage_of = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    for place, (_, parameter) in enumerate(model.named_parameters()):
        begun = [(begin, order.index(stage)) for stage, begin in begins.items() if begin <= place]
        assert stage_of.get(id(parameter)) in (None, order[max(begun)[1]] if begun else order[0])


SCHEDULES = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=9
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_learning_rates_keep_their_ratios_under_torchs_schedulers(tiny, schedule):
    optimizer = torch.optim.AdamW(parameter_groups(tiny, 0.1, factor=2, stages=STAGES))
    scheduler = schedule(optimizer)
    highest = set()
    for _ in range(7):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([lrs[-1] / 4] * 2 + [lrs[-1] / 2] + [lrs[-1]] * 2)
        highest.add(lrs[-1])
        optimizer.step()
        scheduler.step()
    assert len(highest) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("stm", "head")}, "not a module of Tiny: 'stm'. Choose from ['stem']."),
        ({"stages": ("stem", "fc")}, "not a module of Tiny: 'fc'. Choose from ['stem', 'norm', 'body', 'head', 'again']."),
        ({"stages": ("stem", "stem")}, "stages must name each module once, got 'stem' twice."),
        ({"lr": 0}, "lr must be a number above 0, got 0."),
        ({"factor": 0}, "factor must be a number above 0, got 0. 2.6 in ULMFiT; 1 for one lr."),
        ({"weight_decay": -0.1}, "weight_decay must be a number above 0, got -0.1. 0 means none."),
        ({"lr": (1e-2, 1e-4)}, "lr must be a pair (lowest, highest), got 0.01 before 0.0001. Swap them."),
        ({"lr": (1e-2,)}, "lr must be a number or a pair (lowest, highest), got 1 numbers."),
    ],
)
def test_groups_tell_bad_input_in_one_sentence(tiny, change, message):
    with pytest.raises(ValueError) as error:
        parameter_groups(tiny, **({"lr": 0.1} | change))
    assert str(error.value) == message


# --- into a running optimizer -------------------------------------------------------------------------------------


def test_what_the_optimizer_lacks_joins_as_one_group_and_all_else_stays(tiny, task):
    train_only(tiny, "head")
    optimizer = torch.optim.AdamW(tiny.head.parameters(), lr=0.1, weight_decay=0.3)
    F.cross_entropy(tiny(task.inputs), task.labels).backward()
    optimizer.step()
    before = {p: {key: value.clone() for key, value in values.items()} for p, values in optimizer.state.items()}
    old = copy.copy(optimizer.param_groups[0])
    added = unfreeze_into(optimizer, [*tiny.body.parameters(), *tiny.head.parameters(), *tiny.body.parameters()], 0.01)
    assert same_parameters(added, [tiny.body[0].weight])
    assert trainable(tiny) == ["body.0.weight", "head.weight", "head.bias"]
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[0] == old
    assert {key: optimizer.param_groups[1][key] for key in ("lr", "weight_decay")} == {"lr": 0.01, "weight_decay": 0.3}
    assert optimizer.state.keys() == before.keys()
    assert all(torch.equal(optimizer.state[p][key], value) for p, values in before.items() for key, value in values.items())
    weight = tiny.body[0].weight.clone()
    F.cross_entropy(tiny(task.inputs), task.labels).backward()
    optimizer.step()
    assert not torch.equal(tiny.body[0].weight, weight)


def test_parameters_of_equal_values_are_not_the_same(tiny):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(6))], lr=0.1)
    assert len(unfreeze_into(optimizer, [tiny.norm.bias, nn.Parameter(torch.zeros(6))], 0.1, weight_decay=0.0)) == 2


def test_nothing_to_add_adds_no_group(tiny):
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    freeze(tiny)
    assert unfreeze_into(optimizer, tiny.parameters(), 0.1, scheduler=scheduler) == []
    assert len(optimizer.param_groups) == 1 and trainable(tiny) == list(flags(tiny))
    assert unfreeze_into(optimizer, [], 0.1) == [] and len(optimizer.param_groups) == 1


def steps(optimizer, scheduler, count):
    """The learning rates of the last group before each of `count` steps, and after them."""
    lrs = [optimizer.param_groups[-1]["lr"]]
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[-1]["lr"])
    return lrs


def parameter():
    return nn.Parameter(torch.zeros(1))


def test_add_param_group_alone_fails_under_a_scheduler_or_leaves_the_group_out():
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.add_param_group({"params": [parameter()], "lr": 1.0})
    try:
        assert steps(optimizer, scheduler, 3) == [1.0, 1.0, 1.0, 1.0]
    except ValueError:
        assert scheduler.base_lrs == [1.0]
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    unfreeze_into(optimizer, [parameter()], 1.0, scheduler=scheduler)
    assert steps(optimizer, scheduler, 3) == [1.0, 0.5, 0.25, 0.125]


ratios = st.floats(0.1, 1.0)
counts = st.integers(1, 6)
PLAIN = {
    "LambdaLR": st.tuples(counts).map(lambda a: lambda o: lr_scheduler.LambdaLR(o, lambda step: min(step / a[0], 1))),
    "MultiplicativeLR": st.tuples(ratios).map(lambda a: lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: a[0] ** (s % 2))),
    "StepLR": st.tuples(counts, ratios).map(lambda a: lambda o: lr_scheduler.StepLR(o, *a)),
    "MultiStepLR": st.tuples(st.lists(counts, min_size=1, max_size=3), ratios).map(
        lambda a: lambda o: lr_scheduler.MultiStepLR(o, *a)
    ),
    "ExponentialLR": st.tuples(ratios).map(lambda a: lambda o: lr_scheduler.ExponentialLR(o, *a)),
    "LinearLR": st.tuples(ratios, ratios, counts).map(lambda a: lambda o: lr_scheduler.LinearLR(o, *a)),
    "ConstantLR": st.tuples(ratios, counts).map(lambda a: lambda o: lr_scheduler.ConstantLR(o, *a)),
    "PolynomialLR": st.tuples(counts, st.floats(0.5, 3)).map(lambda a: lambda o: lr_scheduler.PolynomialLR(o, *a)),
}
COSINES = {
    "CosineAnnealingLR": lambda low: st.tuples(counts, low).map(lambda a: lambda o: lr_scheduler.CosineAnnealingLR(o, *a)),
    "CosineAnnealingWarmRestarts": lambda low: st.tuples(counts, st.integers(1, 2), low).map(
        lambda a: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, *a)
    ),
}
lows = st.sampled_from([0.0, 0.01, 0.5])  # 0.5 is above some of the learning rates: the cosine rises to it
zero = st.just(0.0)


def sequential(makers):
    first, second, third, milestones = makers

    def make(optimizer):
        members = [first(optimizer), second(optimizer), third(optimizer)]
        return lr_scheduler.SequentialLR(optimizer, members, sorted(milestones))

    return make


proportional = st.one_of(*PLAIN.values(), *(make(zero) for make in COSINES.values()))
restarting = st.one_of(
    *(PLAIN[name] for name in PLAIN if name != "MultiplicativeLR"), *(make(lows) for make in COSINES.values())
)
milestones = st.sets(st.integers(1, 9), min_size=2, max_size=2)
SCHEDULERS = {
    **PLAIN,
    **{name: make(lows) for name, make in COSINES.items()},
    "SequentialLR": st.tuples(restarting, restarting, restarting, milestones).map(sequential),
    "SequentialLR, proportional": st.tuples(proportional, proportional, proportional, milestones).map(sequential),
    "ChainedScheduler": st.tuples(proportional, proportional).map(
        lambda makers: lambda optimizer: lr_scheduler.ChainedScheduler([make(optimizer) for make in makers], optimizer)
    ),
    "ChainedScheduler of SequentialLR": st.tuples(proportional, proportional, proportional, milestones).map(
        lambda a: lambda optimizer: lr_scheduler.ChainedScheduler([sequential(a)(optimizer)], optimizer)
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_group_that_joins_follows_the_schedule_as_if_there_from_the_start(name):
    @few
    @given(SCHEDULERS[name], st.lists(st.integers(0, 12), min_size=1, max_size=3), st.sampled_from([1.0, 0.3, 0.01]))
    def check(make, joins, lr):
        total = 14
        wanted = torch.optim.SGD([{"params": [parameter()], "lr": 0.2}, {"params": [parameter()], "lr": lr}])
        joined = torch.optim.SGD([parameter()], lr=0.2)
        theirs, ours = make(wanted), make(joined)
        for step in range(total):
            for _ in range(joins.count(step)):
                unfreeze_into(joined, [parameter()], lr, scheduler=ours)
            groups = joined.param_groups
            assert groups[0]["lr"] == wanted.param_groups[0]["lr"]
            for group in groups[1:]:
                assert group["lr"] == pytest.approx(wanted.param_groups[1]["lr"], rel=1e-9, abs=1e-12), step
            assert ours.get_last_lr() == [group["lr"] for group in groups] or not joins
            for optimizer, scheduler in ((wanted, theirs), (joined, ours)):
                optimizer.step()
                scheduler.step()

    check()


def test_a_group_that_joins_is_reduced_on_plateaus_like_the_others():
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=0.2)
    scheduler.step(1.0)
    unfreeze_into(optimizer, [parameter()], 0.8, scheduler=scheduler)
    lrs = []
    for _ in range(3):
        scheduler.step(1.0)
        lrs.append([group["lr"] for group in optimizer.param_groups])
    assert lrs == [[0.5, 0.4], [0.25, 0.2], [0.2, 0.2]]


def cosine_in_a_chain(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.CosineAnnealingLR(optimizer, 5, 0.01)], optimizer
    )


def multiplicative_after_a_cosine(optimizer):
    members = [lr_scheduler.CosineAnnealingLR(optimizer, 5, 0.01), lr_scheduler.MultiplicativeLR(optimizer, lambda s: 0.9)]
    return lr_scheduler.SequentialLR(optimizer, members, [2])


def forgotten(optimizer):
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.add_param_group({"params": [parameter()]})
    return scheduler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
            "a group cannot join OneCycleLR, which sets learning rates in its own way. Build the optimizer with all its groups "
            "at the start, or use LambdaLR.",
        ),
        (
            cosine_in_a_chain,
            "a group cannot join ChainedScheduler while a cosine in it has eta_min above 0. Set eta_min=0, "
            "or build the optimizer with all its groups at the start.",
        ),
        (
            multiplicative_after_a_cosine,
            "a group cannot join SequentialLR while a cosine in it has eta_min above 0. Set eta_min=0, "
            "or build the optimizer with all its groups at the start.",
        ),
        (
            lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1.0, lambda step: 0.5]),
            "LambdaLR must treat all groups alike, got different lr_lambdas: which would the new group follow? Give it one.",
        ),
        (
            lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=[0.1, 0.2]),
            "ReduceLROnPlateau must treat all groups alike, got different min_lrs: which would the new group follow? "
            "Give it one.",
        ),
        (
            forgotten,
            "ExponentialLR must know all 3 groups of the optimizer, got 2. "
            "Let each new group join with unfreeze_into(..., scheduler=scheduler).",
        ),
        (
            lambda o: lr_scheduler.ExponentialLR(torch.optim.SGD([parameter()], lr=1.0), 0.9),
            "scheduler must belong to this optimizer, got that of another. Build it as Scheduler(optimizer, ...).",
        ),
    ],
)
def test_a_scheduler_that_no_group_can_join_is_told_before_anything_changes(tiny, make, message):
    freeze(tiny)
    optimizer = torch.optim.SGD([{"params": [parameter()]}, {"params": [parameter()]}], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    groups, before = copy.copy(optimizer.param_groups), state(tiny)
    with pytest.raises(ValueError) as error:
        unfreeze_into(optimizer, tiny.parameters(), 0.1, scheduler=scheduler)
    assert str(error.value) == message
    assert optimizer.param_groups == groups
    assert_same(state(tiny), before)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be a number above 0, got 0.0."),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be a number above 0, got -1.0. 0 means none."),
        (
            {"parameters": nn.Linear(2, 2)},
            TypeError,
            "parameters must be nn.Parameters, got a Linear. Pass model.parameters(), for example.",
        ),
        (
            {"parameters": [parameter(), torch.zeros(2)]},
            TypeError,
            "parameters must be nn.Parameters, got a tensor of shape (2,). Pass model.parameters(), for example.",
        ),
    ],
)
def test_joining_tells_bad_input_in_one_sentence(tiny, change, kind, message):
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    with pytest.raises(kind) as error:
        unfreeze_into(optimizer, **({"parameters": tiny.parameters(), "lr": 0.1} | change))
    assert str(error.value) == message and len(optimizer.param_groups) == 1


# --- gradual unfreezing -------------------------------------------------------------------------------------------


def run(model, task, schedule, steps, records=None, **settings):
    """`fit` with a schedule; what was in the model and the learning rates before each step."""

    def before_step(step, optimizer, scheduler):
        schedule(step, optimizer, scheduler)
        if records is not None:
            lrs = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            records.append((state(model), {name: lrs.get(id(p)) for name, p in model.named_parameters()}))

    settings = {"lr": 0.1, "groups": schedule.groups, "before_step": before_step, "progress": False} | settings
    return fit(model, task, steps=steps, **settings)


def test_the_head_trains_first_and_a_stage_more_at_equal_intervals(tiny, task):
    schedule = GradualUnfreezing(tiny, 0.1, 12, factor=2, stages=STAGES)
    assert trainable(tiny) == ["head.weight", "head.bias"]
    assert schedule.starts == {"head": 0, "body": 4, "stem": 8}
    records = []
    history = run(tiny, task, schedule, 12, records)
    for step, ((_, _, flags_then, modes), lrs) in enumerate(records):
        stages_now = {name.partition(".")[0] for name, flag in flags_then.items() if flag}
        wanted = {"head"} | ({"body"} if step >= 4 else set()) | ({"stem", "norm", "token"} if step >= 8 else set())
        assert stages_now == wanted
        assert {name for name, lr in lrs.items() if lr is not None} == {name for name, flag in flags_then.items() if flag}
        for name, lr in lrs.items():
            depth = {"head": 0, "body": 1}.get(name.partition(".")[0], 2)
            assert lr is None or lr == pytest.approx(history.lr[step] / 2**depth, rel=1e-9)
        mode_of = dict(zip((name for name, _ in tiny.named_modules()), modes, strict=True))
        assert mode_of["norm"] == (step >= 8) and mode_of["body.1"] == mode_of["body.3"] == (step >= 4)
    for name in ("stem.weight", "norm.running_mean", "norm.num_batches_tracked", "token"):
        values = [tensors[name] for (tensors, *_), _ in records]
        assert all(torch.equal(value, values[0]) for value in values[:9]) and not torch.equal(values[9], values[8])
    moved = [tensors["body.1.running_mean"] for (tensors, *_), _ in records]
    assert torch.equal(moved[0], moved[4]) and not torch.equal(moved[4], moved[5])
    assert trainable(tiny) == list(flags(tiny))


def test_weight_decay_and_names_of_groups_that_join(tiny, task):
    schedule = GradualUnfreezing(tiny, 0.1, 3, weight_decay=0.2, stages=STAGES)
    optimizer = torch.optim.AdamW(schedule.groups)
    for step in range(3):
        schedule(step, optimizer)
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        *(("head", 0.2), ("head", 0.0), ("body", 0.2), ("stem", 0.2), ("stem", 0.0))
    ]
    wanted = {(group["name"], group["weight_decay"]): group["lr"] for group in parameter_groups(tiny, 0.1, 2.6, 0.2, STAGES)}
    assert {(group["name"], group["weight_decay"]): group["lr"] for group in optimizer.param_groups} == wanted


def test_a_second_run_starts_like_the_first(tiny, task):
    schedule = GradualUnfreezing(tiny, 0.1, 6, stages=STAGES)
    start = copy.deepcopy(tiny.state_dict())
    results = []
    for _ in range(2):
        tiny.load_state_dict(start)
        run(tiny, task, schedule, 6)
        results.append(state(tiny)[0])
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_frozen_stage_and_a_tied_one_do_not_stop_the_schedule():
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(5, 5), body=nn.Linear(5, 5), out=nn.Linear(5, 5, bias=False)))
    model.out.weight = model.embed.weight
    freeze(model, "embed")
    schedule = GradualUnfreezing(model, 1.0, 10)
    assert schedule.starts == {"body": 0, "embed": 5} and trainable(model) == ["body.weight", "body.bias"]


def test_fewer_steps_than_stages_are_told_and_nothing_has_changed(tiny):
    freeze(tiny, "stem")
    before = state(tiny)
    with pytest.raises(ValueError) as error:
        GradualUnfreezing(tiny, 0.1, 2, stages=STAGES)
    assert str(error.value) == "steps must be a whole number of at least 3, got 2. There are 3 stages, each needs one."
    with pytest.raises(ValueError, match=r"^not a module of Tiny: 'hed'"):
        GradualUnfreezing(tiny, 0.1, 9, stages=("stem", "hed"))
    assert_same(state(tiny), before)


def test_gradual_unfreezing_learns(tiny, task):
    schedule = GradualUnfreezing(tiny, 0.05, 90, stages=STAGES)
    run(tiny, task, schedule, 90, lr=0.05, batch_size=16)
    assert evaluate(tiny, task) > 0.9


# --- the learning rate finder -------------------------------------------------------------------------------------


def batches(task, count=12, size=16):
    rows = [torch.randint(len(task.labels), (size,)) for _ in range(count)]
    return [(task.inputs[row], task.labels[row]) for row in rows]


def random_states():
    gpu = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), gpu


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
}


def a_run_under_way(model, task, make):
    optimizer = make([{"params": [*model.head.parameters()], "lr": 0.02}, {"params": [*model.body.parameters()], "lr": 0.005}])
    for _ in range(2):
        F.cross_entropy(model(task.inputs), task.labels).backward()
        optimizer.step()  # leaves gradients and a state
    return optimizer


BROKEN = pytest.mark.cpu(reason="a label out of range ends CUDA for the whole process")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("broken", [False, pytest.param(True, marks=BROKEN)])
def test_the_search_leaves_model_optimizer_and_random_states_bit_identical(tiny, task, make, broken):
    tiny.norm.eval()
    freeze(tiny, "stem")
    optimizer = a_run_under_way(tiny, task, make)
    data = batches(task)
    if broken:
        data[5] = (data[5][0], data[5][1] + 100)
    before, ids = state(tiny), [id(p) for p in tiny.parameters()]
    saved, rngs = copy.deepcopy(optimizer.state_dict()), random_states()

    def drawing():
        for batch in data:
            _ = random.random(), np.random.rand(), torch.rand(1)
            yield batch

    if broken:
        with pytest.raises((IndexError, RuntimeError)):
            find_lr(tiny, optimizer, drawing())
    else:
        find_lr(tiny, optimizer, drawing())
    assert_same(state(tiny), before)
    assert [id(p) for p in tiny.parameters()] == ids
    assert random_states() == rngs
    after = optimizer.state_dict()
    assert after["param_groups"] == saved["param_groups"]
    for key, values in saved["state"].items():
        for name, value in values.items():
            now = after["state"][key][name]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in tiny.head.parameters()],
        [id(p) for p in tiny.body.parameters()],
    ]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("ends", [None, ValueError, KeyboardInterrupt])
def test_put_back_undoes_training_however_the_block_ends(tiny, task, make, ends):
    tiny.norm.eval()
    freeze(tiny, "stem")
    optimizer = a_run_under_way(tiny, task, make)
    groups, before, saved = list(optimizer.param_groups), state(tiny), copy.deepcopy(optimizer.state_dict())
    with contextlib.suppress(*[ends] * bool(ends)), put_back(tiny, optimizer):
        tiny.scale.fill_(3.0)
        unfreeze_into(optimizer, tiny.parameters(), 0.5)
        for group in optimizer.param_groups:
            group.update(lr=0.3, weight_decay=0.1)
        F.cross_entropy(tiny.train()(task.inputs), task.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(tiny.head.weight, before[0]["head.weight"])
        if ends:
            raise ends
    assert_same(state(tiny), before)
    assert all(now is then for now, then in zip(optimizer.param_groups, groups, strict=True))
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys()
    for key, values in saved["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(optimizer.state_dict()["state"][key][name], value, rtol=0, atol=0)


def test_put_back_passes_the_exception_on_and_leaves_a_new_optimizer_new():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    with pytest.raises(KeyError, match="mine"), put_back(layer, optimizer):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        raise KeyError("mine")
    assert not optimizer.state and layer.weight.grad is None


def test_the_search_is_training_with_a_rising_learning_rate_whose_groups_keep_their_ratios(tiny, task):
    freeze(tiny, ["stem", "norm"])
    optimizer = a_run_under_way(tiny, task, OPTIMIZERS["SGD"])
    data = batches(task, 5)
    curve = find_lr(tiny, optimizer, data, 1e-4, 1e-2)
    assert curve.lrs == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])
    train_mode(tiny)
    wanted = []
    for lr, (inputs, labels) in zip(curve.lrs, data, strict=True):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr / 4
        loss = F.cross_entropy(tiny(inputs), labels)
        wanted.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curve.losses == pytest.approx(wanted, rel=1e-5)


def test_the_search_works_beside_a_scheduler(tiny, task):
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    find_lr(tiny, optimizer, batches(task))
    assert steps(optimizer, scheduler, 2) == [0.1, 0.05, 0.025]


def test_the_search_stops_when_the_loss_blows_up(task):
    model = nn.Linear(4, 3)
    curve = find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), batches(task, 60), 1e-3, 1e4)
    assert 2 < len(curve.lrs) == len(curve.losses) < 60
    smallest = np.minimum.accumulate(curve.losses)
    assert curve.losses[-1] > 4 * smallest[-1]
    assert all(loss <= 4 * low for loss, low in zip(curve.losses[:-1], smallest[:-1], strict=True))
    assert 1e-3 < curve.suggestion < curve.lrs[-1]


def test_the_search_stops_before_a_loss_that_is_not_finite(task):
    data = batches(task, 8)
    data[3] = (data[3][0] * torch.nan, data[3][1])
    model = nn.Linear(4, 3)
    curve = find_lr(model, torch.optim.SGD(model.parameters(), lr=1.0), data)
    assert len(curve.lrs) == 3 and np.isfinite(curve.losses).all()


def test_the_suggestion_is_where_the_loss_falls_most_steeply():
    lrs = np.geomspace(1e-6, 1, 41)
    fall = 2 - 1 / (1 + np.exp((20 - np.arange(41)) / 3))  # steepest at the 20th
    assert LearningRates(lrs.tolist(), fall.tolist()).suggestion == lrs[20] == pytest.approx(1e-3)
    noisy = fall + 0.01 * (-1.0) ** np.arange(41)
    assert LearningRates(lrs.tolist(), noisy.tolist()).suggestion in lrs[18:23]
    exploding = [*fall[:31], 5.0, 9.0]
    assert LearningRates(lrs[:33].tolist(), exploding).suggestion == lrs[20]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, o, data: find_lr(m, o, data[:1]),
            "batches must be at least 2 pairs (inputs, labels), got 1. About 100 make a curve.",
        ),
        (
            lambda m, o, data: find_lr(m, o, data, 1.0, 0.1),
            "lowest must be below highest, got 1.0 and 0.1. 1e-6 and 1.0 suit most models.",
        ),
        (lambda m, o, data: find_lr(m, o, data, 0.0), "lowest must be a number above 0, got 0.0."),
        (
            lambda m, o, data: find_lr(copy.deepcopy(m), o, data),
            "optimizer must hold parameters of the model, got 2 that are not in it. Build it after its modules have changed.",
        ),
        (
            lambda m, o, data: LearningRates([0.1, 0.2, 0.3], [1.0, 1.5, 3.0]).suggestion,
            "the loss must fall somewhere to suggest a learning rate, got 3 losses that never do. "
            "Start lower, or look at what is frozen.",
        ),
    ],
)
def test_the_search_tells_bad_input_in_one_sentence(task, call, message):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError) as error:
        call(model, torch.optim.SGD(model.parameters(), lr=1.0), batches(task, 3))
    assert str(error.value) == message


# --- the head first -----------------------------------------------------------------------------------------------


def test_the_head_becomes_the_probe_and_nothing_else_changes(tiny, task):
    tiny.norm.eval()
    freeze(tiny, ["stem", "head.bias"])
    before, head, ids = state(tiny), tiny.head, [id(p) for p in tiny.parameters()]
    probe_head(tiny, "head", task.inputs, task.labels, penalty=0.01)
    probe = linear_probe(extract(drop_head(tiny, "head"), task.inputs), task.labels, 3, 0.01)
    assert tiny.head is head and [id(p) for p in tiny.parameters()] == ids
    assert torch.equal(tiny.head.weight, probe.weight) and torch.equal(tiny.head.bias, probe.bias)
    after = state(tiny)
    for name in ("head.weight", "head.bias"):
        before[0][name] = after[0][name]
    assert_same(after, before)


def test_an_optimizer_that_holds_the_head_still_does(tiny, task):
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    probe_head(tiny, "head", task.inputs, task.labels)
    before = tiny.head.weight.clone()
    F.cross_entropy(tiny(task.inputs), task.labels).backward()
    optimizer.step()
    assert not torch.equal(tiny.head.weight, before)


def test_a_class_without_examples_keeps_its_output(tiny, task):
    rows = task.labels < 2
    probe_head(tiny, "head", task.inputs[rows], task.labels[rows])
    assert tiny.head.out_features == 3


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("body", "not an nn.Linear of Tiny: 'body'. Choose from ['stem', 'body.0', 'head', 'again_too', 'norm_then_head.1']."),
        ("body.0", "body.0 must have a bias, as a linear probe does, got one without. Replace it: nn.Linear(...)."),
        ("stem", "stem must share no parameters, got some that again_too has. Replace it: nn.Linear(...)."),
        ("norm_then_head.1", "norm_then_head.1 must be the last step of Tiny, got features of 3 numbers instead of 6."),
    ],
)
def test_a_head_that_cannot_be_a_probe_is_told(tiny, task, head, message):
    tiny.again_too = nn.Linear(4, 6)
    tiny.again_too.weight = tiny.stem.weight
    tiny.norm_then_head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))  # not used
    with pytest.raises(ValueError) as error:
        probe_head(tiny, head, task.inputs, task.labels)
    assert str(error.value) == message


def test_lp_ft_is_a_probe_and_then_fit(tiny, task):
    train_only(tiny, "head")
    twin = copy.deepcopy(tiny)
    history = lp_ft(tiny, "head", task, steps=4, lr=0.01, penalty=0.1, batch_size=16, validation=task, progress=False)
    probe_head(twin, "head", task.inputs, task.labels, 0.1)
    twin.requires_grad_(True)
    wanted = fit(twin, task, steps=4, lr=0.01, batch_size=16, validation=task, progress=False)
    assert (history.loss, history.accuracy) == (wanted.loss, wanted.accuracy)
    assert trainable(tiny) == list(flags(tiny))
    assert_same(state(tiny), state(twin))


# --- early stopping -----------------------------------------------------------------------------------------------


def test_stop_when_patience_scores_in_a_row_are_no_better_than_the_best(tiny):
    stopping = EarlyStopping(tiny, 2)
    scores = [0.1, 0.3, 0.3, 0.4, 0.2, math.nan, 0.3, 0.5]
    assert [stopping.step(score) for score in scores] == [False, False, False, False, False, True, True, False]
    assert stopping.best == 0.5
    assert EarlyStopping(tiny, 1).step(math.nan)


def test_an_equal_score_is_no_better_and_the_first_of_the_equals_is_kept(tiny):
    stopping = EarlyStopping(tiny, 2)
    nn.init.ones_(tiny.head.weight)
    assert not stopping.step(0.3)
    nn.init.zeros_(tiny.head.weight)
    assert [stopping.step(0.3), stopping.step(0.3)] == [False, True]
    stopping.restore()
    assert (tiny.head.weight == 1).all()


def test_the_best_state_comes_back_into_the_same_parameters(tiny, task):
    stopping = EarlyStopping(tiny, 3)
    stopping.step(0.5)
    best, ids = state(tiny)[0], [id(p) for p in tiny.parameters()]
    fit(tiny, task, steps=3, lr=0.1, progress=False)
    tiny.scale.fill_(7)  # not in a state dict
    stopping.step(0.4)
    assert not torch.equal(tiny.head.weight, best["head.weight"])
    for _ in range(2):  # a second time too
        stopping.restore()
        assert all(torch.equal(tensor, best[name]) for name, tensor in state(tiny)[0].items())
        assert [id(p) for p in tiny.parameters()] == ids and all(p.is_leaf for p in tiny.parameters())
        nn.init.zeros_(tiny.head.weight)


def test_a_state_dict_is_no_copy(tiny, task):
    best = tiny.state_dict()
    fit(tiny, task, steps=2, lr=0.1, progress=False)
    assert torch.equal(best["head.weight"], tiny.head.weight)


@pytest.mark.parametrize("scores", [[], [math.nan]])
def test_nothing_to_restore_is_told(tiny, scores):
    stopping = EarlyStopping(tiny, 2)
    for score in scores:
        stopping.step(score)
    with pytest.raises(ValueError) as error:
        stopping.restore()
    assert str(error.value) == "no state to restore: step(score) must come first, with a number."


def test_another_structure_is_told_before_anything_changes(tiny):
    stopping = EarlyStopping(tiny, 2)
    stopping.step(1.0)
    tiny.head = nn.Linear(6, 4)
    before = state(tiny)
    with pytest.raises(ValueError) as error:
        stopping.restore()
    wanted = "the model must be as it was at step(score), but these differ: ['head.bias', 'head.weight']."
    assert str(error.value) == wanted
    assert_same(state(tiny), before)
    with pytest.raises(ValueError, match=r"^patience must be a whole number of at least 1, got 0.$"):
        EarlyStopping(tiny, 0)
