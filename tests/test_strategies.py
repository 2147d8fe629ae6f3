"""Strategies: each trains what it says, kept results can be measured again, and what the chapter says of them holds."""

import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from helpers import lora
from helpers.backbones import stages
from helpers.recordings import strategies as module
from helpers.recordings.strategies import (
    CUTS,
    DRAWS,
    FIVE,
    LEARNING_RATES,
    RANKS,
    RECORD,
    RECORDED,
    TASKS,
    Scores,
    adapted,
    circumstances,
    classifier,
    learning_rates,
    letters_kept,
    printed,
    record,
    recorded,
    recorded_updates,
    run,
    strategies,
    train,
)

DIGITS = TASKS["digits"]


def mean(scores, key):
    return statistics.mean(getattr(score, key) for score in scores)


def test_a_classifier_is_the_backbone_itself_with_a_head_that_the_seed_decides():
    backbone = DIGITS.backbone(True)
    model, again = classifier(backbone, 10, seed=3), classifier(DIGITS.backbone(True), 10, seed=3)
    assert model.backbone is backbone and torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.head.weight, classifier(backbone, 10, seed=4).head.weight)
    assert stages(model) == (*(f"backbone.{name}" for name in backbone.stages), "head")


def test_there_is_a_strategy_for_every_depth_of_the_backbone():
    assert strategies("digits")[:6] == ("head only", "last stage", *(f"last {k} stages" for k in (2, 3, 4)), "everything")
    assert set(FIVE) < set(strategies("digits"))
    with pytest.raises(ValueError, match=r"^task must be one of 'digits', 'docstrings', 'word order', got 'digit'.$"):
        strategies("digit")


@pytest.mark.parametrize("strategy", strategies("digits"))
def test_each_strategy_trains_exactly_its_stages_and_no_buffer_of_another(strategy):
    model = classifier(DIGITS.backbone(True), 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(strategy, model, DIGITS.examples("train", 2, 0), lr=1e-2, steps=12, batch_size=8, seed=0)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    depth = {"head only": 0, "last stage": 1, "last 2 stages": 2, "last 3 stages": 3, "last 4 stages": 4}.get(strategy, 5)
    frozen = [f"{stage}." for stage in stages(model)[: 5 - depth]] + (["backbone.bn1."] if depth < 5 else [])
    own = ("backbone.mean", "backbone.std", *frozen)
    assert moved == [name for name in before if not name.startswith(own)]


def test_an_unknown_strategy_is_an_error_that_lists_those_there_are():
    model = classifier(DIGITS.backbone(True), 10)
    with pytest.raises(ValueError, match=r"^strategy must be one of 'last stage', .*'LP-FT', got 'all'.$"):
        train("all", model, DIGITS.examples("train", 2, 0), lr=1e-3, steps=1, batch_size=8, seed=0)


def test_before_any_training_nothing_is_forgotten_and_printed_digits_are_another_domain():
    assert letters_kept(DIGITS.backbone(True)) == pytest.approx(0.981, abs=0.002)
    assert printed().classes == DIGITS.examples("test").classes and len(printed().labels) == 1000


def test_the_record_has_every_draw_and_its_recipe():
    for task in TASKS:
        assert {labels: set(by) for labels, by in recorded(task).items()} == {
            labels: set(names) for labels, names in RECORDED[task].items()
        }
        for by in recorded(task).values():
            assert {len(draws) for draws in by.values()} == {DRAWS[task]}
            for way, draws in by.items():
                assert all(isinstance(score, Scores) and 0 <= score.inside <= 1 for score in draws)
                assert {score.lr for score in draws} <= set(learning_rates(task, way))
    assert RECORD.stat().st_size < 50_000
    assert re.fullmatch(
        r"recorded on an \w+ CPU, one thread, 20\d\d-\d\d-\d\d( and 20\d\d-\d\d-\d\d)*", circumstances("digits")
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_recording_is_of_the_settings_that_the_code_has(task):
    for recording in json.loads(RECORD.read_text(encoding="utf-8"))[task]:
        assert recording["steps"] == TASKS[task].steps
        names = {name for by in recording["scores"].values() for name in by}
        assert recording["learning_rates"] == {name: list(learning_rates(task, name)) for name in names}


@pytest.fixture
def made_up(monkeypatch):
    """Recording measures nothing, and needs no processes: each score has the draw as its learning rate."""
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    monkeypatch.setattr(module, "_measure_cell", lambda cell: [cell[-1], 0.5, 0.5, None, None, 1])
    monkeypatch.setattr(module, "_measure_update", lambda draw, lr: [[draw], [lr], {}])


def test_a_strategy_recorded_later_leaves_the_others_their_date(made_up, monkeypatch):
    everything = record("word order", [])
    assert [list(recording["scores"]["100"]) for recording in everything] == [list(RECORDED["word order"][100])]
    first = {"scores": {"100": everything[0]["scores"]["100"]}, "date": "2026-01-01", "machine": "an old one"}
    assert record("word order", [first | {"updates": []}]) == [first | {"updates": []}], "nothing is missing"
    monkeypatch.setitem(RECORDED, "word order", {100: ("LP-FT", *RECORDED["word order"][100]), 10: ("everything",)})
    old, added = record("word order", [first])
    assert old == first, "as it was"
    assert {labels: list(by) for labels, by in added["scores"].items()} == {"100": ["LP-FT"], "10": ["everything"]}
    assert added["learning_rates"].keys() == {"LP-FT", "everything"} and added["date"] > "2026-01-01"
    assert added["updates"] == [[[draw], [draw], {}] for draw in range(DRAWS["word order"])]
    assert list(module._scores("word order", [old, added])[100]) == list(RECORDED["word order"][100])


def test_lora_trains_adapters_of_every_convolution_and_the_head_and_moves_nothing_else():
    model = classifier(DIGITS.backbone(True), 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convolutions = adapted(model)
    assert len(convolutions) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    train("LoRA rank 2", model, DIGITS.examples("train", 2, 0), lr=1e-2, steps=12, batch_size=8, seed=0)
    assert list(lora.layers(model)) == convolutions
    lora.remove(model)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["head.weight", "head.bias"]


def test_a_frozen_head_stays_random_beside_adapters_that_train():
    model = classifier(DIGITS.backbone(True), 10)
    head, stem = model.head.weight.clone(), model.backbone.conv1.weight.clone()
    train("head frozen, LoRA rank 2", model, DIGITS.examples("train", 2, 0), lr=1e-2, steps=3, batch_size=8, seed=0)
    assert torch.equal(model.head.weight, head) and not torch.equal(lora.layers(model)["backbone.conv1"].B, torch.zeros(1))
    lora.remove(model)
    assert torch.equal(model.backbone.conv1.weight, stem)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "draw"), [("head only", 0), ("LP-FT", 0), ("LoRA rank 4", 4)])
def test_a_kept_result_is_measured_again(way, draw):
    """With other kernels and threads these three are at most 0.002 away; LoRA's draw 0, at a rate of 0.01, up to 0.03."""
    kept = recorded("digits")[10][way][draw]
    again = run("digits", way, 10, draw, kept.lr)
    assert again.trainable == kept.trainable
    for key in ("inside", "outside", "source"):
        assert getattr(again, key) == pytest.approx(getattr(kept, key), abs=0.01)  # another CPU sums in another order


def test_what_chapter_04_says_of_the_record_holds():
    table = recorded("digits")
    shown = (*FIVE, "discriminative")
    for by in table.values():
        assert min(shown, key=lambda way: mean(by[way], "outside")) == "everything"
    two, ten, fifty = table[2], table[10], table[50]
    assert mean(two["everything"], "inside") < mean(two["head only"], "inside")
    assert all(mean(fifty[way], "inside") > mean(fifty["head only"], "inside") for way in shown[1:])
    inside = [mean(ten[way], "inside") for way in FIVE]
    assert max(inside) - min(inside) < 0.02
    differences = {
        ("everything", "head only", "inside"): (0, 0.02),
        ("everything", "head only", "outside"): (-0.15, -0.05),
        ("LP-FT", "everything", "inside"): (0, 0.02),
        ("LP-FT", "everything", "outside"): (0.05, 0.15),
    }
    for (strategy, baseline, key), (low, high) in differences.items():
        assert low < mean(ten[strategy], key) - mean(ten[baseline], key) < high, "the four signs of Kumar et al. 2022"
    assert all(a.outside > b.outside for a, b in zip(ten["LP-FT"], ten["everything"], strict=True)), "in every draw"
    for way in ("gradual unfreezing", "discriminative"):
        assert all(mean(by[way], key) > mean(by["everything"], key) for by in table.values() for key in ("outside", "source"))
    spreads = {way: statistics.stdev(score.outside for score in fifty[way]) for way in shown}
    assert spreads["LP-FT"] > 3 * max(spread for way, spread in spreads.items() if way != "LP-FT")
    worst = min(fifty["LP-FT"], key=lambda score: score.source)
    assert worst.lr == max(LEARNING_RATES["digits"]) and worst.source < 0.5 and worst.inside > 0.95


def overlap(rows):
    """Whether there are accuracies that lie within one standard deviation of every mean."""
    values = [[score.inside for score in draws] for draws in rows]
    low = max(statistics.mean(inside) - statistics.stdev(inside) for inside in values)
    return low < min(statistics.mean(inside) + statistics.stdev(inside) for inside in values)


def test_what_chapter_06_says_of_the_record_holds():
    table, topics, digits = recorded("word order")[100], recorded("docstrings")[10], recorded("digits")[10]
    ways = ("head only", "LoRA rank 8", "everything")
    assert overlap(topics[way] for way in ways)
    assert mean(table["everything"], "inside") - mean(table["head only"], "inside") == pytest.approx(0.2, abs=0.02)
    assert overlap(draws for way, draws in table.items() if way != "head only")
    assert not overlap(table[way] for way in ("head only", "LoRA rank 1"))
    inside = {way: [score.inside for score in draws] for way, draws in table.items()}
    for better in ("LoRA rank 8", "everything"):
        assert all(0.002 < b - a < 0.03 for a, b in zip(inside["LoRA rank 1"], inside[better], strict=True)), "in every draw"
    assert max(mean(table[f"LoRA rank {rank}"], "inside") for rank in RANKS) - mean(table["LoRA rank 1"], "inside") < 0.02
    rates = [score.lr for way in ("LoRA rank 8", "everything") for score in table[way]]
    assert min(rates[:3]) / max(rates[3:]) > 6.6 and max(rates[:3]) / min(rates[3:]) < 20.1
    few, alone, every = digits["LoRA rank 4"], digits["head only"], digits["everything"]
    assert mean(alone, "inside") < mean(few, "inside") < mean(every, "inside")
    assert all(0 < b.inside - a.inside < 0.02 for a, b in zip(alone, every, strict=True))
    assert all(a.source < b.source < 0.95 for a, b in zip(few, every, strict=True)) and min(s.source for s in alone) > 0.97
    assert mean(alone, "outside") > max(mean(few, "outside"), mean(every, "outside"))
    assert every[0].trainable / few[0].trainable == pytest.approx(17, abs=0.5)
    random_head = digits["head frozen, LoRA rank 4"]
    assert all(0.01 < b.inside - a.inside < 0.034 and a.source < b.source for a, b in zip(random_head, few, strict=True))
    assert mean(random_head, "source") < 0.5


def test_what_chapter_06_says_of_recorded_updates_holds():
    updates = recorded_updates()
    assert len(updates) == DRAWS["word order"] and all(update.accuracy.keys() == set(CUTS) for update in updates)
    for update, scores in zip(updates, recorded("word order")[100]["everything"], strict=True):
        assert update.accuracy[384] == pytest.approx(scores.inside, abs=0.01), "the run that is recorded, again"
        assert update.accuracy[0] < 0.6 < update.accuracy[1] < update.accuracy[2] - 0.05
        assert 0.005 < update.accuracy[384] - update.accuracy[2] < 0.045, "one to four points"
        assert abs(update.accuracy[8] - update.accuracy[384]) < 0.015
        assert len(update.ranks) == len(update.shares) == 36 and sum(30 < rank < 165 for rank in update.ranks) > 29
        assert 0.4 < statistics.median(update.shares) < 0.65
