"""From facts to a verdict: compare a learner's facts with the truth table and name the mistake.

Diagnosis is an exact cover. A misconception explains a failed experiment only if its facts there equal the learner's,
and it is ruled out if it would have failed an experiment that passed. The fewest names that explain the most failed
experiments are named; where several choices do equally well, only the names common to all of them.
What stays unexplained is said, never guessed: where a failed experiment that no name explains shows the same fact as one
that is explained, the fact may have another cause in both, and nothing is named for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    outcome: str  # "passed" | "not yet" | "not seen" (because of another that failed) | "not attempted" | "error"
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
        """The worst of the findings; "core passed" if nothing but fine print is missing."""
        if all(finding.outcome == "passed" for finding in self.findings if finding.experiment.in_core):
            return "passed" if self.points == self.exercise.points else "core passed"
        outcomes = {finding.outcome for finding in self.findings}
        return next(word for word in ("not attempted", "error", "not yet") if word in outcomes)

    @property
    def core_passed(self) -> bool:
        """Whether the chapter can go on with what was written."""
        return self.outcome in ("passed", "core passed")

    @property
    def points(self) -> int:
        return sum(self.points_of(in_core) for in_core in (True, False))

    def points_of(self, in_core: bool) -> int:
        """The points for the core, or those for the fine print."""
        passed = (f.experiment for f in self.findings if f.outcome == "passed")
        return sum(experiment.points for experiment in passed if experiment.in_core == in_core)


def judge(exercise: Exercise, observations: Mapping[str, Observation], table: Table) -> Verdict:
    """Judge one exercise.

    Args:
        exercise: the exercise.
        observations: one per experiment, by the experiment's key.
        table: the exercise's truth table.
    """
    findings = _unseen_told_apart(
        [_find(experiment, observations[experiment.key], table[experiment.key]) for experiment in exercise.experiments]
    )
    named, explained = _diagnose(findings, observations, table)
    failed = [finding for finding in findings if finding.outcome == "not yet"]
    # A problem says in a sentence what is wrong, so beside a name it needs no other explanation.
    unexplained = any(f.experiment.key not in explained and (f.differs or not named) for f in failed)
    messages = tuple(dict.fromkeys(line for observation in observations.values() for line in observation.messages))
    return Verdict(exercise, findings, named, unexplained, messages)


def _find(experiment: Experiment, observation: Observation, row: Mapping[str, Facts | None]) -> Finding:
    problem = observation.problem
    if problem is not None:
        return Finding(experiment, OUTCOMES.get(problem.kind, "not yet"), problem=problem)
    expected, got = row["reference"], observation.facts
    differs = tuple((fact, expected[fact], got.get(fact)) for fact in expected if not equal(expected[fact], got.get(fact)))
    return Finding(experiment, "not yet" if differs else "passed", differs, notes=observation.notes)


def _unseen_told_apart(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings in which nothing was seen are "not seen" if another one says why."""
    blank = [bool(finding.differs) and all(got is None for _, _, got in finding.differs) for finding in findings]
    if not any(finding.outcome in ("not yet", "error") and not unseen for finding, unseen in zip(findings, blank, strict=True)):
        return tuple(findings)
    return tuple(
        replace(finding, outcome="not seen") if unseen else finding for finding, unseen in zip(findings, blank, strict=True)
    )


def _diagnose(
    findings: tuple[Finding, ...], observations: Mapping[str, Observation], table: Table
) -> tuple[tuple[str, ...], set[str]]:
    """The misconceptions to name, and the experiments that they explain."""
    failed = {}  # experiment -> the facts that were seen to differ
    for finding in findings:
        facts = {fact for fact, _, got in finding.differs if got is not None}
        if finding.outcome == "not yet" and facts:
            failed[finding.experiment.key] = facts
    passed = {f.experiment.key for f in findings if f.outcome == "passed"}
    explains: dict[str, set[str]] = {}
    for name in next(iter(table.values())).keys() - {"reference"}:
        wrong = {key for key in table if not _same(table[key][name], table[key]["reference"])}
        if wrong & passed:
            continue
        shown = {key for key in wrong & failed.keys() if _same(table[key][name], observations[key].facts)}
        if shown:
            explains[name] = shown
    sure = _fewest(explains)
    while sure:
        explained = set().union(*(explains[name] for name in sure))
        loose = set().union(*(facts for key, facts in failed.items() if key not in explained))
        doubtful = {name for name in sure if any(failed[key] & loose for key in explains[name])}
        if not doubtful:
            return tuple(sorted(sure)), explained
        sure -= doubtful
    return (), set()


def _fewest(explains: dict[str, set[str]]) -> set[str]:
    """The fewest names that together explain all that any of them does; of several such choices, what they have in common."""
    reachable = set().union(*explains.values())
    for size in range(1, len(explains) + 1):
        choices = [set(names) for names in combinations(explains, size)]
        covers = [names for names in choices if set().union(*(explains[name] for name in names)) == reachable]
        if covers:
            return set.intersection(*covers)
    return set()


def _same(facts: Facts | None, expected: Facts | None) -> bool:
    if facts is None or expected is None:
        return False
    return facts.keys() == expected.keys() and all(equal(facts[fact], expected[fact]) for fact in facts)
