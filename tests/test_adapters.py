import copy
import json
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import helpers.adapters
from helpers import lora
from helpers.adapters import AdapterFile, load_peft, save_peft

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py


def network(rank=2, alpha=3, targets=("lin", "again"), train=("head",), **options):
    """A small network, its pre-trained weights always the same, with adapters of random numbers."""
    torch.manual_seed(1)
    parts = {"lin": nn.Linear(6, 5), "act": nn.Tanh(), "again": nn.Linear(5, 4), "head": nn.Linear(4, 3)}
    model = nn.Sequential(OrderedDict(parts))
    if targets:
        lora.inject(model, targets, rank=rank, alpha=alpha, train=train, **options)
    return model


def trained(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def x():
    return torch.randn(7, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "digits.safetensors"


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


# --- our own file -------------------------------------------------------------------------------------------------


def test_another_copy_computes_the_same_after_load(path, x):
    model, loaded = trained(network()), network()
    AdapterFile(path).save(model)
    AdapterFile(str(path)).load(loaded)
    assert torch.equal(loaded(x), model(x)) and same(state(loaded), state(model))


def test_the_file_holds_what_trains_and_nothing_else(path):
    model = trained(network())
    AdapterFile(path).save(model)
    saved = load_file(path)
    assert set(saved) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias"} < set(saved) and len(saved) == 6
    assert list(path.parent.iterdir()) == [path]


def test_a_shared_weight_stands_there_once_and_strides_are_no_matter(path):
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        model["turned"] = nn.Linear(2, 3, bias=False)
        model["turned"].weight = nn.Parameter(torch.randn(2, 3).T)
        return model

    model, loaded = make(), make()
    AdapterFile(path).save(model)
    assert set(load_file(path)) == {"embed.weight", "turned.weight"}
    AdapterFile(path).load(loaded)
    assert same(state(loaded), state(model)) and loaded["head"].weight is loaded["embed"].weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_bit_is_kept(path, dtype):
    model, loaded = trained(network().to(dtype)), network().to(dtype)
    AdapterFile(path).save(model)
    AdapterFile(path).load(loaded)
    assert same(state(loaded), state(model)) and {tensor.dtype for tensor in load_file(path).values()} == {dtype}


def test_load_keeps_objects_flags_dtype_and_modes(path):
    AdapterFile(path).save(trained(network()))
    loaded = network().double().requires_grad_(False).eval()
    before = [(id(parameter), parameter.dtype, parameter.requires_grad) for parameter in loaded.parameters()]
    AdapterFile(path).load(loaded)
    assert [(id(parameter), parameter.dtype, parameter.requires_grad) for parameter in loaded.parameters()] == before
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.head.weight, trained(network()).head.weight.double())


def test_an_optimizer_goes_on_with_what_was_loaded(path):
    AdapterFile(path).save(trained(network()))
    loaded = network()
    optimizer = torch.optim.SGD([parameter for parameter in loaded.parameters() if parameter.requires_grad], lr=1.0)
    AdapterFile(path).load(loaded)
    before = state(loaded)
    loaded(torch.randn(7, 6)).square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in state(loaded).items() if not torch.equal(tensor, before[name])}
    assert moved == set(load_file(path))


def test_buffers_of_what_trains_whole_are_saved_too(path):
    def make():
        model = network(targets=())
        model.head = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
        lora.inject(model, ["lin"], rank=2, train=["head"])
        model.norm = nn.BatchNorm1d(3).requires_grad_(False)
        return model

    model, loaded = trained(make()), make()
    model(torch.randn(9, 6) + 1)
    AdapterFile(path).save(model)
    AdapterFile(path).load(loaded)
    saved = set(load_file(path))
    assert "head.0.running_mean" in saved and not any(name.startswith("norm") for name in saved)
    assert torch.equal(loaded.head[0].running_mean, model.head[0].running_mean)
    frozen = make().requires_grad_(False)
    AdapterFile(path).load(frozen)
    assert torch.equal(frozen.head[0].running_var, model.head[0].running_var)


def test_a_merged_model_saves_the_same_file(path, x):
    model = trained(network())
    AdapterFile(path).save(model)
    unmerged = path.read_bytes()
    lora.merge(model)
    AdapterFile(path).save(model)
    assert path.read_bytes() == unmerged


def test_a_merged_model_loads_and_stays_merged(path, x):
    model, loaded = trained(network()), trained(network(), seed=3)
    plain = network(targets=())
    AdapterFile(path).save(model)
    lora.merge(loaded)
    AdapterFile(path).load(loaded)
    assert all(layer.merged for layer in lora.layers(loaded).values())
    assert torch.allclose(loaded(x), model(x), atol=1e-5)
    lora.unmerge(loaded)
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.lin.base.weight, plain.lin.weight)


def test_the_file_says_what_it_belongs_to(path):
    model = trained(network(rank=2, alpha=3))
    AdapterFile(path).save(model)
    settings = {"rank": 2, "alpha": 3, "scaling": 1.5, "dora": False}
    assert AdapterFile(path).metadata() == {name: {"default": settings} for name in ("lin", "again")}
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"lora"}


def refused(file, model, message):
    """`load` raises this message, in full, and the model is as it was."""
    before = state(model)
    with pytest.raises(ValueError) as error:
        file.load(model)
    assert str(error.value) == message
    assert same(state(model), before)


def test_what_does_not_fit_is_refused_and_nothing_changes(path):
    file = AdapterFile(path)
    file.save(trained(network()))
    without = network()
    without.head = nn.Linear(4, 3, bias=False)
    refused(
        file,
        without,
        "digits.safetensors holds head.bias, which the model lacks. Inject the adapters it was saved with.",
    )
    more = network()
    more.extra = nn.Linear(3, 3)
    refused(
        file,
        more,
        "digits.safetensors lacks extra.weight, extra.bias, which the model trains. Freeze it, or take another file.",
    )
    rank = network(rank=1)
    name = next(name for name, parameter in rank.named_parameters() if parameter.requires_grad)
    refused(
        file,
        rank,
        f"{name} must have shape (1, 6), got (2, 6) in digits.safetensors. Inject adapters of the rank that was saved.",
    )
    refused(
        file,
        network(alpha=6),
        "the adapter of lin must be scaled by 1.5 as in digits.safetensors, got 3. Inject it with the alpha that was saved.",
    )
    wrapped = nn.Sequential(OrderedDict(module=network()))
    with pytest.raises(ValueError, match=r"^digits.safetensors holds .* and 3 more, which the model lacks\. Inject"):
        file.load(wrapped)


def test_one_row_is_not_spread_over_many(path):
    AdapterFile(path).save(trained(network(rank=1)))
    with pytest.raises(ValueError, match="must have shape"):
        AdapterFile(path).load(network(rank=2, alpha=6))


def test_a_model_in_which_nothing_trains_is_not_saved(path):
    message = (
        "nothing to save: all 12 parameters are frozen. What is saved is what has requires_grad, so save before you freeze."
    )
    model = network().requires_grad_(False)
    message = message.replace("12", str(len(list(model.parameters()))))
    with pytest.raises(ValueError) as error:
        AdapterFile(path).save(model)
    assert str(error.value) == message and not path.exists()


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    AdapterFile(path).save(trained(network()))
    old = path.read_bytes()

    def full_disk(tensors, draft, metadata):
        draft.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(helpers.adapters, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        AdapterFile(path).save(trained(network(), seed=3))
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_missing_and_damaged_files(path):
    with pytest.raises(FileNotFoundError) as error:
        AdapterFile(path).load(network())
    assert str(error.value) == f"no file of adapters at {path}. Save one first: AdapterFile(path).save(model)."
    AdapterFile(path).save(trained(network()))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"must be a safetensors file, got one that cannot be read \(.*\)\. Save it again\.$"):
        AdapterFile(path).load(network())


def test_a_file_without_metadata_loads(path, x):
    model, loaded = trained(network()), network()
    save_file({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, path)
    AdapterFile(path).load(loaded)
    assert torch.equal(loaded(x), model(x)) and AdapterFile(path).metadata() == {}


def test_of_several_adapters_the_active_one_is_saved(path, x):
    def make():
        model = trained(network())
        lora.inject(model, ["lin"], rank=1, alpha=2, adapter="second", train=["head"])
        return model

    model, loaded = trained(make()), make()
    AdapterFile(path).save(model)
    assert set(load_file(path)) == {"lin.adapters.second.A", "lin.adapters.second.B", "head.weight", "head.bias"}
    assert AdapterFile(path).metadata()["lin"].keys() == {"second"}
    AdapterFile(path).load(loaded)
    assert torch.equal(loaded(x), model(x))


# --- peft's files -------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer of each kind that peft and ours have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv1 = nn.Conv1d(6, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, (1, 3), stride=(1, 2))
        self.conv3 = nn.Conv3d(5, 6, (1, 1, 2))
        self.lin = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        x = self.conv2(self.conv1(self.embed(x).mT).unsqueeze(2))
        return self.head(self.lin(self.conv3(x.unsqueeze(2)).flatten(2).mean(2)))


LAYERS = ["embed", "conv1", "conv2", "conv3", "lin"]


def kinds(adapted=True, **options):
    torch.manual_seed(1)
    model = Kinds()
    if adapted:
        trained(model, seed=0)
        lora.inject(model, LAYERS, rank=2, alpha=3, train=["head"], **options)
        trained(model)
        model(torch.randint(7, (9, 8)))  # statistics that are not those of a new layer
        return model.eval()
    return trained(model, seed=0).eval()


OPTIONS = [{}, {"rank_stabilised": True}, {"dora": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("merged", [False, True])
def test_what_peft_would_read_comes_back_bit_for_bit(tmp_path, options, merged):
    model, plain = kinds(**options), kinds(adapted=False)
    indices = torch.randint(7, (3, 8))
    wanted, saved = model(indices), state(model)
    if merged:
        lora.merge(model)
    save_peft(model, tmp_path)
    assert load_peft(plain, tmp_path) == LAYERS
    assert same(state(plain), saved) and torch.equal(plain(indices), wanted)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in plain.named_parameters() if parameter.requires_grad} == trains
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_layers_may_differ_in_rank_and_alpha_and_names_in_length(tmp_path, x):
    def plain():
        model = network(targets=())
        model.deep = nn.Sequential(OrderedDict(lin=nn.Linear(3, 3), other=nn.Linear(3, 3)))
        return model

    model = plain()
    for name, rank, alpha in (("deep.lin", 1, 5), ("again", 3, 2)):
        lora.inject(model, [name], rank=rank, alpha=alpha)
    trained(model)
    save_peft(model, tmp_path)
    loaded = plain()
    assert load_peft(loaded, tmp_path, adapter="theirs") == ["again", "deep.lin"]
    assert torch.equal(loaded(x), model(x)) and loaded.again.active == ("theirs",)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["again", "deep.lin"] and config["rank_pattern"] == {r"^deep\.lin": 1}


def test_a_name_that_ends_longer_names_becomes_an_expression(tmp_path):
    model = network(targets=())
    model.deep = nn.Sequential(OrderedDict(lin=nn.Linear(3, 3)))
    made = lora.Linear(model.lin, 2, 3)
    model.lin = made
    save_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "lin"


CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}


@pytest.mark.parametrize(
    ("make", "odd", "dora"),
    [
        (lambda: nn.Conv2d(**CONV, groups=2), "groups=2", False),
        (lambda: nn.Conv1d(**CONV, dilation=2), "dilation=(2,)", False),
        (lambda: nn.Conv2d(**CONV, padding=1, padding_mode="reflect"), "padding_mode='reflect'", False),
        (lambda: nn.Embedding(4, 5, max_norm=1.0), "max_norm=1.0", False),
        (lambda: nn.Embedding(4, 5, padding_idx=0), "padding_idx=0 with DoRA", True),
        (lambda: nn.Embedding(4, 5, padding_idx=-1), "padding_idx=3 where A is not 0", False),
    ],
)
def test_what_peft_computes_differently_is_refused_both_ways(tmp_path, make, odd, dora):
    layer = make()
    model = nn.Sequential(OrderedDict(layer=layer))
    plain = copy.deepcopy(model)
    lora.inject(model, ["layer"], rank=2, dora=dora)
    if "A is" in odd:
        nn.init.ones_(model.layer.A)
    message = f"peft would compute something else for layer, because of {odd}. Take AdapterFile for it."
    with pytest.raises(ValueError) as error:
        save_peft(model, tmp_path)
    assert str(error.value) == message and not list(tmp_path.iterdir())
    same_tensors = nn.Sequential(OrderedDict(layer=copy.deepcopy(layer)))
    for name, value in {"groups": 1, "dilation": (1,), "padding_mode": "zeros", "max_norm": None, "padding_idx": None}.items():
        if hasattr(layer, name):
            setattr(same_tensors.layer, name, (1,) * len(layer.kernel_size) if name == "dilation" else value)
    if odd == "groups=2":
        same_tensors.layer = nn.Conv2d(**CONV)
    lora.inject(same_tensors, ["layer"], rank=2, dora=dora)
    if "A is" in odd:
        nn.init.ones_(same_tensors.layer.A)
    save_peft(same_tensors, tmp_path)
    before = state(plain), [parameter.requires_grad for parameter in plain.parameters()]
    with pytest.raises(ValueError) as error:
        load_peft(plain, tmp_path)
    assert str(error.value) == message
    assert same(state(plain), before[0]) and [parameter.requires_grad for parameter in plain.parameters()] == before[1]


def test_what_has_no_place_in_pefts_files_is_refused(tmp_path):
    def message(model):
        with pytest.raises(ValueError) as error:
            save_peft(model, tmp_path)
        return str(error.value)

    got = "the model must have LoRA layers with an active adapter, got none. Call helpers.lora.inject first."
    assert message(network(targets=())) == got
    two = network()
    lora.inject(two, ["lin"], adapter="second", rank=1)
    lora.activate(two, "default", "second")
    got = "one adapter must be active, got ['default', 'second'] in lin. Activate one, and save them in turn."
    assert message(two) == got
    free = network()
    free.token = nn.Parameter(torch.zeros(3))
    got = "peft has no place for token, which trains, outside modules. Freeze it, or take AdapterFile."
    assert message(free) == got
    mixed = network(targets=("lin",))
    mixed.again = lora.Linear(mixed.again, 2, 3, dora=True)
    assert message(mixed) == "use_dora must hold for all adapters or none, got it for again and not for lin."
    alike = network()
    alike.overhead = nn.Linear(3, 3).requires_grad_(False)
    got = "peft would take overhead for head, which trains. Rename one of them, or take AdapterFile."
    assert message(alike) == got
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_model_is_refused_and_nothing_changes(tmp_path):
    model = trained(network())
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    saved = load_file(tmp_path / "adapter_model.safetensors")

    def message(plain, tensors=saved, **settings):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))
        save_file(tensors, folder / "adapter_model.safetensors")
        before = state(plain), [parameter.requires_grad for parameter in plain.parameters()]
        with pytest.raises(ValueError) as error:
            load_peft(plain, folder)
        assert same(state(plain), before[0]) and [parameter.requires_grad for parameter in plain.parameters()] == before[1]
        return str(error.value)

    plain = network(targets=())
    file, take = "adapter_model.safetensors", "Take the model that it was trained in."
    changed = network(targets=())
    changed.again = nn.Linear(7, 4)
    wanted = "{'lora_A.weight': (2, 7), 'lora_B.weight': (4, 2)}, got {'lora_A.weight': (2, 5), 'lora_B.weight': (4, 2)}"
    assert message(changed) == f"the adapter of again must have {wanted}. {take}"
    changed.again = nn.Tanh()
    kinds = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding"
    assert message(changed) == f"again must be one of {kinds}, got a Tanh. Take the model without LoRA layers."
    del changed.again
    assert message(changed) == f"{file} has adapters for again, which the model lacks. {take}"
    key = "base_model.model.head.bias"
    less = {name: tensor for name, tensor in saved.items() if name != key}
    assert message(plain, less) == f"{file} lacks head.bias of modules_to_save. {take}"
    more = saved | {"base_model.model.head.scale": torch.ones(1)}
    assert message(plain, more) == f"{file} holds head.scale, which no module of modules_to_save has. Take the same model."
    assert message(plain, saved | {"head.bias": torch.ones(3)}).startswith(
        f"every key of {file} must begin with 'base_model.model.'"
    )
    assert message(plain, saved | {key: torch.ones(5)}) == f"head.bias must have shape (3,), got (5,) in {file}."
    half = {name: tensor for name, tensor in saved.items() if "again.lora_A" not in name}
    assert message(plain, half) == f"{file} must have the A of again, got lora_B.weight. Was it saved whole?"
    assert message(plain, use_dora=True).startswith("the adapter of lin must have {'lora_A.weight': (2, 6), ")
    got = "bias must be 'none' in adapter_config.json, got 'all'. Load it with peft itself."
    assert message(plain, bias="all") == got
    assert message(plain, peft_type="IA3").startswith("peft_type must be 'LORA' in adapter_config.json, got 'IA3'.")
    got = "init_lora_weights must be one of [True, False, 'gaussian', 'orthogonal', 'eva'], got 'pissa', which changes the "
    assert message(plain, init_lora_weights="pissa") == got + "base's weights."
    assert message(plain, lora_alpha=-1).endswith("alpha must be a number above 0, got -1.")
    with pytest.raises(FileNotFoundError) as error:
        load_peft(plain, tmp_path / "none")
    got = f"no adapter_config.json in {tmp_path / 'none'}. Name the folder that save_pretrained or save_peft wrote."
    assert str(error.value) == got
