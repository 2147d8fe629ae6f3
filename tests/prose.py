"""The numbers in the prose of a chapter, and where they come from.

`tests/figures_<chapter>.py` has two tables. MEASURED: a piece of the chapter's text with {} for each number, and a function
that computes those numbers from records or from what the solved chapter printed; or a piece without {}, and a function that
says whether it is true. GIVEN: pieces of text whose numbers nobody measures, such as settings, sizes, quotations and formulas.
A number of the prose that is in neither is a fault, so one that was changed by hand is found. Exercises' statements are left
out: their experiments hold them.
"""

import re
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]

# "chapter 02", "exercises 4.1 and 4.2", "section 3.3", years, "## 04 · Fine-tuning" are names, not results.
NAMES = (
    r"\b(?:[Cc]hapters?|[Ee]xercises?|[Ss]ections?|[Pp]art|[Ff]igure) \d[\d.]*(?:(?:,| and| to) \d[\d.]*)*"
    r"|\b(?:19|20)\d\d\b|\d\d · "
)


def prose(chapter: str) -> str:
    """The text of a chapter in one line, without statements, code, formulas, tables, headings' numbers and addresses."""
    cells = [c.source for c in jupytext.read(ROOT / "solutions" / chapter / f"{chapter}.py").cells if c.cell_type == "markdown"]
    text = "\n\n".join(re.split(r"^\*\*Exercise ", cell, flags=re.MULTILINE)[0] for cell in cells)
    text = re.sub(r"^\|.*$|^ {4}.*$", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$|\$[^$]+\$|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return " ".join(text.replace("*", "").split())


def as_pattern(piece: str) -> str:
    """A regular expression for a piece of text, with a group for each {}."""
    number = r"([\d,]*\d(?:\.\d+)?(?:e-?\d+)?)"
    words = " ".join(re.sub(r"`[^`]*`", " ", piece).replace("*", "").split())
    return number.join(re.escape(part) for part in words.split("{}"))


def untold(chapter: str, pieces: list[str]) -> list[str]:
    """The numbers of a chapter's prose that are in none of the pieces, each with the words around it."""
    text = prose(chapter)
    spans = [match.span() for pattern in [NAMES, *map(as_pattern, pieces)] for match in re.finditer(pattern, text)]
    return [
        text[max(0, number.start() - 40) : number.end() + 30]
        for number in re.finditer(r"(?<![A-Za-z\d.-])\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?", text)
        if not any(start <= number.start() and number.end() <= end for start, end in spans)
    ]


def faults(chapter: str, measured: dict, printed: str) -> list[str]:
    """What the prose says and the results do not.

    Args:
        chapter: "08_export".
        measured: piece -> function of `printed` that gives a number (or a list, or whether the piece is true); a number in
            the prose is right if it is the computed one rounded to as many digits. `(function, tolerance)` allows more, where
            another machine may print another number.
        printed: what the cells of the solved chapter printed.
    """
    text, found = prose(chapter), []
    for piece, source in measured.items():
        compute, tolerance = source if isinstance(source, tuple) else (source, 0)
        match = re.search(as_pattern(piece), text)
        if match is None:
            found.append(f"the prose does not say: {piece}")
            continue
        values = compute(printed)
        if isinstance(values, bool):
            found += [] if values else [f"is not so: {piece}"]
            continue
        values = values if isinstance(values, list | tuple) else [values]
        for said, value in zip(match.groups(), values, strict=True):
            digits = len(said.partition(".")[2])
            if abs(float(said.replace(",", "")) - value) > 0.5 * 10**-digits + tolerance + 1e-9:
                found.append(f"{piece!r} says {said}, the result is {value:.5g}")
    return found
