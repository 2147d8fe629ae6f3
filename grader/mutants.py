"""How many small mistakes the checks notice: what `warmstart mutants` runs, and the table in docs/proofs.md.

Each mutant of an author's solution (`grader.mutation`) runs through the exercise's experiments, with the notebook's seed, in a
forked process of its own: one that loops for ever or crashes its process is rejected, and costs the others nothing.
Mutants that are no mistakes are declared, in `EQUIVALENT` of `grader.variants`.
"""

import hashlib
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from grader.checks import TOPICS, exercises, find
from grader.experiment import Exercise, Subject
from grader.golden import table_of
from grader.mutation import Mutant, Solution, mutants, solution
from grader.observe import observe
from grader.variants import variants_of
from grader.verdict import Table, judge
from helpers.files import write_text

PAGE = Path("docs/proofs.md")
LONGEST = 600  # seconds that the author's solution may take
ENVIRONMENT = {  # of the processes that are started here
    "OMP_NUM_THREADS": "1",  # no thread of torch's is there when they fork
    "MALLOC_PERTURB_": "193",  # a tensor that nobody filled holds 0.19, so that no outcome is a matter of chance (Linux)
}
REJECTED = ("named", "described", "raised", "out of time")


class SolutionRejected(ValueError):
    """The author's solution does not pass its own check, so nothing can be learnt from its mutants."""


@dataclass(frozen=True)
class Count:
    """What became of mutants, as a row of the table has it."""

    mutants: int
    rejected: int
    raised: int  # of the rejected, those in which an experiment ended with an error or out of time: not much of a proof
    equivalent: int

    def __add__(self, other: "Count") -> "Count":
        return Count(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def score(self) -> float:
        """The part of those that are mistakes that is rejected."""
        return self.rejected / max(1, self.mutants - self.equivalent)

    @property
    def score_without_raised(self) -> float:
        return (self.rejected - self.raised) / max(1, self.mutants - self.equivalent - self.raised)


@dataclass(frozen=True)
class Outcomes:
    """The mutants of one exercise that were run, each with "survived" or a word of `REJECTED`."""

    number: str
    possible: tuple[Mutant, ...]
    ran: tuple[tuple[Mutant, str], ...]

    def count(self, equivalent: Mapping[str, str]) -> Count:
        outcomes = Counter(outcome for _, outcome in self.ran)
        declared = sum(outcome == "survived" and mutant.change in equivalent for mutant, outcome in self.ran)
        raised = outcomes["raised"] + outcomes["out of time"]
        return Count(len(self.ran), sum(outcomes[word] for word in REJECTED), raised, declared)

    def out_of_date(self, equivalent: Mapping[str, str]) -> Iterator[str]:
        """What is declared equivalent and is not."""
        outcome_of = {mutant.change: outcome for mutant, outcome in self.ran}
        for change in equivalent:
            if change not in {mutant.change for mutant in self.possible}:
                yield f"declared equivalent, but no mutant any more: {change}"
            elif outcome_of.get(change) in REJECTED:
                yield f"declared equivalent, but rejected ({outcome_of[change]}): {change}"


def measure(root: Path, numbers: Sequence[str], *, cap: int, processes: int, write: bool) -> bool:
    """Run the mutants of exercises, print what became of them, and say whether all is at least as it was.

    Args:
        root: the course's repository.
        numbers: the exercises.
        cap: how many mutants of an exercise are run at most, always the same ones.
        processes: how many exercises run at a time, at most.
        write: whether to put the counts into the table of docs/proofs.md. A row stays if `why_not_written` says so.

    Returns:
        False if a score is below the one in the table, a declaration is out of date, or a count is not written.
    """
    declared = {number: equivalent_of(number) for number in numbers}
    page = (root / PAGE).read_text(encoding="utf-8")
    committed, good = counts_in(page), True
    counts = dict(committed)
    os.environ |= ENVIRONMENT
    with ProcessPoolExecutor(min(processes, len(numbers)), multiprocessing.get_context("spawn")) as pool:
        for outcomes in pool.map(outcomes_of, [root] * len(numbers), numbers, [cap] * len(numbers)):
            number, equivalent, before = outcomes.number, declared[outcomes.number], committed.get(outcomes.number)
            count = outcomes.count(equivalent)
            good &= not fell(count, before) and not [*outcomes.out_of_date(equivalent)]
            print("\n".join(report(outcomes, equivalent, before)), flush=True)
            if write and (reason := why_not_written(outcomes, count, before)):
                good = False
                print(f"     not written: {reason}", flush=True)
            elif write:
                counts[number] = count
                write_text(root / PAGE, with_table(page, counts))
    return good


def list_mutants(root: Path, numbers: Sequence[str]) -> None:
    """Print the mutants of exercises."""
    for number in numbers:
        original = solution_of(root, number)
        possible = mutants(original.code, original.above)
        print("\n".join([f"{number}  {len(possible)} mutants", *(line for mutant in possible for line in lines_of(mutant))]))


def outcomes_of(root: Path, number: str, cap: int) -> Outcomes:
    """Make the mutants of an exercise and run them.

    Raises:
        SolutionRejected: the author's solution itself is rejected, or its process crashes as a mutant's would.
    """
    exercise = find(number)
    original, table = solution_of(root, number), table_of(exercise)

    def outcome_of(code: str) -> str:
        return outcome_on(exercise, table, lambda: original.define(code))

    outcome_of(original.code)  # here, so that no forked process has to import what it needs
    started = time.monotonic()
    if (outcome := in_forked_process(partial(outcome_of, original.code), LONGEST)) != "survived":
        raise SolutionRejected(
            f"the author's solution of {number} must pass its check in a forked process, got {outcome!r}. Run "
            f"`warmstart prove {number}`: if that finds no fault, this platform cannot fork a process that uses torch."
        )
    limit = 60 + 5 * (time.monotonic() - started)
    possible = mutants(original.code, original.above)
    ran = [(mutant, in_forked_process(partial(outcome_of, mutant.code), limit)) for mutant in sample(possible, cap)]
    return Outcomes(number, tuple(possible), tuple(ran))


def solution_of(root: Path, number: str) -> Solution:
    """The author's solution of an exercise."""
    exercise = find(number)
    (script,) = (root / "solutions").glob(f"*_{exercise.topic}/*_{exercise.topic}.py")
    return solution(script, number, exercise.name)


def equivalent_of(number: str) -> Mapping[str, str]:
    """The mutants of an exercise that are no mistakes: change -> the reason."""
    return variants_of(find(number)).EQUIVALENT


def sample(possible: Sequence[Mutant], cap: int) -> list[Mutant]:
    """At most `cap` of the mutants, in their order; which ones depends on nothing but their code."""
    chosen = sorted(possible, key=lambda mutant: hashlib.md5(mutant.code.encode()).digest())[:cap]
    return [mutant for mutant in possible if mutant in chosen]


def outcome_on(exercise: Exercise, table: Table, define: Callable[[], Subject]) -> str:
    """What the check makes of what `define` returns: "survived", or how it is rejected, a word of `REJECTED`."""
    try:
        subject = define()
    except Exception:
        return "raised"
    observations = {}
    for experiment in exercise.experiments:
        observations[experiment.key] = observe(experiment, subject, 0, exercise.number)
        if observations[experiment.key].problem and observations[experiment.key].problem.kind == "time":
            return "out of time"  # the other experiments would be, too
    verdict = judge(exercise, observations, table)
    if verdict.outcome == "passed":
        return "survived"
    if any(finding.outcome == "error" for finding in verdict.findings):
        return "raised"
    return "named" if verdict.named else "described"


def in_forked_process(work: Callable[[], str], seconds: float) -> str:
    """What `work` returns, found in a forked process; "raised" if that ends without an answer."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else "out of time"
    except EOFError:
        return "raised"
    finally:
        process.kill()
        process.join()
        receiver.close()


def report(outcomes: Outcomes, equivalent: Mapping[str, str], before: Count | None) -> Iterator[str]:
    """The lines that are printed about one exercise; `before` is its row in the table."""
    count, words = outcomes.count(equivalent), Counter(outcome for _, outcome in outcomes.ran)
    survivors = [mutant for mutant, outcome in outcomes.ran if outcome == "survived" and mutant.change not in equivalent]
    possible = f" ({len(outcomes.possible)} are possible)" if len(outcomes.possible) > count.mutants else ""
    kinds = ", ".join(f"{words[word]} {word}" for word in REJECTED)
    yield f"{outcomes.number}  {count.mutants} mutants{possible}: {count.rejected} rejected ({kinds})"
    yield f"     {count.equivalent} equivalent, {len(survivors)} survived"
    table = "it is not in the table yet" if before is None else f"the table has {scores(before)}"
    yield f"     score {scores(count)}; {table}{': IT FELL' if fell(count, before) else ''}"
    for mutant in survivors:
        yield from lines_of(mutant)
    yield from (f"     {line}" for line in outcomes.out_of_date(equivalent))


def fell(count: Count, before: Count | None) -> bool:
    """Whether the score is below the one in the table."""
    return before is not None and count.score < before.score


def why_not_written(outcomes: Outcomes, count: Count, before: Count | None) -> str | None:
    """Why the table keeps the row that it has, if it does: it guards the score."""
    if len(outcomes.ran) < len(outcomes.possible):
        return f"only {len(outcomes.ran)} of {len(outcomes.possible)} mutants ran. Use --cap {len(outcomes.possible)}."
    if fell(count, before):
        return f"the score fell. To accept that, delete the row from {PAGE.as_posix()} and run this again."
    return None


def scores(count: Count) -> str:
    """Both scores; the second leaves out the mutants that raise."""
    return f"{100 * count.score:.1f} % ({100 * count.score_without_raised:.1f} %)"


def lines_of(mutant: Mutant) -> Iterator[str]:
    """A mutant on two lines: what stood there, and what stands there now."""
    yield f"     {mutant.operator:<17}  {mutant.old}"
    yield f"     {'->':>17}  {mutant.new}"


HEAD = """\
| exercise | mutants | rejected | of these, by raising | equivalent | score | without those that raise |
|---|---|---|---|---|---|---|"""


def counts_in(page: str) -> dict[str, Count]:
    """The counts of exercises in the table of a page."""
    rows = re.findall(r"^\| (\d+\.\d+[a-z]?) .*?\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    return {number: Count(*map(int, cells)) for number, *cells in rows}


def with_table(page: str, counts: Mapping[str, Count]) -> str:
    """The page with a new table: a row for each exercise that has counts, for each chapter and for all."""
    rows, total = [HEAD], Count(0, 0, 0, 0)
    for chapter, topic in TOPICS.items():
        known = {number: exercise for number, exercise in exercises(topic).items() if number in counts}
        rows += [_row(f"{number} `{exercise.name}`", counts[number]) for number, exercise in known.items()]
        of_chapter = sum((counts[number] for number in known), Count(0, 0, 0, 0))
        rows.append(_row(f"**{chapter.zfill(2)} {topic}**", of_chapter))
        total += of_chapter
    table = "\n".join([*rows, _row("**all**", total)])
    return re.sub(r"^\| exercise \|.*(\n\|.*)*", lambda _: table, page, flags=re.MULTILINE)


def _row(name: str, count: Count) -> str:
    cells = (*astuple(count), f"{100 * count.score:.1f} %", f"{100 * count.score_without_raised:.1f} %")
    return f"| {name} | {' | '.join(map(str, cells))} |"
