"""Exercise 2.7: the mean of hidden states over a text's own tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near, which
from helpers.text import mean_pool

exercise = Exercise(__name__, "2.7", mean_pool)


class _Pooling(Experiment):
    """Draws hidden states of texts of different lengths, at least one of them shorter by several tokens."""

    def draw(self, trial: Trial) -> dict:
        n, tokens, width = trial.integer(4, 6), trial.integer(8, 10), trial.integer(12, 15)
        lengths = torch.tensor([tokens, 2, 4, *(trial.integer(3, tokens - 2) for _ in range(n - 3))])[trial.permutation(n)]
        return {"hidden": trial.normal(n, tokens, width), "mask": (torch.arange(tokens) < lengths[:, None]).long()}

    def measure(self, subject, inputs):
        return {"pooled": self.pool(subject, inputs["hidden"], inputs["mask"])}

    def pool(self, subject, hidden: Tensor, mask: Tensor) -> Tensor:
        n, _, width = hidden.shape
        return expect_tensor(subject(hidden, mask), (n, width), "the pooled vectors").detach()


@exercise.experiment("own tokens alike")
class OwnTokensAlike(_Pooling):
    points = 2

    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        return inputs | {"hidden": inputs["hidden"] + 2 * trial.normal(inputs["hidden"].shape[2])}  # the mean is not near zero

    def facts(self, raw, inputs):
        hidden, mask = inputs["hidden"], inputs["mask"].bool()[..., None]
        directions = {
            "the mean over the text's own tokens": (hidden * mask).sum(1),
            "the mean over all places, padding included": hidden.sum(1),
            "the first token": hidden[:, 0],
            "the largest value of each column": hidden.masked_fill(~mask, -torch.inf).amax(1),
            "the largest value of each column, padding included": hidden.amax(1),
        }
        known = {name: F.normalize(rows.double()) for name, rows in directions.items()}
        return {"the result points along": which(F.normalize(raw["pooled"].double()), known)}


@exercise.experiment("divided by own length")
class DividedByOwnLength(_Pooling):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        n, tokens, width = inputs["hidden"].shape
        return inputs | {"hidden": (trial.normal(n, 1, width) + 0.5).expand(n, tokens, width).clone()}

    def facts(self, raw, inputs):
        mask = inputs["mask"].double()
        own, vector = mask.sum(1), inputs["hidden"][:, 0].double()
        factors = {
            "1": torch.ones_like(own),
            "the text's number of tokens": own,
            "the number of all places": torch.full_like(own, mask.shape[1]),
            "the part of the places that are tokens": own / mask.shape[1],
            "the text's part of all tokens of the batch": own / own.sum(),
        }
        known = {name: factor[:, None] * vector for name, factor in factors.items()}
        return {"the result is that vector times": which(raw["pooled"], known)}


@exercise.experiment("padding does not matter")
class PaddingDoesNotMatter(_Pooling):
    points = 2

    def measure(self, subject, inputs):
        hidden, padding = inputs["hidden"], inputs["mask"][..., None] == 0
        clean = self.pool(subject, hidden, inputs["mask"])
        raw = {}
        for name, value in {"a large number": 1e4, "infinity": torch.inf, "NaN": torch.nan}.items():
            pooled = self.pool(subject, hidden.masked_fill(padding, value), inputs["mask"])
            raw[f"{name} at padding"] = {"finite": pooled.isfinite(), "moved": (pooled - clean).nan_to_num(0, 0, 0)}
        return raw

    def facts(self, raw, inputs):
        effects = {}
        for name, result in raw.items():
            finite = "changes nothing" if near(result["moved"], 0) else "changes the result"
            effects[name] = finite if result["finite"].all() else "makes the result NaN or infinite"
        return effects


@exercise.experiment("text without tokens")
class TextWithoutTokens(_Pooling):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["mask"][trial.integer(0, len(inputs["mask"]) - 1)] = 0
        return inputs

    def measure(self, subject, inputs):
        empty = inputs["mask"].sum(1) == 0
        pooled = self.pool(subject, inputs["hidden"], inputs["mask"])
        row = pooled[empty.to(pooled.device)][0]
        return {"finite": row.isfinite(), "row": row.nan_to_num(0, 0, 0)}

    def facts(self, raw, inputs):
        finite = "zeros" if near(raw["row"], 0) else "other numbers"
        return {"a text without tokens gives": finite if raw["finite"].all() else "NaN or infinity"}


def _sum(hidden, mask):
    return hidden.masked_fill(mask[..., None] == 0, 0).sum(1)


def _first(hidden, mask):
    return hidden[:, 0] * mask.any(1, keepdim=True)


def _largest(hidden, mask):
    largest = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    return largest.masked_fill(~mask.any(1, keepdim=True), 0)


def solution(hidden, attention_mask, total=_sum, divisor=lambda mask: mask.sum(1, keepdim=True).clamp_min(1)):
    """A right solution, in pieces that a misconception replaces."""
    return total(hidden, attention_mask) / divisor(attention_mask)


exercise.misconceptions_of(
    solution,
    {
        "mask ignored": {"total": lambda hidden, mask: hidden.sum(1), "divisor": lambda mask: mask.shape[1]},
        "divided by the padded length": {"divisor": lambda mask: mask.shape[1]},
        "not divided": {"divisor": lambda mask: 1},
        "divided by the tokens of the batch": {"divisor": Tensor.sum},
        "first token in place of the mean": {"total": _first, "divisor": lambda mask: 1},
        "maximum in place of the mean": {"total": _largest, "divisor": lambda mask: 1},
        "padding multiplied by zero": {"total": lambda hidden, mask: (hidden * mask[..., None]).sum(1)},
        "divided by zero": {"divisor": lambda mask: mask.sum(1, keepdim=True)},
    },
)
