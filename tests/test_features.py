import copy
import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import helpers.features
from helpers.backbones import glyphnet
from helpers.data import digits
from helpers.features import cache_key, cached_features, drop_head, eval_mode, extract, linear_probe

pytestmark = pytest.mark.usefixtures("device")  # see conftest.py


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_unchanged(model, before):
    state, modes, flags = before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags


def test_extract_leaves_the_model_bit_identical(digits_net):
    digits_net.bn.eval()
    digits_net.conv.requires_grad_(False)
    before = snapshot(digits_net)
    extract(digits_net, torch.randn(10, 1, 8, 8), batch_size=4)
    assert_unchanged(digits_net, before)


def test_extract_puts_modes_back_when_the_model_raises(digits_net):
    before = snapshot(digits_net)
    with pytest.raises(RuntimeError):
        extract(digits_net, torch.randn(4, 7, 8, 8))
    assert_unchanged(digits_net, before)


def test_extract_depends_neither_on_batch_size_nor_on_company(digits_net):
    images = torch.randn(10, 1, 8, 8)
    whole = extract(digits_net, images)
    for batch_size in (1, 3, 10):
        torch.testing.assert_close(extract(digits_net, images, batch_size), whole, rtol=1e-6, atol=1e-6)
    assert not whole.requires_grad


NETWORKS = [
    ("resnet18", "fc", "flatten"),
    ("densenet121", "classifier", "flatten"),
    ("mobilenet_v3_small", "classifier.3", "classifier.2"),
    ("efficientnet_b0", "classifier.1", "classifier.0"),
    ("vit_b_16", "heads.head", "getitem_5"),
]


@pytest.mark.parametrize(("name", "head", "node"), NETWORKS)
def test_features_equal_torchvisions_feature_extractor_exactly(name, head, node):
    model = get_model(name, weights=None, **({"image_size": 64} if name.startswith("vit") else {})).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = create_feature_extractor(model, [node])(images)[node]
    assert torch.equal(extract(drop_head(model, head), images), wanted)


def test_a_dropped_head_put_back_gives_the_old_logits_and_the_model_keeps_its_own():
    model = glyphnet()
    images = torch.rand(5, 1, 32, 32)
    logits = extract(model, images)
    features = extract(drop_head(model), images)
    assert features.shape == (5, model.width) == (5, model.fc.in_features)
    assert torch.equal(model.fc(features), logits)
    assert torch.equal(extract(model, images), logits)


def test_dropping_a_head_shares_nothing_with_the_model():
    model = glyphnet()
    nn.init.zeros_(drop_head(model).conv1.weight)
    assert model.conv1.weight.any()


def test_extract_takes_lists_in_their_order():
    class Lengths(nn.Module):
        def forward(self, texts):
            return torch.tensor([[len(text)] for text in texts])

    texts = ["a" * n for n in (3, 1, 4, 1, 5)]
    assert extract(Lengths(), texts, batch_size=2)[:, 0].tolist() == [3, 1, 4, 1, 5]
    assert extract(Lengths(), tuple(texts)).device.type == "cpu"


def test_eval_mode_restores_mixed_modes(digits_net):
    digits_net.drop.eval()
    before = [m.training for m in digits_net.modules()]
    with pytest.raises(KeyError), eval_mode(digits_net):
        assert not any(m.training for m in digits_net.modules())
        raise KeyError
    assert [m.training for m in digits_net.modules()] == before


def planted(n=60, width=5, classes=4, scale=1.0, shift=0.0):
    labels = torch.arange(n) % classes
    features = torch.randn(n, width, dtype=torch.float64) + torch.randn(classes, width, dtype=torch.float64)[labels]
    return scale * features + shift, labels


@pytest.mark.parametrize(("penalty", "scale", "shift"), [(1e-3, 1, 0), (0.1, 1, 0), (1e-2, 10, 0), (0.1, 1, 100), (1, 0.1, -5)])
def test_linear_probe_equals_scikit_learn(penalty, scale, shift):
    features, labels = planted(scale=scale, shift=shift)
    head = linear_probe(features, labels, penalty=penalty)
    ours = head(features).detach().cpu().numpy()
    features, labels = features.cpu().numpy(), labels.cpu().numpy()
    center = features.mean(0)  # scikit-learn needs centred features, and its Newton solver, to get this close
    reference = LogisticRegression(C=1 / (penalty * len(labels)), solver="newton-cholesky", tol=1e-10, max_iter=1000)
    reference.fit(features - center, labels)
    theirs = reference.decision_function(features - center)
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-6)


def test_linear_probe_matches_class_frequencies_because_the_bias_is_free():
    features, labels = planted(shift=3.0)
    labels[labels == 3] = 0
    probabilities = linear_probe(features, labels, 3, penalty=10.0)(features).softmax(1).mean(0)
    torch.testing.assert_close(probabilities, labels.bincount() / len(labels), check_dtype=False, rtol=0, atol=1e-8)


def test_linear_probe_has_an_output_for_a_class_without_examples():
    features, labels = planted(classes=3)
    assert linear_probe(features, labels, 5).out_features == 5


def test_linear_probe_neither_follows_a_graph_nor_uses_randomness():
    features, labels = planted()
    features.requires_grad_()
    before = torch.get_rng_state()
    with torch.no_grad():
        head = linear_probe(features, labels)
    assert features.grad is None
    assert torch.equal(linear_probe(features, labels).weight, head.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_linear_probe_keeps_the_dtype_of_the_features():
    features, labels = planted()
    assert linear_probe(features.float(), labels).weight.dtype == torch.float32


def test_a_network_and_its_features_are_read_only_for_a_probe():
    few = digits("train", 2)
    model = drop_head(glyphnet())
    reference = copy.deepcopy(model)
    linear_probe(extract(model, few.inputs), few.labels, 10)
    assert_unchanged(model, snapshot(reference))


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compute():
    """`extract`, counting how often it is called."""

    def counting(backbone, inputs, **settings):
        counting.calls += 1
        return extract(backbone, inputs, **settings)

    counting.calls = 0
    return counting


def entries(folder):
    return list(folder.glob("*"))


def test_the_same_is_computed_once_and_equal_to_the_last_bit(tmp_path, compute, digits_net):
    images = torch.randn(6, 1, 8, 8)
    first = cached_features(tmp_path / "new", compute, digits_net, images, {"batch_size": 4})
    again = cached_features(tmp_path / "new", compute, copy.deepcopy(digits_net), images.clone(), {"batch_size": 4})
    assert compute.calls == 1 and torch.equal(first, again) and first.dtype == again.dtype
    assert torch.equal(first, extract(digits_net, images, 4).cpu())
    assert [entry.suffix for entry in entries(tmp_path / "new")] == [".safetensors"]


def a_parameter(net):
    net.conv.weight.data[0, 0, 0, 0] += 1e-6


def a_buffer(net):
    net.bn.running_mean[0] += 1e-6


def another_structure(net):
    net.bn.eps = 1e-3  # not in the state dict


def another_preprocessing(net):
    net.preprocessing = "grey"


def a_buffer_that_is_not_saved(net):
    net.pool.register_buffer("scale", torch.rand(1), persistent=False)


CHANGES = [a_parameter, a_buffer, another_structure, another_preprocessing, a_buffer_that_is_not_saved]


@pytest.mark.parametrize("change", CHANGES)
def test_another_backbone_is_another_entry(tmp_path, compute, digits_net, change):
    images = torch.randn(3, 1, 8, 8)
    cached_features(tmp_path, compute, digits_net, images)
    change(digits_net)
    assert torch.equal(cached_features(tmp_path, compute, digits_net, images), extract(digits_net, images).cpu())
    assert compute.calls == 2


def test_other_data_or_settings_are_another_entry(tmp_path, compute, digits_net):
    images = torch.randn(4, 1, 8, 8)
    pixel = images.clone()
    pixel[0, 0, 0, 0] += 1e-3
    for number, inputs in enumerate((images, pixel, images.flip(0), images[:3], images.double().float() + 1e-3), 1):
        cached_features(tmp_path, compute, digits_net, inputs)
        assert compute.calls == number
    cached_features(tmp_path, compute, digits_net, images, {"batch_size": 2})
    assert compute.calls == 6


class Lengths(nn.Module):
    """A backbone for anything that has a size in bytes."""

    def forward(self, items):
        sizes = [len(item) if isinstance(item, str) else item.stat().st_size for item in items]
        return torch.tensor(sizes).float()[:, None]


def test_lists_of_texts_and_files_are_known_by_their_contents(tmp_path, compute):
    cache, photo = tmp_path / "cache", tmp_path / "photo"
    for number, texts in enumerate((["ab", "c"], ["a", "bc"], ["ab"], ["c", "ab"]), 1):
        cached_features(cache, compute, Lengths(), texts)
        assert compute.calls == number, "a cut elsewhere, or another order, is another entry"
    for content in (b"one", b"two"):
        photo.write_bytes(content)
        cached_features(cache, compute, Lengths(), [photo])
    assert compute.calls == 6
    cached_features(cache, compute, Lengths(), [photo])
    assert compute.calls == 6


def test_other_code_is_another_entry(tmp_path, digits_net):
    images = torch.randn(3, 1, 8, 8)
    twice = cached_features(tmp_path, lambda model, inputs: 2 * extract(model, inputs), digits_net, images)
    thrice = cached_features(tmp_path, lambda model, inputs: 3 * extract(model, inputs), digits_net, images)
    torch.testing.assert_close(thrice, 1.5 * twice)


def test_a_tensor_and_a_list_of_it_are_two_things(tmp_path):
    def count(model, inputs):
        return torch.tensor([[float(len(inputs))]])

    images = torch.randn(3, 2)
    assert cached_features(tmp_path, count, NET, images).item() == 3
    assert cached_features(tmp_path, count, NET, [images]).item() == 1


def test_images_that_differ_in_their_palette_are_two_things(tmp_path, compute):
    class Brightness(nn.Module):
        def forward(self, images):
            return torch.tensor([[float(np.asarray(image.convert("L")).mean())] for image in images])

    pictures = [Image.new("P", (2, 2)) for _ in range(2)]
    for picture, color in zip(pictures, ((10, 10, 10), (200, 200, 200)), strict=True):
        picture.putpalette([*color] * 256)
        assert cached_features(tmp_path, compute, Brightness(), [picture]).item() == color[0]


def test_a_key_is_the_same_for_equal_contents_whatever_their_order_or_place(digits_net):
    images, settings = torch.randn(4, 1, 8, 8), {"mean": 0.1307, "size": 8}
    key = cache_key(digits_net, images, settings)
    assert len(key) == 64 and set(key) <= set("0123456789abcdef")
    copied = images.transpose(2, 3).contiguous().transpose(2, 3)  # the same numbers, not contiguous
    assert cache_key(copy.deepcopy(digits_net), copied, {"size": 8, "mean": 0.1307}) == key


@pytest.mark.parametrize("change", CHANGES)
def test_a_key_knows_the_backbone(digits_net, change):
    images = torch.randn(4, 1, 8, 8)
    key = cache_key(digits_net, images, {})
    change(digits_net)
    assert cache_key(digits_net, images, {}) != key


def test_a_key_knows_settings_to_the_last_digit_and_images_by_their_form(digits_net):
    settings = [{"mean": 0.1307}, {"mean": math.nextafter(0.1307, 1)}, {"std": 0.1307}, {"mean": 0.1307, "size": 8}]
    black = [torch.zeros(20, 1, 8, 8), torch.zeros(80, 1, 4, 4), torch.zeros(20, 1, 8, 8, dtype=torch.int32)]
    keys = [cache_key(digits_net, black[0], some) for some in settings]
    keys += [cache_key(digits_net, images, settings[0]) for images in black[1:]]
    assert len(set(keys)) == len(keys)


def cut(entry):
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])


def flip(entry):
    raw = bytearray(entry.read_bytes())
    raw[-1] ^= 1  # the last bit of the last number: it still loads
    entry.write_bytes(raw)


def empty(entry):
    entry.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path, compute, digits_net, damage):
    images = torch.randn(3, 1, 8, 8)
    wanted = cached_features(tmp_path, compute, digits_net, images)
    damage(entries(tmp_path)[0])
    for calls in (2, 2):
        assert torch.equal(cached_features(tmp_path, compute, digits_net, images), wanted)
        assert compute.calls == calls


def test_an_entry_under_another_name_is_not_believed(tmp_path, compute, digits_net):
    images = torch.randn(3, 1, 8, 8)
    cached_features(tmp_path, compute, digits_net, images)
    (old,) = entries(tmp_path)
    a_parameter(digits_net)
    wanted = cached_features(tmp_path, compute, digits_net, images)
    (new,) = set(entries(tmp_path)) - {old}
    old.replace(new)
    assert torch.equal(cached_features(tmp_path, compute, digits_net, images), wanted) and compute.calls == 3


def test_an_interruption_leaves_no_entry(tmp_path, digits_net):
    def power_cut(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_features(tmp_path, power_cut, digits_net, torch.randn(3, 1, 8, 8))
    assert entries(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, digits_net, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(helpers.features, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        cached_features(tmp_path, extract, digits_net, torch.randn(3, 1, 8, 8))
    assert entries(tmp_path) == []


def test_what_is_no_function_is_refused(tmp_path):
    with pytest.raises(TypeError) as error:
        cached_features(tmp_path, functools.partial(extract, batch_size=2), Lengths(), ["a"])
    assert str(error.value) == "compute must be a function, got a partial. Give it its arguments as settings."


def test_inputs_without_contents_are_refused(tmp_path, compute):
    with pytest.raises(TypeError, match=r"^what compute gives must be a tensor of shape \(n, ...\), got a list.$"):
        cached_features(tmp_path, lambda model, inputs: [1], Lengths(), ["a"])
    with pytest.raises(TypeError, match=r"^inputs must be tensors, texts, paths or PIL images, got an object.$"):
        cached_features(tmp_path, compute, Lengths(), [object()])


NET = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: drop_head([1]), TypeError, "model must be an nn.Module, got a list. Pass the model itself."),
        (lambda: drop_head(None), TypeError, "model must be an nn.Module, got None. Pass the model itself."),
        (lambda: extract({}, torch.randn(2, 3)), TypeError, "model must be an nn.Module, got a dict. Pass the model itself."),
        (lambda: linear_probe([[1.0]], [0]), TypeError, "features must be a tensor of shape (n, width), got a list."),
        (lambda: linear_probe(torch.randn(3, 2), torch.zeros(2).long()), ValueError, "labels must have shape (3,), got (2,)."),
        (lambda: drop_head(NET, "fc"), ValueError, "not an nn.Linear of Sequential: 'fc'. Choose from ['0']."),
        (
            lambda: extract(NET, torch.randn(0, 3)),
            ValueError,
            "inputs must have shape (n, ...), got (0, 3).",
        ),
        (
            lambda: extract(NET, {}),
            TypeError,
            "inputs must be a tensor of shape (n, ...) or a list of n inputs, got a dict.",
        ),
        (
            lambda: extract(NET, torch.randn(2, 3), batch_size=0),
            ValueError,
            "batch_size must be a whole number of at least 1, got 0. 256 suits most models on a CPU.",
        ),
        (
            lambda: linear_probe(torch.randn(32, 512, 7, 7), torch.zeros(32).long()),
            ValueError,
            "features must have shape (n, width), got (32, 512, 7, 7). Pool first: features.mean((2, 3)).",
        ),
        (
            lambda: linear_probe(torch.randn(3, 2), torch.zeros(3)),
            ValueError,
            "labels must be whole numbers, got torch.float32. Convert them: labels.long().",
        ),
        (
            lambda: linear_probe(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1])),
            ValueError,
            "features must be finite, got 1 rows with NaN or infinity. Look at the inputs first.",
        ),
        (
            lambda: linear_probe(torch.randn(2, 2), torch.tensor([0, 1]), penalty=0),
            ValueError,
            "penalty must be a number above 0, got 0. Without one, separable features have no optimum.",
        ),
        (
            lambda: linear_probe(torch.randn(2, 2), torch.tensor([0, 3]), classes=3),
            ValueError,
            "labels must be from 0 to 2 for 3 classes, got 0 to 3. Raise `classes`, or renumber the labels.",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
