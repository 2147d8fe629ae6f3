"""From facts to a verdict: compare a learner's facts with the truth table and name the mistake.

Diagnosis is an exact cover. A misconception explains a failed experiment only if its facts there equal the learner's,
and it is ruled out if it would have failed an experiment that passed. The fewest names that explain the most failed
experiments are named; where several choices do equally well, only the names common to all of them.
What stays unexplained is said, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from grader.experiment import Exercise, Experiment, Fact, equal

Facts = dict[str, Fact]
Table = Mapping[str, Mapping[str, Facts | None]]  # experiment -> "reference" or a misconception's key -> facts


OUTCOMES = {"not attempted": "not attempted", "needs": "not attempted", "raised": "error", "time": "error"}  # of problems


@dataclass(frozen=True)
class Problem:
    """Why an experiment has no facts."""

    kind: str  # "not attempted", "needs", "raised", "returned", "not finite", "changed inputs", "changed state", "time";
    # "refused" by a GPU, real or fake; "not judged", since it is the reference or torch itself was changed
    message: str  # one sentence for the learner


@dataclass(frozen=True)
class Observation:
    """What one experiment saw of one subject: facts, or the problem that prevented them."""

    facts: Facts | None
    problem: Problem | None = None
    notes: tuple[tuple[str, str], ...] = ()  # (fact, magnitude to show beside it)
    messages: tuple[str, ...] = ()  # what the subject printed, warned or wrote to stderr, shortened


@dataclass(frozen=True)
class Finding:
    """The verdict on one experiment."""

    experiment: Experiment
    outcome: str  # "passed" | "not yet" | "not attempted" | "error"
    differs: tuple[tuple[str, Fact, Fact], ...] = ()  # (fact, expected, got)
    problem: Problem | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The verdict on one exercise."""

    exercise: Exercise
    findings: tuple[Finding, ...]
    named: tuple[str, ...]  # keys of misconceptions
    unexplained: bool  # whether a failed experiment with facts is explained by none of them
    messages: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        outcomes = {finding.outcome for finding in self.findings}
        return next(word for word in ("not attempted", "error", "not yet", "passed") if word in outcomes)

    @property
    def points(self) -> int:
        return sum(finding.experiment.points for finding in self.findings if finding.outcome == "passed")


def judge(exercise: Exercise, observations: Mapping[str, Observation], table: Table) -> Verdict:
    """Judge one exercise.

    Args:
        exercise: the exercise.
        observations: one per experiment, by the experiment's key.
        table: the exercise's truth table.
    """
    findings = tuple(
        _find(experiment, observations[experiment.key], table[experiment.key]) for experiment in exercise.experiments
    )
    named, explained = _diagnose(findings, observations, table)
    # What could not be observed because of a named mistake needs no explanation of its own.
    observed = {
        f.experiment.key for f in findings if f.outcome == "not yet" and not all(got is None for _, _, got in f.differs)
    }
    unexplained = bool(observed - explained) or (not named and any(f.outcome == "not yet" for f in findings))
    messages = tuple(dict.fromkeys(line for observation in observations.values() for line in observation.messages))
    return Verdict(exercise, findings, named, unexplained, messages)


def _find(experiment: Experiment, observation: Observation, row: Mapping[str, Facts | None]) -> Finding:
    problem = observation.problem
    if problem is not None:
        return Finding(experiment, OUTCOMES.get(problem.kind, "not yet"), problem=problem)
    expected, got = row["reference"], observation.facts
    differs = tuple((fact, expected[fact], got.get(fact)) for fact in expected if not equal(expected[fact], got.get(fact)))
    return Finding(experiment, "not yet" if differs else "passed", differs, notes=observation.notes)


def _diagnose(
    findings: tuple[Finding, ...], observations: Mapping[str, Observation], table: Table
) -> tuple[tuple[str, ...], set[str]]:
    """The misconceptions to name, and the experiments that they explain."""
    failed = {f.experiment.key for f in findings if f.outcome == "not yet" and f.differs}
    differs = {f.experiment.key: f.differs for f in findings}
    passed = {f.experiment.key for f in findings if f.outcome == "passed"}
    explains: dict[str, set[str]] = {}
    for name in next(iter(table.values())).keys() - {"reference"}:
        wrong = {key for key in table if not _same(table[key][name], table[key]["reference"])}
        if wrong & passed:
            continue
        shown = {
            key
            for key in wrong & failed
            if _same(table[key][name], observations[key].facts) and any(got is not None for _, _, got in differs[key])
        }
        if shown:
            explains[name] = shown
    if not explains:
        return (), set()
    reachable = set().union(*explains.values())
    for size in range(1, len(explains) + 1):
        covers = [
            set(names) for names in combinations(explains, size) if set().union(*(explains[n] for n in names)) == reachable
        ]
        if covers:
            sure = set.intersection(*covers)
            return tuple(sorted(sure)), set().union(*(explains[name] for name in sure)) if sure else set()
    raise AssertionError("all candidates together reach what they reach")


def _same(facts: Facts | None, expected: Facts | None) -> bool:
    if facts is None or expected is None:
        return False
    return facts.keys() == expected.keys() and all(equal(facts[fact], expected[fact]) for fact in facts)
