"""Exercise 2.7: the mean of hidden states over a text's own tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near
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
        candidates = {
            "the mean over the text's own tokens": (hidden * mask).sum(1),
            "the mean over all places, padding included": hidden.sum(1),
            "the first token": hidden[:, 0],
            "the largest value of each column": hidden.masked_fill(~mask, -torch.inf).amax(1),
            "the largest value of each column, padding included": hidden.amax(1),
        }
        pooled = F.normalize(raw["pooled"].double())
        along = (name for name, rows in candidates.items() if near(pooled, F.normalize(rows.double())))
        return {"the result points along": next(along, "something else")}


@exercise.experiment("divided by own length")
class DividedByOwnLength(_Pooling):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        n, tokens, width = inputs["hidden"].shape
        return inputs | {"hidden": (trial.normal(n, 1, width) + 0.5).expand(n, tokens, width).clone()}

    def facts(self, raw, inputs):
        mask = inputs["mask"].double()
        own, one = mask.sum(1), inputs["hidden"][:, 0].double()
        factors = {
            "1": torch.ones_like(own),
            "the text's number of tokens": own,
            "the number of all places": torch.full_like(own, mask.shape[1]),
            "the part of the places that are tokens": own / mask.shape[1],
            "the text's part of all tokens of the batch": own / own.sum(),
        }
        pooled = raw["pooled"].double()
        found = (name for name, f in factors.items() if near(pooled, f[:, None] * one))
        return {"the result is that vector times": next(found, "something else")}


@exercise.experiment("padding does not matter")
class PaddingDoesNotMatter(_Pooling):
    points = 2

    def measure(self, subject, inputs):
        hidden, padding = inputs["hidden"], inputs["mask"][..., None] == 0
        clean = self.pool(subject, hidden, inputs["mask"])
        raw = {}
        for name, value in {"large": 1e4, "infinite": torch.inf, "nan": torch.nan}.items():
            pooled = self.pool(subject, hidden.masked_fill(padding, value), inputs["mask"])
            raw |= {f"{name}: finite": pooled.isfinite(), f"{name}: moved": (pooled - clean).nan_to_num(0, 0, 0)}
        return raw

    def facts(self, raw, inputs):
        def effect(name: str) -> str:
            if not raw[f"{name}: finite"].all():
                return "makes the result NaN or infinite"
            return "changes nothing" if near(raw[f"{name}: moved"], 0) else "changes the result"

        return {
            "a large number at padding": effect("large"),
            "infinity at padding": effect("infinite"),
            "NaN at padding": effect("nan"),
        }


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


def _sum(hidden: Tensor, mask: Tensor) -> Tensor:
    """A right sum over a text's own tokens, for what is wrong elsewhere."""
    return hidden.masked_fill(mask[..., None] == 0, 0).sum(1)


@exercise.misconception("mask ignored")
def mask_ignored(hidden, attention_mask):
    return hidden.mean(1)


@exercise.misconception("divided by the padded length")
def divided_by_the_padded_length(hidden, attention_mask):
    return _sum(hidden, attention_mask) / hidden.shape[1]


@exercise.misconception("not divided")
def not_divided(hidden, attention_mask):
    return _sum(hidden, attention_mask)


@exercise.misconception("divided by the tokens of the batch")
def divided_by_the_tokens_of_the_batch(hidden, attention_mask):
    return _sum(hidden, attention_mask) / attention_mask.sum()


@exercise.misconception("first token in place of the mean")
def first_token(hidden, attention_mask):
    return hidden[:, 0] * attention_mask.any(1, keepdim=True)


@exercise.misconception("maximum in place of the mean")
def maximum(hidden, attention_mask):
    largest = hidden.masked_fill(attention_mask[..., None] == 0, -torch.inf).amax(1)
    return largest.masked_fill(~attention_mask.any(1, keepdim=True), 0)


@exercise.misconception("padding multiplied by zero")
def padding_multiplied_by_zero(hidden, attention_mask):
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


@exercise.misconception("divided by zero")
def divided_by_zero(hidden, attention_mask):
    return _sum(hidden, attention_mask) / attention_mask.sum(1, keepdim=True)
