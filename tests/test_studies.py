"""Studies: the record has every draw, it can be measured again, and what chapter 04 says of it holds."""

import statistics

import pytest
import torch

from helpers.data import digits
from helpers.strategies import FIVE
from helpers.studies import DRAWS, RECORD, STUDIES, circumstances, record, studied, the_probe_alone, with_errors


def mean(draws):
    return statistics.mean(draws)


def test_that_share_of_the_labels_is_wrong_and_nothing_else_changes():
    clean = digits("train", labels_per_class=20)
    spoiled = with_errors(clean, 0.3, seed=1)
    assert (spoiled.labels != clean.labels).sum() == 60 and set(spoiled.labels.tolist()) <= set(range(10))
    assert spoiled.inputs is clean.inputs and spoiled.classes == clean.classes
    assert torch.equal(spoiled.labels, with_errors(clean, 0.3, seed=1).labels)
    assert not torch.equal(spoiled.labels, with_errors(clean, 0.3, seed=2).labels)


def test_the_record_has_every_draw_and_the_circumstances():
    for study in STUDIES:
        assert {len(draws) for draws in studied(study).values()} == {DRAWS}
    assert circumstances().startswith("recorded on an ") and RECORD.stat().st_size < 20_000


def test_a_record_that_lacks_nothing_stays_as_it_is(monkeypatch):
    kept = {"results": dict.fromkeys(STUDIES, [{}] * DRAWS), "machine": "another", "versions": {}, "date": "2026-01-01"}
    assert record(kept) is kept


def test_a_kept_result_is_measured_again():
    for name, accuracy in the_probe_alone(0).items():
        assert accuracy == pytest.approx(studied("the probe alone")[name][0], abs=0.01)  # another CPU sums in another order


def test_what_chapter_04_says_of_the_studies_holds():
    probe = studied("the probe alone")
    assert (round(mean(probe["inside"]), 2), round(mean(probe["outside"]), 2)) == (0.95, 0.86)
    moved = studied("features moved")
    assert set(moved) == set(FIVE) and set(moved["head only"]) == {0}
    assert all(a > 1.2 * b for a, b in zip(moved["everything"], moved["LP-FT"], strict=True)), "in every draw"
    curves = studied("overfitting")
    for wrong, clean in zip(curves["wrong labels"], curves["clean labels"], strict=True):
        best = wrong.index(max(wrong))
        assert best in (1, 2) and wrong[-1] < wrong[best] - 0.07 and clean[-1] > max(clean) - 0.015
