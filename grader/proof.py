"""The proof that a check can be trusted, for any exercise: what `warmstart prove` and the tests run.

the stub                    "not attempted"
the reference               passes, and shows the facts of the truth table
right solutions             pass; they differ from each other in more than names and layout
each misconception          is rejected under its own name, and nothing else is said of it
the same, written again     likewise
two mistakes at once        at least one of the two is named, and no third
"""

import ast
import inspect
import textwrap
import time
from collections.abc import Iterator
from importlib import import_module

from grader.experiment import Exercise, Subject, equal
from grader.golden import load
from grader.observe import observe
from grader.verdict import Table, Verdict, judge

FEWER_SEEDS = 3  # where one verdict takes longer than SLOW seconds of the CPU
SLOW = 0.2


def faults(topic: str, exercise: Exercise, seeds: int = 20) -> list[str]:
    """Everything that is wrong with the checks of an exercise, one sentence each; an empty list is the proof."""
    variants, number = import_module(f"grader.variants.{topic}"), exercise.number
    table = load(topic)[number]
    right, again, both = variants.RIGHT[number], variants.AGAIN[number], variants.BOTH[number]
    wrong = {m.name: m.subject for m in exercise.misconceptions}
    return [
        f"{number}: {fault}"
        for fault in (
            *_counts(exercise, right, again, both),
            *_alike([exercise.reference, *right]),
            *_alike_pairs({name: (wrong[name], subject) for name, subject in again.items() if name in wrong}),
            *_equal_facts(exercise, table),
            *_wrong_verdicts(exercise, table, stub(number), "the stub", seeds, outcome="not attempted"),
            *_wrong_verdicts(exercise, table, exercise.reference, "the reference", seeds, outcome="passed"),
            *(
                f
                for s in right
                for f in _wrong_verdicts(exercise, table, s, f"the right solution {_name(s)}", seeds, outcome="passed")
            ),
            *(f for n, s in wrong.items() for f in _wrong_verdicts(exercise, table, s, f"“{n}”", seeds, names={n})),
            *(
                f
                for n, s in again.items()
                for f in _wrong_verdicts(exercise, table, s, f"“{n}” as {_name(s)}", seeds, names={n})
            ),
            *(
                f
                for n, s in both
                for f in _wrong_verdicts(exercise, table, s, f"{_name(s)}, two mistakes", seeds, names=n, some=True)
            ),
        )
    ]


def stub(number: str) -> Subject:
    """What a learner starts from."""

    def not_attempted(*_, **__):
        raise NotImplementedError(f"Exercise {number}")

    return not_attempted


def verdict_on(exercise: Exercise, subject: Subject, seed: int, table: Table) -> Verdict:
    """The verdict on one subject with one seed."""
    seen = {experiment.name: observe(experiment, subject, seed, exercise.number) for experiment in exercise.experiments}
    return judge(exercise, seen, table)


def _counts(exercise: Exercise, right: list, again: dict, both: list) -> Iterator[str]:
    for what, there, needed in (
        ("right solutions", len(right), 3),
        ("misconceptions", len(exercise.misconceptions), 4),
        ("misconceptions written again", len(again), 2),
        ("subjects with two mistakes", len(both), 1),
    ):
        if there < needed:
            yield f"{there} {what}, at least {needed} are needed"
    known = {m.name for m in exercise.misconceptions}
    for name in (set(again) | set().union(*(names for names, _ in both))) - known:
        yield f"variants name “{name}”, which is no misconception of the exercise"
    for m in exercise.misconceptions:
        if not m.source or not m.hint.rstrip().endswith((".", "?", ":")):
            yield f"“{m.name}” needs a source and a hint that is a sentence"


def _equal_facts(exercise: Exercise, table: Table) -> Iterator[str]:
    """Two rows of the truth table that no experiment tells apart."""
    names = list(exercise.subjects)
    for position, one in enumerate(names):
        for other in names[:position]:
            if all(
                row[one] is not None
                and row[other] is not None
                and all(equal(row[one][fact], row[other][fact]) for fact in row[one])
                for experiment in exercise.experiments
                for row in (table[experiment.name],)
            ):
                yield f"“{one}” and “{other}” have equal facts"


def _wrong_verdicts(
    exercise: Exercise,
    table: Table,
    subject: Subject,
    who: str,
    seeds: int,
    *,
    outcome: str = "not yet",
    names: set[str] = frozenset(),
    some: bool = False,
) -> Iterator[str]:
    seed, tried = 0, seeds
    while seed < tried:
        started = time.process_time()  # a busy machine must not mean fewer seeds
        verdict = verdict_on(exercise, subject, seed, table)
        if seed == 0 and time.process_time() - started > SLOW:
            tried = min(seeds, FEWER_SEEDS)
        named = set(verdict.named)
        agrees = bool(named) and named <= names if some else named == names and not verdict.unexplained
        if verdict.outcome != outcome or not agrees:
            wanted = f"{outcome!r}{f' as {sorted(names)}' if names else ''}"
            got = f"{verdict.outcome!r} as {sorted(named)}{' and something unexplained' if verdict.unexplained else ''}"
            why = [(f.experiment.name, f.differs, f.problem) for f in verdict.findings if f.outcome != "passed"]
            yield f"{who} must be {wanted} with seed {seed}, got {got}: {why}"
        seed += 1


def _alike(subjects: list[Subject]) -> Iterator[str]:
    """Pairs of subjects that are the same up to names and layout, or that call the same operations."""
    shapes = [(_name(subject), _shape(subject), _operations(subject)) for subject in subjects]
    for position, (one, shape, operations) in enumerate(shapes):
        for other, other_shape, other_operations in shapes[:position]:
            if shape == other_shape or operations == other_operations:
                yield f"{one} and {other} are the same solution in other words"


def _alike_pairs(pairs: dict[str, tuple[Subject, Subject]]) -> Iterator[str]:
    for name, pair in pairs.items():
        for fault in _alike(list(pair)):
            yield f"“{name}”: {fault}"


def _tree(subject: Subject) -> ast.AST:
    code = subject if inspect.isfunction(subject) or inspect.isclass(subject) else type(subject)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(code))))
    tree.body[0].decorator_list = []  # `@misconception(...)` says nothing of what is done
    return tree


def _shape(subject: Subject) -> str:
    """The syntax tree with every name, argument and constant made the same."""
    tree = _tree(subject)
    for node in ast.walk(tree):
        for field in ("id", "arg", "name", "value"):
            if isinstance(getattr(node, field, None), str | int | float):
                setattr(node, field, "_")
    return ast.dump(tree)


def _operations(subject: Subject) -> frozenset[str]:
    """The names of everything that is called, and of every operator."""
    operations = set()
    for node in ast.walk(_tree(subject)):
        if isinstance(node, ast.Call):
            operations.add(node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "call"))
        elif isinstance(node, ast.operator):
            operations.add(type(node).__name__)
    return frozenset(operations)


def _name(subject: Subject) -> str:
    return getattr(subject, "__name__", type(subject).__name__)
