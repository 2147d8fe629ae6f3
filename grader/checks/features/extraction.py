"""Exercise 2.2: run a backbone over images, and leave no trace."""

import torch
from torch import Tensor, nn

from grader.checks.features.counting import SharedList
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
from helpers.features import extract

exercise = Exercise(__name__, "2.2", extract, autocast=True)


def _backbone(trial: Trial, width: int) -> nn.Sequential:
    """A small network with BatchNorm and dropout, in train mode, whose statistics are not those of a fresh layer."""
    norms = nn.BatchNorm2d(6), nn.BatchNorm2d(width)
    for norm in norms:
        norm.running_mean.copy_(trial.normal(norm.num_features))
        norm.running_var.copy_(0.5 + trial.normal(norm.num_features).square())
        norm.num_batches_tracked.fill_(trial.integer(5, 50))
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), norms[0], nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(6, width, 3, stride=2), norms[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
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
        images, others = trial.normal(5, 1, 8, 8), 3 + 2 * trial.normal(2, 7, 1, 8, 8)
        return {"backbone": _backbone(trial, width), "width": width, "images": images, "others": others}

    def measure(self, subject, inputs):
        n, width = len(inputs["images"]), inputs["width"]
        features = [
            expect_tensor(subject(inputs["backbone"], torch.cat([inputs["images"], others]), 6), (n + 7, width), "the features")
            for others in inputs["others"]
        ]
        return {"first": features[0].detach()[:n], "second": features[1].detach()[:n]}

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


@exercise.experiment("every image once")
class EveryImageOnce(Experiment):
    def draw(self, trial: Trial) -> dict:
        width, batch_size = trial.integer(4, 8), trial.integer(4, 7)
        n = 3 * batch_size + trial.integer(1, batch_size - 1)  # the last batch is short
        return {
            "backbone": _plain_backbone(width),
            "images": trial.normal(n, 1, 6, 6),
            "batch_size": batch_size,
            "width": width,
        }

    def measure(self, subject, inputs):
        features = subject(inputs["backbone"], inputs["images"], inputs["batch_size"])
        return {"features": expect_tensor(features, ("n", inputs["width"]), "the features").detach()}

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = inputs["backbone"](inputs["images"])
        n, batch_size = len(wanted), inputs["batch_size"]
        rows = {n: "one per image", n - n % batch_size: "none for the last, short batch"}.get(
            len(raw["features"]), "another number"
        )
        order = _equal(raw["features"], wanted[: len(raw["features"])]) if len(raw["features"]) <= n else "differ"
        return {"rows": rows, "rows compared with the images in their order": order}


@exercise.experiment("left as found")
class LeftAsFound(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        backbone = _Counting(_backbone(trial, width=6))
        backbone.inner[5].eval()  # one BatchNorm is in eval mode, as a frozen one would be
        backbone.inner[0].requires_grad_(False)  # and one convolution is frozen
        return {"backbone": backbone, "images": trial.normal(12, 1, 8, 8)}

    def measure(self, subject, inputs):
        backbone = inputs["backbone"]
        expect_tensor(subject(backbone, inputs["images"], 4), ("n", 6), "the features")
        return {
            "seen": sum(backbone.sizes),
            "state": {name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()},
            "trainable": {name: parameter.requires_grad for name, parameter in backbone.named_parameters()},
            "modes": {name: module.training for name, module in backbone.named_modules()},
        }

    def facts(self, raw, inputs):
        before = inputs["backbone"]
        moved = {name for name, tensor in before.state_dict().items() if not _same(raw["state"].get(name), tensor)}
        parameters = dict(before.named_parameters())
        flipped = _changed(parameters, raw["trainable"], lambda parameter: parameter.requires_grad)
        switched = _changed(dict(before.named_modules()), raw["modes"], lambda module: module.training)
        return {
            "the images went through the backbone": "yes" if raw["seen"] else "no",
            "buffers that moved": _some(moved - parameters.keys()),
            "parameters that moved": _some(moved & parameters.keys()),
            "parameters whose requires_grad changed": _some(flipped),
            "modules switched to eval mode": _some([name for name in switched if raw["modes"].get(name) is False]),
            "modules switched to train mode": _some([name for name in switched if raw["modes"].get(name) is True]),
        }

    def notes(self, raw, inputs):
        before = inputs["backbone"]
        buffers = dict(before.named_buffers())
        moved = [name.removeprefix("inner.") for name in buffers if not _same(raw["state"].get(name), buffers[name])]
        return {"buffers that moved": f"{len(moved)} of {len(buffers)}, such as {moved[0]}"} if moved else {}


@exercise.experiment("no graph")
class NoGraph(Experiment):
    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 8)
        return {"backbone": _Counting(_plain_backbone(width)), "images": trial.normal(9, 1, 6, 6), "width": width}

    def measure(self, subject, inputs):
        features = expect_tensor(subject(inputs["backbone"], inputs["images"], 4), ("n", inputs["width"]), "the features")
        graph = (
            "kept" if features.grad_fn is not None else "none, but they require gradients" if features.requires_grad else "none"
        )
        return {"graph": graph, "inference": features.is_inference(), "seen": sum(inputs["backbone"].sizes)}

    def facts(self, raw, inputs):
        return {
            "the images went through the backbone": "yes" if raw["seen"] else "no",
            "the graph behind the features": raw["graph"],
            "the features are inference tensors, which no later training accepts": "yes" if raw["inference"] else "no",
        }


@exercise.experiment("in batches")
class InBatches(Experiment):
    def draw(self, trial: Trial) -> dict:
        batch_size = trial.integer(3, 6)
        settings = [(1, trial.integer(4, 6)), (batch_size, 4 * batch_size + trial.integer(0, 2))]
        return {
            "backbones": [_Counting(_plain_backbone(width=4)) for _ in settings],
            "images": [trial.normal(n, 1, 6, 6) for _, n in settings],
            "batch_sizes": [size for size, _ in settings],
        }

    def measure(self, subject, inputs):
        for backbone, images, batch_size in zip(*inputs.values(), strict=True):
            expect_tensor(subject(backbone, images, batch_size), ("n", 4), "the features")
        return {"largest": [max(backbone.sizes, default=0) for backbone in inputs["backbones"]]}

    def facts(self, raw, inputs):
        largest = raw["largest"]
        if 0 in largest:
            return {"the largest batch that the backbone saw": "none"}
        if largest == [len(images) for images in inputs["images"]]:
            return {"the largest batch that the backbone saw": "all images at once"}
        fits = all(seen <= size for seen, size in zip(largest, inputs["batch_sizes"], strict=True))
        return {"the largest batch that the backbone saw": "at most batch_size" if fits else "more than batch_size"}


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
        full = len(images) // batch_size
        features = torch.cat([backbone(images[i * batch_size : (i + 1) * batch_size]) for i in range(full)])
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


def _equal(one: Tensor, other: Tensor) -> str:
    return "equal" if near(one, other) else "differ"


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _changed(before: dict, after: dict, read) -> list[str]:
    """The names under which `read` gives another value than before, or nothing any more."""
    return [name for name, thing in before.items() if after.get(name) != read(thing)]


def _some(found) -> str:
    return "some" if found else "none"
