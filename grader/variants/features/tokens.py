"""Exercise 2.6 in other styles."""

import re
import unicodedata
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


def _changed(*keys, **changes):
    return [partial(tokenized, **CHANGES[key]) for key in keys] + ([partial(tokenized, **changes)] if changes else [])


def _greedy(vocabulary, word, lengths=lambda rest: range(len(rest), 0, -1), known=lambda vocabulary, mark, piece: mark + piece):
    """The pieces of a word; `known` is a piece of the vocabulary or nothing."""
    pieces = []
    while word:
        mark = "##" if pieces else ""
        found = ((n, known(vocabulary, mark, word[:n])) for n in lengths(word))
        n, piece = next(((n, piece) for n, piece in found if piece in vocabulary), (0, None))
        if piece is None:
            return ["[UNK]"]
        pieces.append(piece)
        word = word[n:]
    return pieces


def _with_or_without(vocabulary, mark, piece):
    return mark + piece if mark + piece in vocabulary else piece


def _marked_at_the_beginning_too(vocabulary, mark, piece):
    return mark + piece if mark + piece in vocabulary else "##" + piece


def _longest_anywhere(vocabulary, word, mark=""):
    """The longest piece of all first, wherever it stands, then what is left of it and right of it."""
    spans = [(start, end) for start in range(len(word)) for end in range(start + 1, len(word) + 1)]
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        piece = (mark if start == 0 else "##") + word[start:end]
        if piece in vocabulary:
            left, right = _longest_anywhere(vocabulary, word[:start], mark), _longest_anywhere(vocabulary, word[end:], "##")
            return ["[UNK]"] if "[UNK]" in left + right else [*left, piece, *right]
    return ["[UNK]"] if word else []


def _unknown_letter_by_letter(vocabulary, word):
    pieces = _greedy(vocabulary, word)
    return pieces * len(word) if pieces == ["[UNK]"] else pieces


class _Neighbours:
    """Unknown words beside each other become one."""

    def __call__(self, vocabulary, texts, max_length):
        known = {**vocabulary}
        shortened = []
        for text in texts:
            words = [(word, _greedy(known, word) == ["[UNK]"]) for word in text.lower().split()]
            pairs = zip(words, [("", False), *words], strict=False)
            shortened.append(" ".join(word for (word, unknown), (_, before) in pairs if not (unknown and before)))
        return into_arrays(vocabulary, shortened, max_length)


def padded_before_the_cut(vocabulary, texts, max_length):
    whole, cut = (into_arrays(vocabulary, texts, most)["input_ids"] for most in (10**6, max_length))
    ids = F.pad(cut, (0, whole.shape[1] - cut.shape[1]), value=vocabulary["[PAD]"])
    return {"input_ids": ids, "attention_mask": (ids != vocabulary["[PAD]"]).long()}


def to_eights(vocabulary, texts, max_length):
    ids = into_arrays(vocabulary, texts, max_length)["input_ids"]
    ids = F.pad(ids, (0, -ids.shape[1] % 8), value=vocabulary["[PAD]"])
    return {"input_ids": ids, "attention_mask": ids.ne(vocabulary["[PAD]"]).long()}


def without_unknown_words_in_the_mask(vocabulary, texts, max_length):
    batch = into_arrays(vocabulary, texts, max_length)
    return batch | {"attention_mask": batch["attention_mask"] * (batch["input_ids"] != vocabulary["[UNK]"])}


def without_the_ends_in_the_mask(vocabulary, texts, max_length):
    batch = into_arrays(vocabulary, texts, max_length)
    ends = (batch["input_ids"] == vocabulary["[CLS]"]) | (batch["input_ids"] == vocabulary["[SEP]"])
    return batch | {"attention_mask": batch["attention_mask"] * ~ends}


def longest_text_first(vocabulary, texts, max_length):
    return tokenized(vocabulary, sorted(texts, key=lambda text: -len(text.split())), max_length)


def _no_longer_than_what_begins_words(vocabulary, word):
    longest = max(len(piece) for piece in vocabulary if not piece.startswith(("##", "[")))
    return _greedy(vocabulary, word, lengths=lambda rest: range(min(longest, len(rest)), 0, -1))


def _last_pieces(pieces, max_length):
    return ["[CLS]", *pieces[max(0, len(pieces) - max_length + 2) :], "[SEP]"]


def _one_too_few(pieces, max_length):
    return ["[CLS]", *pieces[: max(0, max_length - 3)], "[SEP]"]


def _without_accents(text):
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn").split()


BROKEN = {
    1: [
        *_changed("capitals kept", "split at single spaces"),
        *_changed(words=lambda text: [word for word in re.split(r"[ \t\n]+", text.lower()) if word]),
        *_changed(words=lambda text: [word[0].lower() + word[1:] for word in text.split()]),
        *_changed(words=lambda text: re.findall(r"\S+", text.lower(), re.ASCII)),
        *_changed(words=lambda text: re.sub("[A-Z]", lambda letter: letter[0].lower(), text).split()),
    ],
    2: [
        *_changed("## forgotten"),
        *_changed(cut=partial(_greedy, lengths=lambda rest: range(len(rest), 1, -1))),
        *_changed(cut=partial(_greedy, lengths=lambda rest: range(min(10, len(rest)), 0, -1))),
        *_changed(cut=partial(_greedy, known=_with_or_without)),
        *_changed(cut=_longest_anywhere),
        *_changed(cut=_no_longer_than_what_begins_words),
        *_changed(cut=partial(_greedy, known=_marked_at_the_beginning_too)),
    ],
    3: [
        *_changed("pieces beside [UNK]", "unknown words left out", "a longest piece taken back"),
        *_changed(cut=_unknown_letter_by_letter),
        _Neighbours(),
    ],
    4: [
        *_changed("[SEP] cut off", "[CLS] and [SEP] not counted", fit=_last_pieces),
        *_changed(fit=_one_too_few),
    ],
    5: [
        *_changed("mask all ones", "mask upside down", "padded with number 0", "padding before the text"),
        padded_before_the_cut,
        to_eights,
        longest_text_first,
        without_the_ends_in_the_mask,
        without_unknown_words_in_the_mask,
    ],
    6: [
        *_changed("punctuation not kept in words", words=_without_accents),
        *_changed(words=lambda text: unicodedata.normalize("NFKC", text.lower()).split()),
        *_changed(words=lambda text: re.findall(r"[a-z]+", text.lower())),
        *_changed(words=lambda text: [word.strip(".,'") for word in text.lower().replace("-", " ").replace(".", "").split()]),
    ],
}
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
