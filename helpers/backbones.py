"""Pre-trained backbones, each with its preprocessing, feature width and stages.

`glyphnet` is ours: a ResNet small enough for a laptop, with the stages and names of torchvision's
(`conv1`, `bn1`, `layer1` to `layer4`, `avgpool`, `fc`), pre-trained on rendered letters by
`python -m helpers.pretrain`. Its weights come with the package, so nothing is downloaded.

Source of the architecture: He et al. 2015, "Deep Residual Learning for Image Recognition".
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import expect

WEIGHTS = Path(__file__).parent / "weights" / "glyphnet.safetensors"
CARD = WEIGHTS.with_suffix(".json")


class GlyphNet(nn.Module):
    """A ResNet of one basic block per stage, for images of shape (n, 1, 32, 32) with values from 0 to 1.

        stage     conv1         layer1        layer2      layer3      layer4       avgpool  fc
        output    (16, 16, 16)  (16, 16, 16)  (32, 8, 8)  (64, 4, 4)  (128, 2, 2)  (128,)   (classes,)

    The first step of `forward` is the preprocessing, (x - mean) / std with the mean and std of the letters it was
    trained on, kept as buffers: it cannot be forgotten, nor applied with the wrong numbers.
    Other sizes than 32 x 32 work too, as in any ResNet, because `avgpool` takes the mean over whatever is left.
    """

    stages = ("conv1", "layer1", "layer2", "layer3", "layer4")
    width = 128

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, stride=1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, stride=2))
        self.layer4 = nn.Sequential(BasicBlock(64, 128, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def glyphnet(pretrained: bool = True, classes: int | None = None) -> GlyphNet:
    """Build glyphnet.

    Args:
        pretrained: load the shipped weights; False leaves a random start with the shipped `mean` and `std`,
            for comparisons that differ in the weights alone.
        classes: size of a new head `fc`, started at random from torch's global random state;
            None keeps the 43 letters and, if `pretrained`, their trained head.

    Returns:
        A model in train mode (as every new nn.Module) on the CPU.

    Raises:
        ValueError: the weights file is not the one the card describes.
    """
    if classes is not None:
        expect.whole_number("classes", classes, advice="Ten digits need classes=10.")
    card = glyphnet_card()
    model = GlyphNet(len(card["classes"]))
    if pretrained:
        found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        if found != card["sha256"]:
            raise ValueError(
                f"{WEIGHTS.name} must have SHA-256 {card['sha256'][:12]}…, got {found[:12]}…. "
                "The file is damaged or was retrained without its card: install warmstart again, "
                "or run `python -m helpers.pretrain`."
            )
        model.load_state_dict(load_file(WEIGHTS))
    else:
        with safe_open(WEIGHTS, "pt") as weights:
            model.mean, model.std = weights.get_tensor("mean"), weights.get_tensor("std")
    if classes is not None:
        model.fc = nn.Linear(model.width, classes)
    return model


def glyphnet_card() -> dict:
    """The facts of the model card: data, recipe, seed, versions, scores, SHA-256 of the weights."""
    return json.loads(CARD.read_text(encoding="utf-8"))


class BasicBlock(nn.Module):
    """relu(conv, norm, relu, conv, norm + shortcut), as torchvision's block of that name, with its parameter names.

    Ours, because importing torchvision takes as long as importing torch, and most chapters need nothing else of it.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = None
        if stride > 1 or channels_in != channels_out:
            shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)
