"""Studies: the record has every draw, it can be measured again, and what chapter 04 says of it holds."""

import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.data import digits
from helpers.recordings import studies
from helpers.recordings.strategies import FIVE, train
from helpers.recordings.studies import DRAWS, RECORD, STUDIES, circumstances, record, studied, the_probe_alone, with_errors
from helpers.training import fit


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


def test_a_record_that_lacks_nothing_stays_as_it_is():
    kept = [{"results": dict.fromkeys(STUDIES, [{}] * DRAWS), "machine": "another", "versions": {}, "date": "2026-01-01"}]
    assert record(kept) is kept


def test_a_study_recorded_later_leaves_the_others_their_date(monkeypatch):
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda processes, mp_context: ThreadPoolExecutor(processes))
    monkeypatch.setattr(studies, "_measure_cell", lambda cell: {"it": cell})
    first = {"results": dict.fromkeys(list(STUDIES)[1:], [{}] * DRAWS), "date": "2026-01-01"}
    old, added = record([first])
    assert old is first and added["date"] > "2026-01-01" and "torch" in added["versions"]
    assert added["results"] == {"the probe alone": [{"it": ("the probe alone", draw)} for draw in range(DRAWS)]}


def test_a_kept_result_is_measured_again():
    for name, accuracy in the_probe_alone(0).items():
        assert accuracy == pytest.approx(studied("the probe alone")[name][0], abs=0.01)  # another CPU sums in another order


@pytest.mark.slow
def test_every_study_of_trainings_gives_what_is_recorded_of_it(monkeypatch):
    """With 4 steps, which say nothing of accuracy; the cures that train no backbone are as recorded."""
    fits = []

    def short(model, examples, **settings):
        fits.append((len(examples.labels), settings["lr"], settings["weight_decay"], settings["early_stopping"] is None))
        return fit(model, examples, **settings | {"steps": 4, "every": 2})

    monkeypatch.setattr(studies, "fit", short)
    curves = studies.overfitting(0)
    assert curves.keys() == studied("overfitting").keys() and all(len(curve) == 2 for curve in curves.values())
    assert fits == [(200, 1e-3, 1e-4, True), (100, 1e-3, 1e-4, True)]
    fits.clear()
    cures, kept = studies.cures(0), studied("cures")
    assert cures.keys() == kept.keys() and len(set(fits)) == len(fits) == 6, "six trainings, no two alike"
    for cure in ("frozen, penalty 0.001", "frozen, penalty 1"):
        assert cures[cure] == pytest.approx(kept[cure][0], abs=0.01)
    monkeypatch.setattr(
        studies, "train", lambda way, model, examples, lr, *_, seed: train(way, model, examples, lr, 4, 32, seed)
    )
    left = studies.rates(0)
    assert left.keys() == studied("rates").keys()
    (_, low), _, (_, high) = left.values()
    assert low > 0.95 > high, "letters, after a few small steps and after a few large ones"


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
