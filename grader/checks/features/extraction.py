"""Exercise 2.2: run a backbone over images, and leave no trace."""

import weakref
from contextlib import suppress

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.checks.networks import with_statistics
from grader.checks.shared_list import SharedList
from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor
from grader.near import near
from helpers.features import extract
from helpers.modes import eval_mode

exercise = Exercise(__name__, "2.2", extract, core=5, autocast=True)


def _norm(channels: int, trial: Trial) -> nn.BatchNorm2d:
    return with_statistics(nn.BatchNorm2d(channels, affine=False), trial)


def _backbone(trial: Trial, width: int) -> nn.Sequential:
    """A small network with BatchNorm and dropout, in train mode, whose statistics are not those of a fresh layer.

    Its features are around 1, so that what bfloat16 rounds is small beside them.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), _norm(6, trial), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(6, width, 3, stride=2), _norm(width, trial), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def _half_frozen(trial: Trial, width: int) -> nn.Sequential:
    """One BatchNorm is in eval mode, as a frozen one would be, one convolution is frozen, and one has gradients."""
    backbone = _backbone(trial, width)
    backbone[5].eval()
    backbone[0].requires_grad_(False)
    backbone[4].weight.grad = trial.normal(*backbone[4].weight.shape)
    return backbone


def _plain_backbone(width: int) -> nn.Sequential:
    """A network that computes the same in train and in eval mode."""
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Full(RuntimeError):
    """Of a backbone that runs out of memory."""


class _Graph:
    """Lives as long as the graph that it is tied to."""


class _Watched(nn.Module):
    """A module that remembers of each call how many inputs it brought, and how many graphs of earlier calls were there."""

    def __init__(self, inner: nn.Module, raises: bool = False) -> None:
        super().__init__()
        self.inner, self.raises = inner, raises
        self.sizes, self.graphs, self.kept = SharedList(), SharedList(), SharedList()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        self.kept.append(sum(graph() is not None for graph in self.graphs))
        if self.raises:
            raise _Full("out of memory")
        outputs = self.inner(x)
        if outputs.grad_fn is not None:
            outputs.grad_fn.metadata["tied to it"] = graph = _Graph()
            self.graphs.append(weakref.ref(graph))
        return outputs


class _Plain(Experiment):
    """Draws a backbone that computes the same in both modes, and images of which the last batch is short."""

    def draw(self, trial: Trial) -> dict:
        width, batch_size = trial.integer(4, 8), trial.integer(4, 7)
        images = trial.normal(3 * batch_size + trial.integer(2, batch_size - 1), 1, 7, 6)
        return {"backbone": _Watched(_plain_backbone(width)), "images": images, "batch_size": batch_size, "width": width}

    def features(self, subject, inputs: dict) -> Tensor:
        features = subject(inputs["backbone"], inputs["images"], inputs["batch_size"])
        return expect_tensor(features, ("n", inputs["width"]), "the features")


@exercise.experiment("every image once", 1)
class EveryImageOnce(_Plain):
    def measure(self, subject, inputs):
        return {"features": self.features(subject, inputs).detach()}

    def facts(self, raw, inputs):
        with torch.no_grad():
            wanted = inputs["backbone"](inputs["images"])
        n, rows = len(wanted), len(raw["features"])
        words = {n: "one per image", n - n % inputs["batch_size"]: "none for the last, short batch"}
        order = _equal(raw["features"], wanted[:rows])
        if order == "differ" and _equal(_sorted_as(raw["features"], wanted), wanted) == "equal":
            order = "the same rows, in another order"
        return {"rows": words.get(rows, "another number"), "rows compared with the images in their order": order}


@exercise.experiment("any number of images", 1)
class AnyNumberOfImages(Experiment):
    """One image, fewer than a batch, exactly one and two, one more than two; batches of one, images that lie scattered."""

    cases = ((1, 4), (3, 4), (4, 4), (8, 4), (9, 4), (5, 1), (13, 3))  # images, batch_size

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(4, 8)
        images = {case: trial.normal(case[0], 1, 6, 8).transpose(2, 3) for case in self.cases}
        return {"backbone": _plain_backbone(width), "width": width, "images": images}

    def measure(self, subject, inputs):
        rows, reasons, last = {}, {}, None
        for (n, batch_size), images in inputs["images"].items():
            name = f"{n} in batches of {batch_size}"
            try:
                features = subject(inputs["backbone"], images, batch_size)
                rows[name] = expect_tensor(features, ("n", inputs["width"]), "the features").detach()
            except NotImplementedError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError, WrongReturn) as error:
                rows[name], reasons[name], last = torch.zeros(0), " ".join(str(error).split()), error
        if len(reasons) == len(self.cases):
            raise last  # then it is nothing of the number
        return {"rows": rows, "reasons": reasons}

    def facts(self, raw, inputs):
        came_right = []
        for (n, batch_size), images in inputs["images"].items():
            with torch.no_grad():
                wanted = inputs["backbone"](images)
            rows = raw["rows"][f"{n} in batches of {batch_size}"]
            if _equal(rows, wanted) == "equal" or _equal(_sorted_as(rows, wanted), wanted) == "equal":
                came_right.append(f"{n} in batches of {batch_size}")
        return {"numbers of images with all their rows": came_right}

    def notes(self, raw, inputs):
        name, reason = next(iter(raw["reasons"].items()), ("", ""))
        return {"numbers of images with all their rows": f"{name}: {reason[:120]}"} if name else {}


@exercise.experiment("depends on the image alone", 2)
class DependsOnTheImageAlone(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        width = trial.integer(5, 9)
        images, neighbours = trial.normal(5, 1, 8, 8), 3 + 2 * trial.normal(2, 7, 1, 8, 8)
        names = ("BatchNorm", "dropout", "a single module in train mode")
        backbones = {name: _backbone(trial, width) for name in names}
        backbones["BatchNorm"][3] = backbones["a single module in train mode"][3] = nn.Identity()
        backbones["a single module in train mode"].eval()[5].train()
        backbones["dropout"][1] = backbones["dropout"][5] = nn.Identity()
        return {"backbones": backbones, "width": width, "images": images, "neighbours": neighbours}

    def measure(self, subject, inputs):
        raw = {}
        for name, backbone in inputs["backbones"].items():
            batches = [torch.cat([inputs["images"], neighbours]) for neighbours in inputs["neighbours"]]
            rows = [expect_tensor(subject(backbone, b, 6), ("n", inputs["width"]), "the features").detach() for b in batches]
            raw[name] = torch.stack([features[:12] for features in rows]) if min(map(len, rows)) >= 12 else torch.zeros(0)
        return raw

    def facts(self, raw, inputs):
        facts, eval_mode_too = {}, True
        for name, backbone in inputs["backbones"].items():
            backbone.eval()
            with torch.no_grad():
                wanted = [backbone(torch.cat([inputs["images"], neighbours])) for neighbours in inputs["neighbours"]]
            if not len(raw[name]):  # images without rows are another experiment's
                return dict.fromkeys(self.names())
            first, second = (_sorted_as(rows, right)[:5] for rows, right in zip(raw[name], wanted, strict=True))
            facts[f"features of one image in two different batches, behind {name}"] = _equal(first, second)
            eval_mode_too &= _equal(first, wanted[0][:5]) == "equal"
        return facts | {"features compared with those of eval mode": "equal" if eval_mode_too else "differ"}

    def names(self) -> list[str]:
        layers = ("BatchNorm", "dropout", "a single module in train mode")
        facts = [f"features of one image in two different batches, behind {layer}" for layer in layers]
        return [*facts, "features compared with those of eval mode"]

    def notes(self, raw, inputs):
        far = {name: (rows[0, :5] - rows[1, :5]).abs().max().item() for name, rows in raw.items() if len(rows)}
        return {fact: f"by up to {value:.2g}" for fact, value in zip(self.names(), far.values(), strict=False)}


@exercise.experiment("in batches", 3)
class InBatches(_Plain):
    def measure(self, subject, inputs):
        sizes, largest = inputs["backbone"].sizes, []
        for batch_size in (inputs["batch_size"], 1):
            sizes.clear()
            subject(inputs["backbone"], inputs["images"], batch_size)
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


@exercise.experiment("no graph", 4)
class NoGraph(_Plain):
    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        return drawn | {"images": trial.normal(4 * drawn["batch_size"] + 2, 1, 7, 6)}

    def measure(self, subject, inputs):
        features = self.features(subject, inputs)
        unused = "none, but they require gradients" if features.requires_grad else "none"
        return {
            "count": sum(inputs["backbone"].sizes),
            "graph": unused if features.grad_fn is None else "kept",
            "kept": max(inputs["backbone"].kept, default=0),
        }

    def facts(self, raw, inputs):
        return _went_through(raw) | {
            "the graph behind the features": raw["graph"],
            # A variable may still hold the last batch's outputs.
            "graphs in memory while later batches run": "none" if raw["kept"] <= 1 else "those of earlier batches",
        }


class _HalfFrozen(_Plain):
    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        return drawn | {"backbone": _Watched(_half_frozen(trial, drawn["width"]))}

    def measure(self, subject, inputs):
        self.features(subject, inputs)
        backbone = inputs["backbone"]
        return {"count": sum(backbone.sizes), "traces": traces.of(backbone), "hooks": traces.hooks(backbone)}


@exercise.experiment("left as found", 5)
class LeftAsFound(_HalfFrozen):
    def facts(self, raw, inputs):
        kinds = ("parameters", "buffers", "flags", "gradients")
        left = traces.changes(inputs["backbone"], raw["traces"], *kinds)
        return _went_through(raw) | left | {"hooks that are left in it": "some" if raw["hooks"] else "none"}

    def notes(self, raw, inputs):
        moved = traces.changed(inputs["backbone"], raw["traces"], "buffers")
        if not moved:
            return {}
        buffers = len(list(inputs["backbone"].buffers()))
        return {"buffers that moved": f"{len(moved)} of {buffers}, such as {moved[0].removeprefix('inner.')}"}


@exercise.experiment("modes put back", 5)
class ModesPutBack(_HalfFrozen):
    def facts(self, raw, inputs):
        return traces.changes(inputs["backbone"], raw["traces"], "modes")


@exercise.experiment("after an exception", 6)
class AfterAnException(_Plain):
    def draw(self, trial: Trial) -> dict:
        drawn = super().draw(trial)
        backbones = {name: _half_frozen(trial, drawn["width"]) for name in ("raising", "working")}
        return drawn | {"backbone": _Watched(backbones["working"]), "raising": _Watched(backbones["raising"], raises=True)}

    def measure(self, subject, inputs):
        self.features(subject, inputs)
        modes = {"working": traces.of(inputs["backbone"])["modes"]}
        with suppress(_Full):
            subject(inputs["raising"], inputs["images"], inputs["batch_size"])
        return modes | {"raising": traces.of(inputs["raising"])["modes"]}

    def facts(self, raw, inputs):
        fact = "modes that changed when the backbone raised"
        if traces.changed(inputs["backbone"], {"modes": raw["working"]}, "modes"):
            return {fact: None}  # they change when nothing is raised, too
        return {fact: traces.some(traces.changed(inputs["raising"], {"modes": raw["raising"]}, "modes"))}


@exercise.experiment("later training", 7)
class LaterTraining(_Plain):
    def measure(self, subject, inputs):
        return {"inference": self.features(subject, inputs).is_inference()}

    def facts(self, raw, inputs):
        return {"the features are inference tensors, which no later training accepts": "yes" if raw["inference"] else "no"}


def _equal(features: Tensor, expected: Tensor) -> str:
    return "equal" if near(features, expected) else "differ"


def _sorted_as(rows: Tensor, wanted: Tensor) -> Tensor:
    """The rows in the order of `wanted` if they are the same rows; otherwise as they are."""
    if rows.shape != wanted.shape:
        return rows
    order = torch.cdist(wanted.double(), rows.double()).argmin(dim=1)
    return rows[order] if len(order.unique()) == len(rows) and near(rows[order], wanted) else rows


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


@exercise.misconception("parameters frozen for good")
def parameters_frozen_for_good(backbone, images, batch_size):
    for parameter in backbone.parameters():
        parameter.requires_grad = False
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@exercise.misconception("only BatchNorm in eval mode")
def only_batchnorm_in_eval_mode(backbone, images, batch_size):
    modes = [(module, module.training) for module in backbone.modules()]
    for module, _ in modes:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    try:
        with torch.no_grad():
            return torch.cat([backbone(batch) for batch in images.split(batch_size)])
    finally:
        for module, mode in modes:
            module.training = mode


@exercise.misconception("graph kept")
def graph_kept(backbone, images, batch_size):
    with eval_mode(backbone):
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@exercise.misconception("detached at the end")
def detached_at_the_end(backbone, images, batch_size):
    with eval_mode(backbone):
        return torch.cat([backbone(batch) for batch in images.split(batch_size)]).detach()


@exercise.misconception("inference tensors")
def inference_tensors(backbone, images, batch_size):
    with eval_mode(backbone), torch.inference_mode():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


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


@exercise.misconception("no finally")
def no_finally(backbone, images, batch_size):
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    for module, mode in modes:
        module.training = mode
    return features


@exercise.misconception("last batch dropped")
def last_batch_dropped(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size) if len(batch) == batch_size])


@exercise.misconception("shuffled batches")
def shuffled_batches(backbone, images, batch_size):
    loader = torch.utils.data.DataLoader(images, batch_size, shuffle=True)
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in loader])


@exercise.misconception("everything at once")
def everything_at_once(backbone, images, batch_size):
    with eval_mode(backbone), torch.no_grad():
        return backbone(images)
