import pytest
import torch
from torch import nn
from torchvision.models import resnet, resnet18

from helpers import backbones
from helpers.backbones import CARD, WEIGHTS, BasicBlock, glyphnet, glyphnet_card
from helpers.data import LETTERS, letters
from helpers.features import extract
from helpers.training import evaluate


def test_glyphnet_has_torchvisions_stages_and_names():
    theirs = {name.partition(".")[0] for name, _ in resnet18(weights=None).named_children()} - {"maxpool"}
    ours = {name for name, _ in glyphnet().named_children()}
    assert ours == theirs
    assert {name for name, _ in glyphnet().layer2[0].named_parameters()} == {
        name for name, _ in resnet18(weights=None).layer2[0].named_parameters()
    }


@pytest.mark.parametrize(("channels_in", "stride"), [(6, 1), (3, 1), (3, 2)])
def test_the_block_is_torchvisions(channels_in, stride):
    ours = BasicBlock(channels_in, 6, stride)
    shortcut = nn.Sequential(nn.Conv2d(channels_in, 6, 1, stride, bias=False), nn.BatchNorm2d(6))
    theirs = resnet.BasicBlock(channels_in, 6, stride, None if ours.downsample is None else shortcut)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, channels_in, 7, 7)
    assert torch.equal(ours(images), theirs(images))


def test_weights_are_small_and_are_those_of_the_card():
    assert WEIGHTS.stat().st_size <= 2_000_000
    card = glyphnet_card()
    assert card["parameters"] == sum(p.numel() for p in glyphnet().parameters())
    assert card["classes"] == LETTERS
    assert card["sha256"] in CARD.with_suffix(".md").read_text(encoding="utf-8")


def test_stages_give_the_documented_shapes():
    model, shapes = glyphnet().eval(), {}
    for stage in model.stages:
        getattr(model, stage).register_forward_hook(
            lambda _, __, out, stage=stage: shapes.update({stage: tuple(out.shape[1:])})
        )
    model(torch.rand(2, 1, 32, 32))
    assert shapes == {
        "conv1": (16, 16, 16),
        "layer1": (16, 16, 16),
        "layer2": (32, 8, 8),
        "layer3": (64, 4, 4),
        "layer4": (128, 2, 2),
    }


def test_glyphnet_names_letters_as_well_as_its_card_says():
    accuracy = evaluate(glyphnet(), letters(1000, seed=11))
    assert accuracy == pytest.approx(glyphnet_card()["letters_accuracy"], abs=0.02)


def test_untrained_glyphnet_shares_only_the_preprocessing():
    trained, untrained = glyphnet(), glyphnet(pretrained=False)
    assert torch.equal(trained.mean, untrained.mean) and torch.equal(trained.std, untrained.std)
    assert not torch.equal(trained.conv1.weight, untrained.conv1.weight)
    assert evaluate(untrained, letters(300, seed=11)) < 0.15


def test_a_new_head_has_the_classes_asked_for():
    model = glyphnet(classes=10)
    assert extract(model, torch.rand(3, 1, 32, 32)).shape == (3, 10)
    assert torch.equal(model.layer4[0].conv2.weight, glyphnet().layer4[0].conv2.weight)


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "glyphnet.safetensors"
    damaged.write_bytes(WEIGHTS.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(backbones, "WEIGHTS", damaged)
    with pytest.raises(ValueError, match=r"glyphnet.safetensors must have SHA-256 \w{12}…, got \w{12}…. The file is damaged"):
        glyphnet()


@pytest.mark.parametrize("classes", [0, -1, 2.0])
def test_bad_classes(classes):
    with pytest.raises(ValueError) as error:
        glyphnet(classes=classes)
    assert str(error.value) == f"classes must be a whole number of at least 1, got {classes!r}. Ten digits need classes=10."
