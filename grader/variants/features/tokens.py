"""Exercise 2.6 in other styles."""

import re
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from grader.checks.features.tokens import CHANGES, tokenized


def by_regular_expressions(vocabulary, texts, max_length, longest_first=True):
    pieces = (piece for piece in vocabulary if not re.fullmatch(r"\[[A-Z]+\]", piece))
    ranked = sorted(pieces, key=len, reverse=longest_first)
    first = re.compile("|".join(re.escape(piece) for piece in ranked if not piece.startswith("##")))
    later = re.compile("|".join(re.escape(piece[2:]) for piece in ranked if piece.startswith("##")))
    rows = []
    for text in texts:
        row = [vocabulary["[CLS]"]]
        for word in re.findall(r"\S+", text.casefold()):
            match, numbers = first.match(word), []
            while match:
                numbers.append(vocabulary[("##" if numbers else "") + match.group()])
                if match.end() == len(word):
                    break
                match = later.match(word, match.end())
            row += numbers if match else [vocabulary["[UNK]"]]
        del row[max_length - 1 :]
        rows.append(torch.tensor([*row, vocabulary["[SEP]"]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=vocabulary["[PAD]"])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}


def by_recursion(vocabulary, texts, max_length):
    def cut(rest, mark=""):
        if rest == "":
            return []
        for size in reversed(range(len(rest))):
            if (piece := mark + rest[: size + 1]) in vocabulary:
                following = cut(rest[size + 1 :], "##")
                return None if following is None else [piece] + following
        return None

    ids = []
    for text in texts:
        tokens = ["[CLS]"] + [piece for word in text.lower().split() for piece in cut(word) or ["[UNK]"]] + ["[SEP]"]
        if len(tokens) > max_length:
            tokens[max_length - 1 :] = ["[SEP]"]
        ids.append(torch.LongTensor([vocabulary.get(token) for token in tokens]))
    longest = max(row.numel() for row in ids)
    padded = [F.pad(row, (0, longest - row.numel()), value=vocabulary["[PAD]"]) for row in ids]
    masks = [F.pad(torch.ones_like(row), (0, longest - row.numel())) for row in ids]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks)}


def into_arrays(vocabulary, texts, max_length):
    table = []
    for text in texts:
        table.append([])
        for word in map(str.lower, text.split()):
            start, pieces = 0, []
            while start != len(word):
                stop = len(word)
                while stop > start and ("##" * bool(start) + word[start:stop]) not in vocabulary:
                    stop -= 1
                if stop == start:
                    pieces = ["[UNK]"]
                    break
                pieces.append("##" * bool(start) + word[start:stop])
                start = stop
            table[-1].extend(pieces)
    lengths = np.minimum([len(pieces) + 2 for pieces in table], max_length)
    ids = np.full((len(texts), lengths.max()), vocabulary["[PAD]"], dtype=np.int64)
    ids[:, 0] = vocabulary["[CLS]"]
    for row, pieces, n in zip(ids, table, lengths, strict=True):
        row[1 : n - 1] = [vocabulary[piece] for piece in pieces[: n - 2]]
        row[n - 1] = vocabulary["[SEP]"]
    mask = ids != vocabulary["[PAD]"]
    return {"attention_mask": torch.from_numpy(mask.astype(np.int64)), "input_ids": torch.from_numpy(ids)}


class Tokenizer:
    """A class with `__call__`, and a tree of letters to walk down."""

    def __call__(self, vocabulary, texts, max_length):
        trees = {"": {}, "##": {}}
        for piece, number in vocabulary.items():
            mark = "##" if piece.startswith("##") else ""
            node = trees[mark]
            for letter in piece.removeprefix(mark):
                node = node.setdefault(letter, {})
            node["number"] = number
        rows = []
        for text in texts:
            numbers = [number for word in text.lower().split() for number in self.walk(trees, word, vocabulary["[UNK]"])]
            rows.append([vocabulary["[CLS]"], *numbers][: max_length - 1] + [vocabulary["[SEP]"]])
        width = len(max(rows, key=len))
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        ids = mask + vocabulary["[PAD]"]
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row)
            mask[i, : len(row)] = 1
        return {"attention_mask": mask, "input_ids": ids}

    def walk(self, trees, word, unknown):
        numbers, position = [], 0
        while position < len(word):
            node, best = trees["##" if position else ""], None
            for depth, letter in enumerate(word[position:], 1):
                if letter not in node:
                    break
                node = node[letter]
                if "number" in node:
                    best = depth, node["number"]
            if best is None:
                return [unknown]
            position += best[0]
            numbers.append(best[1])
        return numbers


def two_too_many(vocabulary, texts, max_length):
    return by_regular_expressions(vocabulary, texts, max_length + 2)


def ones_of_that_shape(vocabulary, texts, max_length):
    ids = into_arrays(vocabulary, texts, max_length)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.full(ids.shape, 1)}


def where_there_is_a_number(vocabulary, texts, max_length):
    ids = into_arrays(vocabulary, texts, max_length)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.where(ids.eq(0), 0, 1)}


def filled_with_zeros(vocabulary, texts, max_length):
    ids = into_arrays(vocabulary, texts, max_length)["input_ids"]
    ids = ids.masked_fill(ids == vocabulary["[PAD]"], 0)
    return {"input_ids": ids, "attention_mask": torch.sign(ids)}


CORRECT = [by_regular_expressions, by_recursion, into_arrays, Tokenizer()]
REWRITTEN = {
    "[CLS] and [SEP] not counted": two_too_many,
    "mask all ones": ones_of_that_shape,
    "mask from numbers that are not 0": where_there_is_a_number,
    "padding taken to be number 0": filled_with_zeros,
    "shortest piece first": partial(by_regular_expressions, longest_first=False),
}
BROKEN = {}
COMBINED = [
    ({first, second}, partial(tokenized, **CHANGES[first], **CHANGES[second]))
    for first, second in (("[SEP] cut off", "mask all ones"), ("## forgotten", "padded with number 0"))
]

EQUIVALENT = {
    "… = [n for n in range(1, len(word) + 1) if mark … -> "
    "… = [n for n in range(0, len(word) + 1) if mark …": "an empty piece is in no vocabulary",
    "… range(1, len(word) + 1) if mark + word[:n] … -> "
    "… range(1, len(word) + 2) if mark + word[:n] …": "behind its end, a word is cut into the same pieces",
}
