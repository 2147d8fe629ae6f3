"""What is recorded: results of every right solution, and their deviations; one tolerance for each precision."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from halves import Halves
from typer.testing import CliRunner

from grader import golden
from grader.checks import TOPICS, exercises
from grader.experiment import Exercise
from grader.golden import AWAITS, FOLDER
from grader.golden import __main__ as command
from grader.golden.__main__ import deviations, facts_that_differ
from grader.golden.deviations import between
from grader.golden.records import (
    SEEDS,
    SETTINGS,
    About,
    Record,
    all_versions,
    each,
    measure,
    path_of,
    read,
    right_solutions,
    versions,
    write,
)
from grader.golden.truth import record, write_tables
from grader.near import distance, near, rounded_to
from grader.observe import run
from grader.setting import CPU, FAKE_GPU, GPU, Setting

RECORDS = [
    pytest.param(topic, setting, version, id=f"{version} {setting} {topic}")
    for version in all_versions()
    for setting in SETTINGS
    for topic in TOPICS.values()
    if path_of(topic, setting, version).exists()
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topic", "setting", "version"), [row for row in RECORDS if row.values[1:] != (CPU, all_versions()[-1])]
)
def test_facts_made_from_what_was_recorded_are_those_of_the_truth_table(topic, setting, version):
    """With whatever device, precision and version: what the newest gives on the CPU, the proofs run again."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor draws numbers with other last bits, and some facts ask whether a parameter kept all of its")
    assert facts_that_differ(topic, read(path_of(topic, setting, version)), setting) == {}


@pytest.mark.parametrize("topic", TOPICS.values())
def test_every_right_solution_is_recorded_in_every_experiment(topic):
    newest = read(path_of(topic, CPU, all_versions()[-1]))
    wanted = {
        (number, experiment.key, solution, seed)
        for number, exercise in exercises(topic).items()
        for experiment in exercise.experiments
        for solution in right_solutions(exercise)
        for seed in SEEDS
    }
    assert {tuple(key) for *key, _ in each(newest.results)} == wanted
    assert not [key for *key, raw in each(newest.results) if "problem" in raw]


@pytest.mark.parametrize(("topic", "setting", "version"), RECORDS)
def test_a_record_says_what_it_was_measured_on(topic, setting, version):
    about = read(path_of(topic, setting, version)).about
    assert about.device and about.date and about.system and about.precision == setting.precision
    assert (about.driver is None) == (setting.device == "cpu")
    assert version == f"torch-{about.versions['torch'].partition('+')[0]}"


def test_deviations_are_those_of_the_records():
    kept = json.loads((FOLDER / "deviations.json").read_text(encoding="utf-8"))
    assert kept == deviations()
    recorded = any(path_of("lora", GPU, version).exists() for version in all_versions())
    assert (kept["devices"] != AWAITS) == recorded, "where no GPU was recorded it says so"
    assert kept["devices"] == AWAITS or all("cuda" in name and name.count("torch-") == 1 for name in kept["devices"])
    assert kept["versions"] and all(name.count("torch-") == 2 for name in kept["versions"])


@pytest.mark.slow
def test_verify_finds_what_was_recorded_here_again():
    """The topic with most exact facts; where the versions are those of a record, on any machine."""
    here = measure("start", CPU)
    assert facts_that_differ("start", here, CPU) == {}
    if versions() in all_versions():
        compared = between(here.results, read(path_of("start", CPU)).results)
        assert len(compared) == len(here.results["0.1"]) > 0
        assert all(deviation.far < 1e-5 and not deviation.unlike for deviation in compared.values())


def test_verify_says_in_a_table_where_a_machine_deviates(monkeypatch):
    results = measure("start", CPU).results
    seeds = results["0.1"]["is a fraction"]["reference"]
    seeds[0] = {name: value + 0.25 if isinstance(value, float) else value for name, value in seeds[0].items()}
    seeds[1] = seeds[1] | {"more": 1}
    about = About("another", None, "float32", {}, "", "")
    monkeypatch.setattr(
        command, "_kept", lambda topic, setting: ("torch-9", Record(about, results)) if setting == CPU else None
    )
    done = CliRunner().invoke(command.app, ["verify", "start"])
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "every fact is as recorded" in text
    assert re.search(r"0\.1 is a fraction cpu float32 torch-9 another the same \(reference: ", text)
    assert "start cpu float32 3 experiments compared" in text and "bfloat16" not in text
    if not GPU.there:
        assert f"start cuda float32 {AWAITS}" in text
    monkeypatch.setattr(command, "facts_that_differ", lambda *_: {("0.1", "right rows count"): ["reference: what counts"]})
    done = CliRunner().invoke(command.app, ["verify", "start"])
    assert done.exit_code == 1 and "reference: what counts" in done.output and "2 facts differ" in done.output
    monkeypatch.setattr(command, "between", lambda *_: {})  # as where every solution fails
    done = CliRunner().invoke(command.app, ["verify", "start"])
    assert done.exit_code == 1 and "reference: what counts" in done.output


def test_topics_that_are_none_are_refused():
    done = CliRunner().invoke(command.app, ["verify", "sing"])
    assert done.exit_code == 2 and "no topic 'sing'. Choose from start, features, finetune" in " ".join(done.output.split())


def test_a_record_comes_back_as_it_was(tmp_path):
    raw = {"x": torch.arange(3.0), "pair": (1, "a"), "rows": [torch.ones(2, dtype=torch.bfloat16), None, {"n": True}], "f": 0.1}
    record = Record(About("a CPU", None, "float32", {"torch": "2"}, "Linux", "2026-11-21"), {"9.1": {"e": {"who": {0: raw}}}})
    write(record, tmp_path / "topic.safetensors")
    back = read(tmp_path / "topic.safetensors")
    assert back.about == record.about and list(tmp_path.iterdir()) == [tmp_path / "topic.safetensors"]
    got = back.results["9.1"]["e"]["who"][0]
    assert got["pair"] == (1, "a") and got["f"] == 0.1 and got["rows"][1:] == [None, {"n": True}]
    assert torch.equal(got["x"], raw["x"]) and torch.equal(got["rows"][0], raw["rows"][0])
    assert between(back.results, record.results)["9.1", "e"].far == 0


def test_what_cannot_be_recorded_is_said(tmp_path):
    record = Record(About("", None, "", {}, "", ""), {"9.1": {"e": {"who": {0: {"x": object()}}}}})
    with pytest.raises(TypeError, match=r"^raw results are tensors, numbers, strings, lists and dicts, got a object.$"):
        write(record, tmp_path / "topic.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("measured", "far", "differs"),
    [
        ({"x": torch.tensor([1.0, 2.02]), "n": 1}, 0.01, None),
        ({"x": torch.tensor([1.0]), "n": 1}, 0.0, "who, x: (2,) tensor and (1,) tensor"),
        ({"x": torch.tensor([1.0, 2.0]), "n": 2}, 0.0, "who, n: 1 and 2"),
    ],
)
def test_deviations_tell_numbers_from_what_is_no_number(measured, far, differs):
    def results(raw):
        return {"9.1": {"e": {"who": {0: raw}}}}

    deviation = between(results({"x": torch.tensor([1.0, 2.0]), "n": 1}), results(measured))["9.1", "e"]
    assert deviation.far == pytest.approx(far, rel=0.02) and deviation.unlike == differs


def test_near_is_relative_to_what_is_large_and_never_to_what_is_small():
    assert distance([100.0, 1.0], [101.0, 1.0]) == pytest.approx(1 / 101) and distance([0.01], [0.02]) == pytest.approx(0.01)
    assert distance([1.0], [1.0, 1.0]) == distance([float("nan")], [1.0]) == float("inf") and distance([], []) == 0
    assert distance(torch.ones(3), 1) == 0 and distance(0.5, 0.25, scale=0.25) == 1


def test_one_tolerance_for_each_precision_says_what_is_rounding():
    assert near(1.0, 1.0 + 0.99e-4) and not near(1.0, 1.0 + 1.01e-4)
    with rounded_to("bfloat16"):
        assert near(1.0, 1.019) and not near(1.0, 1.021)
        with rounded_to("float32", times=10):
            assert near(1.0, 1.0009) and not near(1.0, 1.0011)
        assert near(1.0, 1.019)
    assert not near(1.0, 1.0 + 1.01e-4)


@pytest.mark.parametrize(
    ("solution", "off", "differs"),
    [
        ("reference", 0.0, []),
        ("another solution", 5e-5, ["another solution: y at 0.1 times the tolerance"]),
        ("reference", 1.0, ["reference: y"]),
        ("off", 1.0, []),
        ("off", 5e-4, ["off: y at 10 times the tolerance"]),
        ("broken", 0.0, ["broken: it raises in the truth table, and not here"]),
    ],
)
def test_what_verify_compares_is_what_the_proofs_hold(monkeypatch, solution, off, differs):
    """Facts at the tolerance, a tenth of it and ten times it: the reference's of right solutions, their own of mistakes."""
    monkeypatch.setattr(command, "exercises", lambda _: {"9.1": SimpleNamespace(experiments=(Halves(),))})
    table = {"halves": {"reference": {"y": "half"}, "off": {"y": "other"}, "broken": None}}
    monkeypatch.setattr(golden, "load", lambda _: {"9.1": table})
    raw = run(Halves(), lambda x: x / 2 + off, 0, "9.1").raw
    made = Record(About("", None, "", {}, "", ""), {"9.1": {"halves": {solution: {0: raw}}}})
    differing = facts_that_differ("a topic", made, CPU)
    assert differing == ({("9.1", "halves"): differs} if differs else {})


def test_a_setting_leaves_torch_as_it_was():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for setting in (CPU, Setting("cpu", "bfloat16"), FAKE_GPU):
        with setting.applied():
            assert not torch.backends.cudnn.allow_tf32
            assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == (setting.precision == "bfloat16")
        assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize(
    "module", [torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["all", "matmul", "conv"]
)
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_a_setting_leaves_newer_precisions_too(module, value):
    """Where they disagree with the older ones, torch refuses to say what these are."""

    def now() -> tuple:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    module.fp32_precision = value
    try:
        before = now()
        assert run(Halves(), lambda x: x / 2, 0, "9.1").problem is None
        assert now() == before
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


def test_an_optimizer_goes_along_with_its_parameters():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with FAKE_GPU.applied():
        moved = FAKE_GPU.put({"layer": layer, "optimizer": optimizer, "again": [layer.weight]})
        assert moved["again"][0] is layer.weight is moved["optimizer"].param_groups[0]["params"][0]
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda and optimizer.state[layer.weight]["momentum_buffer"].is_cuda
        optimizer.step()
    assert FAKE_GPU.fetch({"w": layer.weight})["w"].device.type == "cpu"


class Breaks(Halves):
    def facts(self, raw, inputs):
        return {"y": undefined}  # noqa: F821 - what an author may leave behind


def test_a_truth_table_is_not_written_while_the_reference_has_no_facts():
    exercise = Exercise("grader.checks.made.halves", "9.1", lambda x: x / 2, "half", experiments=[Halves()])
    assert record(exercise) == {"halves": {"reference": {"y": "half"}}}
    with pytest.raises(NameError, match="undefined"):  # with its traceback: it is the author's own code
        record(replace(exercise, experiments=[Breaks()]))
    with pytest.raises(ValueError, match=r"^9.1, 'halves': the reference must have facts, got: .+1 / 0.+ Mend the"):
        record(replace(exercise, reference=lambda x: 1 / 0))


def test_what_changed_in_a_truth_table_is_told(tmp_path):
    rows = write_tables(["start"], tmp_path)
    assert len(rows) == 21 and rows[0] == (
        "0.1, right rows count: reference: {'the result is in proportion to': 'the rows that are right'}"
    )
    assert write_tables(["start"], tmp_path) == []
    file = tmp_path / "start.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"100"', '"101"'), encoding="utf-8")
    assert write_tables(["start"], tmp_path) == ["0.1, is a fraction: percentage: {'what stands for all rows': '100'}"]
