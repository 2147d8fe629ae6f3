"""Exercise 2.8: texts to vectors that depend on their own text alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader.checks import traces
from grader.checks.shared_list import SharedList
from grader.experiment import Exercise, Experiment, Trial, expect_tensor
from grader.near import near, which
from helpers.modes import eval_mode
from helpers.text import embed, mean_pool

exercise = Exercise(__name__, "2.8", embed, core=5, autocast=True)

_CLS, _PAD, _WORDS = 0, 1, 2  # numbers of what every text begins with, of padding, which is not always 0, and of the first word
_WIDTH = 16
_CLS_NORM = 3.0  # of the hidden state of [CLS]; that of all others is 1


def _tokenizer(texts: Sequence[str]) -> dict[str, Tensor]:
    """ "w3 w5" -> [CLS] w3 w5; every word has two letters, so that the longer text is the longer string, too."""
    if isinstance(texts, str):
        raise TypeError(f"the tokenizer takes a list of texts, got {texts!r}")
    rows = [torch.tensor([_CLS, *(_WORDS + ord(word[1]) - ord("a") for word in text.split())]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD)
    return {"input_ids": ids, "attention_mask": (ids != _PAD).long()}


def _text(words: Sequence[int]) -> str:
    return " ".join(f"w{chr(ord('a') + word)}" for word in words)


class _Encoder(nn.Module):
    """Every token points along the axis of its number, [CLS] farther than the rest; what each call brings is remembered."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        norms = torch.ones(_WIDTH).index_fill(0, torch.tensor(_CLS), _CLS_NORM)
        self.axes = nn.Embedding.from_pretrained(norms.diag(), freeze=False)
        self.dropout = nn.Dropout(dropout)
        self.calls = SharedList()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = input_ids == _PAD
        if attention_mask is not None:
            padding = padding | (attention_mask == 0)  # whatever number it has
        self.calls.append((len(input_ids), int(padding.sum())))
        # Once as a module and once as a function, as in the attention of most encoders, which asks for the mode itself.
        return F.dropout(self.dropout(self.axes(input_ids)), self.dropout.p / 2, self.training)


class _Attention(nn.Module):
    """One head of attention over what the mask leaves; at padding it gives zeros, so pooling that turns no vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_WIDTH, 8), nn.Embedding(32, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids) + 0.5 * self.places.weight[: input_ids.shape[1]]
        scores = x @ x.mT / 8
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return (x + 2 * scores.softmax(-1) @ x) * (input_ids != _PAD)[..., None]


def _run(subject, encoder: nn.Module, texts: list[str], batch_size: int, width: int = _WIDTH) -> Tensor:
    return expect_tensor(subject(encoder, _tokenizer, list(texts), batch_size), (len(texts), width), "the vectors")


class _Vectors(Experiment):
    """Draws texts [CLS] + one word again and again, in an order that is neither by length nor its own inverse.

    The mean over a text's tokens lies in the plane of two axes, its word's and that of [CLS]; padding has a third.
    """

    def draw(self, trial: Trial) -> dict:
        n = trial.integer(9, 12)
        middle = (3 + trial.permutation(n - 4)).tolist()
        ranks = [1, 2, 0, n - 1, *middle]  # the place of each text among all, by length; the first four in two cycles
        lengths = [1, 2, 3, *(4 + i // 2 * 2 for i in range(n - 4)), 70]  # by rank: the middle ones in pairs
        words = trial.permutation(_WIDTH - _WORDS).tolist()
        words[4] = words[3]  # and one pair is the same text twice
        return {
            "words": [words[rank] for rank in ranks],
            "lengths": [lengths[rank] for rank in ranks],
            "texts": [_text([words[rank]] * lengths[rank]) for rank in ranks],
            "batch_size": trial.integer(4, 5),
        }

    def measure(self, subject, inputs):
        return {"vectors": _run(subject, _Encoder(), inputs["texts"], inputs["batch_size"]).detach()}


@exercise.experiment("row per text", 1)
class RowPerText(_Vectors):
    points = 2

    def facts(self, raw, inputs):
        share, words = raw["vectors"][:, _WORDS:].max(1)
        if near(share.min(), 0):
            return {"row i is the vector of": None}
        words, wanted, lengths = words.tolist(), inputs["words"], inputs["lengths"]
        rising = sorted(range(len(wanted)), key=lengths.__getitem__)
        falling = sorted(range(len(wanted)), key=lengths.__getitem__, reverse=True)
        answers = {"text i": [wanted]}
        for order in (rising, falling, rising[::-1], falling[::-1]):  # with either order of equal lengths
            answers.setdefault("text order[i], order being that of the lengths", []).append([wanted[i] for i in order])
            answers.setdefault("text order[order[i]]", []).append([wanted[order[i]] for i in order])
        return {"row i is the vector of": next((name for name, rows in answers.items() if words in rows), "another text")}


@exercise.experiment("mean of own tokens", 1)
class MeanOfOwnTokens(_Vectors):
    def draw(self, trial: Trial) -> dict:
        return super().draw(trial) | {"alone": (trial.permutation(_WIDTH - _WORDS)[:4]).tolist()}  # a text of four words

    def measure(self, subject, inputs):
        alone = _run(subject, _Encoder(), [_text(inputs["alone"])], inputs["batch_size"]).detach()[0]
        return super().measure(subject, inputs) | {"alone": alone}

    def facts(self, raw, inputs):
        vectors = F.normalize(raw["vectors"].double(), dim=1)
        *_, before, last = (raw["alone"][_WORDS + word].item() for word in inputs["alone"])
        return {
            "padding in the mean": "none" if near(vectors[:, _PAD], 0) else "some",
            "the tokens of a text in the mean": self.counted(vectors, torch.tensor(inputs["lengths"]).double()),
            "the last of them counts": "as the one before it" if near(last, before) else "more" if last > before else "less",
        }

    def counted(self, vectors: Tensor, lengths: Tensor) -> str:
        if near(vectors[:, _CLS], 1):
            return "the first alone"
        if near(vectors[:, _CLS], 0):
            return "all but the first"
        words = vectors[:, _WORDS:].amax(1) / vectors[:, _CLS].clamp_min(1e-9)
        # Which text a row belongs to is another experiment's question: sorted, the numbers of words must agree.
        words = words.sort().values / lengths.sort().values
        return which(words, {"all alike": 1 / _CLS_NORM, "all, each as a unit vector": 1.0}, "not all alike")


@exercise.experiment("length one", 2)
class LengthOne(_Vectors):
    def facts(self, raw, inputs):
        rows, columns = raw["vectors"].norm(dim=1), raw["vectors"].norm(dim=0)
        lengths = torch.tensor(inputs["lengths"])
        means = (_CLS_NORM**2 + lengths**2).sqrt() / (1 + lengths)
        if near(rows, 1):
            return {"unit vectors are": "the rows"}
        if near(columns, columns > 0.5):  # or all zeros, where no text has a part
            return {"unit vectors are": "the columns"}
        return {
            "unit vectors are": "no rows: they are the means" if near(rows.sort().values, means.sort().values) else "no rows"
        }

    def notes(self, raw, inputs):
        rows = raw["vectors"].norm(dim=1)
        return {"unit vectors are": f"the norms of the rows are from {rows.min().item():.2g} to {rows.max().item():.2g}"}


@exercise.experiment("any company", 3)
class AnyCompany(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        lengths = [2, 4, 9, 14]
        texts = [_text([trial.integer(0, _WIDTH - _WORDS - 1) for _ in range(n)]) for n in lengths]
        return {"encoder": _Attention(), "texts": [texts[i] for i in trial.permutation(len(texts)).tolist()]}

    def measure(self, subject, inputs):
        encoder, texts = inputs["encoder"], inputs["texts"]
        alone = [_run(subject, encoder, [text], 8, width=8) for text in texts]
        return {"alone": torch.cat(alone).detach(), "together": _run(subject, encoder, texts, 8, width=8).detach()}

    def facts(self, raw, inputs):
        # Rows in another order, or of another length, are other experiments' questions.
        points = "where it does alone" if near(_distances(raw).min(1).values, 0) else "elsewhere"
        batch = _tokenizer(inputs["texts"])
        with torch.no_grad():
            seen = raw | {"alone": mean_pool(inputs["encoder"](batch["input_ids"]), batch["attention_mask"])}
        if points == "elsewhere" and near(_distances(seen).min(1).values, 0):
            points = "where it does if its tokens look at padding"
        return {"the vector of a text among longer ones points": points}

    def notes(self, raw, inputs):
        away = _distances(raw).min(1).values.max().item()
        return {"the vector of a text among longer ones points": f"as unit vectors, they are up to {away:.2g} apart"}


@exercise.experiment("no dropout", 3)
class NoDropout(Experiment):
    def draw(self, trial: Trial) -> dict:
        texts = [_text(trial.permutation(_WIDTH - _WORDS).tolist())]
        return {"with dropout": _Encoder(dropout=0.5), "without": _Encoder(), "texts": texts}

    def measure(self, subject, inputs):
        encoders = [inputs["with dropout"], inputs["with dropout"], inputs["without"]]
        return {"vectors": torch.cat([_run(subject, encoder, inputs["texts"], 4) for encoder in encoders]).detach()}

    def facts(self, raw, inputs):
        first, second, without = F.normalize(raw["vectors"].double(), dim=1)
        return {
            "a text that is embedded twice has": "one vector" if near(first, second) else "two vectors",
            "its vector points": "where it does without dropout" if near(first, without) else "elsewhere",
        }


@exercise.experiment("in batches", 4)
class InBatches(Experiment):
    def draw(self, trial: Trial) -> dict:
        batch_size = trial.integer(3, 5)
        settings = [(1, trial.integer(4, 6)), (batch_size, 3 * batch_size + trial.integer(1, 2))]
        return {
            "texts": [[_text([i] * (1 + i)) for i in trial.permutation(14)[:n].tolist()] for _, n in settings],
            "batch_sizes": [size for size, _ in settings],
        }

    def measure(self, subject, inputs):
        largest = []
        for texts, batch_size in zip(inputs["texts"], inputs["batch_sizes"], strict=True):
            encoder = _Encoder()
            _run(subject, encoder, texts, batch_size)
            largest.append(max((n for n, _ in encoder.calls), default=0))
        return {"largest": largest}

    def facts(self, raw, inputs):
        largest = raw["largest"]
        fits = all(n <= size for n, size in zip(largest, inputs["batch_sizes"], strict=True))
        words = "at most batch_size" if fits else "more than batch_size"
        words = "all texts at once" if largest == [len(texts) for texts in inputs["texts"]] else words
        return {"the most texts in the encoder at once": "none" if 0 in largest else words}


@exercise.experiment("little padding", 5)
class LittlePadding(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        batch_size = trial.integer(3, 5)
        n = 2 * batch_size  # short texts, and as many long ones
        short, long = ([low + trial.integer(0, 2) for _ in range(n)] for low in (2, 15))
        long[trial.integer(0, n - 1)] = 25
        lengths = [length for pair in zip(short, long, strict=True) for length in pair]
        return {
            "texts": [_text([trial.integer(0, 9) for _ in range(length)]) for length in lengths],
            "lengths": torch.tensor(lengths),
            "batch_size": batch_size,
        }

    def measure(self, subject, inputs):
        encoder = _Encoder()
        _run(subject, encoder, inputs["texts"], inputs["batch_size"])
        padding, calls = sum(padding for _, padding in encoder.calls), list(encoder.calls)
        return {"batches": calls, "padding": padding, "most": max((n for n, _ in calls), default=0)}

    def facts(self, raw, inputs):
        lengths, size = inputs["lengths"], inputs["batch_size"]
        rising = lengths.sort().values
        least = max(_padding(rising, size), _padding(rising.flip(0), size))  # the short batch may be the first or the last
        if raw["most"] > size:
            return {"padding in the encoder": None}  # larger batches need more; how large they are is asked above
        more = "more than sorting by length leaves"
        if raw["batches"] == [(len(part), _padding(part, size)) for part in lengths.split(size)]:
            more = "as much as in the order of the texts"
        elif raw["padding"] == _padding(rising, len(rising)):
            more = "every text up to the longest of all"
        words = more if raw["padding"] > least else "no more than sorting by length leaves"
        return {"padding in the encoder": words if raw["batches"] else "no text was in the encoder"}

    def notes(self, raw, inputs):
        least = _padding(inputs["lengths"].sort().values, inputs["batch_size"])
        return {"padding in the encoder": f"{raw['padding']} places, where {least} are enough"}


@exercise.experiment("left as found", 7)
class LeftAsFound(Experiment):
    def draw(self, trial: Trial) -> dict:
        encoder = _Encoder(dropout=0.3)
        encoder.axes.eval()  # one module is in eval mode, as a frozen one would be, and the rest are not
        return {"encoder": encoder, "texts": [_text([i] * (i + 1)) for i in trial.permutation(7).tolist()]}

    def measure(self, subject, inputs):
        encoder, texts = inputs["encoder"], list(inputs["texts"])
        expect_tensor(subject(encoder, _tokenizer, texts, 3), (len(texts), _WIDTH), "the vectors")
        left = {"traces": traces.of(encoder), "hooks": traces.hooks(encoder), "p": encoder.dropout.p}
        return left | {"calls": len(encoder.calls), "texts": texts}

    def facts(self, raw, inputs):
        return {
            "the texts went through the encoder": "yes" if raw["calls"] else "no",
            **traces.changes(inputs["encoder"], raw["traces"], "modes", "parameters", "flags"),
            "hooks that are left": traces.some(range(raw["hooks"])),
            "the probability of dropout": "as it was" if raw["p"] == inputs["encoder"].dropout.p else "changed",
            "the list of texts": "as it was" if raw["texts"] == inputs["texts"] else "changed",
        }


@exercise.experiment("no graph", 6)
class NoGraph(Experiment):
    def draw(self, trial: Trial) -> dict:
        return {"encoder": _Encoder(), "texts": [_text([i] * (i + 1)) for i in trial.permutation(7).tolist()]}

    def measure(self, subject, inputs):
        vectors = _run(subject, inputs["encoder"], inputs["texts"], 3)
        graph = "kept" if vectors.grad_fn is not None else "none"
        graph = "none, but they require gradients" if vectors.requires_grad and vectors.is_leaf else graph
        return {"graph": graph, "inference": vectors.is_inference(), "calls": len(inputs["encoder"].calls)}

    def facts(self, raw, inputs):
        return {
            "the texts went through the encoder": "yes" if raw["calls"] else "no",
            "the graph behind the vectors": raw["graph"],
            "the vectors are inference tensors, which no later training accepts": "yes" if raw["inference"] else "no",
        }


def _padding(lengths: Tensor, batch_size: int) -> int:
    """How many places are padding, in batches of texts in that order."""
    return sum(int((part.max() - part).sum()) for part in lengths.split(batch_size))


def _distances(raw: dict[str, Tensor]) -> Tensor:
    """Between each text's vector alone and every vector of the batch, all as unit vectors."""
    return torch.cdist(F.normalize(raw["alone"].double(), dim=1), F.normalize(raw["together"].double(), dim=1))


def _by_length(texts: Sequence[str]) -> list[int]:
    return sorted(range(len(texts)), key=lambda i: len(texts[i].split()))


def _mean(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return mean_pool(encoder(ids, mask), mask)


@contextmanager
def _quiet(encoder: nn.Module) -> Iterator[None]:
    with eval_mode(encoder), torch.no_grad():
        yield


@contextmanager
def _switched(encoder: nn.Module, back: bool = False) -> Iterator[None]:
    encoder.eval()
    with torch.no_grad():
        yield
    encoder.train(back)


def embedded(
    encoder, tokenizer, texts, batch_size, *, order=_by_length, mean=_mean, inside=_quiet, back=torch.argsort, scale=F.normalize
):
    """A right solution: the order of the texts, the mean of a batch, the encoder's state, the way back, the scale."""
    order, rows = torch.tensor(order(texts)), []
    with inside(encoder):
        for part in order.split(batch_size):
            batch = tokenizer([texts[i] for i in part])
            rows.append(mean(encoder, batch["input_ids"], batch["attention_mask"]))
    return scale(torch.cat(rows)[back(order)])


CHANGES = {
    "order not put back": {"back": lambda order: slice(None)},
    "put back with the wrong permutation": {"back": lambda order: order},
    "mask not given to the encoder": {"mean": lambda encoder, ids, mask: mean_pool(encoder(ids), mask)},
    "padding pooled": {"mean": lambda encoder, ids, mask: encoder(ids, mask).mean(1)},
    "batches in the order of the texts": {"order": lambda texts: range(len(texts))},
    "normalised over the texts": {"scale": partial(F.normalize, dim=0)},
    "not normalised": {"scale": nn.Identity()},
    "train mode while embedding": {"inside": lambda encoder: torch.no_grad()},
    "left in eval mode": {"inside": _switched},
    "put back with train()": {"inside": partial(_switched, back=True)},
    "graph kept": {"inside": eval_mode},
    "first token in place of the mean": {"mean": lambda encoder, ids, mask: encoder(ids, mask)[:, 0]},
    "first token left out": {"mean": lambda encoder, ids, mask: mean_pool(encoder(ids, mask)[:, 1:], mask[:, 1:])},
    "normalised token by token": {"mean": lambda encoder, ids, mask: mean_pool(F.normalize(encoder(ids, mask), dim=2), mask)},
}
exercise.misconceptions_of(embedded, CHANGES)


@exercise.misconception("inference tensors")
@torch.inference_mode()
def inference_tensors(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, batch_size)


@exercise.misconception("everything at once")
def everything_at_once(encoder, tokenizer, texts, batch_size):
    return embedded(encoder, tokenizer, texts, len(texts))


@exercise.misconception("padded to the longest of all")
def padded_to_the_longest_of_all(encoder, tokenizer, texts, batch_size):
    everything = tokenizer(texts)

    def rows_of(part):
        places = [texts.index(text) for text in part]
        return {name: rows[places] for name, rows in everything.items()}

    return embedded(encoder, rows_of, texts, batch_size)
