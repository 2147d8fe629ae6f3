"""What a learner sees, whatever their code does."""

import importlib
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

import helpers.features
from grader import CheckFailed, cells, check, continue_with, hint, progress
from grader.check import describe
from grader.checks import TOPICS, exercises
from grader.experiment import Experiment
from grader.golden import table_of
from grader.observe import observe
from grader.proof import stub
from grader.shadow import refuse
from grader.state import preserved
from grader.verdict import Finding, Observation, Problem, Verdict, judge
from helpers.features import extract
from helpers.finetune import EarlyStopping

FIRST = exercises("features")["2.2"]
WRONG = {m.key: m.subject for m in FIRST.misconceptions}


def right(backbone, images, batch_size):
    modes = [(m, m.training) for m in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            return torch.cat([backbone(b) for b in images.split(batch_size)])
    finally:
        for m, training in modes:
            m.training = training


def said(capsys, subject, number="2.2"):
    """What `check` prints for a subject, in one line."""
    with suppress(CheckFailed):
        check(number, subject)
    return " ".join(capsys.readouterr().out.split())


def test_right_code_passes_without_a_word_too_many(capsys):
    assert check("2.2", right) is None
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("2.2  extract ") and "✓ passed · core " in out
    assert "likely" not in out and "more" not in out and "next" not in out and len(out.splitlines()) == 2
    assert max(map(len, out.splitlines())) <= 88


def test_a_mistake_is_named_with_what_was_expected_and_what_came(capsys):
    with pytest.raises(CheckFailed, match=r"^2.2 is not passed yet: see above.$"):
        check("2.2", WRONG["train mode during extraction"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 88
    text = " ".join(out.split())
    assert "expected features of one image in two different batches, behind BatchNorm: equal" in text
    assert "got features of one image in two different batches, behind BatchNorm: differ (by up to" in text
    assert "likely train mode during extraction. BatchNorm and dropout behave as in training, whether" in text
    assert text.endswith('more hint("2.2")')
    assert text.count("likely") == 1 and "besides" not in text and "next" not in text
    assert text.index("✗ not yet") < text.index("likely") < text.index("expected") < text.index("✓ core")


def test_two_mistakes_are_both_told(capsys):
    def both(backbone, images, batch_size):
        backbone.eval()
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])

    assert said(capsys, both).count("likely") == 2


def test_an_unknown_mistake_is_described_and_not_guessed(capsys):
    text = said(capsys, lambda backbone, images, batch_size: 2 * right(backbone, images, batch_size))
    assert "features compared with those of eval mode: differ" in text
    assert "likely" not in text
    assert text.endswith('hint("2.2", 2) says what to look at.') and "No known mistake fits." in text


def test_a_stub_is_not_attempted_and_does_not_stop_the_notebook(capsys):
    assert check("2.2", stub("2.2")) is None
    assert capsys.readouterr().out.split() == ["2.2", "extract", "–", "not", "attempted"]


def test_another_exercises_stub_is_named(capsys):
    assert "needs 0.1 first" in said(capsys, stub("0.1"))
    assert "needs 2.2a first" in said(capsys, stub("2.2a"))


def test_an_exception_is_told_with_the_line_that_raised(capsys):
    def broken(backbone, images, batch_size):
        rows = images.shape
        return rows["n"]

    text = said(capsys, broken)
    assert 'of your cell, `return rows["n"]`, raised TypeError: tuple indices must be integers or slices, not str' in text
    assert "error" in text


def endless():
    while True:
        yield 1


def recursion(*args):
    return recursion(*args)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got None. Is there a return?"),
        ("abc", "got 'abc'."),
        (endless(), "got a generator."),
        (torch.zeros(3), "got (3,)."),
        (nn.Linear(1, 1), "got a Linear."),
    ],
)
def test_garbage_ends_in_a_clear_sentence(capsys, value, message):
    text = said(capsys, lambda backbone, images, batch_size: value)
    assert message in text
    assert "Traceback" not in text and "not yet" in text


def test_nan_is_an_outcome_of_its_own(capsys):
    text = said(capsys, lambda backbone, images, batch_size: right(backbone, images, batch_size) * torch.nan)
    assert "values that came back are NaN or infinite" in text


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (lambda *_: sys.exit("bye"), "SystemExit: bye"),
        (recursion, "RecursionError"),
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *_: (_ for _ in ()).throw(GeneratorExit), "GeneratorExit"),
        (lambda backbone: None, "TypeError"),
        (lambda *_: (_ for _ in ()).throw(MemoryError("x" * 1000)), "MemoryError: xxx"),
    ],
)
def test_whatever_is_raised_ends_in_a_clear_sentence(capsys, subject, message):
    text = said(capsys, subject)
    assert message in text and " error" in text
    assert len(text) < 1500


def test_an_interrupt_passes_through():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("2.2", interrupted)


class Quick(Experiment):
    """quick"""

    seconds = 0.2

    def draw(self, trial):
        return {"x": trial.normal(3)}

    def measure(self, subject, inputs):
        return {"y": subject(inputs["x"])}

    def facts(self, raw, inputs):
        return {"y": "seen"}


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this platform cannot stop a loop from outside")
def test_a_loop_that_never_ends_is_stopped():
    def loop(x):
        while True:
            with suppress(Exception):
                sum(range(1000))

    observation = observe(Quick(), loop, 0, "9.1")
    assert observation.problem.kind == "time"
    assert observation.problem.message == "your code was stopped after 0.2 s: is there a loop that never ends?"


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this platform cannot stop a loop from outside")
def test_an_import_is_finished_before_a_subject_is_stopped(tmp_path, monkeypatch):
    """Half of a module would stay in the kernel: after it no optimizer of torch could be made."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "slow_module.py").write_text("import time\nfor _ in range(15):\n    time.sleep(0.1)\nDONE = True\n")

    def late(x):
        import slow_module

        return slow_module.DONE

    seen = observe(Quick(), late, 0, "9.1")
    assert seen.facts == {"y": "seen"} and sys.modules.pop("slow_module").DONE
    (tmp_path / "slow_module.py").write_text("while True:\n    pass\n")
    monkeypatch.setattr("grader.observe.IMPORT_SECONDS", 1)
    assert observe(Quick(), late, 0, "9.1").problem.kind == "time"


@pytest.mark.slow
def test_a_first_check_does_not_wait_for_torchs_compiler():
    """Its import takes a second or more; only an optimizer needs it."""
    program = """
        import sys
        from grader import CheckFailed, check
        from grader.checks import find
        for number in ("0.1", "2.1", "5.1"):
            try:
                check(number, find(number).misconceptions[0].subject)
            except CheckFailed:
                print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout.count("\nFalse\n") == 3, done.stdout + done.stderr


def test_changed_inputs_are_told(capsys):
    def in_place(features, labels, classes, penalty):
        features -= features.mean(0)
        return nn.Linear(features.shape[1], classes)

    assert "your code changed its input `features` in place: work on a copy" in said(capsys, in_place, "2.3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.set_grad_enabled(False), "grad mode: True -> False"),
        (lambda: torch.set_default_dtype(torch.float64), "default dtype: torch.float32 -> torch.float64"),
        (lambda: torch.set_default_device("meta"), "default device: cpu -> meta"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms: False -> True"),
        (lambda: os.chdir("/"), "working directory: "),
        (lambda: sys.setrecursionlimit(12345), "recursion limit: "),
    ],
)
def test_a_changed_global_setting_is_told_and_put_back(change, message):
    def subject(x):
        change()
        return 1

    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd()
    limit = sys.getrecursionlimit()
    problem = observe(Quick(), subject, 0, "9.1").problem
    assert problem.kind == "changed state"
    assert problem.message.startswith("your code left a global setting changed (") and message in problem.message
    assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(), os.getcwd())
    assert limit == sys.getrecursionlimit() and not torch.are_deterministic_algorithms_enabled()


def test_random_states_environment_and_warning_filters_are_put_back_in_silence(capsys):
    def subject(x):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        os.environ["WARMSTART_TEST"] = "1"
        warnings.simplefilter("ignore")
        sys.path.insert(0, "/nowhere")
        return 1

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), list(warnings.filters)
    assert observe(Quick(), subject, 0, "9.1").facts == {"y": "seen"}
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        list(warnings.filters),
    )
    assert "WARMSTART_TEST" not in os.environ and "/nowhere" not in sys.path
    with preserved(0) as changed:
        pass
    assert changed == []


def test_output_warnings_and_stderr_are_caught_and_cost_nothing(capfd):
    def noisy(backbone, images, batch_size):
        print("hello")
        warnings.warn("careful", UserWarning, stacklevel=1)
        print("oh", file=sys.stderr)
        os.write(2, b"from C code")
        return right(backbone, images, batch_size)

    assert check("2.2", noisy) is None
    out, err = capfd.readouterr()
    assert err == ""
    for line in ("your code printed: hello", "UserWarning: careful", "your code wrote to stderr: oh"):
        assert line in out
    assert "from C code" in out


def test_much_output_is_shortened():
    observation = observe(Quick(), lambda x: print("x" * 100_000), 0, "9.1")
    assert len(observation.messages[0]) < 2100


class Borrowed:
    __init__ = EarlyStopping.__init__
    step = EarlyStopping.step
    restore = EarlyStopping.restore


@pytest.mark.parametrize("thing", [EarlyStopping, type("Mine", (EarlyStopping,), {}), Borrowed])
def test_a_class_that_is_extends_or_borrows_from_the_reference_is_refused(capsys, thing):
    with pytest.raises(CheckFailed):
        check("4.5", thing)
    assert "`EarlyStopping` is or calls the reference from `helpers.stopping`." in capsys.readouterr().out


@pytest.mark.parametrize(
    "thing",
    [
        extract,
        partial(extract, progress=False),
        lambda backbone, images, batch_size: extract(backbone, images, batch_size),
        lambda backbone, images, batch_size: helpers.features.extract(backbone, images, batch_size),
    ],
)
def test_the_reference_is_refused_as_a_subject(capsys, thing):
    text = said(capsys, thing)
    assert "`extract` is or calls the reference from `helpers.features`. Run your own cell again, then this one." in text
    assert "passed" not in text


@pytest.mark.parametrize(("thing", "came"), [(None, "nothing"), (3, "a int"), (torch.zeros(1), "a Tensor")])
def test_what_cannot_be_called_is_told(capsys, thing, came):
    assert f"`extract` must be something that can be called, got {came}." in said(capsys, thing)


def test_a_patched_torch_is_noticed_instead_of_blamed_on_the_learner(capsys, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "eval", lambda self: self)
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: self)
    text = said(capsys, WRONG["left in eval mode"])
    assert "something in this kernel has changed torch itself" in text and "likely" not in text


def test_the_chapter_goes_on_with_what_passed_and_says_so(capsys):
    assert continue_with("2.2") is extract
    assert "2.2  was not checked: continuing with the reference extract from helpers.features" in capsys.readouterr().out
    check("2.2", right)
    capsys.readouterr()
    assert continue_with("2.2") is right
    assert capsys.readouterr().out == "2.2  continuing with your extract\n"
    said(capsys, WRONG["graph kept"])
    assert continue_with("2.2") is right, "an exercise once passed stays passed"


def test_progress_has_the_names_that_learners_read_not_the_keys(capsys, monkeypatch):
    wrong = next(m for m in FIRST.misconceptions if m.key == "graph kept")
    others = [m for m in FIRST.misconceptions if m is not wrong]
    monkeypatch.setattr(FIRST, "misconceptions", [replace(wrong, name="le graphe"), *others])
    with suppress(CheckFailed):
        check(FIRST.number, wrong.subject)
    assert "likely    le graphe. " in capsys.readouterr().out
    progress()
    assert "not yet (le graphe)" in capsys.readouterr().out


@pytest.fixture
def all_but_one_is_fine_print(monkeypatch):
    """0.1 as if all but its first experiment were fine print, whatever a teacher makes of it later."""
    exercise = exercises("start")["0.1"]
    for experiment in exercise.experiments:
        monkeypatch.setattr(experiment, "in_core", experiment.key == "right rows count")
    return exercise


def as_percentage(logits, labels):
    return (logits.argmax(1) == labels).float().mean() * 100


def test_with_the_core_passed_the_chapter_goes_on_and_the_fine_print_is_shown(capsys, all_but_one_is_fine_print):
    assert check("0.1", as_percentage) is None
    told = capsys.readouterr().out
    assert "✓ core passed · core 1 of 1 · fine print 0 of 2 points" in told
    assert "✗ 2  The result is a fraction" in told and "✓ core\n" in told
    assert told.index("The result is a fraction") < told.index("because of the line above"), "the cause comes first"
    assert continue_with("0.1") is as_percentage
    assert capsys.readouterr().out == "0.1  continuing with your accuracy, whose fine print has not passed\n"
    with suppress(CheckFailed):
        check("0.1", stub("0.1"))
    progress()
    assert "core passed" in capsys.readouterr().out, "the best verdict stays"


def test_points_are_split_between_core_and_fine_print(monkeypatch, all_but_one_is_fine_print):
    published = []
    monkeypatch.setattr(sys.modules["grader.check"], "_publish", published.append)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check("0.1", as_percentage) == 1.0
    assert published[0].items() >= {"points": 1, "core": 1, "fine print": 0, "outcome": "core passed"}.items()


def test_what_could_not_be_seen_says_so(capsys):
    table = table_of(FIRST)
    observations = {key: Observation(dict(row["reference"])) for key, row in table.items()}
    first, second, *_ = observations
    observations[first] = Observation(dict.fromkeys(table[first]["reference"], "another"))
    observations[second] = Observation(dict.fromkeys(table[second]["reference"]))
    text = describe(judge(FIRST, observations, table))
    assert text.count("could not be seen, because of the line above") == 1
    observations[first] = Observation(table[first]["reference"])
    assert "could not be seen\n" in describe(judge(FIRST, observations, table))


def test_of_many_facts_that_differ_the_first_are_told_and_the_others_counted():
    facts = {f"fact {number}": "right" for number in range(6)}
    finding = Finding(FIRST.experiments[0], "not yet", tuple((fact, "right", "wrong") for fact in facts))
    text = describe(Verdict(FIRST, (finding,), named=(), unexplained=True))
    assert text.count("got       fact") == 4 and "besides   2 more like these" in text


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("def accuracy(logits, labels)\n    return 1", "SyntaxError: expected ':'"),
        ("raise RuntimeError('no')\ndef accuracy(logits, labels):\n    return 1", "RuntimeError: no"),
    ],
)
def test_a_definition_that_a_failed_cell_left_behind_is_not_judged(capsys, broken, error):
    shell = InteractiveShell.instance()
    cells.watch(shell)
    try:
        shell.run_cell("def accuracy(logits, labels):\n    return (logits.argmax(1) == labels).float().mean()")
        assert check("0.1", shell.user_ns["accuracy"]) is None
        shell.run_cell(broken)
        capsys.readouterr()
        text = said(capsys, shell.user_ns["accuracy"], "0.1")
        assert f"the last run of the cell that defines `accuracy` failed ({error}" in text and "hint(" not in text
        shell.run_cell("def accuracy(logits, labels):\n    return (logits.argmax(1) == labels).float().mean()\n1 / 0")
        assert check("0.1", shell.user_ns["accuracy"]) is None, "what raises below a definition leaves it new"
        shell.run_cell(broken)
        shell.run_cell("def accuracy(logits, labels):\n    return (logits.argmax(1) == labels).float().mean()")
        assert check("0.1", shell.user_ns["accuracy"]) is None
    finally:
        shell.events.callbacks["pre_run_cell"].clear()
        shell.events.callbacks["post_run_cell"].clear()
        InteractiveShell.clear_instance()


@pytest.mark.parametrize("thing", [extract, None])
def test_what_cannot_be_judged_has_a_reason_and_no_hint(capsys, thing):
    """A hint would be about the exercise; what helps is in the reason."""
    text = said(capsys, thing)
    assert text.startswith("2.2 extract ✗ error · core 0 of ") and "got `extract` " in text and "hint(" not in text


def test_a_number_that_is_no_string_is_refused():
    with pytest.raises(ValueError, match=r'^number must be a string, got 2.1. Write it in quotes: "2.1".$'):
        check(2.1, extract)


def test_two_modules_with_one_number_are_refused(monkeypatch):
    from grader import checks

    again = SimpleNamespace(exercise=replace(FIRST, module="grader.checks.features.copied"))
    monkeypatch.setattr(
        checks, "import_module", lambda name: again if name.endswith(".cache") else importlib.import_module(name)
    )
    message = (
        r"must be one exercise's, got 2.2 in grader.checks.features.\w+ and grader.checks.features.\w+. Change one of them.$"
    )
    with pytest.raises(ValueError, match=message):
        checks.exercises.__wrapped__("features")


def test_the_worst_verdict_counts_where_a_later_one_is_stopped(monkeypatch):
    """Seed 1 fails everywhere; with seed 2 one experiment passes before the next is stopped."""
    calls = []

    def observed(experiment, subject, seed, number):
        calls.append(seed)
        first = experiment is FIRST.experiments[0]
        if seed == 2 and not first:
            return Observation(None, Problem("time", "stopped"))
        table = table_of(FIRST)[experiment.key]
        passes = (seed == 2 and first) or subject is FIRST.reference
        return Observation(table["reference"] if passes else dict.fromkeys(table["reference"]))

    monkeypatch.setattr(sys.modules["grader.check"], "observe", observed)
    monkeypatch.setenv("WARMSTART_SEEDS", "1,2")
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check(FIRST.number, right) == 0.0 and set(calls) == {1, 2}


def test_progress_lists_verdicts_and_names(capsys):
    progress()
    assert capsys.readouterr().out == "nothing checked yet in this kernel\n"
    said(capsys, WRONG["graph kept"])
    progress()
    told = " ".join(capsys.readouterr().out.split())
    assert re.fullmatch(r"2\.2 extract \d+ of \d+ points (not yet|core passed) \(graph kept\)", told)


def test_hints_come_in_steps(capsys):
    for level in (1, 2, 3):
        hint("2.2", level)
        out = capsys.readouterr().out
        assert out.startswith(f"2.2  hint {level} of 3  ")
        assert (f'hint("2.2", {level + 1})' in out) == (level < 3)
    with pytest.raises(ValueError, match=r"^level must be 1, 2 or 3, got 4.$"):
        hint("2.2", 4)


@pytest.mark.parametrize("call", [lambda: check("2.9", right), lambda: hint("x"), lambda: continue_with("7.1")])
def test_unknown_exercises_are_told(call):
    with pytest.raises(ValueError, match=r"no exercise '.*'. Choose from 0.1, 2.1, 2.2a, 2.2, 2.3, 2.4a, 2.4, 2.5, 2.6, "):
        call()


def test_under_nbgrader_the_points_are_returned_and_nothing_is_raised(monkeypatch, capsys):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check("2.2", right) == 10.0
    assert check("2.2", WRONG["graph kept"]) == 9.0
    for zero in (stub("2.2"), None, extract, lambda *_: float("nan"), lambda *_: sys.exit()):
        assert check("2.2", zero) == 0.0


def test_grading_draws_other_inputs_than_the_notebook(monkeypatch):
    runs = []

    def spy(backbone, images, batch_size):
        if not images.is_cuda and not torch.is_autocast_enabled("cpu"):  # there, with the same inputs
            runs[-1].add(images.sum().item())
        return right(backbone, images, batch_size)

    for variables in ({}, {"NBGRADER_EXECUTION": "autograde"}, {"WARMSTART_SEEDS": "5"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        runs.append(set())
        check("2.2", spy)
    assert [len(drawn) > 2 for drawn in runs] == [True] * 3
    assert len(set.union(*runs)) == sum(map(len, runs))


@pytest.mark.parametrize("name", ["torch.py", "helpers.py", "numpy/__init__.py"])
def test_files_that_hide_a_package_are_noticed(tmp_path, name):
    hiding = tmp_path / name
    hiding.parent.mkdir(exist_ok=True)
    hiding.write_text("")
    package = name.split("/")[0].removesuffix(".py")
    with pytest.raises(ImportError) as error:
        refuse(tmp_path, home=tmp_path / "elsewhere")
    assert str(error.value).endswith(f"in this folder hides the real {package}. Rename it and restart the kernel.")


def test_the_repository_itself_hides_nothing(root):
    refuse(root, home=root)


@pytest.mark.slow
def test_checks_work_without_jupyter_nbgrader_or_scikit_learn(root, tmp_path):
    program = """
        import sys

        for name in ("IPython", "jupyter_client", "ipykernel", "nbgrader", "nbformat", "nbconvert", "jupytext", "sklearn"):
            sys.modules[name] = None  # importing it raises ModuleNotFoundError

        from grader import check, hint, progress
        import helpers.backbones, helpers.features, helpers.training

        for number in ("0.1", "2.2", "2.3"):
            def stub(*args):
                raise NotImplementedError(f"Exercise {number}")
            check(number, stub)
        progress()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("– not attempted") == 3 and done.stdout.count("not attempted") == 6


@pytest.mark.parametrize("topic", TOPICS.values())
def test_hints_hold_no_line_of_the_solution(root, topic):
    script = next((root / "solutions").glob(f"*_{topic}/*_{topic}.py")).read_text(encoding="utf-8")
    solutions = [block.split("### END SOLUTION")[0] for block in script.split("### BEGIN SOLUTION")[1:]]
    lines = {"".join(line.split()) for block in solutions for line in block.splitlines() if len(line.split()) > 1}
    for exercise in exercises(topic).values():
        for text in (*exercise.hints, *(m.hint for m in exercise.misconceptions)):
            assert not any(line in "".join(text.split()) for line in lines)
        assert exercise.hints[0].rstrip().endswith("?"), "hint 1 asks"


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError


def closing_stdout(backbone, images, batch_size):
    print("about to close")
    sys.stdout.close()
    return right(backbone, images, batch_size)


def adding_a_module(backbone, images, batch_size):
    features = right(backbone, images, batch_size)
    backbone.extra = nn.BatchNorm1d(2)
    return features


def raising_the_unreadable(*_):
    raise Unreadable


@pytest.mark.parametrize(
    "subject",
    [
        lambda b, i, s: right(b, i, s).to("meta"),
        lambda b, i, s: right(b, i, s).to_sparse(),
        lambda b, i, s: right(b, i, s).to(torch.float8_e5m2),
        lambda b, i, s: right(b, i, s).to(torch.complex64),
        lambda b, i, s: right(b, i, s)[:1].expand(10**12, -1),
        closing_stdout,
        adding_a_module,
        raising_the_unreadable,
    ],
)
def test_strange_behaviour_ends_in_a_verdict_and_no_traceback(capsys, subject):
    text = said(capsys, subject)
    assert text.startswith("2.2 ") and "Traceback" not in text


def test_features_that_no_training_accepts_are_told(capsys):
    def frozen_for_ever(backbone, images, batch_size):
        with torch.inference_mode():
            return right(backbone, images, batch_size)

    assert "got the features are inference tensors, which no later training accepts: yes" in said(capsys, frozen_for_ever)


def test_a_number_of_batches_is_not_a_batch_size(capsys):
    def chunked(backbone, images, batch_size):
        rows = [right(backbone, chunk, len(chunk)) for chunk in images.chunk(batch_size)]
        return torch.cat(rows)

    text = said(capsys, chunked)
    assert "the largest batch that the backbone saw: more than batch_size" in text
    assert "likely" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "disturb",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16).__enter__(),
    ],
)
def test_a_disturbed_kernel_does_not_fail_right_code(disturb):
    """In a process of its own, since some of these settings cannot be undone."""
    program = f"""
        import torch
        from grader import check
        from grader.variants.features.extraction import one_at_a_time
        from grader.variants.features.probe import by_gradient_descent
        {inspect.getsource(disturb).strip().removeprefix("lambda: ").removesuffix(",")}
        check("2.2", one_at_a_time)
        check("2.3", by_gradient_descent)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓ passed") == 2


def test_a_method_with_the_references_name_is_no_reference():
    class Mine:
        def extract(self, *inputs):
            return right(*inputs)

    def solution(backbone, images, batch_size):
        return Mine().extract(backbone, images, batch_size)

    assert check("2.2", solution) is None


def test_an_attribute_with_the_references_name_is_no_reference():
    def solution(backbone, images, batch_size):
        backbone.extract = helpers.features.__name__  # the module and the name, but never helpers.features.extract
        return right(backbone, images, batch_size)

    assert check("2.2", solution) is None


def test_after_a_loop_that_never_ends_the_other_experiments_are_not_waited_for(monkeypatch, capsys):
    calls = []

    def loop(*_):
        calls.append(1)
        while True:
            pass

    for experiment in FIRST.experiments:
        monkeypatch.setattr(type(experiment), "seconds", 0.1)
    assert "your code was stopped after 0.1 s" in said(capsys, loop)
    assert len(calls) == 1


def test_the_interrupt_key_works_after_a_subject_has_disabled_it():
    before = signal.getsignal(signal.SIGINT)
    observe(Quick(), lambda x: signal.signal(signal.SIGINT, signal.SIG_IGN) and 1, 0, "9.1")
    assert signal.getsignal(signal.SIGINT) is before


def test_endless_printing_does_not_fill_the_memory():
    def chatter(x):
        for _ in range(100_000):
            print("x" * 100)
        return 1

    tracemalloc.start()
    observe(Quick(), chatter, 0, "9.1")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
