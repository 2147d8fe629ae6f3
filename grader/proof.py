"""The proof that a check can be trusted, for any exercise: what `warmstart prove` and the tests run.

the stub                    "not attempted"
the reference               passes, and shows the facts of the truth table
right solutions             pass; they differ from each other in more than names and layout
each misconception          is rejected under its own name, and nothing else is said of it
the same, written again     likewise, where the facts of two misconceptions differ in one alone
two mistakes at once        at least one of the two is named, and no third
each sentence               has subjects that break it and no other; only experiments that speak of it reject them
facts                       are the same at a tenth of the tolerance and at ten times it; those of right solutions in
                            bfloat16 too, at its margins, if the exercise's statement asks for autocast
"""

import ast
import functools
import inspect
import multiprocessing
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path

from grader.checks import find
from grader.experiment import Exercise, Experiment, Subject, equal
from grader.golden import table_of
from grader.observe import differing_facts, observation, run
from grader.setting import Setting
from grader.variants import variants_of
from grader.verdict import Table, Verdict, judge


def faults(exercise: Exercise, seeds: Sequence[int]) -> list[str]:
    """Everything that is wrong with the checks of an exercise, one sentence each; an empty list is the proof."""
    variants, number, table = variants_of(exercise), exercise.number, table_of(exercise)
    correct, rewritten, combined = variants.CORRECT, variants.REWRITTEN, variants.COMBINED
    wrong = {m.key: m.subject for m in exercise.misconceptions}
    claims = [
        Claim(stub(number), "the stub", "not attempted"),
        Claim(exercise.reference, "the reference", "passed"),
        *(Claim(subject, f"the right solution {_name(subject)}", "passed") for subject in correct),
        *(Claim(subject, f"“{key}”", "not yet", {key}) for key, subject in wrong.items()),
        *(Claim(subject, f"“{key}” as {_name(subject)}", "not yet", {key}) for key, subject in rewritten.items()),
        *(Claim(subject, f"{_name(subject)}, two mistakes", "not yet", keys, any_of_them=True) for keys, subject in combined),
        *(
            Claim(subject, f"{_name(subject)}, which breaks sentence {sentence},", "not yet", breaks=sentence)
            for sentence, subjects in variants.BROKEN.items()
            for subject in subjects
        ),
    ]
    faults_found = [
        *_counts(exercise, correct, rewritten, combined),
        *_alike([exercise.reference, *correct]),
        *(f"“{key}”: {fault}" for key in wrong if key in rewritten for fault in _alike([wrong[key], rewritten[key]])),
        *_equal_facts(exercise, table),
        *_written_once(exercise, table, rewritten),
        *_unbroken(exercise, variants.BROKEN),
    ]
    shown: dict[str, tuple[str, list[int]]] = {}
    for claim in claims:
        for seed in seeds:
            for fault, why in _not_as_claimed(exercise, table, claim, seed):
                shown.setdefault(fault, (why, []))[1].append(seed)
        if claim.subject is exercise.reference and any(fault.startswith(claim.label) for fault in shown):
            faults_found.clear()  # these are consequences, as all that would follow
            break
    faults_found += [f"{fault}, with seed {', '.join(map(str, failed))}: {why}" for fault, (why, failed) in shown.items()]
    return [f"{number}: {fault}" for fault in faults_found]


def all_faults(numbers: Sequence[str], seeds: Sequence[int], processes: int) -> Iterator[str]:
    """The faults of some exercises, one exercise after the other."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for faults_of_one in pool.map(_faults_of, numbers, [seeds] * len(numbers)):
            yield from faults_of_one


def _faults_of(number: str, seeds: Sequence[int]) -> list[str]:
    return faults(find(number), seeds)


def own_seed(exercise: Exercise) -> int:
    """A seed made from the source files of an exercise: changed code meets new inputs, unchanged code the same ones."""
    modules = {exercise.reference.__module__}
    _collect_modules(variants_of(exercise).__name__, modules)
    _collect_modules(exercise.module, modules)
    files = [sys.modules[module].__file__ for module in sorted(modules)]
    text = "".join(Path(file).read_text(encoding="utf-8") for file in files)  # as text: the same with any line ends
    return int.from_bytes(sha256(text.encode()).digest()[:4]) >> 1


def _collect_modules(module: str, collected: set[str]) -> None:
    """Add a module of checks or variants, and those of them that it takes something from."""
    if module in collected or not module.startswith(("grader.checks.", "grader.variants.")):
        return
    collected.add(module)
    for value in vars(sys.modules[module]).values():
        _collect_modules(value.__name__ if inspect.ismodule(value) else str(getattr(value, "__module__", "")), collected)


def stub(number: str) -> Subject:
    """What a learner starts from."""

    def not_attempted(*_, **__):
        raise NotImplementedError(f"Exercise {number}")

    return not_attempted


@dataclass(frozen=True)
class Claim:
    """What the verdict on a subject must be."""

    subject: Subject
    label: str
    outcome: str
    names: Collection[str] = ()
    any_of_them: bool = False  # whether some of the names will do
    breaks: int = 0  # the sentence of the statement that it breaks, whatever it is called


def _not_as_claimed(exercise: Exercise, table: Table, claim: Claim, seed: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the verdict on a subject, and facts that rounding could change; each with its details."""
    observations = {}
    for experiment in exercise.experiments:
        ran = run(experiment, claim.subject, seed, exercise.number)
        observations[experiment.key] = observation(experiment, ran, seed)
        if (facts := observations[experiment.key].facts) is not None:
            for fact in differing_facts(experiment, ran.raw, seed, facts):
                yield f"{claim.label} must keep its facts, and does not: {fact}", experiment.key
        if exercise.autocast and claim.outcome == "passed":
            yield from _not_kept_in_autocast(exercise, experiment, table, claim, seed)
    verdict = judge(exercise, observations, table)
    if claim.breaks:
        yield from _not_rejected_for(claim, verdict)
        return
    named, wanted = set(verdict.named), set(claim.names)
    agrees = named == wanted and not verdict.unexplained
    if claim.any_of_them:
        agrees = bool(named) and named <= wanted
    outcome = "not yet" if verdict.outcome == "core passed" else verdict.outcome  # rejected, be it for fine print alone
    if outcome != claim.outcome or not agrees:
        expected = f"{claim.outcome!r}{f' as {sorted(wanted)}' if wanted else ''}"
        got = f"{verdict.outcome!r} as {sorted(named)}{' and something unexplained' if verdict.unexplained else ''}"
        why = [(f.experiment.key, f.differs, f.problem) for f in verdict.findings if f.outcome != "passed"]
        yield f"{claim.label} must be {expected}, got {got}", f"{why}"


def _not_rejected_for(claim: Claim, verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Whether a broken subject is accepted, or rejected by experiments that do not speak of the sentence that it breaks."""
    failed = [f for f in verdict.findings if f.outcome not in ("passed", "not seen")]
    if not failed:
        yield f"{claim.label} must be rejected, and passes", ""
    for finding in failed:
        if claim.breaks not in finding.experiment.sentences:
            key, said = finding.experiment.key, finding.experiment.sentences
            yield f"{claim.label} must pass “{key}”, which speaks of {said}", f"{finding.differs}, {finding.problem}"


def _not_kept_in_autocast(
    exercise: Exercise, experiment: Experiment, table: Table, claim: Claim, seed: int
) -> Iterator[tuple[str, str]]:
    half = Setting("cpu", "bfloat16")
    ran = run(experiment, claim.subject, seed, exercise.number, half)
    if ran.problem is not None:
        yield f"{claim.label} must work in autocast: {ran.problem.message}", experiment.key
        return
    for fact in differing_facts(experiment, ran.raw, seed, table[experiment.key]["reference"], half):
        yield f"{claim.label} must keep its facts in autocast, and does not: {fact}", experiment.key


def _counts(exercise: Exercise, correct: list, rewritten: dict, combined: list) -> Iterator[str]:
    for what, there, needed in (
        ("right solutions", len(correct), 3),
        ("misconceptions", len(exercise.misconceptions), 4),
        # What two mistakes do together is one fact too many where there is one experiment to tell them apart.
        ("subjects with two mistakes", len(combined), 1 if len(exercise.experiments) > 1 else 0),
    ):
        if there < needed:
            yield f"{there} {what}, at least {needed} are needed"
    known = {m.key for m in exercise.misconceptions}
    for key in (set(rewritten) | set().union(*(keys for keys, _ in combined))) - known:
        yield f"variants name “{key}”, which is no misconception of the exercise"
    for m in exercise.misconceptions:
        if not m.source or not m.hint.rstrip().endswith((".", "?", ":")):
            yield f"“{m.key}” needs a source and a hint that is a sentence"


def _unbroken(exercise: Exercise, broken: dict[int, list[Subject]]) -> Iterator[str]:
    """Sentences of the statement that no experiment speaks of, or that no subject breaks."""
    spoken_of = {sentence for experiment in exercise.experiments for sentence in experiment.sentences}
    for experiment in exercise.experiments:
        if not experiment.sentences:
            yield f"“{experiment.key}” must say of which sentences of the statement it speaks"
    for sentence in sorted(spoken_of | broken.keys() | set(range(1, exercise.core + 1))):
        if sentence not in spoken_of:
            yield f"no experiment speaks of sentence {sentence}"
        if not broken.get(sentence):
            yield f"no subject breaks sentence {sentence}"


def _equal_facts(exercise: Exercise, table: Table) -> Iterator[str]:
    """Two rows of the truth table that no experiment tells apart."""
    for first, second in combinations(exercise.subjects, 2):
        if not _differing(table, first, second):
            yield f"“{second}” and “{first}” have equal facts"


def _written_once(exercise: Exercise, table: Table, rewritten: dict) -> Iterator[str]:
    """Pairs of misconceptions that one fact alone tells apart, and of which none is written again in other words."""
    for first, second in combinations([m.key for m in exercise.misconceptions], 2):
        if len(_differing(table, first, second)) == 1 and not rewritten.keys() & {first, second}:
            yield f"“{first}” and “{second}” differ in one fact: one of the two must be written again in other words"


def _differing(table: Table, first: str, second: str) -> list[tuple[str, str]]:
    """The facts of two rows that differ, as (experiment, fact); an experiment that one of them has no facts in counts once."""
    differing = []
    for experiment, row in table.items():
        if row[first] is None or row[second] is None:
            differing += [(experiment, "")] * (row[first] != row[second])
        else:
            differing += [(experiment, fact) for fact, value in row[first].items() if not equal(value, row[second][fact])]
    return differing


def _alike(subjects: list[Subject]) -> Iterator[str]:
    """Pairs of subjects that are the same up to names, numbers and layout."""
    for first, second in combinations(subjects, 2):
        if _shape(first) == _shape(second):
            yield f"{_name(second)} and {_name(first)} are the same solution in other words"


def _tree(subject: Subject) -> ast.AST:
    if isinstance(subject, functools.partial):
        subject = subject.func
    code = subject if inspect.isfunction(subject) or inspect.isclass(subject) else type(subject)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(code))))
    tree.body[0].decorator_list = []  # `@exercise.misconception(...)` says nothing of what is done
    return tree


def _shape(subject: Subject) -> str:
    """The syntax tree with every name, argument and constant made the same."""
    tree = _tree(subject)
    for node in ast.walk(tree):
        for field in ("id", "arg", "name", "value"):
            if isinstance(getattr(node, field, None), str | int | float):
                setattr(node, field, "_")
    return ast.dump(tree)


def _name(subject: Subject) -> str:
    return getattr(subject, "__name__", type(subject).__name__)
