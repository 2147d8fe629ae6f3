"""What is recorded: results of every right solution, tolerances that keep their rule, deviations."""

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from grader import golden
from grader.checks import TOPICS, exercises
from grader.experiment import Experiment, equal
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
from grader.golden.rule import GRID, ROUNDING, Broken, _rows
from grader.near import UNRECORDED, distance, near, within
from grader.observe import facts_under, run
from grader.setting import CPU, GPU, PRETENDED, Setting

ALL = [(topic, exercise) for topic in TOPICS.values() for exercise in exercises(topic).values()]
EXERCISES = [pytest.param(topic, exercise, id=exercise.number) for topic, exercise in ALL]
RECORDS = [
    pytest.param(topic, setting, of, id=f"{of} {setting} {topic}")
    for of in all_versions()
    for setting in SETTINGS
    for topic in TOPICS.values()
    if path_of(topic, setting, of).exists()
]
ROWS = json.loads((FOLDER / "tolerances.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize(("topic", "setting", "of"), RECORDS)
def test_facts_made_from_what_was_recorded_are_those_of_the_truth_table(topic, setting, of):
    """On whatever device it was recorded: the facts of CPU and GPU agree."""
    assert facts_that_differ(topic, read(path_of(topic, setting, of)), setting) == {}


@pytest.mark.parametrize("topic", TOPICS.values())
def test_every_right_solution_is_recorded_in_every_experiment(topic):
    newest = read(path_of(topic, CPU, all_versions()[-1]))
    wanted = {
        (number, experiment.name, who, seed)
        for number, exercise in exercises(topic).items()
        for experiment in exercise.experiments
        for who in right_solutions(topic, exercise)
        for seed in SEEDS
    }
    assert {tuple(key) for *key, _ in each(newest.results)} == wanted
    assert not [key for *key, raw in each(newest.results) if "problem" in raw]


@pytest.mark.parametrize(("topic", "setting", "of"), RECORDS)
def test_a_record_says_what_it_was_measured_on(topic, setting, of):
    about = read(path_of(topic, setting, of)).about
    assert about.device and about.date and about.system and about.precision == setting.precision
    assert (about.driver is None) == (setting.device == "cpu")
    assert of == f"torch-{about.versions['torch'].partition('+')[0]}"


@pytest.mark.slow
@pytest.mark.parametrize(("topic", "exercise"), EXERCISES)
def test_a_tenth_and_ten_times_the_tolerance_give_the_same_facts(topic, exercise):
    """Of every right solution and every mistake: so the nearest mistake is ten tolerances away, and rounding a tenth."""
    wrong = {m.name: m.subject for m in exercise.misconceptions}
    newest = read(path_of(topic, CPU, all_versions()[-1])).results[exercise.number]
    for experiment in exercise.experiments:
        rows = ROWS[exercise.number].get(experiment.name, {})
        expected = golden.load(topic)[exercise.number][experiment.name]
        made = [(expected["reference"], raw, seed) for seeds in newest[experiment.name].values() for seed, raw in seeds.items()]
        for name, subject in wrong.items():
            ran = run(experiment, subject, 0, exercise.number)
            if expected[name] is not None:
                made.append((expected[name], ran.raw, 0))
        for fact, row in rows.items():
            tolerance = row[str(CPU)]
            assert tolerance >= 10 * ROUNDING and 10 * tolerance <= row["tells"] * 1.0001
            for factor in (0.1, 1, 10):
                for facts, raw, seed in made:
                    got = facts_under(experiment, raw, seed, float(f"{tolerance * factor:.0e}"))[0].get(fact)
                    assert equal(facts[fact], got), (experiment.name, fact, tolerance * factor, facts[fact], got)


def test_tolerances_are_those_of_this_device_and_else_of_the_cpu():
    rows = {"e": {"f": {"tells": 0.1, "cpu float32": 1e-5, "cuda float32": 1e-4, "cuda TF32": None, "cuda bfloat16": AWAITS}}}
    kept, golden._tolerances = golden._tolerances, lambda: {"9.1": rows}
    try:
        found = [golden.tolerances("9.1", "e", setting)["f"] for setting in (*SETTINGS, PRETENDED)]
        rows["e"]["f"]["cpu bfloat16"] = 0.1
        half = golden.tolerances("9.1", "e", Setting("cuda", "bfloat16"))["f"]
    finally:
        golden._tolerances = kept
    assert found == [1e-5, 1e-5, 1e-4, None, 1e-5, 1e-5] and half == 0.1


def test_where_no_gpu_was_recorded_it_says_so():
    recorded = {str(setting) for of in all_versions() for setting in SETTINGS if path_of("lora", setting, of).exists()}
    missing = {str(setting) for setting in SETTINGS if setting.precision != "bfloat16"} - recorded
    rows = [row for experiments in ROWS.values() for facts in experiments.values() for row in facts.values()]
    assert rows and all(
        (row[setting] == AWAITS) == (setting in missing) for row in rows for setting in missing | {"cpu float32"}
    )
    kept = json.loads((FOLDER / "deviations.json").read_text(encoding="utf-8"))
    assert (kept["devices"] == AWAITS) == (str(GPU) in missing)


def test_deviations_are_those_of_the_records():
    kept = json.loads((FOLDER / "deviations.json").read_text(encoding="utf-8"))
    assert kept == deviations()
    assert kept["devices"] == AWAITS or all("cuda" in name and name.count("torch-") == 1 for name in kept["devices"])
    assert kept["versions"] and all(name.count("torch-") == 2 for name in kept["versions"])


@pytest.mark.slow
def test_verify_finds_what_was_recorded_here_again():
    """The topic with most exact facts; where the versions are those of a record, on any machine."""
    here = measure("start", CPU)
    assert facts_that_differ("start", here, CPU) == {}
    if versions() in all_versions():
        found = between(here.results, read(path_of("start", CPU)).results)
        assert len(found) == len(here.results["0.1"]) > 0
        assert all(deviation.far < 1e-5 and not deviation.other for deviation in found.values())


def test_verify_says_in_a_table_where_a_machine_deviates(monkeypatch):
    results = measure("start", CPU).results
    seeds = results["0.1"]["is afraction"]["reference"]
    seeds[0] = {name: value + 0.25 if isinstance(value, float) else value for name, value in seeds[0].items()}
    seeds[1] = seeds[1] | {"more": 1}
    about = About("another", None, "float32", {}, "", "")
    monkeypatch.setattr(
        command, "_kept", lambda topic, setting: ("torch-9", Record(about, results)) if setting == CPU else None
    )
    done = CliRunner().invoke(command.app, ["verify", "start"])
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "every fact is as recorded" in text
    assert re.search(r"0\.1 is afraction cpu float32 torch-9 another the same \(reference: ", text)
    assert "start cpu float32 2 experiments compared" in text and "bfloat16" not in text
    if not GPU.there:
        assert f"start cuda float32 {AWAITS}" in text
    monkeypatch.setattr(command, "facts_that_differ", lambda *_: {("0.1", "right rows count"): ["reference: what counts"]})
    done = CliRunner().invoke(command.app, ["verify", "start"])
    assert done.exit_code == 1 and "reference: what counts" in done.output and "1 facts differ" in done.output
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
    ("other", "far", "differs"),
    [
        ({"x": torch.tensor([1.0, 2.02]), "n": 1}, 0.01, None),
        ({"x": torch.tensor([1.0]), "n": 1}, 0.0, "who, x: (2,) tensor and (1,) tensor"),
        ({"x": torch.tensor([1.0, 2.0]), "n": 2}, 0.0, "who, n: 1 and 2"),
    ],
)
def test_deviations_tell_numbers_from_what_is_no_number(other, far, differs):
    def results(raw):
        return {"9.1": {"e": {"who": {0: raw}}}}

    found = between(results({"x": torch.tensor([1.0, 2.0]), "n": 1}), results(other))["9.1", "e"]
    assert found.far == pytest.approx(far, rel=0.02) and found.other == differs


class Halves(Experiment):
    """halves"""

    def draw(self, trial):
        return {"x": trial.normal(3)}

    def measure(self, subject, inputs):
        return {"y": subject(inputs["x"])}

    def facts(self, raw, inputs):
        return {"y": "half" if near(raw["y"], inputs["x"] / 2) else "other"}


@pytest.mark.parametrize(("off", "tolerance"), [(1e-2, 1e-6), (1e-4, 1e-6), (3e-6, None)])
def test_a_tolerance_lies_between_rounding_and_the_nearest_mistake(monkeypatch, off, tolerance):
    """Ten times rounding, a tenth of what the mistake is off; where there is no room, the experiment is refused."""
    topic, exercise = ALL[0]
    halves = replace(exercise, number="9.1", experiments=(Halves(),), misconceptions=())
    table = {"9.1": {"halves": {"reference": {"y": "half"}, "off": {"y": "other"}}}}
    monkeypatch.setattr("grader.golden.rule.load", lambda _: table)
    monkeypatch.setattr(
        "grader.golden.rule._wrong", lambda *_: [("off", run(Halves(), lambda x: x / 2 + off, 0, "9.1").raw, 0)]
    )
    raw = {seed: run(Halves(), lambda x: x / 2, seed, "9.1").raw for seed in SEEDS}
    recorded = {CPU: [Record(About("", None, "", {}, "", ""), {"9.1": {"halves": {"reference": raw}}})]}
    if tolerance is None:
        with pytest.raises(Broken, match=r"^9.1, halves, “y”: holds from 1e-09 to 1e-06, and needs a factor of ten"):
            _rows(topic, halves, Halves(), recorded)
        return
    row = _rows(topic, halves, Halves(), recorded)["y"]
    assert row["cpu float32"] == tolerance and row["cuda float32"] == AWAITS and row["tells"] in GRID
    assert row["tells"] <= off and golden.dump({"9.1": {"halves": {"y": row}}}).count("\n") == 7


def test_near_is_relative_to_what_is_large_and_never_to_what_is_small():
    assert distance([100.0, 1.0], [101.0, 1.0]) == pytest.approx(1 / 101) and distance([0.01], [0.02]) == pytest.approx(0.01)
    assert distance([1.0], [1.0, 1.0]) == distance([float("nan")], [1.0]) == float("inf") and distance([], []) == 0
    assert distance(torch.ones(3), 1) == 0 and distance(0.5, 0.25, scale=0.25) == 1
    with within(0.1):
        assert near(1.0, 1.05) and not near(1.0, 1.2)
    assert UNRECORDED in GRID
    with pytest.raises(RuntimeError, match=r"^near\(\) needs a tolerance: call it in `facts` or `notes`"):
        near(1.0, 1.0)


def test_a_setting_leaves_torch_as_it_was():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for setting in (CPU, Setting("cpu", "TF32"), Setting("cpu", "bfloat16"), PRETENDED):
        with setting.applied():
            assert torch.backends.cudnn.allow_tf32 == (setting.precision == "TF32")
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
        for setting in (CPU, Setting("cpu", "TF32")):
            assert run(Halves(), lambda x: x / 2, 0, "9.1", setting).problem is None
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
    with PRETENDED.applied():
        moved = PRETENDED.put({"layer": layer, "optimizer": optimizer, "again": [layer.weight]})
        assert moved["again"][0] is layer.weight is moved["optimizer"].param_groups[0]["params"][0]
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda and optimizer.state[layer.weight]["momentum_buffer"].is_cuda
        optimizer.step()
    assert PRETENDED.fetch({"w": layer.weight})["w"].device.type == "cpu"
