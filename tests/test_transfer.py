import json
import statistics

import pytest
import torch

from helpers.data import Examples
from helpers.recordings import strategies, transfer
from helpers.recordings.transfer import RECORD, TASKS, measure_arm, plain_features, record, recorded

SPLITS = ("validation", "test")


@pytest.mark.slow
def test_a_probe_on_five_labels_per_class_is_enough_on_held_out_digits():
    assert statistics.mean(measure_arm("digits", "probe", labels_per_class=5, draw=draw) for draw in range(5)) >= 0.88


@pytest.mark.slow
def test_60_steps_at_one_learning_rate_fine_tune_on_five_labels_per_class(monkeypatch):
    """The record has 300 steps and the best of three rates, which take minutes; a fifth of the steps is enough for 0.93."""
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=60, learning_rates=(3e-3,)))
    assert statistics.mean(measure_arm("digits", "fine-tuned", labels_per_class=5, draw=draw) for draw in range(3)) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize(("task", "labels"), [("digits", 2), ("docstrings", 20)])
def test_recorded_results_are_what_is_measured(task, labels):
    """The two arms that need no training; other versions and machines move a few of 360 or 800 test examples."""
    for arm in TASKS[task].arms[:2]:
        for draw in (0, 1):
            assert measure_arm(task, arm, labels, draw) == pytest.approx(recorded(task)[labels][arm][draw], abs=0.012)


@pytest.mark.parametrize(("arm", "tried"), [("probe", "_probes"), ("fine-tuned", "_trained")])
@pytest.mark.parametrize("best", range(3))
def test_the_setting_is_chosen_on_validation(monkeypatch, best, arm, tried):
    """Three settings get every test example right, or none, but for the one that is best on validation."""
    held_out = {split: Examples(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), ("a", "b")) for split in SPLITS}
    right, wrong = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
    half = torch.cat([right[:2], wrong[2:]])
    tables = [dict(zip(SPLITS, (right, half) if place == best else (wrong, right), strict=True)) for place in range(3)]
    monkeypatch.setattr(transfer, tried, lambda *arguments: iter(tables))
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(examples=lambda split, *_: held_out.get(split)))
    assert measure_arm("digits", arm, labels_per_class=1) == 0.5


@pytest.mark.slow
def test_a_recording_holds_every_arm_and_draw_and_how_it_was_made(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=2, learning_rates=(1e-9,)))
    kept = record("digits", (1,), draws=2)
    accuracies = kept["accuracy"]["1"]
    assert {arm: len(values) for arm, values in accuracies.items()} == dict.fromkeys(TASKS["digits"].arms, 2)
    assert max(accuracies["from scratch"]) < 0.3 < min(accuracies["probe"]), "trained with the steps that it says"
    assert kept["steps"] == 2 and "torch" in kept["versions"] and kept["machine"] and kept["date"]


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_is_recorded_with_several_draws(task):
    for arms in recorded(task).values():
        assert tuple(arms) == TASKS[task].arms
        assert len({len(draws) for draws in arms.values()}) == 1
        assert all(len(draws) >= 3 and all(0 <= value <= 1 for value in draws) for draws in arms.values())


def test_what_chapter_02_says_of_the_curves_is_in_the_record():
    def means(task):
        return {labels: {arm: statistics.mean(v) for arm, v in arms.items()} for labels, arms in recorded(task).items()}

    digits, texts = means("digits"), means("docstrings")
    assert digits[1]["fine-tuned"] < digits[1]["probe"], "with one label per class, fine-tuning ends below the probe"
    assert digits[2]["fine-tuned"] < digits[2]["probe"], "the quiz: it beat fine-tuning at 1 and 2 labels per class"
    assert 0 < digits[5]["fine-tuned"] - digits[5]["probe"] < 0.03, "from 5 labels on it wins, by little"
    assert 0 < digits[10]["fine-tuned"] - digits[10]["probe"] < 0.03
    assert all(min(arms, key=arms.get) == "from scratch" for labels, arms in digits.items() if labels < 10), "the lowest curve"
    assert texts[5]["probe"] > texts[50]["TF-IDF"], "with 5 labels the probe is ahead of TF-IDF with 50"
    assert all(arms["from scratch"] < arms["TF-IDF"] for arms in texts.values()), "worse than counting words"
    for labels, arms in recorded("docstrings").items():
        gain = texts[labels]["fine-tuned"] - texts[labels]["probe"]
        assert 0 <= gain < max(statistics.stdev(arms["fine-tuned"]), statistics.stdev(arms["probe"])), "less than the spread"


@pytest.mark.parametrize("task", strategies.TASKS)
def test_a_task_says_how_many_classes_it_has(task):
    known = strategies.TASKS[task]  # those of `helpers.recordings.transfer`, and one more
    assert len(known.examples("test").classes) == known.classes


def test_the_record_is_of_the_settings_that_the_code_has():
    kept = json.loads(RECORD.read_text(encoding="utf-8"))["docstrings"]
    assert kept["steps"] == TASKS["docstrings"].steps
    assert tuple(kept["learning_rates"]) == TASKS["docstrings"].learning_rates


def test_plain_features_of_texts_know_nothing_of_other_texts():
    train, test = plain_features(["a file is read", "a socket is closed"], ["a word never seen", "file file file"])
    assert train.shape[1] == test.shape[1] == 5  # TF-IDF leaves out words of one letter
    assert test[0].count_nonzero() == 0 and test[1].count_nonzero() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: measure_arm("digits", "prob", 5),
            "arm must be one of 'raw pixels', 'probe', 'from scratch', 'fine-tuned', got 'prob'.",
        ),
        (lambda: recorded("digit"), "task must be one of 'digits', 'docstrings', got 'digit'."),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
