"""What an exercise is made of: experiments and misconceptions, which its module registers where it defines them.

    exercise = Exercise(__name__, "4.1", train_only, core=3)

    @exercise.experiment("frozen stay", 1)
    class FrozenStay(Experiment): ...

    @exercise.misconception("head alone")
    def head_alone(model): ...

The keys in quotes are what truth tables, records and statistics know them by. What a learner reads of each, hints
included, stands under the same keys in `grader/words/<topic>.toml`. The numbers are those of the sentences of the
statement that an experiment speaks of: the first `core` of them are the core, the others its fine print.

An experiment asks one question of any subject, be it the learner's code, the reference or a misconception:

    draw(trial)               a seed -> inputs, drawn on the CPU; drawing again gives the same inputs
    measure(subject, inputs)  run the subject; return raw tensors, numbers and strings
    facts(raw, inputs)        raw results -> a few named facts, the same for every seed if the subject is right

The facts of the reference and of every misconception stand in `grader/golden/`; `grader.verdict` compares a
learner's facts with them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import isclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grader import words
from helpers import expect

Fact = str | bool | int | float | None | list
Subject = Callable[..., Any]


class WrongReturn(Exception):
    """The subject returned something that cannot be measured; the message says what was wanted and what came."""


class Trial:
    """One run of an experiment: random choices that depend on `seed` alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of that shape, float32."""
        return torch.randn(*shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        """The numbers 0 to n - 1 in random order."""
        return torch.randperm(n, generator=self.generator)


class Experiment:
    """One question about a subject.

    `draw` may also use torch's global random state (to make a module): it is seeded with `trial.seed` before,
    and put back afterwards. `measure` may change its inputs; `facts` gets freshly drawn ones.
    A fact of None means "not observable here": it counts as different from the reference and explains nothing.
    """

    key: str  # what tables and records know it by; set by `Exercise.experiment`
    claim: str  # the sentence that a learner reads, from `grader/words`
    sentences: tuple[int, ...] = ()  # which sentences of the statement it speaks of, counted from 1
    in_core: bool = True  # whether these are core or fine print

    points: ClassVar[int] = 1
    seconds: ClassVar[float] = 10.0  # after that the subject is stopped
    on_fake_gpu: ClassVar[bool] = True  # whether it can run on a fake GPU
    # Names of inputs that the statement lets a subject change in place. A module may always change: look at it in `facts`.
    may_change: ClassVar[tuple[str, ...]] = ()

    def draw(self, trial: Trial) -> dict[str, Any]:
        raise NotImplementedError

    def measure(self, subject: Subject, inputs: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def facts(self, raw: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Fact]:
        raise NotImplementedError

    def notes(self, raw: dict[str, Any], inputs: dict[str, Any]) -> dict[str, str]:
        """Magnitudes worth showing beside a fact that differs; they depend on free choices and are never compared."""
        return {}


def equal(value: Fact, expected: Fact) -> bool:
    """Whether two values of a fact are the same: numbers, which facts round, to within 0.001, all else exactly."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(equal, value, expected))
    if _is_number(value) and _is_number(expected):
        return abs(value - expected) <= 1e-3
    return type(value) is type(expected) and value == expected


@dataclass(frozen=True)
class Misconception:
    """A named mistake: a wrong implementation, a hint towards the idea it misses, and where it was seen."""

    key: str  # what tables, records and statistics know it by
    name: str  # what a learner reads; the key, unless `grader/words` has another
    hint: str  # a sentence that points at the idea, never at code; ends with a question or an observation to make
    source: str  # where it comes from
    subject: Subject


@dataclass(eq=False)
class Exercise:
    """An exercise as the grader knows it."""

    module: str  # the `__name__` of the module that defines it, in `grader.checks.<topic>`
    number: str  # "2.1"
    reference: Subject
    name: str = ""  # what the learner defines; left out, it is called as the reference is
    core: int = 0  # how many sentences of the statement are its core; those after them are fine print
    autocast: bool = False  # whether the statement says that it works inside `torch.autocast` too
    experiments: list[Experiment] = field(default_factory=list)
    misconceptions: list[Misconception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or self.reference.__name__

    @property
    def topic(self) -> str:
        return self.module.split(".")[2]

    @property
    def words(self) -> words.Words:
        return words.of(self.topic, self.number)

    def experiment(self, key: str, *sentences: int) -> Callable[[type[Experiment]], type[Experiment]]:
        """Register the class below as an experiment; the order of experiments is that in which they are defined.

        Args:
            key: what tables, records and statistics know it by.
            sentences: the numbers of the sentences of the statement that it speaks of, of the core or of the fine print.

        Raises:
            ValueError: some of the sentences are core and some are fine print.
        """
        in_core = {number <= self.core for number in sentences or [0]}
        if len(in_core) > 1:
            raise ValueError(
                f"{self.number}: “{key}” must speak of the core (1 to {self.core}) or of the fine print, got {sentences}. "
                "Make two experiments of it."
            )

        def register(kind: type[Experiment]) -> type[Experiment]:
            experiment = kind()
            experiment.key, experiment.claim = key, self.words.claim(key)
            experiment.sentences, experiment.in_core = sentences, in_core == {True}
            self.experiments.append(experiment)
            return kind

        return register

    def misconception(self, key: str) -> Callable[[Subject], Subject]:
        """Register the function or class below as a wrong implementation."""

        def register(subject: Subject) -> Subject:
            self.misconceptions.append(Misconception(key, *self.words.misconception(key), subject))
            return subject

        return register

    def misconceptions_of(self, solution: Subject, changes: Mapping[str, dict[str, Any]]) -> None:
        """Register misconceptions that are a right solution but for a piece of it.

        Args:
            solution: a function with an option for each piece, or a class with a method for each.
            changes: key -> what is another there: keyword arguments of the function, or attributes of the class.
        """
        for key, change in changes.items():
            if isclass(solution):
                # Like a function's decorator it says what it was made from: that is where its source stands.
                subject = type(key, (solution,), change | {"__module__": solution.__module__, "__wrapped__": solution})
            else:
                subject = partial(solution, **change)
            self.misconception(key)(subject)

    @property
    def hints(self) -> list[str]:
        """A question; an observation to make; the formula or the name of the operation."""
        return self.words.hints

    @property
    def points(self) -> int:
        return sum(experiment.points for experiment in self.experiments)

    @property
    def subjects(self) -> dict[str, Subject]:
        """The reference under "reference", and every misconception under its key."""
        return {"reference": self.reference} | {wrong.key: wrong.subject for wrong in self.misconceptions}


def wrong_return(wanted: str, value: object) -> WrongReturn:
    """The exception to raise where a subject returned something else: "freeze must return a function", what came instead."""
    question = " Is there a return?" if value is None else ""
    return WrongReturn(f"{wanted}, got {expect.describe(value)}.{question}")


def expect_tensor(value: object, shape: tuple[int | str, ...], what: str) -> Tensor:
    """Pass on a tensor of that shape, or say what came instead; a string in `shape` stands for any size."""
    try:
        return expect.tensor(what, value, shape).as_subclass(Tensor)
    except (TypeError, ValueError) as error:
        question = " Is there a return?" if value is None else ""
        raise WrongReturn(str(error) + question) from None


def expect_names(value: object, wanted: str) -> list[str]:
    """Pass on strings in their order as a list, or say what came instead: "replace must return a list of names", got a set."""
    if isinstance(value, str | bytes | dict | set | frozenset | Tensor) or not isinstance(value, Iterable):
        raise wrong_return(wanted, value)
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise WrongReturn(f"{wanted}, got a list with {expect.describe(name)}.")
    return names


def expect_number(value: object, what: str) -> float:
    """Pass on a number (or a tensor that holds one) as a float, or say what came instead."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, str | bytes | bool | Tensor) or not (_is_number(value) or hasattr(value, "__float__")):
        raise wrong_return(f"{what} must be a number", value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WrongReturn(f"{what} must be a number, got {expect.describe(value)} ({error}).") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
