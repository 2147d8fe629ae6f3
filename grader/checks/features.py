"""Exercises 2.1 (feature extraction) and 2.2 (the linear probe)."""

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor, misconception
from helpers import expect
from helpers.features import extract, linear_probe

# --- 2.1 extract(backbone, images, batch_size) ------------------------------------------------------------------


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


_SIZES: dict[int, "_Sizes"] = weakref.WeakValueDictionary()


class _Sizes(list):
    """A list that every copy of its owner shares, deep or pickled: a subject may work on a copy of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        _SIZES[id(self)] = self

    def __reduce__(self):
        return _sizes_with, (id(self),)


def _sizes_with(number: int) -> _Sizes:
    return _SIZES[number]


class _Counting(nn.Module):
    """A module that remembers how many inputs each call brought."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = _Sizes()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.inner(x)


class DependsOnTheImageAlone(Experiment):
    """The features of an image depend on that image alone."""

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


class EveryImageOnce(Experiment):
    """Every image gives one row of features, in the order of the images."""

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


class LeftAsFound(Experiment):
    """The backbone is left as it was found: buffers, requires_grad, and the mode of each module."""

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


class NoGraph(Experiment):
    """The features carry no graph, so that memory does not grow with the number of images."""

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


class InBatches(Experiment):
    """At most `batch_size` images are in the backbone at once."""

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


@misconception(
    "train mode during extraction",
    hint="BatchNorm and dropout behave as in training, whether gradients are computed or not. What do they go by?",
    source="seen in public teaching code: evaluation that never calls .eval(); running_mean changes under no_grad",
)
def train_mode_during_extraction(backbone, images, batch_size):
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@misconception(
    "requires_grad=False in place of eval mode",
    hint="No parameter can train any more, and yet the buffers moved. What moves a buffer, if not a gradient?",
    source="seen in public teaching code: backbone frozen with requires_grad_(False), then run in train mode",
)
def requires_grad_in_place_of_eval_mode(backbone, images, batch_size):
    backbone.requires_grad_(False)
    return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@misconception(
    "graph kept",
    hint="Every batch's activations are kept for a backward pass that never comes. What tells torch that none will?",
    source="a line of reasoning: eval mode changes what layers compute, not whether torch records it",
)
def graph_kept(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    features = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    for module, mode in modes.items():
        module.training = mode
    return features


@misconception(
    "left in eval mode",
    hint="Compare each module's mode before and after. In which mode would training go on after your function?",
    source="a line of reasoning: an evaluation in the middle of training that turns dropout off for the rest of it",
)
def left_in_eval_mode(backbone, images, batch_size):
    backbone.eval()
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])


@misconception(
    "put back with train()",
    hint="One BatchNorm was in eval mode before, the others were not. What does train() do to it?",
    source="seen in public teaching code: a freeze that the next model.train() undoes",
)
def put_back_with_train(backbone, images, batch_size):
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(batch) for batch in images.split(batch_size)])
    backbone.train()
    return features


@misconception(
    "last batch dropped",
    hint="Count the rows for 10 images in batches of 4. Where are the missing ones?",
    source="a line of reasoning: drop_last=True is right for training and wrong for extraction",
)
def last_batch_dropped(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        full = len(images) // batch_size
        features = torch.cat([backbone(images[i * batch_size : (i + 1) * batch_size]) for i in range(full)])
    for module, mode in modes.items():
        module.training = mode
    return features


@misconception(
    "everything at once",
    hint="The whole data set went through the backbone in one call. How much memory do the activations of 100,000 images take?",
    source="a line of reasoning: it works on a small set, and is out of memory on the real one",
)
def everything_at_once(backbone, images, batch_size):
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    with torch.no_grad():
        features = backbone(images)
    for module, mode in modes.items():
        module.training = mode
    return features


# --- 2.2 linear_probe(features, labels, classes, penalty) -------------------------------------------------------


class _Optimum(Experiment):
    """Draws features of three overlapping classes of unequal size, and looks at the gradient where training ended.

    The objective is convex, so a right answer is where its gradient vanishes, however one got there. And where it
    vanishes for another objective, that objective is named: another loss, another weight of the penalty.
    """

    seconds = 30.0
    penalty = 0.1
    n = 40

    def draw(self, trial: Trial) -> dict:
        return self.draw_task(trial, self.n, self.penalty)

    def draw_task(self, trial: Trial, n: int, penalty: float) -> dict:
        counts = torch.tensor([n - n * 12 // 40 - n * 6 // 40, n * 12 // 40, n * 6 // 40])
        labels = torch.arange(3).repeat_interleave(counts)[trial.permutation(n)]
        centers = F.normalize(trial.normal(3, 4), dim=1)  # the classes overlap
        return {"features": centers[labels] + trial.normal(n, 4), "labels": labels, "classes": 3, "penalty": penalty}

    def measure(self, subject, inputs):
        head = subject(inputs["features"], inputs["labels"], inputs["classes"], inputs["penalty"])
        return _affine(head, inputs["features"].shape[1], inputs["classes"])

    def find(self, raw: dict, inputs: dict) -> dict[str, str | None]:
        """The loss whose gradient vanishes at the head, and the weights of the penalties on weights and bias."""
        x, labels = inputs["features"].double(), inputs["labels"]
        weight = raw["weight"].double().sub(raw["weight"].double().mean(0))
        bias = raw["bias"].double().sub(raw["bias"].double().mean())
        # A saturated head has a small gradient for every loss: so what remains must be small beside one example's, too.
        losses = {
            "cross-entropy of the logits": (lambda logits: F.cross_entropy(logits, labels), 0.1),
            "cross-entropy of the softmax of the logits": (lambda logits: F.cross_entropy(logits.softmax(1), labels), 0.01),
        }
        cross_entropy, _ = losses["cross-entropy of the logits"]
        start = _down(cross_entropy, x, torch.zeros_like(weight), torch.zeros_like(bias))
        for name, (loss, share) in losses.items():
            down = _down(loss, x, weight, bias)
            pull = _pull(down["weight"], weight)
            rest = (down["weight"] - pull * weight).norm()
            small = rest < 0.02 * start["weight"].norm() and rest < share * down["one example"]
            if small and weight.norm() > 0.05:
                return {"loss": name, "weights": self.spell(pull, inputs), "bias": self.spell_bias(down, start, bias, inputs)}
        return {"loss": "no loss that this check knows, or training has not ended", "weights": None, "bias": None}

    def spell_bias(self, down: dict, start: dict, bias: Tensor, inputs: dict) -> str:
        """What the bias feels: nothing if the loss alone has pulled it as far as it goes."""
        if bias.norm() < 1e-6:
            return "there is no bias"
        if down["bias"].norm() < 0.03 * start["bias"].norm():
            return "none"
        pull = _pull(down["bias"], bias)
        if (down["bias"] - pull * bias).norm() > 0.1 * down["bias"].norm():
            return "the bias is not where any penalty leaves it"
        return self.spell(pull, inputs)

    def spell(self, pull: float, inputs: dict) -> str:
        """The weight of a penalty / 2 * |W|^2, as a multiple of what was asked for."""
        unit, n = pull / inputs["penalty"], len(inputs["labels"])
        for name, value in {"penalty": 1, "2 x penalty": 2, "penalty / n": 1 / n, "none": 0}.items():
            if abs(unit - value) < 0.3 / n + 0.05 * value:
                return name
        return "another weight"


class RightLoss(_Optimum):
    """Training ends where the gradient of cross-entropy plus penalty vanishes."""

    points = 2

    def facts(self, raw, inputs):
        return {"the gradient vanishes for": self.find(raw, inputs)["loss"]}


class RightPenalty(_Optimum):
    """The weights feel penalty / 2 times the sum of their squares, beside the mean loss."""

    def draw(self, trial: Trial) -> dict:
        # Two sizes and two penalties: what is penalty / n by chance on one of them is not on the other.
        return {"tasks": [self.draw_task(trial, 40, 0.1), self.draw_task(trial, 80, 0.25)]}

    def measure(self, subject, inputs):
        return {"heads": [super(RightPenalty, self).measure(subject, task) for task in inputs["tasks"]]}

    def facts(self, raw, inputs):
        found = [self.find(head, task)["weights"] for head, task in zip(raw["heads"], inputs["tasks"], strict=True)]
        agreed = found[0] if found[0] == found[1] else "another weight"
        return {"weight of the penalty on the weights": None if None in found else agreed}


class FreeBias(_Optimum):
    """The bias is trained, and feels no penalty."""

    def facts(self, raw, inputs):
        return {"weight of the penalty on the bias": self.find(raw, inputs)["bias"]}


class OneOutputPerClass(Experiment):
    """The head has one output per class, also for a class that has no labelled example."""

    seconds = 30.0

    def draw(self, trial: Trial) -> dict:
        classes = trial.integer(4, 6)
        labels = torch.arange(24) % (classes - 1)  # none of the last class
        return {"features": trial.normal(24, 4) + labels[:, None], "labels": labels, "classes": classes, "penalty": 0.5}

    def measure(self, subject, inputs):
        head = subject(inputs["features"], inputs["labels"], inputs["classes"], inputs["penalty"])
        return {"outputs": _affine(head, 4, "outputs")["weight"].shape[0]}

    def facts(self, raw, inputs):
        seen = inputs["classes"] - 1
        words = {inputs["classes"]: "one per class", seen: "one per class seen in the labels"}
        return {"outputs of the head": words.get(raw["outputs"], "another number")}


def _down(loss, x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Minus the gradients of the loss, and the mean norm of the gradient of one example."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    logits = F.linear(x, weight, bias)
    down_weight, down_bias, down_logits = (-g for g in torch.autograd.grad(loss(logits), (weight, bias, logits)))
    return {"weight": down_weight, "bias": down_bias, "one example": (down_logits.norm(dim=1) * x.norm(dim=1)).sum()}


def _pull(down: Tensor, tensor: Tensor) -> float:
    """The factor c for which c * tensor comes closest to `down`."""
    return float((down * tensor).sum() / tensor.square().sum().clamp_min(1e-30))


def _affine(head: object, width: int, outputs: int | str) -> dict[str, Tensor]:
    """Weight and bias of anything that maps (n, width) to (n, outputs) in an affine way, found by calling it."""
    if not callable(head) or isinstance(head, Tensor):
        raise WrongReturn(f"linear_probe must return an nn.Linear, got {expect.describe(head)}.")
    parameter = next(head.parameters(), None) if isinstance(head, nn.Module) else None
    dtype = torch.float32 if parameter is None else parameter.dtype
    inner = torch.linspace(-2, 2, width)
    with torch.no_grad():
        probes = torch.stack([torch.zeros(width), *torch.eye(width), inner]).to(dtype)
        values = expect_tensor(head(probes), (width + 2, outputs), "the head's output").detach()
    weight, bias = (values[1:-1] - values[0]).T, values[0]
    if values.isfinite().all() and not torch.allclose(values[-1], weight @ inner.to(dtype) + bias, rtol=1e-2, atol=1e-2):
        raise WrongReturn("the head must give logits, W f + b, got something that is not affine in the features.")
    return {"weight": weight, "bias": bias}


def _train_probe(features, labels, classes, penalty, *, loss, steps=300, bias=True, squares=None) -> nn.Linear:
    """Full-batch L-BFGS for the misconceptions below; they differ in the loss and in what is penalised."""
    head = nn.Linear(features.shape[1], classes, bias=bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-12)
    squares = squares or (lambda head: head.weight.square().sum() / 2)

    def objective():
        optimizer.zero_grad()
        value = loss(head(features), labels) + penalty * squares(head)
        value.backward()
        return value

    optimizer.step(objective)
    return head


@misconception(
    "softmax before cross-entropy",
    hint="Softmax is applied twice, once before the loss and once inside it. Between which two values can its input then move?",
    source="seen in public teaching code: softmax before cross-entropy",
)
def softmax_before_cross_entropy(features, labels, classes, penalty):
    return _train_probe(features, labels, classes, penalty, loss=lambda z, y: F.cross_entropy(z.softmax(1), y))


@misconception(
    "penalty forgotten",
    hint="Train with a penalty ten times as large: does your head change at all?",
    source="a line of reasoning: the argument is there and nothing uses it",
)
def penalty_forgotten(features, labels, classes, penalty):
    return _train_probe(features, labels, classes, 0.0, loss=F.cross_entropy)


@misconception(
    "penalty not halved",
    hint="The pull on the weights is twice as strong as asked for. What is the derivative of a square?",
    source="a line of reasoning: torch's weight_decay = c is the penalty c / 2 * |W|^2, not c * |W|^2",
)
def penalty_not_halved(features, labels, classes, penalty):
    return _train_probe(
        features, labels, classes, penalty, loss=F.cross_entropy, squares=lambda head: head.weight.square().sum()
    )


@misconception(
    "sum in place of mean",
    hint="With n examples the penalty acts n times weaker than asked for. Which of the two terms grows with n?",
    source="a line of reasoning: a summed loss changes what every fixed penalty and learning rate means",
)
def sum_in_place_of_mean(features, labels, classes, penalty):
    return _train_probe(features, labels, classes, penalty, loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))


@misconception(
    "penalty on the bias too",
    hint="Compare the mean predicted probability of each class with its frequency in the labels. What keeps them apart?",
    source="a line of reasoning: no weight decay on biases; an optimizer's weight_decay reaches every parameter it is given",
)
def penalty_on_the_bias_too(features, labels, classes, penalty):
    return _train_probe(
        *(features, labels, classes, penalty),
        loss=F.cross_entropy,
        squares=lambda head: (head.weight.square().sum() + head.bias.square().sum()) / 2,
    )


@misconception(
    "no bias",
    hint="What does your head say of features that are all zero, and what are the class frequencies?",
    source="a line of reasoning: without a bias every class is equally likely at the origin, wherever the data are",
)
def no_bias(features, labels, classes, penalty):
    return _train_probe(features, labels, classes, penalty, loss=F.cross_entropy, bias=False)


@misconception(
    "not at the optimum",
    hint="Print the norm of the objective's gradient at your last step and after ten times as many. Does it still fall, "
    "or has another objective than the statement's come to rest?",
    source="a line of reasoning: a fixed small number of steps makes good features look bad",
)
def not_at_the_optimum(features, labels, classes, penalty):
    return _train_probe(features, labels, classes, penalty, loss=F.cross_entropy, steps=1)


@misconception(
    "classes counted from the labels",
    hint="One class has no example among these labels. How many outputs does your head have, and how many should it?",
    source="a line of reasoning: the head's shape error; a small labelled sample easily misses a class",
)
def classes_counted_from_the_labels(features, labels, classes, penalty):
    return _train_probe(features, labels, int(labels.max()) + 1, penalty, loss=F.cross_entropy)


def _equal(one: Tensor, other: Tensor) -> str:
    return (
        "equal" if one.shape == other.shape and torch.allclose(one.to(other.dtype), other, rtol=1e-4, atol=1e-5) else "differ"
    )


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _changed(before: dict, after: dict, read) -> list[str]:
    """The names under which `read` gives another value than before, or nothing any more."""
    return [name for name, thing in before.items() if after.get(name) != read(thing)]


def _some(found) -> str:
    return "some" if found else "none"


EXERCISES = (
    Exercise(
        number="2.1",
        name="extract",
        reference=extract,
        experiments=(DependsOnTheImageAlone(), EveryImageOnce(), LeftAsFound(), NoGraph(), InBatches()),
        misconceptions=(
            *(train_mode_during_extraction, requires_grad_in_place_of_eval_mode, graph_kept, left_in_eval_mode),
            *(put_back_with_train, last_batch_dropped, everything_at_once),
        ),
        hints=(
            "Which layers of a network compute something else in training than later, and who tells them which it is?",
            "Before and after your function, look at `running_mean` of a BatchNorm, at `requires_grad` of a parameter, "
            "and at `training` of every module, when one module starts in eval mode and the rest do not.",
            "Remember every module's mode, switch all to eval mode, run batch by batch without gradients, "
            "concatenate, and give every module its own mode back, even if something raised.",
        ),
    ),
    Exercise(
        number="2.2",
        name="linear_probe",
        reference=linear_probe,
        experiments=(RightLoss(), RightPenalty(), FreeBias(), OneOutputPerClass()),
        misconceptions=(
            *(softmax_before_cross_entropy, penalty_forgotten, penalty_not_halved, sum_in_place_of_mean),
            *(penalty_on_the_bias_too, no_bias, not_at_the_optimum, classes_counted_from_the_labels),
        ),
        hints=(
            "The objective is convex: there is one best head. How would you notice that you have reached it?",
            "Print the norm of the objective's gradient as training goes on; "
            "at the end, compare the mean predicted probability of each class with its frequency in the labels.",
            "objective = mean cross-entropy of the logits + penalty / 2 * sum of squared weights, the bias left out; "
            "`torch.optim.LBFGS` with a closure, or some hundred full-batch gradient steps, bring its gradient to zero.",
        ),
    ),
)
