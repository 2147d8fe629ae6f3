"""Exercise 2.2: run a backbone over images, and leave no trace."""

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.checks.shared_list import SharedList
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.features import extract

exercise = Exercise(__name__, "2.2", extract, autocast=True)


def _backbone(trial: Trial, width: int) -> nn.Sequential:
    """A small network with BatchNorm and dropout, in train mode, whose statistics are not those of a fresh layer.

    Its features are around 1, so that what bfloat16 rounds is small beside them.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), with_statistics(nn.BatchNorm2d(6, affine=False), trial), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(6, width, 3, stride=2), with_statistics(nn.BatchNorm2d(width, affine=False), trial), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def _plain_backbone(width: int) -> nn.Sequential:
    """A network that computes the same in train and in eval mode."""
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Counting(nn.Module):
    """A module that remembers how many inputs each call brought."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = SharedList()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.inner(x)


@exercise.experiment("depends on the image alone")
class DependsOnTheImageAlone(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 9)
        images, neighbours = trial.normal(5, 1, 8, 8), 3 + 2 * trial.normal(2, 7, 1, 8, 8)
        return {"backbone": _backbone(trial, width), "width": width, "images": images, "neighbours": neighbours}

    def measure(self, subject, inputs):
        raw = {}
        for name, neighbours in zip(("first", "second"), inputs["neighbours"], strict=True):
            images = torch.cat([inputs["images"], neighbours])
            features = expect_tensor(subject(inputs["backbone"], images, 6), (len(images), inputs["width"]), "the features")
            raw[name] = features.detach()[: len(inputs["images"])]
        return raw

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = inputs["backbone"].eval()(inputs["images"])
        return {
            "features of one image in two different batches": _equal(raw["first"], raw["second"]),
            "features compared with those of eval mode": _equal(raw["first"], wanted),
        }

    def notes(self, raw, inputs):
        largest = (raw["first"] - raw["second"]).abs().max().item()
        return {"features of one image in two different batches": f"by up to {largest:.2g}"}


class _Plain(Experiment):
    """Draws a backbone that computes the same in both modes, and images of which the last batch is short."""

    def draw(self, trial: Trial) -> dict:
        width, batch_size = trial.integer(4, 8), trial.integer(4, 7)
        images = trial.normal(3 * batch_size + trial.integer(1, batch_size - 1), 1, 6, 6)
        return {"backbone": _Counting(_plain_backbone(width)), "images": images, "batch_size": batch_size, "width": width}

    def features(self, subject, inputs: dict) -> Tensor:
        features = subject(inputs["backbone"], inputs["images"], inputs["batch_size"])
        return expect_tensor(features, ("n", inputs["width"]), "the features")


@exercise.experiment("every image once")
class EveryImageOnce(_Plain):
    def measure(self, subject, inputs):
        return {"features": self.features(subject, inputs).detach()}

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = inputs["backbone"](inputs["images"])
        n, rows = len(wanted), len(raw["features"])
        words = {n: "one per image", n - n % inputs["batch_size"]: "none for the last, short batch"}
        return {
            "rows": words.get(rows, "another number"),
            "rows compared with the images in their order": _equal(raw["features"], wanted[:rows]),
        }


@exercise.experiment("left as found")
class LeftAsFound(_Plain):
    points = 2

    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        backbone = _backbone(trial, drawn["width"])
        backbone[5].eval()  # one BatchNorm is in eval mode, as a frozen one would be
        backbone[0].requires_grad_(False)  # and one convolution is frozen
        return drawn | {"backbone": _Counting(backbone)}

    def measure(self, subject, inputs):
        self.features(subject, inputs)
        return {"count": sum(inputs["backbone"].sizes), "traces": traces.of(inputs["backbone"])}

    def facts(self, raw, inputs):
        return _went_through(raw) | traces.changes(inputs["backbone"], raw["traces"])

    def notes(self, raw, inputs):
        moved = traces.changed(inputs["backbone"], raw["traces"], "buffers")
        if not moved:
            return {}
        buffers = len(list(inputs["backbone"].buffers()))
        return {"buffers that moved": f"{len(moved)} of {buffers}, such as {moved[0].removeprefix('inner.')}"}


@exercise.experiment("no graph")
class NoGraph(_Plain):
    def measure(self, subject, inputs):
        features = self.features(subject, inputs)
        unused = "none, but they require gradients" if features.requires_grad else "none"
        return {
            "count": sum(inputs["backbone"].sizes),
            "graph": unused if features.grad_fn is None else "kept",
            "inference": features.is_inference(),
        }

    def facts(self, raw, inputs):
        return _went_through(raw) | {
            "the graph behind the features": raw["graph"],
            "the features are inference tensors, which no later training accepts": "yes" if raw["inference"] else "no",
        }


@exercise.experiment("in batches")
class InBatches(_Plain):
    def measure(self, subject, inputs):
        sizes, largest = inputs["backbone"].sizes, []
        for batch_size in (inputs["batch_size"], 1):
            sizes.clear()
            self.features(subject, inputs | {"batch_size": batch_size})
            largest.append(max(sizes, default=0))
        return {"largest": largest}

    def facts(self, raw, inputs):
        largest, single = raw["largest"]
        if 0 in raw["largest"]:
            size = "none"
        elif largest == single == len(inputs["images"]):
            size = "all images at once"
        else:
            size = "at most batch_size" if largest <= inputs["batch_size"] and single == 1 else "more than batch_size"
        return {"the largest batch that the backbone saw": size}


def _equal(features: Tensor, expected: Tensor) -> str:
    return "equal" if near(features, expected) else "differ"


def _went_through(raw: dict) -> dict[str, str]:
    return {"the images went through the backbone": "yes" if raw["count"] else "no"}


@exercise.misconception("train mode during extraction")
def train_mode_during_extraction(backbone, images, batch_size):
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@exercise.misconception("requires_grad=False in place of eval mode")
def requires_grad_in_place_of_eval_mode(backbone, images, batch_size):
    backbone.requires_grad_(False)
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@exercise.misconception("graph kept")
def graph_kept(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    features = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    for module, mode in modes.items():
        module.training = mode
    return features


@exercise.misconception("left in eval mode")
def left_in_eval_mode(backbone, images, batch_size):
    backbone.eval()
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@exercise.misconception("put back with train()")
def put_back_with_train(backbone, images, batch_size):
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    backbone.train()
    return features


@exercise.misconception("last batch dropped")
def last_batch_dropped(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch) for batch in images.split(batch_size) if len(batch) == batch_size])
    for module, mode in modes.items():
        module.training = mode
    return features


@exercise.misconception("everything at once")
def everything_at_once(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        features = backbone(images)
    for module, mode in modes.items():
        module.training = mode
    return features
