"""LoRA beside peft and loralib: layers, models, merging, names, files."""

import copy
import json
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from helpers import lora
from helpers.adapters import load_peft, save_peft

from . import falls_short, load

PEFT = "peft 0.21.2 "

# --- one layer ----------------------------------------------------------------------------------------------------


def ours(base, rank, alpha, **options):
    """A layer of ours: the layer, its A and its B."""
    kind = next(kind for kind in lora.Layer.kinds if isinstance(base, kind.base_type))
    layer = kind(copy.deepcopy(base), rank, alpha, **options)
    return layer, layer.A, layer.B


def pefts(base, rank, alpha, rank_stabilised=False, dora=False):
    """The same of peft."""
    module = load("peft.tuners.lora.layer")
    config = load("peft").LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rank_stabilised, use_dora=dora)
    kind = getattr(module, type(base).__name__)
    with peft_quiet():
        layer = kind(copy.deepcopy(base).requires_grad_(False), "default", config, r=rank, lora_alpha=alpha)
    if isinstance(base, nn.Embedding):
        return layer, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def loralibs(base, rank, alpha):
    """The same of loralib, which makes the base itself."""
    module, sizes = load("loralib"), base.weight.shape if isinstance(base, nn.Embedding) else base.weight.shape[::-1]
    layer = getattr(module, type(base).__name__)(*sizes, r=rank, lora_alpha=alpha, merge_weights=False)
    layer.load_state_dict(base.state_dict(), strict=False)
    return layer, layer.lora_A, layer.lora_B


def peft_quiet():
    """Without its warning that convolutions with groups cannot be merged."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def outputs_and_gradients(made, x, A, B):  # noqa: N803
    """With these numbers in A and B: outputs, and the gradients of A and B, in the shapes of ours."""
    layer, a, b = made
    with torch.no_grad():
        a.copy_(A.view_as(a))
        b.copy_(B.view_as(b))
    outputs = layer(x)
    gradients = torch.autograd.grad(outputs.square().sum() / 2, (a, b))
    return outputs, gradients[0].view_as(A), gradients[1].view_as(B)


def matrices(layer):
    return torch.randn(layer.A.shape) / 3, torch.randn(layer.B.shape) / 3


def assert_close(got, wanted, tolerance=1e-6):
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


BASES = {"linear": lambda: nn.Linear(6, 4), "embedding": lambda: nn.Embedding(5, 4)}


def inputs(base):
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (3, 4))
    return torch.randn(3, base.in_features)


@pytest.mark.slow  # importing peft
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("peer", [pefts, loralibs])
def test_outputs_and_gradients_equal_the_peers(base, peer):
    base = BASES[base]()
    mine = ours(base, 3, 5)
    A, B = matrices(mine[0])  # noqa: N806
    x = inputs(base)
    assert_close(outputs_and_gradients(mine, x, A, B), outputs_and_gradients(peer(base, 3, 5), x, A, B))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)),
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8)),
        (nn.Conv3d(2, 4, 2), torch.randn(2, 2, 4, 4, 4)),
        (nn.Embedding(5, 4), torch.tensor([[0, 4], [1, 1]])),
    ],
    ids=["linear", "without bias", "conv1d", "conv2d", "conv3d", "embedding"],
)
def test_dora_equals_peft_with_use_dora(base, x):
    mine, theirs = ours(base, 2, 3, dora=True), pefts(base, 2, 3, dora=True)
    A, B = matrices(mine[0])  # noqa: N806
    magnitudes = mine[0].adapter.magnitude, theirs[0].lora_magnitude_vector["default"].weight
    assert_close([magnitudes[0]], [magnitudes[1].flatten()])
    with torch.no_grad():
        for magnitude in magnitudes:
            magnitude.copy_(magnitude * torch.linspace(0.5, 2, magnitude.numel()).view_as(magnitude))
    assert_close(outputs_and_gradients(mine, x, A, B), outputs_and_gradients(theirs, x, A, B))
    gradients = [
        torch.autograd.grad(layer(x).square().sum(), m)[0] for (layer, *_), m in zip((mine, theirs), magnitudes, strict=True)
    ]
    assert_close([gradients[0]], [gradients[1].flatten()])


@pytest.mark.slow
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_scaling_equals_pefts(rank_stabilised):
    base = nn.Linear(64, 64)
    for rank in (1, 2, 8, 50, 64):
        theirs = pefts(base, rank, 16, rank_stabilised=rank_stabilised)[0].scaling["default"]
        assert ours(base, rank, 16, rank_stabilised=rank_stabilised)[0].scaling == theirs


# --- convolutions -------------------------------------------------------------------------------------------------

CONVS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "same": {"padding": "same"},
    "kernel": {"kernel_size": (3, 1)},
    "without bias": {"bias": False},
    "dilation": {"dilation": 2},
    "dilation, padding": {"dilation": 2, "padding": 2},
    "dilation, same": {"dilation": (2, 1), "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate", "dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
}


def conv(case):
    return nn.Conv2d(4, 8, **{"kernel_size": 3} | CONVS[case])


@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_equals_the_explicit_formula(case):
    """conv2d(x, W + delta) with the base's own arguments: outputs, and gradients of A and B."""
    base, x = conv(case), torch.randn(2, 4, 9, 9)
    made = ours(base, 2, 3)
    A, B = matrices(made[0])  # noqa: N806
    got = outputs_and_gradients(made, x, A, B)
    A.requires_grad_(), B.requires_grad_()
    weight = base.weight.detach() + 1.5 * (B @ A).view_as(base.weight)
    wanted = explicit(base, x, weight)
    gradients = torch.autograd.grad(wanted.square().sum() / 2, (A, B))
    assert_close(got, (wanted.detach(), *gradients), tolerance=2e-6)


def explicit(base, x, weight):
    if base.padding_mode != "zeros":
        vertical, horizontal = base.padding
        x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode=base.padding_mode)
    padding = base.padding if base.padding_mode == "zeros" else 0
    return F.conv2d(x, weight, base.bias, base.stride, padding, base.dilation, base.groups)


SHORT = {
    "dilation": (RuntimeError, "drops dilation: two outputs of different sizes."),
    "dilation, padding": (RuntimeError, "drops dilation: two outputs of different sizes."),
    "dilation, same": (AssertionError, "drops dilation: merged, it computes something else."),
    "reflect": (AssertionError, "drops padding_mode: merged, it computes something else."),
    "circular": (AssertionError, "drops padding_mode: merged, it computes something else."),
    "replicate": (RuntimeError, "drops dilation and padding_mode: two outputs of different sizes."),
    "groups": (NotImplementedError, "does not merge convolutions with groups."),
    "depthwise": (ValueError, "refuses a rank that is no multiple of groups."),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "make"),
    [(case, ours) for case in CONVS]
    + [
        pytest.param(case, pefts, marks=pytest.mark.xfail(strict=True, raises=SHORT[case][0], reason=PEFT + SHORT[case][1]))
        if case in SHORT
        else (case, pefts)
        for case in CONVS
    ],
)
def test_a_merged_convolution_computes_what_it_computed_before(case, make):
    layer, A, B = make(conv(case), 2, 3)  # noqa: N806
    nn.init.normal_(A)
    nn.init.normal_(B)
    x = torch.randn(2, 4, 9, 9)
    before = layer(x)
    layer.merge()
    assert_close([layer(x)], [before], tolerance=1e-5)


# --- a model ------------------------------------------------------------------------------------------------------


def network():
    """Names of which some are the end, or a part, of others; the embedding and the decoder have one weight."""
    torch.manual_seed(1)
    parts = {
        "embed": nn.Embedding(7, 6),
        "query": nn.Linear(6, 6),
        "query_norm": nn.LayerNorm(6),
        "act": nn.Tanh(),
        "block": nn.Sequential(OrderedDict(query=nn.Linear(6, 5), subquery=nn.Linear(5, 6))),
        "head": nn.Linear(6, 7, bias=False),
    }
    model = nn.Sequential(OrderedDict(parts))
    model.head.weight = model.embed.weight
    return model


def inject_ours(model, targets, train=(), **options):
    names = lora.inject(model, targets, rank=2, alpha=3, train=train, **options)
    return model, names


def inject_pefts(model, targets, train=(), **options):
    peft = load("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, modules_to_save=list(train) or None, **options)
    with peft_quiet():
        wrapped = peft.get_peft_model(model, config)
    return wrapped, wrapped.targeted_module_names


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["query"], ["block.query"], ["subquery"], ["query", "subquery"]])
def test_the_same_names_are_targeted(targets):
    assert inject_ours(network(), targets)[1] == inject_pefts(network(), targets)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "inject",
    [
        inject_ours,
        falls_short(inject_pefts, PEFT + "raises only if no target at all matches.", pytest.fail.Exception),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(inject):
    with pytest.raises(ValueError, match="valeu"):
        inject(network(), ["query", "valeu"])


def merge_all_ours(model):
    lora.merge(model)


def merge_all_pefts(model):
    model.merge_adapter()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "merge"),
    [
        (inject_ours, merge_all_ours),
        pytest.param(
            *(inject_pefts, merge_all_pefts),
            marks=pytest.mark.xfail(
                strict=True, raises=AssertionError, reason=PEFT + "merges into the weight that the embedding has too."
            ),
        ),
    ],
)
def test_merging_a_tied_head_leaves_the_embedding_as_it_was(inject, merge):
    """Refused, or done without a change of the embedding."""
    model = network()
    embedding = model.embed.weight
    before = embedding.detach().clone()
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        injected, _ = inject(model, ["head"])
        for parameter in injected.parameters():
            if parameter.requires_grad:
                nn.init.ones_(parameter)
        try:
            merge(injected)
        except ValueError as error:
            assert "untie" in str(error)
    assert torch.equal(embedding, before)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, falls_short(pefts, PEFT + "subtracts what it added, in bfloat16.")])
def test_unmerging_gives_every_bit_back_in_bfloat16(make):
    base = nn.Linear(64, 64).bfloat16()
    layer, A, B = make(base, 4, 8)  # noqa: N806
    with torch.no_grad():
        A.normal_()
        B.normal_()
    layer.merge()
    layer.unmerge()
    weight = (layer.base if make is ours else layer.base_layer).weight
    assert torch.equal(weight, base.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "merge"),
    [
        (inject_ours, merge_all_ours),
        pytest.param(
            *(inject_pefts, merge_all_pefts),
            marks=pytest.mark.xfail(
                strict=True, raises=AssertionError, reason=PEFT + "does not save that it is merged: the update counts twice."
            ),
        ),
    ],
)
def test_a_checkpoint_saved_while_merged_computes_the_same_when_loaded(inject, merge):
    indices = torch.randint(7, (3, 4))
    model, loaded = inject(network(), ["query"])[0], inject(network(), ["query"])[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    wanted = model(indices)
    merge(model)
    loaded.load_state_dict(model.state_dict())
    assert_close([loaded(indices)], [wanted], tolerance=1e-5)


# --- files --------------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv1 = nn.Conv1d(6, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, (1, 3), stride=(1, 2))
        self.conv3 = nn.Conv3d(5, 6, (1, 1, 2))
        self.lin = nn.Linear(6, 8)
        self.deep = nn.Sequential(OrderedDict(lin=nn.Linear(8, 8)))
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        x = self.conv2(self.conv1(self.embed(x).mT).unsqueeze(2))
        return self.head(self.deep(self.lin(self.conv3(x.unsqueeze(2)).flatten(2).mean(2))))


def pretrained():
    torch.manual_seed(1)
    return Kinds().eval()


LAYERS = ["embed", "conv1", "conv2", "conv3", "lin"]
OPTIONS = {"plain": {}, "rslora": {"rank_stabilised": True}, "dora": {"dora": True}}


def adapt(model, name, rank, alpha, **options):
    """Adapt the layer of exactly this name."""
    base = model.get_submodule(name)
    kind = next(kind for kind in lora.Layer.kinds if isinstance(base, kind.base_type))
    lora.replace(model, [name], lambda layer: kind(layer, rank, alpha, **options) if layer is base else layer)


def randomised(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.train()(torch.randint(7, (9, 8)))  # statistics that are not those of a new layer
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "targets", [[*LAYERS, "deep.lin"], ["deep.lin", "embed"], ["lin", "embed"]], ids=["all", "some", "an end of another"]
)
def test_peft_reads_what_we_save_and_computes_the_same(tmp_path, targets, options):
    peft, model, indices = load("peft"), pretrained().requires_grad_(False), torch.randint(7, (3, 8))
    for rank, name in enumerate(targets, start=1):
        adapt(model, name, min(rank, 4), alpha=rank + 1, **OPTIONS[options])
    model.head.requires_grad_(True)
    randomised(model)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(pretrained(), tmp_path)
    assert_close([theirs(indices)], [model(indices)], tolerance=1e-5)
    with peft_quiet():
        written = peft.get_peft_model_state_dict(theirs)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == saved.keys() and all(torch.equal(written[key], saved[key]) for key in saved)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_we_read_what_peft_saves_and_compute_the_same(tmp_path, options):
    peft, indices = load("peft"), torch.randint(7, (3, 8))
    flags = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[options]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=LAYERS,
        modules_to_save=["head"],
        rank_pattern={"conv2": 3, "^lin": 4},
        alpha_pattern={"lin": 5},
        **flags,
    )
    theirs = randomised(peft.get_peft_model(pretrained(), config))
    with peft_quiet():
        theirs.save_pretrained(tmp_path)
    model = pretrained()
    assert load_peft(model, tmp_path) == [*LAYERS, "deep.lin"]  # peft matches ends of names
    assert_close([model(indices)], [theirs(indices)], tolerance=1e-5)
    save_peft(model, tmp_path / "again")
    saved = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert peft.LoraConfig(**written).use_dora == flags.get("use_dora", False)


def load_ours(folder):
    load_peft(pretrained(), folder)


def load_pefts(folder):
    peft = load("peft")
    with peft_quiet():
        peft.PeftModel.from_pretrained(pretrained(), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "read", [load_ours, falls_short(load_pefts, PEFT + "warns, and goes on without them.", pytest.fail.Exception)]
)
def test_tensors_that_no_layer_has_are_an_error(tmp_path, read):
    """As after training inside a wrapper, which puts `module.` in front of every name."""
    model = pretrained()
    lora.inject(model, ["conv1", "lin"], rank=2)
    save_peft(randomised(model), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    save_file({name.replace("model.model.", "model.model.module."): tensor.clone() for name, tensor in saved.items()}, path)
    with pytest.raises(ValueError, match=r"module\.conv1"):
        read(tmp_path)
