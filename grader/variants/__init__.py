"""Solutions in other styles, right and wrong: what proves that a check judges behaviour and not wording.

The module of an exercise is called as that of its checks is, and has five tables:

    CORRECT     at least three right solutions that differ from each other and from the reference
    REWRITTEN   misconceptions written a second time, differently: {misconception's key: subject}
    BROKEN      subjects that keep every sentence of the statement but one: {the sentence's number: [subject, ...]}
    COMBINED    subjects with two mistakes at once: [({keys}, subject)]
    EQUIVALENT  mutants of the author's solution that are no mistakes (docs/proofs.md): {"old -> new": the reason}

They are no part of what is installed from a wheel; the proofs and the records are made with them.
"""

from importlib import import_module
from types import ModuleType

from grader.experiment import Exercise


def variants_of(exercise: Exercise) -> ModuleType:
    """The module with the variants of an exercise."""
    return import_module(exercise.module.replace("grader.checks", "grader.variants"))
