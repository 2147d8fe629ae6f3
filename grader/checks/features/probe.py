"""Exercise 2.3: the linear probe."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor, wrong_return
from grader.near import near
from helpers.features import linear_probe

exercise = Exercise(__name__, "2.3", linear_probe)


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
        head = subject(inputs["features"], inputs["labels"], inputs["classes"], inputs["penalty"])
        return _affine(head, inputs["features"], inputs["classes"])

    def find(self, raw: dict, inputs: dict) -> dict[str, str | None]:
        """The loss whose gradient vanishes at the head, and the weights of the penalties on weights and bias."""
        x, labels = inputs["features"].double(), inputs["labels"]
        weight, bias = (raw[name].double() - raw[name].double().mean(0) for name in ("weight", "bias"))
        start = _down(F.cross_entropy, x, labels, torch.zeros_like(weight), torch.zeros_like(bias))
        # A saturated head has a small gradient for every loss: so what remains must be a small share of one example's, too.
        losses = {
            "cross-entropy of the logits": (F.cross_entropy, 0.1),
            "cross-entropy of the softmax of the logits": (lambda z, y: F.cross_entropy(z.softmax(1), y), 0.01),
        }
        for name, (loss, share) in losses.items():
            down = _down(loss, x, labels, weight, bias)
            pull = _pull(down["weight"], weight)
            rest = (down["weight"] - pull * weight).norm()
            small = rest < 0.02 * start["weight"].norm() and rest < share * down["one example"]  # how far training must get
            if small and weight.norm() > 0.05:  # at 0, any penalty's pull is 0
                return {"loss": name, "weights": self.spell(pull, inputs), "bias": self.spell_bias(down, start, bias, inputs)}
        return {"loss": "no loss that this check knows, or training has not ended", "weights": None, "bias": None}

    def spell_bias(self, down: dict, start: dict, bias: Tensor, inputs: dict) -> str:
        """What the bias feels: nothing if the loss alone has pulled it as far as it goes."""
        if near(bias, 0):
            return "there is no bias"
        if down["bias"].norm() < 0.03 * start["bias"].norm():  # how far training must get, as for the weights
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


@exercise.experiment("right loss")
class RightLoss(_Optimum):
    points = 2

    def facts(self, raw, inputs):
        return {"the gradient vanishes for": self.find(raw, inputs)["loss"]}


@exercise.experiment("right penalty")
class RightPenalty(_Optimum):
    def draw(self, trial: Trial) -> dict:
        # Two sizes and two penalties: what is penalty / n by chance on one of them is not on the other.
        return {"tasks": [super(RightPenalty, self).draw(trial, *task) for task in ((40, 0.1), (80, 0.25))]}

    def measure(self, subject, inputs):
        return {"heads": [super(RightPenalty, self).measure(subject, task) for task in inputs["tasks"]]}

    def facts(self, raw, inputs):
        found = [self.find(head, task)["weights"] for head, task in zip(raw["heads"], inputs["tasks"], strict=True)]
        agreed = found[0] if found[0] == found[1] else "another weight"
        return {"weight of the penalty on the weights": None if None in found else agreed}


@exercise.experiment("free bias")
class FreeBias(_Optimum):
    def facts(self, raw, inputs):
        return {"weight of the penalty on the bias": self.find(raw, inputs)["bias"]}


@exercise.experiment("one output per class")
class OneOutputPerClass(Experiment):
    seconds = 30.0
    on_fake_gpu = False  # thousands of steps: ten seconds and more on a fake GPU

    def draw(self, trial: Trial) -> dict:
        classes = trial.integer(4, 6)
        labels = torch.arange(24) % (classes - 1)  # none of the last class
        return {"features": trial.normal(24, 4) + labels[:, None], "labels": labels, "classes": classes, "penalty": 0.5}

    def measure(self, subject, inputs):
        head = subject(inputs["features"], inputs["labels"], inputs["classes"], inputs["penalty"])
        return {"outputs": _affine(head, inputs["features"], "outputs")["weight"].shape[0]}

    def facts(self, raw, inputs):
        seen = inputs["classes"] - 1
        words = {inputs["classes"]: "one per class", seen: "one per class seen in the labels"}
        return {"outputs of the head": words.get(raw["outputs"], "another number")}


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
        "penalty forgotten": {"times": 0},
        "penalty not halved": {"times": 2},
        "sum in place of mean": {"loss": partial(F.cross_entropy, reduction="sum")},
        "penalty on the bias too": {"on_bias": 1},
        "no bias": {"bias": False},
        "not at the optimum": {"steps": 1},
    },
)


@exercise.misconception("classes counted from the labels")
def classes_counted_from_the_labels(features, labels, classes, penalty):
    return solution(features, labels, int(labels.max()) + 1, penalty)
