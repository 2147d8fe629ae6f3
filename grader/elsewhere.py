"""Whether a solution that is right on the CPU works on a GPU too: what a check adds, and what costs no points.

On a machine with a GPU the learner's code runs there. Without one it runs with tensors that only say they are on one
(`grader.pretend`), which finds most of what a GPU would refuse. Grading must not depend on the grader's machine, so
nothing of this changes points or outcome.
"""

from dataclasses import dataclass

from grader import golden
from grader.experiment import Exercise, Experiment, Subject, equal
from grader.observe import observe
from grader.setting import GPU, PRETENDED, Setting
from grader.verdict import Table, Verdict


@dataclass(frozen=True)
class Elsewhere:
    """What was seen away from the CPU and from float32."""

    right: frozenset[str] = frozenset()  # experiments that passed on a real GPU
    wrong: frozenset[str] = frozenset()  # experiments that passed on the CPU alone
    on_a_gpu: tuple[str, ...] = ()  # a sentence for the learner each
    in_autocast: tuple[str, ...] = ()


NOWHERE = Elsewhere()


def look(exercise: Exercise, thing: Subject, verdict: Verdict, table: Table, seed: int) -> Elsewhere:
    """Run the experiments that passed once more: on the GPU if there is one, else on a pretended one; and in autocast.

    In autocast only if the exercise's statement asks for it, on the GPU if there is one, else on the CPU.
    """
    gpu = GPU if GPU.there else PRETENDED
    passed = [finding.experiment for finding in verdict.findings if finding.outcome == "passed"]
    tried = [experiment for experiment in passed if gpu == GPU or experiment.pretends]
    wrong, untold = _problems(exercise, thing, tried, table, seed, gpu)
    right = {experiment.name for experiment in tried if gpu == GPU} - wrong.keys() - untold
    half = Setting("cuda" if gpu == GPU else "cpu", "bfloat16")
    rounded, _ = _problems(exercise, thing, passed, table, seed, half) if exercise.autocast else ({}, set())
    rounded = {name: problem for name, problem in rounded.items() if name not in wrong}  # said once
    return Elsewhere(frozenset(right), frozenset(wrong), _once(wrong), _once(rounded))


def _problems(
    exercise: Exercise, thing: Subject, experiments: list[Experiment], table: Table, seed: int, setting: Setting
) -> tuple[dict[str, str], set[str]]:
    """Experiment -> what is wrong with the subject in that setting; and those in which the reference is wrong, too."""
    found, untold = {}, set()
    for experiment in experiments:
        arguments = (table, seed, setting)
        problem = _problem(exercise, experiment, thing, *arguments)
        if problem and _problem(exercise, experiment, exercise.reference, *arguments):
            untold.add(experiment.name)
        elif problem:
            found[experiment.name] = problem
    return found, untold


def _problem(
    exercise: Exercise, experiment: Experiment, subject: Subject, table: Table, seed: int, setting: Setting
) -> str | None:
    """What is wrong there, in a sentence. Of the pretended GPU only what a real one would refuse counts."""
    seen = observe(experiment, subject, seed, exercise.number, setting)
    if seen.problem is not None:
        told = setting != PRETENDED or seen.problem.kind == "refused"
        return seen.problem.message.rstrip(".") if told else None
    if setting == PRETENDED:
        return None
    expected = table[experiment.name]["reference"]
    tolerances = golden.tolerances(exercise.number, experiment.name, setting)
    compared = (fact for fact in expected if tolerances.get(fact, 0) is not None)
    differs = (fact for fact in compared if not equal(expected[fact], seen.facts.get(fact)))
    return next((f"{fact}: {seen.facts.get(fact)}. In float32 on the CPU: {expected[fact]}" for fact in differs), None)


def _once(problems: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(problems.values()))
