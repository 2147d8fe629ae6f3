"""Exercise 2.3: the linear probe."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Subject, Trial, WrongReturn, expect_tensor, wrong_return
from grader.near import near
from helpers.features import linear_probe

exercise = Exercise(__name__, "2.3", linear_probe, core=5)


# What a head can be the optimum of. A saturated head has a small gradient for every loss: so what remains of it must be a
# small share of one example's, too.
LOSSES = {
    "cross-entropy of the logits": (F.cross_entropy, 0.1),
    "cross-entropy of the softmax of the logits": (lambda z, y: F.cross_entropy(z.softmax(1), y), 0.01),
    **{
        f"cross-entropy, labels smoothed by {share:g}": (partial(F.cross_entropy, label_smoothing=share), 0.1)
        for share in (0.05, 0.1, 0.2)
    },
}
ON_THE_WAY, PAST, ELSEWHERE = "on the way", "past the optimum", "elsewhere"  # of heads that are the optimum of none


class _Optimum(Experiment):
    """Draws features of three overlapping classes of unequal size, and looks at the gradient where training ended.

    The objective is convex, so a right answer is where its gradient vanishes, however one got there. And where it
    vanishes for another objective, that objective is named: another loss, another weight of the penalty.
    """

    seconds = 30.0

    def draw(self, trial: Trial, n: int = 40, penalty: float = 0.1) -> dict:
        counts = torch.tensor([22, 12, 6]) * n // 40
        labels = torch.arange(3).repeat_interleave(counts)[trial.permutation(n)]
        centers = F.normalize(trial.normal(3, 4), dim=1)  # the classes overlap
        return {"features": centers[labels] + trial.normal(n, 4), "labels": labels, "classes": 3, "penalty": penalty}

    def measure(self, subject, inputs):
        """Where the head is the optimum of nothing known, the subject trains again; training takes time."""
        raw = _train(subject, inputs)
        weight = _centered(raw)[0]
        if self.optimum_of(raw, inputs) is None:
            again = _centered(_train(subject, inputs))[0]
            raw["trained again"] = "equal" if (again - weight).norm() < 0.05 * weight.norm() else "different"
        if self.hardly_held(raw, inputs):
            more = _centered(_train(subject, inputs | {"penalty": 50 * inputs["penalty"]}))[0]
            raw["with more penalty"] = "shorter" if more.norm() < 0.7 * weight.norm() else "as long"
        return raw

    def optimum_of(self, raw: dict, inputs: dict) -> tuple[str, dict[str, Tensor]] | None:
        """The loss that, with some penalty on the weights, has its optimum at the head; and its gradients there."""
        x, labels = inputs["features"].double().cpu(), inputs["labels"].cpu()
        weight, bias = _centered(raw)
        start = _down(F.cross_entropy, x, labels, torch.zeros_like(weight), torch.zeros_like(bias))
        for name, (loss, share) in LOSSES.items():
            down = _down(loss, x, labels, weight, bias)
            rest = (down["weight"] - _pull(down["weight"], weight) * weight).norm()
            small = rest < 0.02 * start["weight"].norm() and rest < share * down["one example"]  # how far training must get
            if small and weight.norm() > 0.05:  # at 0, any penalty's pull is 0
                return name, down | {"start": start["bias"]}
        return None

    def find(self, raw: dict, inputs: dict) -> dict[str, str | None]:
        """The loss whose gradient vanishes at the head, and the weights of the penalties on weights and bias."""
        found, weight, bias = self.optimum_of(raw, inputs), *_centered(raw)
        if self.past_the_optimum(raw, inputs):
            return {"loss": PAST, "weights": None, "bias": None}
        if found is None:
            return {"loss": ON_THE_WAY if raw["trained again"] == "different" else ELSEWHERE, "weights": None, "bias": None}
        loss, down = found
        if "smoothed" in loss:  # by how much is not known exactly, so neither is what is left for a penalty
            return {"loss": loss.partition(" by ")[0], "weights": None, "bias": None}
        pull = self.spell(_pull(down["weight"], weight), inputs)
        return {"loss": loss, "weights": pull, "bias": self.spell_bias(down, bias, inputs)}

    def hardly_held(self, raw: dict, inputs: dict) -> bool:
        """Whether the loss's pull on the weights is far less than the penalty's should be, and not along them."""
        weight, bias = _centered(raw)
        down = _down(F.cross_entropy, inputs["features"].double().cpu(), inputs["labels"].cpu(), weight, bias)["weight"]
        pull = _pull(down, weight)
        return bool(abs(pull) < 0.15 * inputs["penalty"] and (down - pull * weight).norm() > 0.15 * down.norm())

    def past_the_optimum(self, raw: dict, inputs: dict) -> bool:
        """Whether the penalty acts, and yet hardly holds the weights, and not all alike: a decay apart from the gradient."""
        if raw.get("with more penalty") != "shorter":
            return False
        x, labels = inputs["features"].double(), inputs["labels"]
        best = linear_probe(x, labels, inputs["classes"], inputs["penalty"])
        with torch.no_grad():
            return bool(F.cross_entropy(F.linear(x, *_centered(raw)), labels) < F.cross_entropy(best(x), labels))

    def spell_bias(self, down: dict, bias: Tensor, inputs: dict) -> str:
        """What the bias feels: nothing if the loss alone has pulled it as far as it goes."""
        if near(bias, 0):
            return "there is no bias"
        if down["bias"].norm() < 0.03 * down["start"].norm():  # how far training must get, as for the weights
            return "none"
        pull = _pull(down["bias"], bias)
        if (down["bias"] - pull * bias).norm() > 0.1 * down["bias"].norm():  # likewise
            return "the bias is not where any penalty leaves it"
        return self.spell(pull, inputs)

    def spell(self, pull: float, inputs: dict) -> str:
        """The weight of a penalty / 2 * |W|^2, as a multiple of what was asked for."""
        unit, n = pull / inputs["penalty"], len(inputs["labels"])
        for name, value in {"penalty": 1, "2 x penalty": 2, "penalty / n": 1 / n, "none": 0}.items():
            if abs(unit - value) < 0.3 / n + 0.05 * value:  # training ends near the optimum, not at it
                return name
        return "another weight"


@exercise.experiment("right loss", 1)
class RightLoss(_Optimum):
    points = 2

    def facts(self, raw, inputs):
        loss = self.find(raw, inputs)["loss"]
        known = {ON_THE_WAY: None, PAST: None, ELSEWHERE: "no loss that this check knows"}
        return {"the gradient vanishes for": known.get(loss, loss)}


@exercise.experiment("right penalty", 2)
class RightPenalty(_Optimum):
    def draw(self, trial: Trial) -> dict:
        # Two sizes and two penalties: what is penalty / n by chance on one of them is not on the other.
        return {"tasks": [super(RightPenalty, self).draw(trial, *task) for task in ((40, 0.1), (80, 0.25))]}

    def measure(self, subject, inputs):
        return {"heads": [super(RightPenalty, self).measure(subject, task) for task in inputs["tasks"]]}

    def facts(self, raw, inputs):
        found = [self.find(head, task) for head, task in zip(raw["heads"], inputs["tasks"], strict=True)]
        fact, pulls = "weight of the penalty on the weights", [task["weights"] for task in found]
        if [task["loss"] for task in found] == [PAST, PAST]:
            return {fact: "not the same for all weights, and less than asked for"}
        return {fact: None if None in pulls else pulls[0] if pulls[0] == pulls[1] else "another weight"}


@exercise.experiment("free bias", 3)
class FreeBias(_Optimum):
    def facts(self, raw, inputs):
        return {"weight of the penalty on the bias": self.find(raw, inputs)["bias"]}


@exercise.experiment("until the gradient vanishes", 4)
class UntilTheGradientVanishes(_Optimum):
    """On a task with more classes, features of very different sizes, all far from 0, and little penalty."""

    on_fake_gpu = False  # hundreds of steps more

    def draw(self, trial: Trial) -> dict:
        easy = super().draw(trial)
        for _ in range(20):
            labels = torch.arange(80) % 6
            features = (trial.normal(80, 8) + 0.5 * trial.normal(6, 8)[labels]) * torch.logspace(-0.8, 0, 8)
            features = features * (240**0.5 / torch.linalg.matrix_norm(features, 2)) + 0.7
            hard = {"features": features, "labels": labels, "classes": 6, "penalty": 0.01}
            head = solution(**hard, steps=20)
            if self.left({"weight": head.weight.detach(), "bias": head.bias.detach()}, hard) > 0.02:
                break  # hard enough: so much is left after twenty steps of L-BFGS
        return {"easy": easy, "hard": hard}

    def measure(self, subject, inputs):
        return {"easy": super().measure(subject, inputs["easy"]), "hard": _train(subject, inputs["hard"])}

    def left(self, head: dict, task: dict) -> float:
        """Of the objective's gradient, beside what it is where all weights are 0."""
        x, labels = task["features"].double(), task["labels"]
        weight, bias = head["weight"].double(), head["bias"].double()
        here, start = (_down(F.cross_entropy, x, labels, factor * weight, factor * bias) for factor in (1, 0))
        here["weight"] = here["weight"] - task["penalty"] * weight
        norms = [torch.cat([down["weight"].flatten(), down["bias"]]).norm() for down in (here, start)]
        return float(norms[0] / norms[1])

    def facts(self, raw, inputs):
        found, fact = self.find(raw["easy"], inputs["easy"]), "training stops"
        if found["loss"] == ON_THE_WAY:
            return {fact: ON_THE_WAY}
        if found != {"loss": "cross-entropy of the logits", "weights": "penalty", "bias": "none"}:
            return {fact: None}  # it goes to another place
        return {fact: "at the optimum" if self.left(raw["hard"], inputs["hard"]) < 0.01 else "on the way, on a harder task"}

    def notes(self, raw, inputs):
        left = self.left(raw["hard"], inputs["hard"])
        return {"training stops": f"{left:.1%} of the gradient at the start are left, less than 1% was asked for"}


@exercise.experiment("one output per class", 5)
class OneOutputPerClass(Experiment):
    seconds = 30.0
    on_fake_gpu = False  # thousands of steps: ten seconds and more on a fake GPU

    def draw(self, trial: Trial) -> dict:
        classes = trial.integer(4, 6)
        tasks = []
        for missing in (classes - 1, 1):  # the last class, and one between others
            labels = torch.arange(24) % (classes - 1)
            labels = labels + (labels >= missing)
            tasks.append(
                {"features": trial.normal(24, 4) + labels[:, None], "labels": labels, "classes": classes, "penalty": 0.5}
            )
        return {"tasks": tasks}

    def measure(self, subject, inputs):
        heads = [_train(subject, task, "outputs") for task in inputs["tasks"]]
        return {"outputs": [len(head["bias"]) for head in heads], "biases": [head["bias"] for head in heads]}

    def facts(self, raw, inputs):
        (classes, *_), (last, between) = (task["classes"] for task in inputs["tasks"]), raw["outputs"]
        words = {classes: "one per class", classes - 1: "one per class seen in the labels"}
        return {
            "outputs of the head where the last class has no example": words.get(last, "another number"),
            "outputs of the head where another one has none": words.get(between, "another number"),
        }


def _train(subject: Subject, task: dict, classes: int | str | None = None) -> dict[str, Tensor]:
    head = subject(task["features"], task["labels"], task["classes"], task["penalty"])
    return _affine(head, task["features"], classes or task["classes"])


def _centered(raw: dict) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64; what is added to all classes alike makes no difference, and is taken off."""
    weight, bias = (raw[name].double().cpu() for name in ("weight", "bias"))
    return weight - weight.mean(0), bias - bias.mean(0)


def _down(loss, x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Minus the gradients of the loss, and the mean norm of the gradient of one example."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    logits = F.linear(x, weight, bias)
    down_weight, down_bias, down_logits = (-g for g in torch.autograd.grad(loss(logits, labels), (weight, bias, logits)))
    return {"weight": down_weight, "bias": down_bias, "one example": (down_logits.norm(dim=1) * x.norm(dim=1)).sum()}


def _pull(down: Tensor, tensor: Tensor) -> float:
    """The factor c for which c * tensor comes closest to `down`."""
    return float((down * tensor).sum() / tensor.square().sum().clamp_min(1e-30))


def _affine(head: object, features: Tensor, outputs: int | str) -> dict[str, Tensor]:
    """Weight and bias of anything that maps features to (n, outputs) in an affine way, found by calling it."""
    if not callable(head) or isinstance(head, Tensor):
        raise wrong_return("linear_probe must return an nn.Linear", head)
    parameters = head.parameters() if isinstance(head, nn.Module) else ()
    dtype = next((parameter.dtype for parameter in parameters), torch.float32)
    width = features.shape[1]
    inner = torch.linspace(-2, 2, width, device=features.device)
    with torch.no_grad():
        unit = torch.eye(width, device=features.device)
        probes = torch.cat([torch.zeros_like(unit[:1]), unit, inner[None]]).to(dtype)
        values = expect_tensor(head(probes), (width + 2, outputs), "the head's output").detach()
    weight, bias = (values[1:-1] - values[0]).T, values[0]
    # Affine to 1 %, whatever the head's dtype: another form would be off by far more.
    if values.isfinite().all() and not torch.allclose(values[-1], weight @ inner.to(dtype) + bias, rtol=1e-2, atol=1e-2):
        raise WrongReturn("the head must give logits, W f + b, got something that is not affine in the features.")
    return {"weight": weight, "bias": bias}


def solution(features, labels, classes, penalty, *, loss=F.cross_entropy, steps=300, bias=True, times=1, on_bias=0):
    """A right solution, full-batch L-BFGS, in pieces that a misconception replaces; the penalty counts `times` over."""
    head = nn.Linear(features.shape[1], classes, bias=bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def objective():
        optimizer.zero_grad()
        squares = head.weight.square().sum() + (on_bias * head.bias.square().sum() if bias else 0)
        value = loss(head(features), labels) + times * penalty / 2 * squares
        value.backward()
        return value

    optimizer.step(objective)
    return head


exercise.misconceptions_of(
    solution,
    {
        "softmax before cross-entropy": {"loss": lambda logits, labels: F.cross_entropy(logits.softmax(1), labels)},
        "labels smoothed": {"loss": partial(F.cross_entropy, label_smoothing=0.1)},
        "penalty forgotten": {"times": 0},
        "penalty not halved": {"times": 2},
        "sum in place of mean": {"loss": partial(F.cross_entropy, reduction="sum")},
        "penalty on the bias too": {"on_bias": 1},
        "no bias": {"bias": False},
        "not at the optimum": {"steps": 20},
        "hardly trained": {"steps": 1},
    },
)


@exercise.misconception("weight decay of AdamW")
def weight_decay_of_adamw(features, labels, classes, penalty):
    head = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=penalty)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head


@exercise.misconception("classes counted from the labels")
def classes_counted_from_the_labels(features, labels, classes, penalty):
    return solution(features, labels, int(labels.max()) + 1, penalty)
