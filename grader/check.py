"""What a learner calls: `check`, `hint`, `continue_with`, `progress`."""

import dis
import functools
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

from grader import cells, on_gpu
from grader.checks import find, place
from grader.experiment import Exercise, Fact, Subject, equal
from grader.golden import table_of
from grader.observe import observe
from grader.verdict import Finding, Observation, Problem, Table, Verdict, judge

WIDTH = 88  # characters of a line; wider ones break in a half-screen notebook
NOTEBOOK_SEEDS = (0,)
GRADING_SEEDS = (101, 202)  # unless WARMSTART_SEEDS gives others, as `warmstart grade` does, new ones for each run
MIME = "application/vnd.warmstart.verdict+json"  # how a verdict leaves the kernel when nbgrader runs the notebook

SHOWN = 4  # facts of an experiment that are printed; more of them say the same again
MARKS = {"passed": "✓", "core passed": "✓", "not attempted": "–"}  # of an outcome; ✗ of the others

_session: dict[str, tuple[Verdict, Subject]] = {}  # the best verdict, of equals the last, and its subject


class CheckFailed(Exception):
    """Raised by `check` after a verdict other than "passed" or "not attempted", so that "Run All" stops there."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows in place of a traceback: the verdict above says all."""
        return [str(self)]


def check(number: str, thing: Subject) -> float | None:
    """Check your solution of an exercise and print what was found.

    Args:
        number: the exercise, "2.1".
        thing: what you defined for it.

    Returns:
        Nothing. Under nbgrader: the points earned, from 0.0 to the exercise's maximum.

    Raises:
        CheckFailed: the core is not passed yet (not under nbgrader). Neither fine print nor an untouched exercise stops
            the notebook: the chapter goes on.
    """
    exercise = find(number)
    table = table_of(exercise)
    verdict = _verdict(exercise, thing, table)
    if number not in _session or _rank(verdict) >= _rank(_session[number][0]):
        _session[number] = verdict, thing
    print(describe(verdict), flush=True)
    if os.environ.get("NBGRADER_EXECUTION"):
        points = {"points": verdict.points, "core": verdict.points_of(True), "fine print": verdict.points_of(False)}
        _publish({"exercise": number, **points, "outcome": verdict.outcome, "named": list(verdict.named)})
        return float(verdict.points)
    if verdict.outcome == "passed":  # the answer is there already; this may take a moment
        for label, sentence in on_gpu.try_on_gpu(exercise, thing, table, _seeds()[0]):
            print(_fill(f"     {label:<10}", sentence))
    elif verdict.outcome not in ("core passed", "not attempted"):
        raise CheckFailed(f"{number} is not passed yet: see above.")
    return None


def hint(number: str, level: int = 1) -> None:
    """Print a hint for an exercise: 1 asks, 2 points at something to observe, 3 gives the formula or the operation."""
    exercise = find(number)
    if level not in (1, 2, 3):
        raise ValueError(f"level must be 1, 2 or 3, got {level!r}.")
    print(_fill(f"{number}  hint {level} of 3  ", exercise.hints[level - 1]))
    if level < 3:
        print(f'     more      hint("{number}", {level + 1})')


def continue_with(number: str) -> Subject:
    """Return your solution of an exercise if its core passed, else the reference, and print which of the two."""
    exercise = find(number)
    verdict, thing = _session.get(number, (None, None))
    if verdict is not None and verdict.core_passed:
        missing = "" if verdict.outcome == "passed" else ", whose fine print has not passed"
        print(f"{number}  continuing with your {exercise.name}{missing}")
        return thing
    state = "was not checked" if verdict is None else f"is {verdict.outcome}"
    origin = exercise.reference.__module__
    print(f"{number}  {state}: continuing with the reference {exercise.name} from {origin}")
    return exercise.reference


def progress() -> None:
    """Print where you are: every exercise checked since the kernel started. The best verdict stays."""
    if not _session:
        print("nothing checked yet in this kernel")
    for number, (verdict, _) in sorted(_session.items(), key=lambda entry: place(entry[0])):
        exercise = verdict.exercise
        names = [wrong.name for wrong in exercise.misconceptions if wrong.key in verdict.named]
        named = f" ({', '.join(names)})" if names else ""
        print(f"{number}  {exercise.name:<20}  {verdict.points} of {exercise.points} points  {verdict.outcome}{named}")


def describe(verdict: Verdict) -> str:
    """A verdict in the words that a learner reads: the likely idea, then what differs, then what holds."""
    exercise = verdict.exercise
    lines = [_header(verdict)]
    problems = {finding.problem for finding in verdict.findings}
    if len(problems) == 1 and None not in problems:  # the same problem everywhere: say it once
        (problem,) = problems
        if problem.kind != "not attempted":
            lines.append(_fill("     got       ", problem.message))
    else:
        named = [wrong for wrong in exercise.misconceptions if wrong.key in verdict.named]
        lines += [_fill("     likely    ", f"{wrong.name}. {wrong.hint}") for wrong in named]
        if named and verdict.unexplained:
            lines.append("     besides   this does not explain everything that differs")
        for finding in sorted(verdict.findings, key=lambda f: (f.outcome == "not seen", not f.experiment.in_core)):
            lines += _lines(finding)
        lines += _what_holds(verdict)
    lines += [_fill("     note      ", line) for line in verdict.messages]
    if not any(problem and problem.kind == "not judged" for problem in problems):
        lines += _what_next(verdict)
    return "\n".join(lines)


def _header(verdict: Verdict) -> str:
    """Number and name, and what came of it, with the points of core and fine print."""
    exercise = verdict.exercise
    parts = {"core": True, "fine print": False}
    most = {part: sum(e.points for e in exercise.experiments if e.in_core == in_core) for part, in_core in parts.items()}
    points = [f"{part} {verdict.points_of(parts[part])} of {points}" for part, points in most.items() if points]
    scored = "" if verdict.outcome == "not attempted" else f" · {' · '.join(points)} points"
    outcome = f"{MARKS.get(verdict.outcome, '✗')} {verdict.outcome}{scored}"
    name = f"{exercise.number}  {exercise.name}"
    return f"{name:<{WIDTH - len(outcome) - 2}}  {outcome}"


def _lines(finding: Finding) -> list[str]:
    """What there is to say of an experiment that was not passed."""
    if finding.outcome == "passed":
        return []
    numbers = ", ".join(map(str, finding.experiment.sentences))
    mark = "–" if finding.outcome in ("not seen", "not attempted") else "✗"
    lines = [_fill(f"     {mark} {numbers}{'  ' if numbers else ''}", finding.experiment.claim)]
    if finding.problem:
        lines.append(_fill("       got       ", finding.problem.message))
    notes, seen = dict(finding.notes), [(fact, *values) for fact, *values in finding.differs if values[1] is not None]
    for fact, expected, got in seen[:SHOWN]:
        lines.append(_fill("       expected  ", f"{fact}: {_spell(expected)}"))
        note = f" ({notes[fact]})" if fact in notes else ""
        lines.append(_fill("       got       ", f"{fact}: {_spell(got)}{note}"))
    if len(seen) > SHOWN:
        lines.append(f"       besides   {len(seen) - SHOWN} more like these")
    if finding.differs and not seen:
        reason = ", because of the line above" if finding.outcome == "not seen" else ""
        lines.append(f"       got       could not be seen{reason}")
    return lines


def _what_holds(verdict: Verdict) -> list[str]:
    """The sentences of the statement that hold, in one line: "✓ core 1, 3 · ✓ fine print"."""
    parts = []
    for part, in_core in (("core", True), ("fine print", False)):
        findings = [finding for finding in verdict.findings if finding.experiment.in_core == in_core]
        spoken_of = {number for finding in findings for number in finding.experiment.sentences}
        failed = {number for finding in findings if finding.outcome != "passed" for number in finding.experiment.sentences}
        held = ", ".join(map(str, sorted(spoken_of - failed)))
        if held:
            parts.append(f"✓ {part} {held}" if failed else f"✓ {part}")
    return [f"     {' · '.join(parts)}"] if parts else []


def _what_next(verdict: Verdict) -> list[str]:
    number = verdict.exercise.number
    if verdict.outcome in ("passed", "not attempted"):
        return []
    if verdict.named:
        return [f'     more      hint("{number}")']
    advice = f'Run the example in the stub, step by step. hint("{number}", 2) says what to look at.'
    return [_fill("     next      ", f"No known mistake fits. {advice}" if _seen(verdict) else advice)]


def _seen(verdict: Verdict) -> bool:
    return any(got is not None for finding in verdict.findings for _, _, got in finding.differs)


def _rank(verdict: Verdict) -> int:
    return ("core passed", "passed").index(verdict.outcome) + 1 if verdict.core_passed else 0


def _verdict(exercise: Exercise, thing: Subject, table: Table) -> Verdict:
    if not callable(thing):
        came = "nothing" if thing is None else f"a {type(thing).__name__}"
        return _refused(exercise, f"`{exercise.name}` must be something that can be called, got {came}.")
    if stopped := cells.why_old(exercise.name, thing):
        return _refused(
            exercise,
            f"the last run of the cell that defines `{exercise.name}` failed ({stopped}), so this would judge an old "
            "definition. Mend that cell and run it, then this one.",
        )
    if _is_reference(thing, exercise.reference):
        origin = exercise.reference.__module__
        return _refused(
            exercise, f"`{exercise.name}` is or calls the reference from `{origin}`. Run your own cell again, then this one."
        )
    worst = None
    for seed in _seeds():
        observations = _observe_all(exercise, thing, seed)
        verdict = judge(exercise, observations, table)
        if worst is None or verdict.points < worst.points:
            worst = verdict
        if any(observation.problem and observation.problem.kind == "time" for observation in observations.values()):
            break  # with other inputs it would be stopped again
        if verdict.outcome in ("not yet", "core passed") and not _torch_is_itself(exercise, verdict, seed, table):
            return _refused(
                exercise,
                "the reference fails here too, so something in this kernel has changed torch itself. "
                "Restart the kernel, and look for assignments such as nn.BatchNorm2d.train = ...",
            )
    return worst


def _refused(exercise: Exercise, reason: str) -> Verdict:
    """A verdict that says why there can be none."""
    problem = Problem("not judged", reason)
    findings = (Finding(experiment, "error", problem=problem) for experiment in exercise.experiments)
    return Verdict(exercise, tuple(findings), named=(), unexplained=False)


def _observe_all(exercise: Exercise, thing: Subject, seed: int) -> dict[str, Observation]:
    """Every experiment on one subject; once it had to be stopped, it is not run again."""
    observations: dict[str, Observation] = {}
    stopped = None
    for experiment in exercise.experiments:
        observations[experiment.key] = stopped or observe(experiment, thing, seed, exercise.number)
        if observations[experiment.key].problem and observations[experiment.key].problem.kind == "time":
            stopped = observations[experiment.key]
    return observations


def _torch_is_itself(exercise: Exercise, verdict: Verdict, seed: int, table: Table) -> bool:
    """Whether the reference still passes where the learner's code did not: the control of every experiment."""
    failed = [finding.experiment for finding in verdict.findings if finding.outcome == "not yet"]
    for experiment in failed:
        control = observe(experiment, exercise.reference, seed, exercise.number)
        expected = table[experiment.key]["reference"]
        if control.facts is None or not all(equal(expected[f], control.facts[f]) for f in expected):
            return False
    return True


def _seeds() -> tuple[int, ...]:
    given = os.environ.get("WARMSTART_SEEDS")
    if given:
        return tuple(int(seed) for seed in given.split(","))
    return GRADING_SEEDS if os.environ.get("NBGRADER_EXECUTION") else NOTEBOOK_SEEDS


def _is_reference(thing: Any, reference: Any) -> bool:
    """Whether `thing` is the reference, wraps or extends it, or has a function that is one of its own or looks it up."""
    for _ in range(10):  # wrappers inside wrappers; an object may also claim to wrap itself
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif inspect.ismethod(thing):
            thing = thing.__func__
        elif inspect.isfunction(thing):
            thing = getattr(thing, "__wrapped__", thing)
    if thing is reference or (inspect.isclass(thing) and inspect.isclass(reference) and issubclass(thing, reference)):
        return True
    own = {function.__code__ for function in _functions(inspect.unwrap(reference))}
    functions = _functions(thing)
    return any(f.__code__ in own or any(value is reference for value in _looked_up(f)) for f in functions)


def _functions(thing: Any) -> list[FunctionType]:
    return [part for part in (vars(thing).values() if inspect.isclass(thing) else [thing]) if isinstance(part, FunctionType)]


def _looked_up(function: FunctionType) -> Iterator[Any]:
    """What a function, with those inside it, looks up by a name or as `module.name`."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = function.__globals__ | {name: cell.cell_contents for name, cell in cells if cell != CellType()}
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        value = None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = vars(value).get(step.argval) if inspect.ismodule(value) else None
            else:
                value = names.get(step.argval) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF") else None
            yield value


def _publish(verdict: dict) -> None:
    """Send the verdict beside the last value of the cell, which IPython's settings can suppress."""
    if "IPython" in sys.modules:
        from IPython.display import display

        display({MIME: verdict}, raw=True)


def _fill(label: str, text: str) -> str:
    """Text of one or more lines behind a label, wrapped under it."""
    indent = " " * len(label)
    parts = [
        textwrap.fill(part, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) if part else ""
        for part in text.splitlines() or [""]
    ]
    return label + "\n".join(parts)[len(indent) :]


def _spell(fact: Fact) -> str:
    if isinstance(fact, list):
        return ", ".join(map(_spell, fact)) or "none"
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


if sys.modules.get("IPython") and not os.environ.get("NBGRADER_EXECUTION"):
    from IPython import get_ipython

    if (shell := get_ipython()) is not None:
        cells.watch(shell)
