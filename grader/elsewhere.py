"""Whether a solution that is right on the CPU works on a GPU too: what a check adds, and what costs no points.

On a machine with a GPU the learner's code runs there. Without one it runs with tensors that only say they are on one
(`grader.pretend`), which finds most of what a GPU would refuse. Grading must not depend on the grader's machine, so
nothing of this changes points or outcome.
"""

from dataclasses import dataclass

import torch

from grader.experiment import Exercise, Experiment, Subject, equal
from grader.observe import observe
from grader.setting import GPU, PRETENDED, Setting
from grader.verdict import Observation, Table, Verdict


@dataclass(frozen=True)
class Elsewhere:
    """What was seen away from the CPU."""

    right: frozenset[str] = frozenset()  # experiments that passed on a real GPU
    wrong: frozenset[str] = frozenset()  # experiments that passed on the CPU alone
    problems: tuple[str, ...] = ()  # a sentence for the learner each


NOWHERE = Elsewhere()


def look(exercise: Exercise, thing: Subject, verdict: Verdict, table: Table, seed: int) -> Elsewhere:
    """Run the experiments that passed on the CPU once more, on the GPU if there is one, else on a pretended one."""
    setting = GPU if torch.cuda.is_available() else PRETENDED
    passed = [finding.experiment for finding in verdict.findings if finding.outcome == "passed"]
    problems: dict[str, str] = {}
    right = set()
    for experiment in passed:
        if setting == PRETENDED and not experiment.pretends:
            continue
        problem = _problem(experiment, observe(experiment, thing, seed, exercise.number, setting), table, setting)
        if problem is None and setting == GPU:
            right.add(experiment.name)
        # Where the reference fails as well, it is the check or the machine that is at fault.
        elif problem and not _problem(
            experiment, observe(experiment, exercise.reference, seed, exercise.number, setting), table, setting
        ):
            problems[experiment.name] = problem
    return Elsewhere(frozenset(right), frozenset(problems), tuple(dict.fromkeys(problems.values())))


def _problem(experiment: Experiment, seen: Observation, table: Table, setting: Setting) -> str | None:
    """What is wrong there, in a sentence. Of the pretended GPU only what a real one would refuse counts."""
    if seen.problem is not None:
        told = setting == GPU or seen.problem.kind == "refused"
        return f"it works on the CPU only: {seen.problem.message}" if told else None
    if setting == PRETENDED:
        return None
    expected = table[experiment.name]["reference"]
    differs = (fact for fact in expected if not equal(expected[fact], seen.facts.get(fact)))
    return next((f"{fact}: {seen.facts.get(fact)}, and on the CPU: {expected[fact]}" for fact in differs), None)
