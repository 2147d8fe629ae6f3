"""Exercise 2.7: the mean of hidden states over a text's own tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from grader.experiment import Exercise, Experiment, Subject, Trial, expect_tensor
from grader.near import near, which
from helpers.text import mean_pool

exercise = Exercise(__name__, "2.7", mean_pool, core=2)


def _pooled(subject: Subject, hidden: Tensor, mask: Tensor) -> Tensor:
    n, _, width = hidden.shape
    return expect_tensor(subject(hidden, mask), (n, width), "the pooled vectors").detach()


SIZES = {  # name -> the lengths of the texts, places, width
    "ordinary texts": ([5, 3, 4], 7, 4),
    "one text of one token": ([1], 1, 5),
    "one text of one token, and padding": ([1], 6, 3),
    "one text without padding": ([4], 4, 2),
    "texts of 1, 2 and 7 tokens": ([7, 1, 2], 7, 4),
    "as many texts as places and columns": ([3, 1, 2], 3, 3),
    "width 1": ([3, 1], 4, 1),
    "padding behind every text": ([2, 5, 1, 3], 8, 6),
    "texts with a hidden state of zeros": ([4, 2], 6, 3),
}
AT_PADDING = {"a large number": 1e4, "infinity": torch.inf, "minus infinity": -torch.inf, "NaN": torch.nan}


class _Pooling(Experiment):
    """Draws hidden states of texts of different lengths, with padding behind the longest too."""

    def draw(self, trial: Trial) -> dict:
        n, tokens, width = trial.integer(4, 6), trial.integer(8, 10), trial.integer(12, 15)
        lengths = torch.tensor([tokens - 1, 3, 4, *(trial.integer(3, tokens - 2) for _ in range(n - 3))])[trial.permutation(n)]
        return {"hidden": trial.normal(n, tokens, width), "mask": (torch.arange(tokens) < lengths[:, None]).long()}

    def measure(self, subject, inputs):
        return {"pooled": _pooled(subject, inputs["hidden"], inputs["mask"])}


@exercise.experiment("own tokens alike", 1)
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
            "the mean without the first and the last token": (hidden * mask)[:, 1:].sum(1) - self.last(hidden, inputs["mask"]),
            "the largest value of each column": hidden.masked_fill(~mask, -torch.inf).amax(1),
            "the largest value of each column, padding included": hidden.amax(1),
        }
        known = {name: F.normalize(rows.double()) for name, rows in directions.items()}
        return {"the result points along": which(F.normalize(raw["pooled"].double()), known)}

    def last(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden[torch.arange(len(mask)), mask.sum(1) - 1]


@exercise.experiment("divided by own length", 1)
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
            "the square root of that number": own.sqrt(),
            "the number of all places": torch.full_like(own, mask.shape[1]),
            "the part of the places that are tokens": own / mask.shape[1],
            "the text's part of all tokens of the batch": own / own.sum(),
        }
        known = {name: factor[:, None] * vector for name, factor in factors.items()}
        return {"the result is that vector times": which(raw["pooled"], known)}


# Texts above are padded to one that has two tokens or more; what depends on sizes is seen with others.
@exercise.experiment("any size", 1)
class AnySize(Experiment):
    def draw(self, trial: Trial) -> dict:
        batches = {}
        for name, (lengths, tokens, width) in SIZES.items():
            hidden = trial.normal(tokens, len(lengths), width).transpose(0, 1)  # as encoders give it that go place by place
            if "zeros" in name:
                hidden[:, 1] = 0
            batches[name] = hidden, (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
        return {"batches": batches}

    def measure(self, subject, inputs):
        return {name: _pooled(subject, *batch) for name, batch in inputs["batches"].items()}

    def facts(self, raw, inputs):
        right = [name for name, batch in inputs["batches"].items() if near(raw[name], mean_pool(*batch))]
        # Where ordinary texts come out wrong, the experiments before this one say how; why others do, cannot be seen.
        return {"batches that are pooled right": right if "ordinary texts" in right else None}


@exercise.experiment("padding does not matter", 2)
class PaddingDoesNotMatter(_Pooling):
    points = 2

    def measure(self, subject, inputs):
        hidden, padding = inputs["hidden"], inputs["mask"][..., None] == 0
        clean = _pooled(subject, hidden, inputs["mask"])
        raw = {}
        for name, value in AT_PADDING.items():
            pooled = _pooled(subject, hidden.masked_fill(padding, value), inputs["mask"])
            raw[f"{name} at padding"] = {"finite": pooled.isfinite(), "moved": (pooled - clean).nan_to_num(0, 0, 0)}
        return raw

    def facts(self, raw, inputs):
        effects = {}
        for name, result in raw.items():
            finite = "changes nothing" if near(result["moved"], 0) else "changes the result"
            effects[name] = finite if result["finite"].all() else "makes the result NaN or infinite"
        return effects


@exercise.experiment("text without tokens", 3)
class TextWithoutTokens(_Pooling):
    def draw(self, trial: Trial) -> dict:
        inputs = super().draw(trial)
        inputs["mask"][trial.integer(0, len(inputs["mask"]) - 1)] = 0
        return inputs

    def measure(self, subject, inputs):
        empty = inputs["mask"].sum(1) == 0
        pooled = _pooled(subject, inputs["hidden"], inputs["mask"])
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


def _inner(mask):
    """The mask without a text's first and last token; a text of one or two tokens keeps them."""
    inner = mask * torch.roll(mask, -1, 1)
    inner[:, [0, -1]] = 0
    return torch.where(inner.any(1, keepdim=True), inner, mask)


def solution(hidden, attention_mask, total=_sum, divisor=lambda mask: mask.sum(1, keepdim=True).clamp_min(1)):
    """A right solution, in pieces that a misconception replaces."""
    return total(hidden, attention_mask) / divisor(attention_mask)


@exercise.misconception("special tokens left out")
def special_tokens_left_out(hidden, attention_mask):
    return solution(hidden, _inner(attention_mask))


exercise.misconceptions_of(
    solution,
    {
        "mask ignored": {"total": lambda hidden, mask: hidden.sum(1), "divisor": lambda mask: mask.shape[1]},
        "divided by the padded length": {"divisor": lambda mask: mask.shape[1]},
        "not divided": {"divisor": lambda mask: 1},
        "divided by the square root": {"divisor": lambda mask: mask.sum(1, keepdim=True).clamp_min(1).sqrt()},
        "divided by the tokens of the batch": {"divisor": Tensor.sum},
        "first token in place of the mean": {"total": _first, "divisor": lambda mask: 1},
        "maximum in place of the mean": {"total": _largest, "divisor": lambda mask: 1},
        "padding multiplied by zero": {"total": lambda hidden, mask: (hidden * mask[..., None]).sum(1)},
        "divided by zero": {"divisor": lambda mask: mask.sum(1, keepdim=True)},
    },
)
