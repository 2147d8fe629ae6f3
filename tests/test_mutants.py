"""Mutants: what is made of a solution, and what is counted."""

import os
import signal
import time

import pytest
from typer.testing import CliRunner

from grader import mutants as command
from grader.checks import TOPICS, exercises
from grader.cli import app
from grader.experiment import Exercise, Experiment
from grader.mutants import (
    Count,
    Outcomes,
    counts_in,
    equivalent_of,
    in_forked_process,
    outcome_on,
    report,
    sample,
    why_not_written,
    with_table,
)
from grader.mutation import Mutant, mutants, solution

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork a process")
NUMBERS = [number for topic in TOPICS.values() for number in exercises(topic)]


def changes(code, **above):
    """{(operator, new lines)} of a function's body; `code` may have several lines."""
    lines = "\n    ".join(code.splitlines())
    return {(mutant.operator, mutant.new) for mutant in mutants(f"def f(x, y):\n    {lines}", above)}


@pytest.mark.parametrize(
    ("code", "operator", "new"),
    [
        ("return x < y", "compare", ["return x <= y", "return x >= y"]),
        ("return x is y", "compare", ["return x is not y"]),
        ("return x + y", "arithmetic", ["return x - y"]),
        ("return x + y", "drop operand", ["return x", "return y"]),
        ("return x - y", "drop operand", ["return x"]),
        ("return x @ y", "swap operands", ["return y @ x"]),
        ("x += y", "arithmetic", ["x -= y"]),
        ("x += y", "+= to =", ["x = y"]),
        ("return x and y", "and/or", ["return x or y"]),
        ("return x and y", "drop operand", ["return x", "return y"]),
        ("return not x", "drop not/minus", ["return x"]),
        ("return -x", "drop not/minus", ["return x"]),
        ("return 3", "constant", ["return 2", "return 4"]),
        ("return True", "constant", ["return False"]),
        ("return 0.5", "constant", ["return 1.0"]),
        ("return x.sum(dim=2)", "dim", ["return x.sum(dim=-1)", "return x.sum(dim=0)", "return x.sum(dim=1)"]),
        ("return x.sum(y, keepdim=y)", "drop keyword", ["return x.sum(y)"]),
        ("return pow(x, y)", "swap arguments", ["return pow(y, x)"]),
        ("return pow(x)", "f(x) to x", ["return x"]),
        ("return x.abs()", "obj.m() to obj", ["return x"]),
        ("return x[:3]", "drop slice", ["return x"]),
        ("if x:\n    y()", "if true", ["if True:"]),
        ("if x:\n    y()", "if false", ["if False:"]),
        ("return x if y else 7", "if true", ["return x"]),
        ("return x if y else 7", "if false", ["return 7"]),
        ("while x:\n    y()", "empty loop", ["while False:"]),
        ("for z in x:\n    y(z)", "empty loop", ["for z in []:"]),
        ("for z in x:\n    y(z)", "loop once", ["y(z) ⏎ break"]),
        ("return [z for z in x if z]", "drop filter", ["return [z for z in x]"]),
        ("with x:\n    y()", "drop with", [""]),
        ("try:\n    return x\nfinally:\n    y()", "no finally", ["result = x ⏎ y() ⏎ return result"]),
        ("try:\n    x()\nexcept OSError:\n    y()", "no except", ["x()"]),
        (
            "try:\n    x()\nexcept ValueError:\n    y()",
            "except other",
            ["except BaseException:", "except RuntimeError:"],
        ),
        ("raise ValueError('empty')", "raise other", ["raise RuntimeError('empty')"]),
        ("raise ValueError('empty')", "raise silent", ["raise ValueError()"]),
        ("@x\ndef g():\n    y()", "drop decorator", [""]),
        ("x()\ny()", "delete statement", ["pass"]),
    ],
)
def test_an_operator_makes_these_changes(code, operator, new):
    assert sorted(text for name, text in changes(code) if name == operator) == new


def test_functions_of_modules_and_super_are_no_methods():
    assert ("obj.m() to obj", "return os") not in changes("return os.getpid()", os=os)
    assert ("obj.m() to obj", "return os.path") not in changes("return os.path.join()", os=os)
    assert ("obj.m() to obj", "return super()") not in changes("return super().f()")


def test_equal_code_is_made_once_and_what_does_not_compile_is_not_made():
    made = mutants("def f(x):\n    return x[1]", {})
    assert sorted(mutant.new for mutant in made) == ["pass", "return x[0]", "return x[2]"]
    counter = "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n    return g"
    made = {mutant.change for mutant in mutants(counter, {})}
    assert "n = 0 -> n = 1" in made
    assert "n = 0 -> pass" not in made  # what would n be nonlocal to?
    dims = [mutant.new for mutant in mutants("def f(x):\n    return x.sum(dim=1)", {})]
    assert dims.count("return x.sum(dim=0)") == 1


def test_annotations_docstrings_and_the_definition_itself_stay():
    code = 'def f(x: int=1 + 1) -> list[2]:\n    """Says 3."""\n    return x'
    assert {mutant.operator for mutant in mutants(code, {})} == {"arithmetic", "drop operand", "constant", "delete statement"}
    assert all("list[2]" in mutant.code and "Says 3." in mutant.code for mutant in mutants(code, {}))


def test_equal_changes_in_two_places_have_different_names():
    made = [mutant.change for mutant in mutants("def f(x):\n    x()\n    y\n    x()", {}) if mutant.old == "x()"]
    assert made == ["x() -> pass", "x() -> pass (2)"]


def test_a_solution_is_read_with_what_stands_above_it(tmp_path):
    script = tmp_path / "00_new.py"
    script.write_text(
        "# %%\nimport math\n\n# %%\ndef half(x):\n    ### BEGIN SOLUTION\n    return x / 2\n    ### END SOLUTION\n\n"
        '# %%\ncheck("0.8", half)\n\n# %% tags=["demo"]\nimport nothing_that_is_installed\n\n'
        "# %%\ndef quarter(x):\n    ### BEGIN SOLUTION\n    return half(half(x))  # twice\n    ### END SOLUTION\n\n"
        '# %%\ncheck("0.9", quarter)\n'
    )
    read = solution(script, "0.9", "quarter")
    assert read.code == "def quarter(x):\n    return half(half(x))"
    assert read.above["math"].pi > 3
    assert read.define(read.code)(8) == 2
    assert read.define("def quarter(x):\n    return half(x)")(8) == 4
    with pytest.raises(ValueError, match=r"00_new.py must define `eighth` above the check of 0.9, found no such"):
        solution(script, "0.9", "eighth")


class Doubles(Experiment):
    key = claim = "doubles"

    seconds = 0.2

    def draw(self, trial):
        return {"x": trial.integer(3, 9)}

    def measure(self, subject, inputs):
        return {"y": subject(inputs["x"])}

    def facts(self, raw, inputs):
        return {"twice as much": raw["y"] == 2 * inputs["x"]}


def outcome(subject):
    exercise = Exercise(__name__, "0.9", lambda x: 2 * x, "double", experiments=[Doubles()])
    facts = {"reference": {"twice as much": True}, "mistake": {"twice as much": None}}
    return outcome_on(exercise, {"doubles": facts}, subject)


def forever(_):
    while True:
        time.sleep(0.01)


def test_outcomes_of_what_survives_and_of_what_is_rejected():
    assert outcome(lambda: lambda x: x + x) == "survived"
    assert outcome(lambda: lambda x: x) == "described"
    assert outcome(lambda: lambda x: 1 / 0) == "raised"
    assert outcome(lambda: 1 / 0) == "raised"  # when it is defined


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this platform cannot stop a loop from outside")
def test_the_outcome_of_what_never_ends():
    assert outcome(lambda: forever) == "out of time"


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_mutant_that_hangs_or_kills_its_process_is_rejected_alone():
    assert in_forked_process(lambda: "survived", 30) == "survived"
    assert in_forked_process(lambda: os._exit(0), 30) == "raised"
    assert in_forked_process(lambda: os.kill(os.getpid(), signal.SIGKILL), 30) == "raised"
    started = time.monotonic()
    assert in_forked_process(lambda: forever(0), 0.2) == "out of time"
    assert time.monotonic() - started < 10
    assert in_forked_process(lambda: "named", 30) == "named"


def some(*outcomes):
    """Outcomes of mutants x -> 0, x -> 1, ..."""
    made = tuple(Mutant("constant", "x", str(i), f"x = {i}") for i in range(len(outcomes)))
    return Outcomes("2.4", made, tuple(zip(made, outcomes, strict=True)))


def test_scores_leave_out_equivalents_and_those_that_raise():
    count = some("named", "described", "raised", "out of time", "survived", "survived").count({"x -> 5": "no mistake"})
    assert count == Count(6, 4, 2, 1)
    assert (count.score, count.score_without_raised) == (4 / 5, 2 / 3)
    assert Count(3, 0, 0, 3).score == 0


def test_the_report_tells_survivors_and_a_score_that_fell():
    ran = some("named", "raised", "survived", "survived")
    text = "\n".join(report(ran, {"x -> 2": "no mistake"}, Count(4, 3, 1, 1)))
    assert "2.4  4 mutants: 2 rejected (1 named, 0 described, 1 raised, 0 out of time)" in text
    assert "1 equivalent, 1 survived" in text
    assert "score 66.7 % (50.0 %); the table has 100.0 % (100.0 %): IT FELL" in text
    assert "constant           x\n                    ->  3" in text
    assert "->  2" not in text
    assert "it is not in the table yet" in "\n".join(report(ran, {}, None))


def test_a_sample_is_told_and_always_the_same():
    ran = some(*["named"] * 9)
    few = sample(ran.possible, 4)
    assert few == sample(ran.possible, 4) == sorted(few, key=lambda mutant: mutant.new)
    assert set(few) < set(sample(ran.possible, 5))
    part = Outcomes("2.4", ran.possible, tuple((mutant, "named") for mutant in few))
    assert next(report(part, {}, None)).startswith("2.4  4 mutants (9 are possible)")


def test_the_table_keeps_its_row_if_mutants_are_left_out_or_the_score_fell():
    ran = some("named", "raised", "survived", "survived")
    count = ran.count({})
    assert why_not_written(ran, count, None) is None
    assert why_not_written(ran, count, count) is None
    assert why_not_written(ran, count, Count(4, 3, 1, 0)) == (
        "the score fell. To accept that, delete the row from docs/proofs.md and run this again."
    )
    part = Outcomes("2.4", ran.possible, ran.ran[:1])
    assert why_not_written(part, part.count({}), None) == "only 1 of 4 mutants ran. Use --cap 4."


def test_a_declaration_that_is_out_of_date_is_told():
    ran = some("named", "survived")
    declared = {"x -> 0": "is rejected", "x -> 1": "survives", "x -> 2": "is no mutant"}
    lines = ["declared equivalent, but rejected (named): x -> 0", "declared equivalent, but no mutant any more: x -> 2"]
    assert list(ran.out_of_date(declared)) == lines
    assert all(any(line.endswith(text) for line in report(ran, declared, None)) for text in lines)


def test_every_solution_has_mutants_and_those_declared_equivalent_are_among_them(root):
    for number in NUMBERS:
        original, declared = command.solution_of(root, number), equivalent_of(number)
        made = mutants(original.code, original.above)
        assert len({mutant.change for mutant in made}) == len({mutant.code for mutant in made} - {original.code}) == len(made)
        assert declared.keys() <= {mutant.change for mutant in made}, number
        assert len(made) > len(declared)
        assert all(10 < len(reason) < 120 for reason in declared.values()), number


def test_the_page_names_every_exercise_and_its_sums_come_out(root):
    page = (root / "docs/proofs.md").read_text(encoding="utf-8")
    counts = counts_in(page)
    assert list(counts) == NUMBERS
    assert with_table(page, counts) == page


def test_the_table_is_written_where_it_stands():
    page = "# Title\n\n| exercise |\n|---|\n\nText | with a bar.\n"
    written = with_table(page, {"2.4": Count(42, 33, 19, 2), "0.1": Count(11, 9, 6, 2)})
    assert "| 2.4 `cached_features` | 42 | 33 | 19 | 2 | 82.5 % | 66.7 % |\n| **02 features** | 42 |" in written
    assert "| **all** | 53 | 42 | 25 | 4 | 85.7 % | 70.8 % |\n\nText | with a bar.\n" in written
    assert counts_in(written) == {"0.1": Count(11, 9, 6, 2), "2.4": Count(42, 33, 19, 2)}
    assert with_table(written, counts_in(written)) == written


def run(*arguments):
    done = CliRunner().invoke(app, ["mutants", *arguments])
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


def test_the_command_lists_mutants_and_names_the_exercises_there_are(root, monkeypatch):
    monkeypatch.chdir(root)
    status, output = run("--list", "0.1")
    assert status == 0
    assert output.startswith("0.1 11 mutants delete statement winners = logits.argmax(dim=1) -> pass drop keyword")
    status, output = run("9.9")
    assert status == 2
    assert f"no exercise '9.9'. Choose from {', '.join(NUMBERS)}." in output


def test_the_command_says_where_it_cannot_run(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.delattr(os, "fork", raising=False)
    assert run("0.1") == (
        2,
        "warmstart mutants forks a process for each mutant, and this platform cannot: use Linux, or --list.",
    )
    assert run("--list", "0.1")[0] == 0


def test_an_error_in_a_run_is_no_wrong_argument(root, monkeypatch):
    def measure(*_, **__):
        raise ValueError("of the run itself")

    monkeypatch.chdir(root)
    monkeypatch.setattr(command, "measure", measure)
    done = CliRunner().invoke(app, ["mutants", "0.1"])
    assert (done.exit_code, str(done.exception)) == (1, "of the run itself")


def test_an_authors_solution_that_fails_is_one_sentence_and_no_traceback(root, monkeypatch):
    def measure(*_, **__):
        raise command.SolutionRejected("the author's solution of 0.1 must pass")

    monkeypatch.chdir(root)
    monkeypatch.setattr(command, "measure", measure)
    done = CliRunner().invoke(app, ["mutants", "0.1"])
    assert (done.exit_code, done.output.strip()) == (1, "the author's solution of 0.1 must pass")


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_authors_solution_is_judged_as_its_mutants_are(root, monkeypatch):
    judged = []

    def in_forked_process(work, seconds):
        judged.append(work())
        return "raised"  # as where a forked process crashes

    monkeypatch.setattr(command, "in_forked_process", in_forked_process)
    message = r"the author's solution of 0.1 must pass its check in a forked process, got 'raised'. Run `warmstart prove 0.1`"
    with pytest.raises(ValueError, match=message):
        command.outcomes_of(root, "0.1", 100)
    assert judged == ["survived"]


@forks
@pytest.mark.slow
def test_the_command_ends_with_1_if_a_score_fell_and_writes_the_table_where_there_is_no_row(root, monkeypatch, tmp_path):
    (tmp_path / "nbgrader_config.py").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "solutions").symlink_to(root / "solutions")
    page = tmp_path / "docs/proofs.md"
    page.write_text(with_table("| exercise |\n", {"0.1": Count(11, 9, 6, 2)}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "equivalent_of", lambda number: {})
    for name, value in command.ENVIRONMENT.items():  # put back afterwards, since the command sets it
        monkeypatch.setenv(name, value)
    status, output = run("0.1", "--write", "--cap", "10")
    assert status == 1
    assert "0.1 10 mutants (11 are possible)" in output
    assert "the table has 100.0 % (100.0 %): IT FELL" in output
    assert "not written: only 10 of 11 mutants ran" in output
    assert counts_in(page.read_text(encoding="utf-8"))["0.1"] == Count(11, 9, 6, 2)
    page.write_text("| exercise |\n", encoding="utf-8")
    status, output = run("0.1", "--write")
    assert status == 0
    assert counts_in(page.read_text(encoding="utf-8"))["0.1"] == Count(11, 9, 6, 0)
