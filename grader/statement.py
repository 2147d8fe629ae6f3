"""What an exercise asks for, read from its chapter's script.

    ## Exercise 6.1: a layer that learns a sum
    The idea, in at most 90 words.

    **Exercise 6.1** (25 min, ●●○). Write `LoRALinear`.

    *Core*

    1. It computes `base(x) + alpha / rank * B A x`.
    2. A new layer computes what `base` computes.

    *Fine print*

    3. `base` is held, not copied.

The stub in the next cell carries the contract: types in its signature, a docstring, an example with its output.
The sentences are numbered through. `grader/checks` says which experiments speak of a sentence, `grader/variants` has
subjects that break it; one that contains UNSEEN has neither.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

UNSEEN = "the check does not look at this"
_BEGINS = re.compile(r"^\*\*Exercise (\d+\.\d+[a-z]?)\*\*", re.MULTILINE)
_ITEM = re.compile(r"^(\d+)\. (.*(?:\n(?!\d+\. |\n).*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Statement:
    """The statement of one exercise."""

    number: str
    idea: str  # what stands between the heading and the exercise's first line
    task: str  # the first line: minutes, difficulty, what to write
    core: dict[int, str]  # number of a sentence -> the sentence
    fine_print: dict[int, str]
    stub: str  # source of the cell that the learner fills

    @property
    def sentences(self) -> dict[int, str]:
        return self.core | self.fine_print

    @property
    def words(self) -> int:
        """Words of all that stands before the stub, without the heading."""
        return sum(len(text.split()) for text in (self.idea, self.task, *self.sentences.values()))

    @property
    def definitions(self) -> list[ast.FunctionDef | ast.ClassDef]:
        """The functions and classes of the stub, methods included, that a learner calls by a name without an underscore."""
        tree = ast.walk(ast.parse(self.stub))
        definitions = [node for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return [node for node in definitions if not node.name.startswith("_") or node.name == "__init__"]


def statements(script: Path) -> dict[str, Statement]:
    """The statements of a chapter's exercises, by number, in their order.

    Raises:
        ValueError: after a statement comes no cell with a solution.
    """
    read, text = {}, None
    for cell in jupytext.read(script).cells:
        if cell.cell_type == "markdown":
            text = cell.source if _BEGINS.search(cell.source) else text
        elif "### BEGIN SOLUTION" in cell.source and text is not None:
            statement = _statement(text, cell.source)
            read[statement.number], text = statement, None
    if text is not None:
        raise ValueError(f"{script.name}: after the statement of {_BEGINS.search(text)[1]} a cell with a solution must come.")
    return read


def _statement(text: str, cell: str) -> Statement:
    begins = _BEGINS.search(text)
    idea = re.sub(r"\A.*^#+ [^\n]*\n", "", text[: begins.start()], flags=re.MULTILINE | re.DOTALL)  # from the last heading on
    task, _, listed = text[begins.start() :].partition("*Core*")
    core, _, fine_print = listed.partition("*Fine print*")
    stub = re.sub(r"^ *### BEGIN SOLUTION\n.*?### END SOLUTION$", _stop, cell, flags=re.MULTILINE | re.DOTALL)
    return Statement(begins[1], idea.strip(), task.strip(), _items(core), _items(fine_print), stub)


def _items(text: str) -> dict[int, str]:
    return {int(number): " ".join(sentence.split()) for number, sentence in _ITEM.findall(text)}


def _stop(solution: re.Match) -> str:
    return " " * (len(solution[0]) - len(solution[0].lstrip())) + "raise NotImplementedError"
