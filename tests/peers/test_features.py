"""Ours beside timm: the same features from the same weights."""

import pytest
import torch

from helpers.features import drop_head, extract

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("resnet18", "fc", 64),
        ("densenet121", "classifier", 64),
        ("mobilenetv3_small_100", "classifier", 64),
        ("convnext_atto", "head.fc", 64),
        ("vit_tiny_patch16_224", "head", 224),
    ],
)
def test_features_equal_timms_without_a_head_exactly(name, head, size):
    model = timm.create_model(name, num_classes=7).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    weights = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{head}.")}
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, size, size)
    assert torch.equal(extract(drop_head(model, head), images), extract(theirs, images))
