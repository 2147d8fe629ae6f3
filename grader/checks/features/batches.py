"""Vocabularies to draw, and batches of tokens to read: what the checks of exercise 2.6 are made of."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grader.experiment import Trial, WrongReturn, expect_tensor, wrong_return


def blocks(trial: Trial, n: int) -> list[str]:
    """n strings of two letters; no letter stands twice, so that a word is made of blocks in one way only."""
    letters = "".join(chr(ord("a") + number) for number in trial.permutation(26).tolist())
    return [letters[2 * i : 2 * i + 2] for i in range(n)]


def numbered(trial: Trial, *pieces: str) -> dict[str, int]:
    """A vocabulary: the first piece is number 0, all others, [PAD] among them, are numbered at random."""
    rest = [*pieces[1:], "[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return {pieces[0]: 0} | dict(zip(rest, (1 + trial.permutation(len(rest))).tolist(), strict=True))


def run(subject, vocabulary: dict[str, int], texts: list[str], max_length: int) -> dict[str, Tensor]:
    batch = subject(dict(vocabulary), list(texts), max_length)
    if not isinstance(batch, Mapping):
        raise wrong_return("tokenize must return a dict of input_ids and attention_mask", batch)
    for name in ("input_ids", "attention_mask"):
        if name not in batch:
            raise WrongReturn(f"tokenize must return a dict with {name!r} in it, got the keys {sorted(map(str, batch))}.")
        expect_tensor(batch[name], (len(texts), "tokens"), name)
        if batch[name].dtype != torch.int64:
            raise WrongReturn(f"{name} must be int64, got {str(batch[name].dtype).removeprefix('torch.')}.")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"ids": ids, "mask": expect_tensor(mask, tuple(ids.shape), "attention_mask")}


def read(vocabulary: dict[str, int], row: Tensor) -> list[str]:
    pieces = {number: piece for piece, number in vocabulary.items()}
    return [pieces.get(number, "?") for number in row.tolist()]


def inside(tokens: list[str]) -> list[str]:
    """What stands between [CLS] and [SEP], or between padding if they are missing."""
    end = tokens.index("[SEP]") if "[SEP]" in tokens else len(tokens)
    return [token for token in tokens[:end] if token not in ("[CLS]", "[PAD]")]


def filled(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token != "[PAD]"]


def bare(tokens: list[str]) -> list[str]:
    return [token.removeprefix("##") for token in tokens]


def place(tokens: list[str], row: list[str]) -> int | None:
    """Where in the row the tokens begin, wherever padding stands and whatever it is."""
    starts = range(len(row) - len(tokens) + 1)
    return next((start for start in starts if row[start : start + len(tokens)] == tokens), None)
