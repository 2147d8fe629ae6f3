"""Exercise 2.6: texts to one batch of word pieces and a mask."""

import re
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from grader.checks.features import batches
from grader.experiment import Exercise, Experiment, Trial
from helpers.text import tokenize

exercise = Exercise(__name__, "2.6", tokenize, core=5)


class _OneText(Experiment):
    """Draws a vocabulary and texts, each of which is a batch of its own, so that there is no padding."""

    def measure(self, subject, inputs):
        runs = [batches.run(subject, inputs["vocabulary"], [text], 32) for text in inputs["texts"]]
        return {"rows": [run["ids"][0] for run in runs]}

    def words(self, raw: dict, inputs: dict) -> list[list[str]]:
        return [batches.inside(batches.read(inputs["vocabulary"], row)) for row in raw["rows"]]


@exercise.experiment("longest piece first", 2)
class LongestPieceFirst(_OneText):
    points = 2

    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e, f = batches.blocks(trial, 6)
        pieces = [a, a + b, c, c + d, e, e + f, *(f"##{rest}" for rest in (a, b, c, d, f, a + b, c + d))]
        return {
            "vocabulary": batches.numbered(trial, *pieces),
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


@exercise.experiment("pieces of any length", 2)
class PiecesOfAnyLength(_OneText):
    def draw(self, trial: Trial) -> dict:
        (a, b), (c, d), (e, f), (g, h), *_ = batches.blocks(trial, 4)
        long = a + b + c + d + e + f + g + h + 8 * a
        pieces = [b, a, c + d + e, e, e + f, long]
        pieces += [f"##{piece}" for piece in (a, b, c, long, long + h, g, h, f + g + h)]
        several = f"{long} {a + long} {c + d + e + b + long + a}"
        return {
            "vocabulary": batches.numbered(trial, *pieces),
            "texts": [f"{a} {b} {a}", f"{a + b + a + c}", several, e + f + g + h, a + long + h],
            "cuts": {
                "words of one letter": [a, b, a],
                "pieces of one letter": [a, b, a, c],
                "pieces of sixteen letters": [long, a, long, c + d + e, b, long, a],
                "pieces before a longer one": [e + f, g, h],
                "a piece inside a word that is longer than all that begin one": [a, long + h],
            },
        }

    def facts(self, raw, inputs):
        # Whether pieces inside a word have their ## is another question.
        cuts = zip(inputs["cuts"].items(), self.words(raw, inputs), strict=True)
        return {name: "found" if cut == batches.bare(words) else "something else" for (name, cut), words in cuts}


@exercise.experiment("unknown words", 3)
class UnknownWords(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e, (unknown, _) = batches.blocks(trial, 6)
        return {
            "vocabulary": batches.numbered(trial, e, a, d, a + b, f"##{b + c}", f"##{e}"),
            "texts": [f"{e} {word} {e}" for word in (d + unknown + e, d + unknown, unknown, a + b + c)],
            "several": f"{unknown} {d + unknown} {e} {unknown} {unknown}",
            "known": e,
        }

    def measure(self, subject, inputs):
        several = batches.run(subject, inputs["vocabulary"], [inputs["several"]], 32)["ids"][0]
        return super().measure(subject, inputs) | {"several": several}

    def facts(self, raw, inputs):
        kinds = [self.kind(words, inputs["known"]) for words in self.words(raw, inputs)]
        several = batches.inside(batches.read(inputs["vocabulary"], raw["several"]))
        each = "one [UNK] each" if several == ["[UNK]", "[UNK]", inputs["known"], "[UNK]", "[UNK]"] else "something else"
        return {
            "a known piece before letters that no piece has": kinds[0] if kinds[0] == kinds[1] else "something else",
            "letters that no piece has, alone": kinds[2],
            "a longest piece before a rest that no piece begins, where a shorter piece would have done": kinds[3],
            "unknown words beside each other": each if kinds[0] == "one [UNK]" else None,
        }

    def kind(self, words: list[str], known: str) -> str:
        if len(words) < 2 or words[0] != known or words[-1] != known:
            return "something else"
        unknown = words[1:-1].count("[UNK]")
        if unknown == len(words) - 2:
            return {0: "nothing", 1: "one [UNK]"}.get(unknown, "several [UNK]")
        return "pieces and [UNK]" if unknown else "pieces"


@exercise.experiment("## inside a word alone", 2)
class MarkInsideAWordAlone(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e = batches.blocks(trial, 5)
        return {
            "vocabulary": batches.numbered(trial, e, a, b, f"##{c}", f"##{d}", d),
            "texts": [f"{e} {word} {e}" for word in (a + d, a + b, c, c + d)],
            "right": [a, f"##{d}"],
            "only a word": b,
            "only a rest": c,
        }

    def facts(self, raw, inputs):
        rest, word, *begins = self.words(raw, inputs)
        only_word, only_rest = inputs["only a word"], inputs["only a rest"]
        if rest[1:-1] != inputs["right"]:  # then it does not look pieces up as it should in any word
            return {"a rest that is a word only": None, "a word that is a rest only": None}
        return {
            "a rest that is a word only": "taken" if only_word in batches.bare(word) else "not taken",
            "a word that is a rest only": "taken" if any(only_rest in batches.bare(words) for words in begins) else "not taken",
        }


@exercise.experiment("small letters", 1)
class SmallLetters(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c = batches.blocks(trial, 3)
        d, e = "\u00e9" + a, "\u0436" + b  # an accent, and a letter that is not Latin
        texts = [f"{a} {b} {c}", f"{a.capitalize()} {b} {c.upper()}", f"{d} {c} {e}", f"{d.upper()} {c} {e.upper()}"]
        return {"vocabulary": batches.numbered(trial, a, b, c, d, e, f"##{a}"), "texts": texts}

    def facts(self, raw, inputs):
        small, capitals, *beyond = self.words(raw, inputs)
        return {
            "words in capitals become": "what they are in small letters" if small == capitals else "something else",
            "words in capitals beyond A to Z become": "what they are in small letters"
            if beyond[0] == beyond[1]
            else "something else",
        }


@exercise.experiment("any white space", 1)
class AnyWhiteSpace(_OneText):
    def draw(self, trial: Trial) -> dict:
        a, b, c, d = batches.blocks(trial, 4)
        texts = [f"{a} {b} {c} {d}", f" {a}\t{b}\n{c}   {d}\n", f"\r\n{a}\r{b}\f{c} \v {d}", f"{a}\u00a0{b}\u2003{c}\u3000{d}"]
        return {"vocabulary": batches.numbered(trial, a, b, c, d), "texts": texts}

    def facts(self, raw, inputs):
        spaced, mixed, rare, wide = self.words(raw, inputs)
        return {
            "tabs, line ends and many spaces part words": "as one space does" if spaced == mixed else "otherwise",
            "returns, form feeds and vertical tabs part words": "as one space does" if spaced == rare else "otherwise",
            "spaces that do not break a line, or are wide, part words": "as one space does" if spaced == wide else "otherwise",
        }


@exercise.experiment("white space alone", 6)
class WhiteSpaceAlone(_OneText):
    marks: ClassVar = {
        "dots": ".",
        "hyphens": "-",
        "apostrophes": "'",
        "digits": "7",
        "accents": "\u00e9",
        "raised digits": "\u00b2",
    }

    def draw(self, trial: Trial) -> dict:
        a, b, c, d, e = batches.blocks(trial, 5)
        words = [[a + mark + b, mark + c, d + mark] for mark in self.marks.values()]
        pieces = [piece for some in words for piece in some]
        return {"vocabulary": batches.numbered(trial, e, f"##{e}", *pieces), "texts": [" ".join([*some, e]) for some in words]}

    def facts(self, raw, inputs):
        kept = [words == text.split() for words, text in zip(self.words(raw, inputs), inputs["texts"], strict=True)]
        return {"what is not kept in a word": [mark for mark, same in zip(self.marks, kept, strict=True) if not same]}


@exercise.experiment("fits max_length", 4)
class FitsMaxLength(Experiment):
    points = 2

    def draw(self, trial: Trial) -> dict:
        single, *blocks = batches.blocks(trial, 7)
        max_length = 5 + 2 * trial.integer(1, 3)  # odd, so that the cut is inside a word of two pieces
        firsts, seconds = blocks[:3], blocks[3:]

        def words(n: int) -> list[tuple[str, str]]:
            return [(firsts[trial.integer(0, 2)], f"##{seconds[trial.integer(0, 2)]}") for _ in range(n)]

        texts = [words(max_length), [(single,), *words((max_length - 3) // 2)], words(1)]  # too long, just fits, short
        return {
            "vocabulary": batches.numbered(trial, single, *firsts, *seconds, *(f"##{block}" for block in seconds)),
            "texts": [" ".join("".join(batches.bare(word)) for word in text) for text in texts],
            "pieces": [[piece for word in text for piece in word] for text in texts],
            "max_length": max_length,
        }

    def measure(self, subject, inputs):
        vocabulary, texts = inputs["vocabulary"], inputs["texts"]
        return {
            "ids": batches.run(subject, vocabulary, texts, inputs["max_length"])["ids"],
            "smallest": [batches.run(subject, vocabulary, texts, most)["ids"] for most in (2, 3)],
            "empty": batches.run(subject, vocabulary, [" "], inputs["max_length"])["ids"][0],
        }

    def facts(self, raw, inputs):
        most = inputs["max_length"]
        rows = [batches.bare(batches.read(inputs["vocabulary"], row)) for row in raw["ids"]]
        long, *fitting = [batches.bare(pieces) for pieces in inputs["pieces"]]
        cut = batches.filled(rows[0])
        kept = [token for token in cut if token not in ("[CLS]", "[SEP]")]
        whole = all(
            batches.place(["[CLS]", *pieces, "[SEP]"], row) is not None for pieces, row in zip(fitting, rows[1:], strict=True)
        )
        sizes = {most: "max_length", most + 1: "max_length + 1", most + 2: "max_length + 2", len(long) + 2: "all it has"}
        between = "more than max_length, yet not all" if len(cut) > most else "fewer than max_length"
        return {
            "tokens of a text that is too long": sizes.get(len(cut), between),
            "the last of them": "[SEP]" if cut[-1:] == ["[SEP]"] else "another",
            "its pieces that are kept": "the first" if kept == long[: len(kept)] else "different",
            "texts that fit": "[CLS], all pieces, [SEP]" if whole else "something else",
            "texts of any length, cut to 2 and to 3 tokens": self.smallest(raw, inputs),
            "an empty text, alone": ", ".join(batches.filled(batches.read(inputs["vocabulary"], raw["empty"]))),
        }

    def smallest(self, raw: dict, inputs: dict) -> str:
        two, three = ([batches.filled(batches.read(inputs["vocabulary"], row)) for row in ids] for ids in raw["smallest"])
        first = [["[CLS]", pieces[0], "[SEP]"] for pieces in inputs["pieces"]]
        same = all(row == ["[CLS]", "[SEP]"] for row in two) and [batches.bare(row) for row in three] == first
        return "[CLS], as many pieces, [SEP]" if same else "something else"


class _RaggedBatch(Experiment):
    """Draws texts of different lengths, all shorter than `max_length`; piece number 0 is a word of each but the empty one."""

    def draw(self, trial: Trial) -> dict:
        zero, unknown, *blocks = batches.blocks(trial, 7)
        counts = [trial.integer(1, 2), 0, trial.integer(5, 7), trial.integer(2, 4)]
        texts = [[zero, *(blocks[trial.integer(0, 4)] for _ in range(count - 1))] if count else [] for count in counts]
        texts[3][-1] = unknown
        texts.append(texts[3])  # the same text twice
        order = trial.permutation(len(texts)).tolist()
        return {
            "vocabulary": batches.numbered(trial, zero, *blocks),
            "texts": [" ".join(reversed(texts[i])) for i in order],
            "max_length": trial.integer(12, 15),
        }

    def measure(self, subject, inputs):
        return batches.run(subject, inputs["vocabulary"], inputs["texts"], inputs["max_length"])

    def read(self, ids: Tensor, inputs: dict) -> list[list[str]]:
        return [batches.read(inputs["vocabulary"], row) for row in ids]

    def places(self, raw: dict, inputs: dict) -> list[tuple[list[str], int, int | None]]:
        """Of each text: the row, the number of tokens, and where they begin in the row."""
        rows = self.read(raw["ids"], inputs)
        return [(row, len(tokens), batches.place(tokens, row)) for row, tokens in zip(rows, self.wanted(inputs), strict=True)]

    def wanted(self, inputs: dict) -> list[list[str]]:
        words = [[word if word in inputs["vocabulary"] else "[UNK]" for word in text.split()] for text in inputs["texts"]]
        return [["[CLS]", *some, "[SEP]"] for some in words]


@exercise.experiment("padded to the longest", 5)
class PaddedToTheLongest(_RaggedBatch):
    def measure(self, subject, inputs):
        longer = inputs | {"texts": [*inputs["texts"], " ".join(5 * inputs["texts"])]}
        return super().measure(subject, inputs) | {"cut": super().measure(subject, longer)["ids"]}

    def facts(self, raw, inputs):
        longest = max(n for _, n, _ in self.places(raw, inputs))
        sizes = {longest: "as many as the longest text has", longest - 2: "two fewer", inputs["max_length"]: "max_length"}
        rows = self.read(raw["cut"], inputs)
        after = max(len(row) - row[::-1].index("[SEP]") if "[SEP]" in row else len(row) for row in rows)
        return {
            "tokens of a row": sizes.get(raw["ids"].shape[1], "another number"),
            "where a text was cut": "as many as it has then" if raw["cut"].shape[1] == after else "more",
        }


@exercise.experiment("filled with pad", 5)
class FilledWithPad(_RaggedBatch):
    def facts(self, raw, inputs):
        places, width = self.places(raw, inputs), raw["ids"].shape[1]
        if any(start is None for _, _, start in places):
            return {"row i is that of": self.other(raw, inputs), "padding stands": None, "padding is": None}
        after = all(start == 0 for _, _, start in places)
        before = all(start == width - n for _, n, start in places)
        zero = batches.read(inputs["vocabulary"], torch.tensor([0]))[0]
        padding = {token for row, n, start in places for token in row[:start] + row[start + n :]}
        names = {"[PAD]": "[PAD]", zero: "the piece with number 0"}
        return {
            "row i is that of": "text i",
            "padding stands": "after the text" if after else "before the text" if before else "elsewhere",
            "padding is": names.get("".join(padding), "something else"),
        }

    def other(self, raw: dict, inputs: dict) -> str | None:
        """Whether each text is in another row than its own; if not, its tokens are wrong, which others ask."""
        rows = self.read(raw["ids"], inputs)
        somewhere = (any(batches.place(tokens, row) is not None for row in rows) for tokens in self.wanted(inputs))
        return "another text" if all(somewhere) else None


@exercise.experiment("mask of tokens", 5)
class MaskOfTokens(_RaggedBatch):
    points = 2

    def facts(self, raw, inputs):
        places = self.places(raw, inputs)
        if any(start is None for _, _, start in places):
            return {"the mask on tokens": None, "the mask on padding": None}
        own = torch.zeros_like(raw["mask"]).bool()
        for row, (_, n, start) in zip(own, places, strict=True):
            row[start : start + n] = True
        on_tokens, on_padding, numbers = raw["mask"][own], raw["mask"][~own], raw["ids"][own]
        not_zero = "0 where the number is 0, else 1" if torch.equal(on_tokens, (numbers != 0).long()) else "something else"
        return {"the mask on tokens": _constant(on_tokens) or not_zero, "the mask on padding": _constant(on_padding)}


def _constant(values: Tensor) -> str:
    return str(values[0].item()) if len(values) and (values == values[0]).all() else ""


def _words(text: str) -> list[str]:
    return text.lower().split()


def _longest(vocabulary: Mapping[str, int], word: str, mark: str = "##") -> list[str]:
    pieces = []
    while word:
        prefix = mark if pieces else ""
        length = next((n for n in range(len(word), 0, -1) if prefix + word[:n] in vocabulary), None)
        if length is None:
            return ["[UNK]"]
        pieces.append(prefix + word[:length])
        word = word[length:]
    return pieces


def _fit(pieces: list[str], max_length: int) -> list[str]:
    return ["[CLS]", *pieces[: max_length - 2], "[SEP]"]


def tokenized(
    vocabulary, texts, max_length, *, words=_words, cut=_longest, fit=_fit, number=None, side="right", mask=lambda ids, own: own
):
    """A right solution: a text's words, a word's pieces, a text's tokens, number and side of padding, the mask."""
    rows = [fit([piece for word in words(text) for piece in cut(vocabulary, word)], max_length) for text in texts]
    rows = [torch.tensor([vocabulary[token] for token in row]) for row in rows]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    ids = pad(rows, padding_value=vocabulary["[PAD]"] if number is None else number)
    return {"input_ids": ids, "attention_mask": mask(ids, pad([torch.ones_like(row) for row in rows]))}


def _shortest(vocabulary: Mapping[str, int], word: str) -> list[str]:
    pieces, start = [], 0
    for end in range(1, len(word) + 1):
        piece = ("##" if start else "") + word[start:end]
        if piece in vocabulary:
            pieces.append(piece)
            start = end
    return pieces if start == len(word) else ["[UNK]"]


def _and_unknown(vocabulary: Mapping[str, int], word: str) -> list[str]:
    for end in range(len(word), 0, -1):
        if "[UNK]" not in (head := _longest(vocabulary, word[:end])):
            return head if end == len(word) else [*head, "[UNK]"]
    return ["[UNK]"]


def _taking_back(vocabulary: Mapping[str, int], word: str) -> list[str]:
    def search(rest: str, mark: str = "") -> list[str] | None:
        if not rest:
            return []
        for end in range(len(rest), 0, -1):
            if mark + rest[:end] in vocabulary and (following := search(rest[end:], "##")) is not None:
                return [mark + rest[:end], *following]
        return None

    return search(word) or ["[UNK]"]


def _not_0(ids: Tensor, own: Tensor) -> Tensor:
    return (ids != 0).long()


CHANGES = {
    "[SEP] cut off": {"fit": lambda pieces, max_length: ["[CLS]", *pieces, "[SEP]"][:max_length]},
    "[CLS] and [SEP] not counted": {"fit": lambda pieces, max_length: ["[CLS]", *pieces[:max_length], "[SEP]"]},
    "[CLS] and [SEP] left out": {"fit": lambda pieces, max_length: pieces[:max_length] or ["[UNK]"]},
    "mask all ones": {"mask": lambda ids, own: torch.ones_like(own)},
    "mask upside down": {"mask": lambda ids, own: 1 - own},
    "mask from numbers that are not 0": {"mask": _not_0},
    "padded with number 0": {"number": 0},
    "padding taken to be number 0": {"number": 0, "mask": _not_0},
    "padding before the text": {"side": "left"},
    "shortest piece first": {"cut": _shortest},
    "## forgotten": {"cut": partial(_longest, mark="")},
    "pieces beside [UNK]": {"cut": _and_unknown},
    "unknown words left out": {"cut": lambda *word: [piece for piece in _longest(*word) if piece != "[UNK]"]},
    "a longest piece taken back": {"cut": _taking_back},
    "capitals kept": {"words": str.split},
    "split at single spaces": {"words": lambda text: text.lower().split(" ")},
    "punctuation not kept in words": {"words": lambda text: re.findall(r"\w+|[^\w\s]", text.lower())},
}
exercise.misconceptions_of(tokenized, CHANGES)


@exercise.misconception("words counted in place of tokens")
def words_counted(vocabulary, texts, max_length):
    return tokenized(vocabulary, [" ".join(text.split()[: max_length - 2]) for text in texts], 10**6)


@exercise.misconception("padded to max_length")
def padded_to_max_length(vocabulary, texts, max_length):
    batch = tokenized(vocabulary, [*texts, "? " * max_length], max_length)  # one more text, which fills its row
    return {name: rows[:-1] for name, rows in batch.items()}
