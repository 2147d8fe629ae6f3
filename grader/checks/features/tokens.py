"""Exercise 2.6: texts to one batch of word pieces and a mask."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grader.experiment import Exercise, Experiment, Trial, WrongReturn, expect_tensor, wrong_return
from helpers.text import tokenize

exercise = Exercise(__name__, "2.6", tokenize)


def _blocks(trial: Trial, n: int) -> list[str]:
    """n strings of two letters; no letter stands twice, so that a word is made of blocks in one way only."""
    letters = "".join(chr(ord("a") + number) for number in trial.permutation(26).tolist())
    return [letters[2 * i : 2 * i + 2] for i in range(n)]


def _numbered(trial: Trial, *pieces: str) -> dict[str, int]:
    """A vocabulary: the first piece is number 0, all others, [PAD] among them, are numbered at random."""
    others = [*pieces[1:], "[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return {pieces[0]: 0} | dict(zip(others, (1 + trial.permutation(len(others))).tolist(), strict=True))


def _run(subject, vocabulary: dict[str, int], texts: list[str], max_length: int) -> dict[str, Tensor]:
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


def _read(vocabulary: dict[str, int], row: Tensor) -> list[str]:
    pieces = {number: piece for piece, number in vocabulary.items()}
    return [pieces.get(number, "?") for number in row.tolist()]


def _inside(tokens: list[str]) -> list[str]:
    """What stands between [CLS] and [SEP], or between padding if they are missing."""
    end = tokens.index("[SEP]") if "[SEP]" in tokens else len(tokens)
    return [token for token in tokens[:end] if token not in ("[CLS]", "[PAD]")]


def _bare(tokens: list[str]) -> list[str]:
    return [token.removeprefix("##") for token in tokens]


def _place(tokens: list[str], row: list[str]) -> int | None:
    """Where in the row the tokens begin, wherever padding stands and whatever it is."""
    starts = range(len(row) - len(tokens) + 1)
    return next((start for start in starts if row[start : start + len(tokens)] == tokens), None)


class _OneText(Experiment):
    """Draws a vocabulary and texts, each of which is a batch of its own, so that there is no padding."""

    def measure(self, subject, inputs):
        runs = [_run(subject, inputs["vocabulary"], [text], 32) for text in inputs["texts"]]
        return {"rows": [run["ids"][0] for run in runs]}

    def words(self, raw: dict, inputs: dict) -> list[list[str]]:
        return [_inside(_read(inputs["vocabulary"], row)) for row in raw["rows"]]


@exercise.experiment("longest piece first")
class LongestPieceFirst(_OneText):
    points = 2

    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e, f = _blocks(trial, 6)
        pieces = [a, a + b, c, c + d, e, e + f, *(f"##{rest}" for rest in (a, b, c, d, f, a + b, c + d))]
        return {
            "vocabulary": _numbered(trial, *pieces),
            "texts": [f"{a + b + c + d} {e + f} {c + a + b}"],
            "cuts": {
                "the longest first": [a + b, f"##{c + d}", e + f, c, f"##{a + b}"],
                "the shortest first": [a, f"##{b}", f"##{c}", f"##{d}", e, f"##{f}", c, f"##{a}", f"##{b}"],
                "the longest first, but pieces inside a word without their ##": [a + b, c + d, e + f, c, a + b],
            },
        }

    def facts(self, raw, inputs):
        (words,) = self.words(raw, inputs)
        return {"pieces of words": next((name for name, cut in inputs["cuts"].items() if cut == words), "something else")}


@exercise.experiment("unknown words")
class UnknownWords(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e, (unknown, _) = _blocks(trial, 6)
        return {
            "vocabulary": _numbered(trial, e, a, d, a + b, f"##{b + c}", f"##{e}"),
            "texts": [f"{e} {word} {e}" for word in (d + unknown + e, d + unknown, unknown, a + b + c)],
            "known": e,
        }

    def facts(self, raw, inputs):
        kinds = [self.kind(words, inputs["known"]) for words in self.words(raw, inputs)]
        return {
            "a known piece before letters that no piece has": kinds[0] if kinds[0] == kinds[1] else "something else",
            "letters that no piece has, alone": kinds[2],
            "a longest piece before a rest that no piece begins, where a shorter piece would have done": kinds[3],
        }

    def kind(self, words: list[str], known: str) -> str:
        if len(words) < 2 or words[0] != known or words[-1] != known:
            return "something else"
        unknown = words[1:-1].count("[UNK]")
        if unknown == len(words) - 2:
            return {0: "nothing", 1: "one [UNK]"}.get(unknown, "several [UNK]")
        return "pieces and [UNK]" if unknown else "pieces"


@exercise.experiment("small letters")
class SmallLetters(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c = _blocks(trial, 3)
        texts = [f"{a} {b} {c}", f"{a.capitalize()} {b} {c.upper()}"]
        return {"vocabulary": _numbered(trial, a, b, c), "texts": texts}

    def facts(self, raw, inputs):
        small, capitals = self.words(raw, inputs)
        return {"words in capitals become": "what they are in small letters" if small == capitals else "something else"}


@exercise.experiment("any white space")
class AnyWhiteSpace(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c, d = _blocks(trial, 4)
        texts = [f"{a} {b} {c} {d}", f" {a}\t{b}\n{c}   {d}\n"]
        return {"vocabulary": _numbered(trial, a, b, c, d), "texts": texts}

    def facts(self, raw, inputs):
        one, any_amount = self.words(raw, inputs)
        return {"tabs, line ends and many spaces part words": "as one space does" if one == any_amount else "otherwise"}


@exercise.experiment("fits max length")
class FitsMaxLength(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        single, *blocks = _blocks(trial, 7)
        max_length = 5 + 2 * trial.integer(1, 3)  # odd, so that the cut is inside a word of two pieces
        firsts, seconds = blocks[:3], blocks[3:]

        def words(n: int) -> list[tuple[str, str]]:
            return [(firsts[trial.integer(0, 2)], f"##{seconds[trial.integer(0, 2)]}") for _ in range(n)]

        texts = [words(max_length), [(single,), *words((max_length - 3) // 2)], words(1)]  # too long, just fits, short
        return {
            "vocabulary": _numbered(trial, single, *firsts, *seconds, *(f"##{block}" for block in seconds)),
            "texts": [" ".join("".join(_bare(word)) for word in text) for text in texts],
            "pieces": [[piece for word in text for piece in word] for text in texts],
            "max_length": max_length,
        }

    def measure(self, subject, inputs):
        return {"ids": _run(subject, inputs["vocabulary"], inputs["texts"], inputs["max_length"])["ids"]}

    def facts(self, raw, inputs):
        most = inputs["max_length"]
        rows = [_bare(_read(inputs["vocabulary"], row)) for row in raw["ids"]]
        long, *fitting = [_bare(pieces) for pieces in inputs["pieces"]]
        cut = [token for token in rows[0] if token != "[PAD]"]
        kept = [token for token in cut if token not in ("[CLS]", "[SEP]")]
        whole = all(_place(["[CLS]", *pieces, "[SEP]"], row) is not None for pieces, row in zip(fitting, rows[1:], strict=True))
        sizes = {most: "max_length", most + 2: "max_length + 2", len(long) + 2: "all it has"}
        between = "more than max_length, yet not all" if len(cut) > most else "fewer than max_length"
        return {
            "tokens of a text that is too long": sizes.get(len(cut), between),
            "the last of them": "[SEP]" if cut[-1:] == ["[SEP]"] else "another",
            "its pieces that are kept": "the first" if kept == long[: len(kept)] else "different",
            "texts that fit": "[CLS], all pieces, [SEP]" if whole else "something else",
        }


class _RaggedBatch(Experiment):
    """Draws texts of different lengths, all shorter than `max_length`; piece number 0 is a word of each but the empty one."""

    def draw(self, trial: Trial) -> dict:
        zero, *others = _blocks(trial, 6)
        counts = [trial.integer(1, 2), 0, trial.integer(5, 7), trial.integer(2, 4)]
        texts = [[zero, *(others[trial.integer(0, 4)] for _ in range(count - 1))] if count else [] for count in counts]
        order = trial.permutation(len(texts)).tolist()
        return {
            "vocabulary": _numbered(trial, zero, *others),
            "texts": [" ".join(reversed(texts[i])) for i in order],
            "max_length": trial.integer(12, 15),
        }

    def measure(self, subject, inputs):
        return _run(subject, inputs["vocabulary"], inputs["texts"], inputs["max_length"])

    def find(self, raw: dict, inputs: dict) -> list[tuple[list[str], int, int | None]]:
        """Of each text: the row, the number of tokens, and where they begin in the row."""
        wanted = [["[CLS]", *text.split(), "[SEP]"] for text in inputs["texts"]]
        rows = [_read(inputs["vocabulary"], row) for row in raw["ids"]]
        return [(row, len(tokens), _place(tokens, row)) for row, tokens in zip(rows, wanted, strict=True)]


@exercise.experiment("padded to the longest")
class PaddedToTheLongest(_RaggedBatch):
    def facts(self, raw, inputs):
        longest = max(n for _, n, _ in self.find(raw, inputs))
        sizes = {longest: "as many as the longest text has", inputs["max_length"]: "max_length"}
        return {"tokens of a row": sizes.get(raw["ids"].shape[1], "another number")}


@exercise.experiment("filled with pad")
class FilledWithPad(_RaggedBatch):
    def facts(self, raw, inputs):
        found, width = self.find(raw, inputs), raw["ids"].shape[1]
        if any(start is None for _, _, start in found):
            return {"padding stands": None, "padding is": None}
        after = all(start == 0 for _, _, start in found)
        before = all(start == width - n for _, n, start in found)
        zero = _read(inputs["vocabulary"], torch.tensor([0]))[0]
        padding = {token for row, n, start in found for token in row[:start] + row[start + n :]}
        names = {"[PAD]": "[PAD]", zero: "the piece with number 0"}
        return {
            "padding stands": "after the text" if after else "before the text" if before else "elsewhere",
            "padding is": names.get("".join(padding), "something else"),
        }


@exercise.experiment("mask of tokens")
class MaskOfTokens(_RaggedBatch):
    points = 2

    def facts(self, raw, inputs):
        found = self.find(raw, inputs)
        if any(start is None for _, _, start in found):
            return {"the mask on tokens": None, "the mask on padding": None}
        own = torch.zeros_like(raw["mask"]).bool()
        for row, (_, n, start) in zip(own, found, strict=True):
            row[start : start + n] = True
        on_tokens, on_padding, numbers = raw["mask"][own], raw["mask"][~own], raw["ids"][own]
        not_zero = "0 where the number is 0, else 1" if torch.equal(on_tokens, (numbers != 0).long()) else "something else"
        return {"the mask on tokens": _constant(on_tokens) or not_zero, "the mask on padding": _constant(on_padding)}


def _constant(values: Tensor) -> str:
    return str(values[0].item()) if len(values) and (values == values[0]).all() else ""


def _longest(vocabulary: Mapping[str, int], word: str, mark: str = "##") -> list[str]:
    """A right cut, for what is wrong elsewhere."""
    pieces = []
    while word:
        prefix = mark if pieces else ""
        length = next((n for n in range(len(word), 0, -1) if prefix + word[:n] in vocabulary), None)
        if length is None:
            return ["[UNK]"]
        pieces.append(prefix + word[:length])
        word = word[length:]
    return pieces


def _rows(vocabulary, texts, cut=_longest) -> list[list[int]]:
    return [[vocabulary[piece] for word in text.lower().split() for piece in cut(vocabulary, word)] for text in texts]


def _ended(vocabulary, rows, max_length) -> list[list[int]]:
    return [[vocabulary["[CLS]"], *row[: max_length - 2], vocabulary["[SEP]"]] for row in rows]


def _batch(rows, padding: int, width: int | None = None) -> dict[str, Tensor]:
    width = width or max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def _cut_by(cut, vocabulary, texts, max_length) -> dict[str, Tensor]:
    return _batch(_ended(vocabulary, _rows(vocabulary, texts, cut), max_length), vocabulary["[PAD]"])


@exercise.misconception("padded to max_length")
def padded_to_max_length(vocabulary, texts, max_length):
    rows = _ended(vocabulary, _rows(vocabulary, texts), max_length)
    return _batch(rows, vocabulary["[PAD]"], width=max_length)


@exercise.misconception("[SEP] cut off")
def sep_cut_off(vocabulary, texts, max_length):
    rows = _ended(vocabulary, _rows(vocabulary, texts), 10**6)
    return _batch([row[:max_length] for row in rows], vocabulary["[PAD]"])


@exercise.misconception("[CLS] and [SEP] not counted")
def special_tokens_not_counted(vocabulary, texts, max_length):
    return _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length + 2), vocabulary["[PAD]"])


@exercise.misconception("words counted in place of tokens")
def words_counted(vocabulary, texts, max_length):
    texts = [" ".join(text.split()[: max_length - 2]) for text in texts]
    return _batch(_ended(vocabulary, _rows(vocabulary, texts), 10**6), vocabulary["[PAD]"])


@exercise.misconception("[CLS] and [SEP] left out")
def special_tokens_left_out(vocabulary, texts, max_length):
    return _batch([row[:max_length] or [vocabulary["[UNK]"]] for row in _rows(vocabulary, texts)], vocabulary["[PAD]"])


@exercise.misconception("mask all ones")
def mask_all_ones(vocabulary, texts, max_length):
    batch = _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length), vocabulary["[PAD]"])
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


@exercise.misconception("mask upside down")
def mask_upside_down(vocabulary, texts, max_length):
    batch = _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length), vocabulary["[PAD]"])
    return batch | {"attention_mask": 1 - batch["attention_mask"]}


@exercise.misconception("mask from numbers that are not 0")
def mask_from_numbers_that_are_not_0(vocabulary, texts, max_length):
    batch = _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length), vocabulary["[PAD]"])
    return batch | {"attention_mask": (batch["input_ids"] != 0).long()}


@exercise.misconception("padded with number 0")
def padded_with_number_0(vocabulary, texts, max_length):
    return _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length), 0)


@exercise.misconception("padding taken to be number 0")
def padding_taken_to_be_number_0(vocabulary, texts, max_length):
    batch = _batch(_ended(vocabulary, _rows(vocabulary, texts), max_length), 0)
    return batch | {"attention_mask": batch["input_ids"].bool().long()}


@exercise.misconception("padding before the text")
def padding_before_the_text(vocabulary, texts, max_length):
    rows = _ended(vocabulary, _rows(vocabulary, texts), max_length)
    batch = _batch([row[::-1] for row in rows], vocabulary["[PAD]"])
    return {name: values.flip(1) for name, values in batch.items()}


@exercise.misconception("shortest piece first")
def shortest_piece_first(vocabulary, texts, max_length):
    def cut(vocabulary, word):
        pieces, start = [], 0
        for end in range(1, len(word) + 1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                pieces.append(piece)
                start = end
        return pieces if start == len(word) else ["[UNK]"]

    return _cut_by(cut, vocabulary, texts, max_length)


@exercise.misconception("## forgotten")
def mark_forgotten(vocabulary, texts, max_length):
    return _cut_by(lambda vocabulary, word: _longest(vocabulary, word, mark=""), vocabulary, texts, max_length)


@exercise.misconception("pieces beside [UNK]")
def pieces_beside_unk(vocabulary, texts, max_length):
    def cut(vocabulary, word):
        for end in range(len(word), 0, -1):
            if "[UNK]" not in (head := _longest(vocabulary, word[:end])):
                return head if end == len(word) else [*head, "[UNK]"]
        return ["[UNK]"]

    return _cut_by(cut, vocabulary, texts, max_length)


@exercise.misconception("unknown words left out")
def unknown_words_left_out(vocabulary, texts, max_length):
    def cut(vocabulary, word):
        return [piece for piece in _longest(vocabulary, word) if piece != "[UNK]"]

    return _cut_by(cut, vocabulary, texts, max_length)


@exercise.misconception("a longest piece taken back")
def a_longest_piece_taken_back(vocabulary, texts, max_length):
    def search(word, mark=""):
        if not word:
            return []
        for end in range(len(word), 0, -1):
            if mark + word[:end] in vocabulary and (rest := search(word[end:], "##")) is not None:
                return [mark + word[:end], *rest]
        return None

    return _cut_by(lambda _, word: search(word) or ["[UNK]"], vocabulary, texts, max_length)


@exercise.misconception("capitals kept")
def capitals_kept(vocabulary, texts, max_length):
    rows = [[vocabulary[piece] for word in text.split() for piece in _longest(vocabulary, word)] for text in texts]
    return _batch(_ended(vocabulary, rows, max_length), vocabulary["[PAD]"])


@exercise.misconception("split at single spaces")
def split_at_single_spaces(vocabulary, texts, max_length):
    rows = [[vocabulary[piece] for word in text.lower().split(" ") for piece in _longest(vocabulary, word)] for text in texts]
    return _batch(_ended(vocabulary, rows, max_length), vocabulary["[PAD]"])
