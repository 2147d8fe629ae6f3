"""Run one experiment on one subject, whatever the subject does, and say what was seen."""

import io
import linecache
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from grader.experiment import Experiment, Subject, Trial, WrongReturn, equal
from grader.fake_gpu import Refused
from grader.near import MARGINS, rounded_to, same
from grader.setting import CPU, Setting
from grader.state import fresh_defaults, preserved
from grader.verdict import Facts, Observation, Problem
from helpers.training import one_thread

IMPORT_SECONDS = 30.0  # that a subject may have besides if it imports something: torch's compiler takes a while to load
FAKE_GPU_SECONDS = 5.0  # what takes longer on a fake GPU is not looked at there
OUTPUT_LIMIT = 2000  # characters of a subject's own output that are shown
_NOT_THE_LEARNERS = tuple(  # folders of ours, of Python and of installed packages
    Path(folder).resolve()
    for folder in (
        Path(__file__).parent,
        Path(__file__).parents[1] / "helpers",
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    )
)


class TimeIsUp(BaseException):
    """Raised inside a subject that runs too long; no `except Exception` of the subject's stops it."""


@dataclass(frozen=True)
class Run:
    """What came of measuring a subject: raw results on the CPU, or the problem that prevented them."""

    raw: dict[str, Any] | None
    fresh: dict[str, Any] | None = None  # the inputs, drawn again; `facts` may use them up
    problem: Problem | None = None
    messages: tuple[str, ...] = ()  # what the subject printed, warned or wrote to stderr, shortened


def observe(experiment: Experiment, subject: Subject, seed: int, number: str, setting: Setting = CPU) -> Observation:
    """Run `experiment` on `subject` and make the facts; whatever the subject does ends in an observation.

    Args:
        experiment: what to ask.
        subject: the code that is asked.
        seed: of the inputs.
        number: the exercise's, to tell "not attempted" from "needs another exercise first".
        setting: where the subject computes, and how precisely. Facts are made on the CPU.
    """
    return observation(experiment, run(experiment, subject, seed, number, setting), seed, setting)


def observation(experiment: Experiment, ran: Run, seed: int, setting: Setting = CPU) -> Observation:
    """The facts of what was measured, or the problem that there was."""
    if ran.problem is not None:
        return Observation(None, ran.problem, messages=ran.messages)
    try:
        facts, notes = facts_of(experiment, ran.raw, seed, setting, ran.fresh)
    except Exception as error:
        return Observation(None, _not_measurable(error), messages=ran.messages)
    return Observation(facts, notes=tuple(notes.items()), messages=ran.messages)


def run(experiment: Experiment, subject: Subject, seed: int, number: str, setting: Setting = CPU) -> Run:
    """Draw inputs on the CPU, move them to the setting's device, measure the subject, and fetch what came back.

    Global state is put back, output is caught, time is limited (where the platform has SIGALRM and this is the main
    thread). Only KeyboardInterrupt passes through.
    """
    seconds = experiment.seconds if setting.device != "fake" else min(experiment.seconds, FAKE_GPU_SECONDS)
    messages: list[str] = []
    problem, raw, fresh = None, None, None
    with one_thread(), fresh_defaults():
        inputs = _draw(experiment, seed)
        with setting.applied(), preserved(seed + 1) as changed, _caught(messages):
            try:
                inputs = setting.put(inputs)
                with _time_limit(seconds):
                    raw = experiment.measure(subject, inputs)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit, RecursionError and the rest are the subject's
                problem = _explain(error, number, seconds, setting)
        try:
            if problem is None:
                raw, inputs = setting.fetch(raw), setting.fetch(inputs)
                fresh = _draw(experiment, seed)
                problem = _not_finite(raw) or _changed_inputs(experiment, inputs, fresh) or _changed_state(changed)
        except Exception as error:
            problem = _not_measurable(error)
    return Run(raw, fresh, None, tuple(messages)) if problem is None else Run(None, None, problem, tuple(messages))


def facts_of(
    experiment: Experiment,
    raw: dict[str, Any],
    seed: int,
    setting: Setting = CPU,
    fresh: dict[str, Any] | None = None,
    times: float = 1.0,
) -> tuple[Facts, dict[str, str]]:
    """The facts of raw results, and the notes on them.

    Args:
        experiment: whose results they are.
        raw: what `run` returned; made on any device.
        seed: with which the inputs were drawn.
        setting: where and how precisely the results were computed.
        fresh: inputs that were drawn again already; `facts` may use them up.
        times: how many times the tolerance of that precision to allow.
    """
    with one_thread(), fresh_defaults(), rounded_to(setting.precision, times):
        fresh = _draw(experiment, seed) if fresh is None else fresh
        return experiment.facts(raw, fresh), experiment.notes(raw, fresh)


def differing_facts(
    experiment: Experiment, raw: dict[str, Any], seed: int, expected: Facts, setting: Setting = CPU
) -> list[str]:
    """The facts of raw results that are not as expected, at the tolerance or, if all are so there, at its margins.

    What the proofs hold, and `python -m grader.golden verify`: rounding changes no fact.
    """
    for times in (1.0, *MARGINS[setting.precision]):
        facts, _ = facts_of(experiment, raw, seed, setting, times=times)
        if differ := [fact for fact, value in expected.items() if not equal(value, facts.get(fact))]:
            return [fact if times == 1 else f"{fact} at {times:g} times the tolerance" for fact in differ]
    return []


def _draw(experiment: Experiment, seed: int) -> dict[str, Any]:
    with preserved(seed):
        return experiment.draw(Trial(seed))


def _not_measurable(error: Exception) -> Problem:
    """Results of a form that no experiment foresaw: sparse, quantised."""
    text = " ".join(_text(error).split())[:200]
    return Problem("returned", f"what your code returned or left behind cannot be measured ({type(error).__name__}: {text})")


def _explain(error: BaseException, number: str, seconds: float, setting: Setting) -> Problem:
    if isinstance(error, NotImplementedError) and (stub := re.match(r"Exercise (\d+\.\d+[a-z]?)", _text(error))):
        if stub[1] == number:
            return Problem("not attempted", "not attempted yet")
        return Problem("needs", f"needs {stub[1]} first")
    if isinstance(error, WrongReturn):
        return Problem("returned", str(error))
    if isinstance(error, TimeIsUp):
        return Problem("time", f"your code was stopped after {seconds:g} s: is there a loop that never ends?")
    where = _line_of(error)
    kind = "refused" if isinstance(error, Refused) else "raised"
    text = " ".join(_text(error).split())
    if where is None and ("on the same device" in text or "and weight type" in text):  # of what the subject had returned
        on = ("on the CPU", "on the GPU") if setting != CPU else ("not on the CPU", "there")
        return Problem(kind, f"what your code returned is {on[0]}, but its inputs are {on[1]}")
    text = text if len(text) <= 300 else text[:300] + " …"
    return Problem(kind, f"{where or 'your code'} raised {_named(error)}{': ' + text if text else ''}")


def _named(error: BaseException) -> str:
    """The name of the error's class; what the fake GPU raises has the name that torch's own has."""
    return (type(error).__bases__[1] if isinstance(error, Refused) else type(error)).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be read"


def _line_of(error: BaseException) -> str | None:
    """The last line of the learner's own code that the exception went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        if file.startswith("<frozen") or any(Path(file).is_relative_to(folder) for folder in _NOT_THE_LEARNERS):
            continue
        line = (frame.line or linecache.getline(file, frame.lineno or 0)).strip()
        return f"line {frame.lineno} of your cell, `{line}`," if line else f"line {frame.lineno} of your cell"
    return None


def _not_finite(raw: Any) -> Problem | None:
    """NaN and infinity are an outcome of their own: no fact made from them means anything."""
    for _, tensor in _tensors(raw):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            return Problem("not finite", f"{bad} of {tensor.numel()} values that came back are NaN or infinite")
    return None


def _changed_inputs(experiment: Experiment, after: dict[str, Any], fresh: dict[str, Any]) -> Problem | None:
    for name, value in fresh.items():
        if name in experiment.may_change or isinstance(value, nn.Module):
            continue
        for (_, was), (_, now) in zip(_tensors(value), _tensors(after[name]), strict=False):
            if not same(was, now.detach()):
                which = f"its input `{name}`" if isinstance(value, Tensor) else "its inputs"
                return Problem("changed inputs", f"your code changed {which} in place: work on a copy")
    return None


def _changed_state(changed: list[str]) -> Problem | None:
    if not changed:
        return None
    return Problem(
        "changed state", f"your code left a global setting changed ({'; '.join(changed)}): put it back, or use a `with` block"
    )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, float):
        yield name, torch.tensor(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, name)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    patience, loaded = IMPORT_SECONDS, len(sys.modules)

    def stop(_: int, frame: FrameType | None) -> None:
        nonlocal patience, loaded
        if patience <= 0 or not (_importing(frame) or len(sys.modules) > loaded):
            raise TimeIsUp
        patience, loaded = patience - seconds, len(sys.modules)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, should the subject swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _importing(frame: FrameType | None) -> bool:
    """Whether the subject is importing something. Stopped in the middle, it would leave half a module to all later code.

    The first optimizer of a process imports torch's compiler, for a second or more.
    """
    while frame is not None and frame.f_code is not run.__code__:  # the check itself may stand in a module being imported
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def _caught(messages: list[str]) -> Iterator[None]:
    """Collect what the body prints, warns or writes to stderr, through `sys` or through descriptor 2.

    nbgrader gives 0 points to a check cell with anything on stderr; a warning in right code must not cost points.
    """
    printed, errors = _Capped(), _Capped()
    with tempfile.TemporaryFile() as file:
        copy = None
        with suppress(OSError):  # no descriptor 2: nothing to redirect
            copy = os.dup(2)
            os.dup2(file.fileno(), 2)
        try:
            with redirect_stdout(printed), redirect_stderr(errors), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("default")
                yield
        finally:
            if copy is not None:
                os.dup2(copy, 2)
                os.close(copy)
            file.seek(0)
            stderr = errors.text() + file.read(OUTPUT_LIMIT).decode(errors="replace")
            warned_of = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in warned)
            for label, text in (("printed", printed.text()), ("wrote to stderr", stderr), ("warned", "\n".join(warned_of))):
                if text.strip():
                    messages.append(f"your code {label}: {_shorten(text.strip())}")


class _Capped(io.StringIO):
    """A stream that keeps the beginning of what is written to it, and cannot be closed."""

    def write(self, text: str) -> int:
        if self.tell() <= OUTPUT_LIMIT:
            super().write(text[: OUTPUT_LIMIT + 1])
        return len(text)

    def close(self) -> None:
        """A subject may close `sys.stdout`; what it wrote is still wanted."""

    def text(self) -> str:
        return self.getvalue()


def _shorten(text: str) -> str:
    return text if len(text) <= OUTPUT_LIMIT else text[:OUTPUT_LIMIT] + " …"
