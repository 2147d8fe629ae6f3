import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from helpers.backbones import glyphnet
from helpers.data import digits
from helpers.features import eval_mode, extract, freeze, linear_probe, remove_head


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


def test_extract_equals_torchvisions_feature_extractor_exactly():
    model = resnet18(weights=None).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        wanted = create_feature_extractor(model, ["flatten"])(images)["flatten"]
    remove_head(model)
    assert torch.equal(extract(model, images), wanted)


def test_removed_head_put_back_gives_the_old_logits():
    model = glyphnet()
    images = torch.rand(5, 1, 32, 32)
    logits = extract(model, images)
    head = remove_head(model)
    features = extract(model, images)
    assert features.shape == (5, model.width) == (5, head.in_features)
    assert torch.equal(head(features), logits)


def test_freeze_stops_parameters_and_buffers(digits_net):
    assert freeze(digits_net) is digits_net
    before = snapshot(digits_net)
    digits_net(torch.randn(6, 1, 8, 8))
    assert_unchanged(digits_net, before)
    assert not any(p.requires_grad for p in digits_net.parameters())


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
    center = features.numpy().mean(0)  # scikit-learn needs centred features, and its Newton solver, to get this close
    reference = LogisticRegression(C=1 / (penalty * len(labels)), solver="newton-cholesky", tol=1e-10, max_iter=1000)
    reference.fit(features.numpy() - center, labels.numpy())
    ours = head(features).detach().numpy()
    theirs = reference.decision_function(features.numpy() - center)
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
    model = glyphnet()
    remove_head(model)
    reference = copy.deepcopy(model)
    linear_probe(extract(model, few.inputs), few.labels, 10)
    assert_unchanged(model, snapshot(reference))


NET = nn.Sequential(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: freeze([1]), TypeError, "model must be an nn.Module, got a list. Pass the model itself."),
        (lambda: remove_head(None), TypeError, "model must be an nn.Module, got None. Pass the model itself."),
        (lambda: extract({}, torch.randn(2, 3)), TypeError, "model must be an nn.Module, got a dict. Pass the model itself."),
        (lambda: linear_probe([[1.0]], [0]), TypeError, "features must be a tensor of shape (n, width), got a list."),
        (lambda: linear_probe(torch.randn(3, 2), torch.zeros(2).long()), ValueError, "labels must have shape (3,), got (2,)."),
        (lambda: remove_head(NET, "fc"), ValueError, "not an nn.Linear of Sequential: 'fc'. Choose from ['0']."),
        (
            lambda: extract(NET, torch.randn(0, 3)),
            ValueError,
            "inputs must have shape (n, ...), got (0, 3).",
        ),
        (
            lambda: extract(NET, [1, 2]),
            TypeError,
            "inputs must be a tensor of shape (n, ...), got a list.",
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
