import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers import finetune, lora
from helpers.training import train_mode

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py

few = settings(max_examples=15, deadline=None, derandomize=True)
KINDS = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding"
BASES = {
    "linear": lambda: (nn.Linear(5, 4), torch.randn(2, 3, 5)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", dilation=2, groups=2), torch.randn(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, (3, 2), stride=2, padding="valid", bias=False), torch.randn(2, 3, 7, 7)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2, padding=1, groups=2), torch.randn(2, 2, 3, 3, 3)),
    "embedding": lambda: (nn.Embedding(7, 5), torch.randint(7, (2, 4))),
    "padded": lambda: (nn.Embedding(7, 5, padding_idx=2), torch.randint(7, (2, 4)) // 2 * 2),
    "shortened": lambda: (nn.Embedding(7, 5, padding_idx=-1, max_norm=1.5, norm_type=1.0), torch.tensor([[0, 6, 3]])),
}


def wrap(base, rank=2, alpha=6.0, **options):
    """A LoRA layer whose adapter has random numbers everywhere, in eval mode."""
    layer = getattr(lora, type(base).__name__)(base, rank, alpha, **options)
    randomise(layer)
    return layer.eval()


def randomise(model):
    with torch.no_grad():
        for layer in lora.layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.query_norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.3)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.drop(self.value(torch.tanh(self.query_norm(self.query(x)))))


class Net(nn.Module):
    """An embedding, two blocks, a convolution, a module with two names, and an output tied to the embedding."""

    def __init__(self, width=6):
        super().__init__()
        self.tokens = nn.Embedding(9, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.mix = nn.Linear(width, width)
        self.again = self.mix
        self.head = nn.Linear(width, 3)
        self.out = nn.Linear(width, 9, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        x = self.mix(x) + self.conv(x.mT).mT + self.again(x)
        return torch.cat([self.head(x), self.out(x)], -1)


def ids():
    return torch.tensor([[0, 3, 8], [5, 5, 1]])


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def adapted(net):
    lora.inject(net, ["query", "value", "conv", "mix"], rank=2, alpha=6, train="head")
    randomise(net)
    return net.eval()


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def everything(model):
    """What must not change when an error is raised, or when injection is undone."""
    tensors = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)], tensors


def assert_unchanged(model, before):
    modules, tensors = everything(model)
    assert modules == before[0] and tensors.keys() == before[1].keys()
    for name, (identity, tensor, flag) in tensors.items():
        assert (identity, flag) == (before[1][name][0], before[1][name][2]), name
        assert torch.equal(tensor, before[1][name][1]), name


# --- one layer ----------------------------------------------------------------------------------------------------


def test_linear_is_the_formula_and_so_are_its_gradients():
    base, x = nn.Linear(5, 4).double(), torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    layer = wrap(base)
    assert layer.scaling == 3 and layer.A.shape == (2, 5) and layer.B.shape == (4, 2)
    torch.testing.assert_close(layer.delta(), 3 * layer.B @ layer.A)
    wanted = x @ (base.weight + 3 * layer.B @ layer.A).T + base.bias
    torch.testing.assert_close(layer(x), wanted)
    g = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad((y * g).sum(), [layer.A, layer.B, x]) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_a_new_layer_computes_what_its_base_computes(kind, dora):
    base, x = BASES[kind]()
    plain = copy.deepcopy(base)(x)
    layer = getattr(lora, type(base).__name__)(base, 2, 6.0, dora=dora)
    assert layer(x).sub(plain).abs().max() <= (1e-6 if kind == "shortened" else 0)
    (layer(x) * torch.randn_like(plain)).sum().backward()
    assert sum(bool(parameter.grad.any()) for parameter in (layer.A, layer.B)) == 1
    assert trainable(layer) == [f"adapters.default.{name}" for name in ("A", "B", "magnitude")[: 2 + dora]]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_every_kind_is_its_base_with_another_weight(kind, dora):
    base, x = BASES[kind]()
    layer = wrap(base.double(), dora=dora)
    x = x.double() if x.is_floating_point() else x
    before = base.weight.clone()
    wanted = functional_call(base, {"weight": layer.weight.clone()}, (x,))
    torch.testing.assert_close(layer(x), wanted)
    g = torch.randn_like(wanted)
    parameters = list(layer.adapters.parameters())
    ours, theirs = (torch.autograd.grad((y * g).sum(), parameters) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)
    layer.merge()
    torch.testing.assert_close(layer(x), wanted)
    layer.unmerge()
    assert torch.equal(base.weight, before)  # max_norm included


@few
@given(st.data())
def test_convolutions_with_any_arguments_merge(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    n = data.draw(st.sampled_from([1, 2, 3]))
    kernel, stride, dilation = (data.draw(st.tuples(*[st.integers(1, most)] * n)) for most in (3, 2, 2))
    same = ["same"] if set(stride) == {1} and 2 not in kernel else []
    groups, padding = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([0, 1, "valid", *same]))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    channels = data.draw(st.sampled_from([(4, 4), (4, 8), (8, 4)]))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    base = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](*channels, kernel, bias=data.draw(st.booleans()), **how).double()
    x = torch.randn(2, channels[0], *[5] * n, dtype=torch.double, requires_grad=True)
    if data.draw(st.booleans()):
        x = x[0].detach().requires_grad_()  # without a batch
    layer = wrap(base, data.draw(st.integers(1, min(base.weight.flatten(1).shape))))
    weight = base.weight + (layer.scaling * layer.B @ layer.A).view_as(base.weight)
    wanted = functional_call(base, {"weight": weight}, (x,))
    torch.testing.assert_close(layer(x), wanted)
    g = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad((y * g).sum(), [layer.A, layer.B, x]) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)
    layer.merge()
    torch.testing.assert_close(layer(x), wanted)


def test_a_convolution_is_the_formula():
    base, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), torch.randn(2, 4, 8, 8)
    layer = wrap(base)
    weight = base.weight + 3 * (layer.B @ layer.A).view(6, 2, 3, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, base.bias, stride=2, padding=1, dilation=2, groups=2))


def test_a_padding_row_has_no_update_and_no_gradient():
    base = nn.Embedding(5, 4, padding_idx=1)
    layer = wrap(base)
    assert not layer.delta()[1].any() and layer.delta()[[0, 2, 3, 4]].all()
    layer(torch.tensor([1, 1, 3])).sum().backward()
    assert not layer.A.grad[:, [0, 1, 2, 4]].any() and layer.A.grad[:, 3].any()
    assert torch.equal(layer(torch.tensor([1])), base.weight[[1]])


def test_rslora_scales_by_the_root_of_the_rank():
    base = nn.Linear(16, 16)
    assert [lora.Linear(base, r, 8.0).scaling for r in (1, 4, 16)] == [8, 2, 0.5]
    assert [lora.Linear(base, r, 8.0, rank_stabilised=True).scaling for r in (1, 4, 16)] == [8, 4, 2]


def test_dropout_drops_inputs_of_the_update_alone_and_in_train_mode_alone():
    base, x = nn.Linear(64, 4), torch.randn(2, 64)
    layer = wrap(base, dropout=0.5)
    still = layer(x)
    torch.testing.assert_close(still, F.linear(x, base.weight + layer.delta(), base.bias))
    torch.manual_seed(3)
    moving = layer.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(moving, base(x) + F.dropout(x, 0.5) @ layer.delta().T)
    torch.nn.init.zeros_(layer.B)
    assert torch.equal(layer(x), base(x))


def test_dora_keeps_magnitude_and_direction_apart():
    base, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.double)
    layer = wrap(base, dora=True)
    direction = base.weight + 3 * layer.B @ layer.A
    norm = direction.norm(dim=1, keepdim=True).detach()
    wanted = F.linear(x, layer.adapter.magnitude[:, None] * direction / norm, base.bias)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.weight.norm(dim=1), layer.adapter.magnitude.abs())
    parameters = list(layer.adapters.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (layer(x), wanted))
    torch.testing.assert_close(ours, theirs)


def test_dora_with_dropout_drops_inputs_of_all_that_it_adds():
    base, x = nn.Linear(64, 4), torch.randn(2, 64)
    layer = wrap(base, dropout=0.5, dora=True).train()
    torch.manual_seed(3)
    moving = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(moving, base(x) + F.dropout(x, 0.5) @ layer.delta().T, atol=1e-4, rtol=1e-4)


def test_dora_leaves_rows_of_zeros_finite():
    base = nn.Linear(5, 4)
    nn.init.zeros_(base.weight)
    layer, x = lora.Linear(base, 2, 6.0, dora=True), torch.randn(3, 5)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.adapters.parameters())


# --- merging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_gives_every_bit_back_in_every_dtype(dtype, dora):
    base = nn.Linear(30, 20).to(dtype)
    weight, bits = base.weight, base.weight.detach().clone()
    layer = wrap(base, dora=dora)
    for _ in range(3):
        layer.merge()
        assert layer.merged and layer.original is weight and not torch.equal(base.weight, bits)
        assert base.weight.dtype == dtype and not base.weight.requires_grad
        layer.unmerge()
        assert not layer.merged and base.weight is weight and torch.equal(weight, bits)
        assert [name for name, _ in layer.named_parameters()][:2] == ["base.weight", "base.bias"]


def test_a_merged_weight_is_rounded_once():
    base = nn.Linear(30, 20).bfloat16()
    layer = wrap(base)
    exact = base.weight.float() + 3 * layer.B.float() @ layer.A.float()
    layer.merge()
    assert torch.equal(base.weight, exact.bfloat16()) and torch.equal(layer.weight, base.weight)


def test_merging_twice_or_unmerging_first_is_refused(adapted):
    layer = adapted.mix
    with pytest.raises(ValueError, match=r"^the layer must be merged before this. Call merge first.$"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(ValueError, match=r"^the layer must not be merged before this. Call unmerge first.$"):
        layer.merge()
    before = everything(adapted)
    with pytest.raises(ValueError, match=r"^mix must not be merged before this. Call unmerge first.$"):
        lora.merge(adapted)
    with pytest.raises(
        ValueError, match=r"^blocks.0.query, blocks.0.value, blocks.1.query and 2 more must be merged before this. Call merge"
    ):
        lora.unmerge(adapted)
    with pytest.raises(ValueError, match=r"^mix must not be merged before this. Call unmerge first.$"):
        lora.activate(adapted)
    with pytest.raises(ValueError, match=r"^mix must not be merged before this. Call unmerge first.$"):
        lora.inject(adapted, "head", rank=2, adapter="second")
    assert_unchanged(adapted, before)


def test_merged_inside_the_block_alone(adapted):
    y, before = adapted(ids()), everything(adapted)
    with pytest.raises(KeyError), lora.merged(adapted):
        assert all(layer.merged for layer in lora.layers(adapted).values())
        torch.testing.assert_close(adapted(ids()), y, atol=1e-4, rtol=1e-4)
        raise KeyError
    assert_unchanged(adapted, before)
    assert torch.equal(adapted(ids()), y)


def test_training_while_merged_raises_and_running_does_not(adapted):
    x = torch.randn(2, 6)
    lora.merge(adapted)
    adapted.train()
    assert torch.equal(adapted.mix(x), adapted.mix.base(x))
    with pytest.raises(
        RuntimeError,
        match=r"^an adapter must be unmerged to train, got a gradient for one that is merged. "
        r"Call unmerge\(model\) first, or freeze it if only other parts are to train.$",
    ):
        adapted(ids()).sum().backward()
    finetune.freeze(adapted, [f"{name}.adapters" for name in lora.layers(adapted)])
    adapted(ids()).sum().backward()
    assert adapted.head.weight.grad is not None


def test_tied_weights_are_refused_until_untied(net):
    x = net(ids())
    lora.inject(net, ["out", "head"], rank=2)
    randomise(net)
    y = net(ids())
    assert net.out.base.weight is net.tokens.weight and not torch.equal(x, y)
    before = everything(net)
    refusal = r"^out must have a weight of its own to be merged, got that of tokens. Call untie\(model, 'out'\) first.$"
    with pytest.raises(ValueError, match=refusal):
        lora.merge(net)
    assert_unchanged(net, before)
    net.out.merge()  # the layer does not know of its ties
    with pytest.raises(ValueError, match=refusal):
        lora.remove(net)
    with pytest.raises(ValueError, match=r"^out must not be merged before this. Call unmerge first.$"):
        lora.untie(net, "out")
    net.out.unmerge()
    assert net.out.base.weight is net.tokens.weight
    lora.untie(net, "out")
    rows = net.tokens.weight.clone()
    lora.merge(net)
    torch.testing.assert_close(net(ids()), y, atol=1e-4, rtol=1e-4)
    assert torch.equal(net.tokens.weight, rows)
    lora.unmerge(net)
    with pytest.raises(
        ValueError, match=r"^out must share its weight with another module, got a weight of its own. It needs no untying.$"
    ):
        lora.untie(net, "out")
    with pytest.raises(ValueError, match=r"^not a LoRA layer of Net: 'tokens'. Choose from head, out.$"):
        lora.untie(net, "tokens")


# --- in a model ---------------------------------------------------------------------------------------------------


def test_targets_are_whole_components_and_the_names_come_back(net):
    assert lora.replace(net, ["1.query", "again"], lambda layer: nn.Sequential(layer)) == ["blocks.1.query", "mix"]
    assert net.again is net.mix and isinstance(net.mix, nn.Sequential) and isinstance(net.blocks[0].query, nn.Linear)
    assert lora.inject(Net(), "query", rank=2) == ["blocks.0.query", "blocks.1.query"]


def test_a_top_level_name_is_not_taken_for_the_end_of_another():
    net = nn.Sequential(OrderedDict(fc=nn.Linear(3, 3), body=nn.Sequential(OrderedDict(fc=nn.ReLU()))))
    fc, relu = net.fc, net.body.fc
    lora.replace(net, ["fc"], lambda layer: lora.Linear(layer, 1, 1.0) if layer is fc else layer)
    assert lora.remove(net) == ["fc"] and net.fc is fc and net.body.fc is relu


def test_injection_trains_the_adapters_and_the_head_alone(net):
    names = lora.inject(net, ["query", "tokens"], rank=2, train=["head", "conv.bias"])
    adapters = [f"{name}.adapters.default.{letter}" for name in names for letter in "AB"]
    assert names == ["tokens", "blocks.0.query", "blocks.1.query"]
    assert set(trainable(net)) == {*adapters, "head.weight", "head.bias", "conv.bias"}
    train_mode(net)
    assert net.blocks[0].query.training and net.blocks[0].query.adapter.dropout.training
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step one of A and B has no gradient
        net(ids()).square().sum().backward()
        optimizer.step()
    assert {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])} == {*trainable(net)}


@few
@given(
    st.sets(st.sampled_from(["query", "value", "conv", "mix", "head", "tokens", "out", "1.query"]), min_size=1),
    st.sets(st.sampled_from(["head.bias", "tokens.weight", "mix.weight", "blocks.0.query.weight"])),
)
def test_injection_and_removal_are_an_identity(targets, frozen):
    net = Net().eval()
    finetune.freeze(net, frozen)
    before, y, flags = everything(net), net(ids()), {name: p.requires_grad for name, p in net.named_parameters()}
    keys = list(net.state_dict())
    names = lora.inject(net, targets, rank=2)
    assert torch.equal(net(ids()), y)
    randomise(net)
    assert not torch.allclose(net(ids()), y)
    assert lora.remove(net) == names
    outside = [name for name in flags if not any(name.startswith(f"{layer}.") for layer in names)]
    tied = "tokens.weight" if "out" in names and "tokens" not in names else None
    assert not any(dict(net.named_parameters())[name].requires_grad for name in outside if name != tied)
    finetune.unfreeze(net, [name for name in outside if flags[name]])
    assert_unchanged(net, before)
    assert torch.equal(net(ids()), y) and list(net.state_dict()) == keys


def test_removal_after_merging_leaves_plain_layers_with_the_update(adapted):
    y, bases = adapted(ids()), {name: layer.base for name, layer in lora.layers(adapted).items()}
    lora.merge(adapted)
    lora.remove(adapted)
    assert not lora.layers(adapted) and all(adapted.get_submodule(name) is base for name, base in bases.items())
    torch.testing.assert_close(adapted(ids()), y, atol=1e-4, rtol=1e-4)
    assert adapted.mix.weight.requires_grad and list(adapted.state_dict()) == list(Net().state_dict())


def test_several_adapters_sum_and_switch(net):
    plain = net(ids())
    lora.inject(net, ["query", "mix"], rank=2, train="head")
    assert lora.inject(net, ["query", "conv"], rank=1, adapter="second") == ["blocks.0.query", "blocks.1.query", "conv"]
    randomise(net)
    assert set(trainable(net)) == {
        f"{name}.adapters.second.{letter}" for name in ("blocks.0.query", "blocks.1.query", "conv") for letter in "AB"
    }
    outputs = {}
    for names in [(), ("default",), ("second",), ("default", "second")]:
        lora.activate(net, *names)
        outputs[names] = net(ids())
        assert {name.split(".adapters.")[1].split(".")[0] for name in trainable(net)} == {*names}
        with lora.merged(net):
            torch.testing.assert_close(net(ids()), outputs[names], atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs[()], plain)
    x, layer = torch.randn(3, 6), net.blocks[0].query
    first, second = layer.adapters["default"], layer.adapters["second"]
    wanted = layer.base(x) + x @ (8.0 * first.B @ first.A + 16.0 * second.B @ second.A).T
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)
    assert layer.A is first.A and net.mix.active == ("default",) and net.conv.active == ("second",)
    with pytest.raises(ValueError, match=r"^not an adapter of Net: 'third'. Choose from \['default', 'second'\].$"):
        lora.activate(net, "third")
    with pytest.raises(ValueError, match=r"^not an adapter of the layer: 'third'. Choose from \['default', 'second'\].$"):
        layer.activate("third")


def test_dora_is_active_alone(net):
    lora.inject(net, "mix", rank=2)
    lora.inject(net, ["mix", "conv"], rank=2, adapter="second", dora=True)
    before = everything(net)
    with pytest.raises(
        ValueError,
        match=r"^an adapter with dora=True must be active alone, got \['default', 'second'\]. Activate one of them.$",
    ):
        lora.activate(net, "default", "second")
    assert_unchanged(net, before)
    assert net.mix.active == net.conv.active == ("second",)


REFUSED = {
    "a near name": ({"targets": "qurey"}, r"not a module of Net: 'qurey'. Choose from \['query'\]."),
    "a near name of two parts": (
        {"targets": ["value", "0.qury"]},
        r"not a module of Net: '0.qury'. Choose from \['0.query', '1.query', '0.query_norm'\].",
    ),
    "no name": (
        {"targets": "xyz"},
        r"not a module of Net: 'xyz'. "
        r"Choose from \['tokens', 'query', 'query_norm', 'value', 'conv', 'mix', 'again', 'head', 'out'\].",
    ),
    "nothing": ({"targets": []}, r"targets must name a module of Net, got none. Choose from \['tokens', 'query', .*\]."),
    "one in another": (
        {"targets": ["blocks.0", "query"]},
        r"targets must not lie inside each other, got 'blocks.0' and 'blocks.0.query'. Name one of them.",
    ),
    "a norm": (
        {"targets": ["query", "1.query_norm"]},
        rf"blocks.1.query_norm: the base must be one of {KINDS}, got a LayerNorm. Adapt other layers.",
    ),
    "a rank too large for the last": (
        {"targets": ["query", "head"], "rank": 4},
        r"head: rank must be a whole number from 1 to 3, got 4. The weight is the matrix \(3, 6\).",
    ),
    "alpha": ({"targets": "query", "alpha": 0}, r"blocks.0.query: alpha must be a number above 0, got 0."),
    "dropout of indices": (
        {"targets": ["query", "tokens"], "dropout": 0.1},
        r"tokens: dropout must be 0 for an nn.Embedding, which takes indices, got 0.1. Inject it by itself.",
    ),
    "a name with a dot": (
        {"targets": "query", "adapter": "a.b"},
        r"blocks.0.query: adapter must be a name of letters, digits and _, got 'a.b'. Take another.",
    ),
    "a name that modules use": (
        {"targets": "query", "adapter": "pop"},
        r"blocks.0.query: adapter must be a name of letters, digits and _, got 'pop'. Take another.",
    ),
    "a part that is not there": (
        {"targets": "query", "train": "haed"},
        r"not a part of Net with parameters: 'haed'. Choose from \['head'.*\].",
    ),
    "a part that is adapted": (
        {"targets": ["query", "mix"], "train": ["head", "blocks.1"]},
        r"train must not hold what is adapted, got \['head', 'blocks.1'\], and blocks.1.query adapted. Choose one of the two.",
    ),
    "a part tied to one that is adapted": (
        {"targets": "out", "train": "tokens"},
        r"train must not hold what is adapted, got \['tokens'\], and out adapted. Choose one of the two.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_injected_leaves_the_model_as_it_was(net, case):
    options, message = REFUSED[case]
    finetune.freeze(net, "conv")
    before = everything(net)
    with pytest.raises(ValueError, match=f"^{message}$"):
        lora.inject(net, **{"rank": 2, **options})
    assert_unchanged(net, before)


def test_an_option_that_does_not_exist_leaves_the_model_as_it_was(net):
    before = everything(net)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'biass'$"):
        lora.inject(net, "query", rank=2, biass=True)
    with pytest.raises(TypeError, match=r"^what make gives must be an nn.Module, got None. Pass the model itself.$"):
        lora.replace(net, ["query"], lambda layer: None)
    assert_unchanged(net, before)


def test_a_lora_layer_is_not_searched_and_takes_a_name_once(adapted):
    before = everything(adapted)
    with pytest.raises(ValueError, match=r"^not a module of Net: 'query.base'. Choose from \[.*\].$"):
        lora.inject(adapted, ["query.base"], rank=2, adapter="second")
    with pytest.raises(
        ValueError, match=r"^blocks.0.query: adapter must be a new name, got 'default', which the layer has. Take another.$"
    ):
        lora.inject(adapted, ["head", "query"], rank=2)
    with pytest.raises(
        ValueError, match=r"^train must not hold what is adapted, got \['mix'\], and mix adapted. Choose one of the two.$"
    ):
        lora.inject(adapted, ["head"], rank=2, adapter="second", train="mix")
    assert_unchanged(adapted, before)


def test_a_model_without_lora_layers_is_said_to_have_none(net):
    for function in (lora.merge, lora.unmerge, lora.remove, lora.activate):
        with pytest.raises(ValueError, match=r"^Net must have LoRA layers, got none. Call inject first.$"):
            function(net)
    with pytest.raises(
        ValueError, match=r"^the model must hold LoRA layers, got one that is itself a LoRA layer. Take its .base.$"
    ):
        lora.remove(lora.Linear(net.mix, 2, 4.0))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


UNSUPPORTED = {
    "a ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 2, 3),
    "a Standardised with a forward of its own": lambda: Standardised(2, 2, 3),
    "a NonDynamicallyQuantizableLinear of an nn.MultiheadAttention, which reads its weight and never calls it": lambda: (
        nn.MultiheadAttention(4, 2).out_proj
    ),
    "a ParametrizedLinear whose weight is computed from other parameters": lambda: nn.utils.parametrizations.weight_norm(
        nn.Linear(4, 4)
    ),
    "a LazyLinear whose weight has no shape before its first forward": lambda: nn.LazyLinear(4),
    "an Embedding with sparse=True": lambda: nn.Embedding(4, 4, sparse=True),
    "an Embedding with scale_grad_by_freq=True": lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
}


LAZY = pytest.mark.real(reason="a weight without a shape cannot be a tensor of the fake GPU")


@pytest.mark.parametrize("what", [pytest.param(what, marks=LAZY if "Lazy" in what else ()) for what in UNSUPPORTED])
def test_layers_that_are_not_supported_are_said_to_be(what):
    with pytest.raises(ValueError, match=rf"^the base must be one of {KINDS}, got {what}. Adapt other layers.$"):
        lora.Linear(UNSUPPORTED[what](), 1, 1.0)


def test_the_wrong_kind_for_a_base_names_the_right_one():
    with pytest.raises(ValueError, match=r"^the base must be an nn.Linear, got a Conv2d. Take lora.Conv2d.$"):
        lora.Linear(nn.Conv2d(1, 1, 1), 1, 1.0)
    with pytest.raises(TypeError, match=r"^base must be an nn.Module, got None. Pass the model itself.$"):
        lora.Linear(None, 1, 1.0)


def test_code_that_reads_the_weight_instead_of_calling_the_layer_sees_the_update():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    lora.inject(encoder, ["linear1", "linear2"], rank=2)
    randomise(encoder)
    x = torch.randn(2, 3, 8)
    called = encoder.train()(x)
    with torch.no_grad():  # in eval mode without gradients torch takes a path of its own, with linear1.weight
        torch.testing.assert_close(encoder.eval()(x), called, atol=1e-4, rtol=1e-4)


# --- checkpoints and copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [False, True], ids=["into unmerged", "into merged"])
@pytest.mark.parametrize("saved", [False, True], ids=["unmerged", "merged"])
def test_a_checkpoint_says_whether_it_is_merged(adapted, saved, into):
    y = adapted(ids())
    if saved:
        lora.merge(adapted)
    merged = adapted(ids())
    loaded = Net().eval()
    lora.inject(loaded, ["query", "value", "conv", "mix"], rank=2, alpha=6)
    randomise(loaded)
    if into:
        lora.merge(loaded)
    loaded.load_state_dict(adapted.state_dict())
    assert [layer.merged for layer in lora.layers(loaded).values()] == [saved] * 6
    assert torch.equal(loaded(ids()), merged)
    if saved:
        lora.unmerge(loaded)
    assert torch.equal(loaded(ids()), y)


def test_a_checkpoint_of_something_else_leaves_a_merged_layer_alone(adapted):
    lora.merge(adapted)
    adapted.load_state_dict({"head.bias": torch.zeros(3)}, strict=False)
    assert adapted.mix.merged
    adapted.load_state_dict({"mix.adapters.default.B": torch.zeros(6, 2)}, strict=False)
    assert not adapted.mix.merged and adapted.conv.merged


def test_names_in_a_checkpoint_are_plain(adapted):
    names = [name for name in adapted.state_dict() if name.startswith("mix.")]
    assert names == ["mix.base.weight", "mix.base.bias", "mix.adapters.default.A", "mix.adapters.default.B"]
    adapted.mix.merge()
    assert "mix.original" in adapted.state_dict()


@pytest.mark.real(reason="a tensor of the fake GPU cannot be pickled")
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_can_be_unmerged(adapted, merged):
    y = adapted(ids())
    if merged:
        lora.merge(adapted)
    now, file = adapted(ids()), io.BytesIO()
    torch.save(adapted, file)
    file.seek(0)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ids()), now) and twin.out.weight is twin.tokens.weight
        if merged:
            lora.unmerge(twin)
        assert torch.equal(twin(ids()), y) and trainable(twin) == trainable(adapted)


def test_another_dtype_while_merged_reaches_the_weight_that_is_kept(adapted):
    lora.merge(adapted)
    adapted.double()
    weight = adapted.mix.original
    lora.unmerge(adapted)
    assert adapted.mix.base.weight is weight and weight.dtype == torch.float64
    assert adapted(ids()).dtype == torch.float64


def assert_same(got, wanted):
    """Bit for bit on the CPU; on a GPU, a trace may fuse operations into a kernel that rounds otherwise."""
    if got.is_cuda:
        torch.testing.assert_close(got, wanted)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.real(reason="a tensor of the fake GPU cannot be traced or exported")
def test_traced_and_exported_it_computes_the_same(adapted):
    model, x = adapted.blocks[0], torch.randn(3, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert_same(program.module()(x[:2]), model(x[:2]))
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tracing is deprecated
            assert_same(torch.jit.trace(model, x)(x), model(x))
        if not model.query.merged:
            lora.merge(model)


@pytest.mark.slow
@pytest.mark.real(reason="torch.compile does not take a tensor of the fake GPU")
def test_compiled_it_computes_the_same(adapted):
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids()), adapted(ids()))


# --- what it takes, and whether it is enough ----------------------------------------------------------------------


def test_an_injection_that_is_refused_leaves_every_gradient(net):
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="train must not hold what is adapted"):
        lora.inject(net, ["mix"], rank=2, train=["mix"])
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_cost_is_what_injection_makes_trainable(net):
    layers = [net.mix, net.conv, net.tokens, net.blocks[0].query]
    for optimizer, moments in {"sgd": 0, "momentum": 1, "adamw": 2}.items():
        numbers = 2 * ((6 + 6) + (6 + 18) + (9 + 6) + (6 + 6))
        wanted = {"full": 36 + 108 + 54 + 36, "adapter": numbers}
        wanted |= {"gradient_bytes": 4 * numbers, "optimizer_bytes": 4 * moments * numbers}
        assert lora.cost([*layers, net.out, net.mix], rank=2, optimizer=optimizer) == wanted
    lora.inject(net, ["mix", "conv", "tokens", "0.query"], rank=2)
    made = finetune.report(net)
    assert (made.trainable, made.gradient_bytes, made.adamw_bytes) == (numbers, 4 * numbers, 8 * numbers + 8 * 4)
    assert lora.cost(lora.layers(net).values(), rank=2)["adapter"] == numbers
    assert lora.cost([nn.Linear(768, 768)], rank=8) == {
        "full": 589_824,
        "adapter": 12_288,
        "gradient_bytes": 49_152,
        "optimizer_bytes": 98_304,
    }
    with pytest.raises(ValueError, match=r"^optimizer must be one of \['sgd', 'momentum', 'adamw'\], got 'adam'.$"):
        lora.cost(layers, 2, "adam")
    with pytest.raises(ValueError, match=rf"^the base must be one of {KINDS}, got a Dropout. Adapt other layers.$"):
        lora.cost([nn.Dropout()], 2)
    with pytest.raises(ValueError, match=r"^rank must be a whole number from 1 to 3, got 4. A weight is the matrix \(3, 6\).$"):
        lora.cost([net.head], 4)


def test_a_report_counts_no_weight_twice(adapted):
    unmerged = finetune.report(adapted)
    assert lora.report(adapted) == unmerged
    lora.merge(adapted)
    assert lora.report(adapted) == unmerged and finetune.report(adapted).all > unmerged.all
    assert "mix.original" in adapted.state_dict()
    lora.unmerge(adapted)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_of_update_finds_the_rank(rank):
    before = torch.randn(8, 3, 2, 2)
    after = before + (torch.randn(8, rank) @ torch.randn(rank, 12)).view_as(before)
    assert lora.rank_of_update(before, after, share=0.999999) == rank
    assert lora.rank_of_update(before.bfloat16(), before.bfloat16()) == 0


def test_rank_of_update_counts_squares_of_singular_values():
    before, after = torch.zeros(3, 4), torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    after = F.pad(after, (0, 1))  # squares 9, 4, 1 of 14
    assert [lora.rank_of_update(before, after, share) for share in (0.6, 0.65, 0.9, 0.93)] == [1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"^share must be below 1, got 1. 0.9 asks for nine tenths.$"):
        lora.rank_of_update(before, after, 1)
    with pytest.raises(ValueError, match=r"^share must be a number above 0, got 0.$"):
        lora.rank_of_update(before, after, 0)
    with pytest.raises(ValueError, match=r"^after must have shape \(3, 4\), got \(4, 3\).$"):
        lora.rank_of_update(before, after.T)
    with pytest.raises(ValueError, match=r"^before must have shape \(out, in, ...\), got \(3,\).$"):
        lora.rank_of_update(before[:, 0], after[:, 0])
