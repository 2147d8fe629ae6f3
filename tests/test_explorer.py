"""The explorer's figures and every callback, at the ends of what the controls allow."""

import base64
import io
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import strategies
from helpers.backbones import glyphnet
from helpers.batchnorm import adabn, drift, moved
from helpers.data import digits
from helpers.explorer import (
    DriftExplorer,
    FreezingExplorer,
    StaticFigure,
    TransferExplorer,
    explore_drift,
    explore_freezing,
    explore_transfer,
    transfer_figure,
)
from helpers.explorer_figures import depths, drift_figure, freezing_figure, recorded_depths
from helpers.features import drop_head, extract, linear_probe
from helpers.figures import image
from helpers.shifts import KINDS, described, measure, network, shifted
from helpers.strategies import Scores
from helpers.training import accuracy
from helpers.transfer import TASKS, recorded


def picture(html):
    data = re.search(r'src="data:image/png;base64,([^"]+)"', html)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))


def alt(html):
    return re.search(r'alt="([^"]+)"', html)[1]


@pytest.mark.parametrize("task", TASKS)
def test_a_figure_shows_the_recorded_numbers(task):
    results = recorded(task)
    for labels in (min(results), max(results)):
        fig, text = transfer_figure(task, labels, TASKS[task].arms)
        left, right = fig.axes
        for arm in TASKS[task].arms:
            mean = np.mean(results[labels][arm])
            assert f"{arm} {mean:.3f}" in text
            assert f"{mean:.3f}" in [note.get_text() for note in right.texts]
        assert left.get_xlabel() == "labelled examples per class" and left.get_ylabel().startswith("accuracy")
        assert "recorded" in fig.get_suptitle()


@pytest.fixture
def explorer():
    return TransferExplorer()


def test_every_corner_of_the_controls_draws_another_figure(explorer):
    seen = set()
    for task in TASKS:
        explorer.task.value = task
        ends = [explorer.labels.options[0], explorer.labels.options[-1]]
        for labels, arms in itertools.product(ends, ([True] * 4, [True] + [False] * 3, [False] * 4)):
            explorer.labels.value = labels
            for box, chosen in zip(explorer.arms, arms, strict=True):
                box.value = chosen
            names = [arm for arm, chosen in zip(TASKS[task].arms, arms, strict=True) if chosen]
            text = alt(explorer.picture.value)
            assert f"With {labels} per class" in text and task in text
            assert all(arm in text for arm in names) and ("no strategy chosen" in text) == (not names)
            assert picture(explorer.picture.value).std() > 10
            seen.add(picture(explorer.picture.value).tobytes())
    assert len(seen) == 2 * 2 * 3
    assert not plt.get_fignums(), "no figure is left for pyplot to show"


def test_changing_the_task_draws_once_and_renames_the_baseline(explorer):
    drawn = []
    explorer.picture.observe(lambda change: drawn.append(change["new"]), "value")
    explorer.task.value = "docstrings"
    assert len(drawn) == 1
    assert explorer.arms[0].description == "TF-IDF"
    assert list(explorer.labels.options) == sorted(recorded("docstrings"))
    explorer.task.value = "digits"
    assert explorer.arms[0].description == "raw pixels"


def test_knobs_turned_at_once_leave_the_figure_of_their_last_positions(explorer):
    """JupyterLab 4.4 and later run callbacks of different widgets in different threads."""

    def turn(number):
        control = (*explorer.arms, explorer.labels, explorer.task)[number % 6]
        control.value = {4: explorer.labels.options[number % 4], 5: tuple(TASKS)[number % 2]}.get(number % 6, number % 5 > 0)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(60)))
    chosen = [arm for arm, box in zip(TASKS[explorer.task.value].arms, explorer.arms, strict=True) if box.value]
    wanted = image(*transfer_figure(explorer.task.value, explorer.labels.value, chosen))
    assert np.array_equal(picture(explorer.picture.value), picture(wanted)) and alt(explorer.picture.value) == alt(wanted)


def test_where_no_widgets_run_there_is_a_figure(explorer, monkeypatch):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].count("<img") == len(TASKS) and "fine-tuned" in bundle["text/plain"]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    without = explore_transfer()
    assert isinstance(without, StaticFigure)
    assert without._repr_mimebundle_().keys() == {"text/html", "text/plain"}


def test_a_number_of_labels_without_a_record_is_told():
    with pytest.raises(ValueError, match=r"^labels_per_class must be one of \[1, 2, 5, 10\] for digits, got 3.$"):
        transfer_figure("digits", 3, ())


# --- chapter 04 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch):
    """Scores in place of those recorded, which change; every depth of both tasks with 2 and 10 labels, and a strategy more."""

    def made(task):
        inside = task == "docstrings"
        names = ["head only", "last stage", *(f"last {k} stages" for k in range(2, 7 if inside else 5)), "everything", "LP-FT"]
        return {
            labels: {
                name: [
                    Scores(
                        0.01, 0.9, 0.8 + (labels + place + draw) / 100, *([None] * 2 if inside else [0.6 - draw / 10, 0.7]), 1
                    )
                    for draw in range(3)
                ]
                for place, name in enumerate(names)
            }
            for labels in (2, 10)
        }

    monkeypatch.setattr(strategies, "recorded", made)
    return made


def test_depths_train_what_the_strategies_train():
    """The same names, and the parameters that `strategies.train` leaves trainable."""
    examples = digits("train", 1)
    assert list(depths("digits")) == list(strategies.strategies("digits"))[: len(depths("digits"))]
    for name, found in depths("digits").items():
        model = strategies.classifier(drop_head(glyphnet()), 10)
        strategies.train(name, model, examples, lr=1e-3, steps=1, batch_size=2, seed=0)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert found.trainable == sum(p.numel() for p in trainable)
        assert found.gradient_bytes == sum(p.grad.numel() * p.grad.element_size() for p in trainable)


def test_counting_parameters_draws_no_random_numbers():
    before = torch.get_rng_state()
    depths.__wrapped__("digits")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_freezing_shows_the_parameters_and_the_recorded_accuracy(records, depth):
    fig, text = freezing_figure("digits", depth, 10)
    left, right = fig.axes
    name, chosen = list(depths("digits").items())[depth]
    for stage, (trainable, count) in chosen.stages.items():
        assert f"{count:,}" in [note.get_text() for note in left.texts]
        assert (f"{stage.removeprefix('backbone.')} {count:,}" in text) == bool(trainable)
    assert f"{chosen.trainable:,} of {chosen.all:,}" in text and name in text and name in fig.get_suptitle()
    assert "recorded" in fig.get_suptitle()
    scores = records("digits")[10][name]
    for score, label in (("inside", "handwritten"), ("outside", "printed"), ("source", "letters kept")):
        mean = np.mean([getattr(one, score) for one in scores])
        assert f"{label} {mean:.3f}" in text
        assert f"{label} {mean:.3f}" in [entry.get_text() for entry in right.get_legend().get_texts()]
    dots = np.concatenate([line.get_xydata() for line in right.lines if line.get_linestyle() == "None"])
    assert len(dots) == 3 * 3 * len(depths("digits")), "every draw of each score at each depth"
    assert {round(y, 3) for x, y in dots if abs(x - depth) < 0.3} == {
        round(getattr(one, score), 3) for one in scores for score in ("inside", "outside", "source")
    }


def test_freezing_says_what_is_not_recorded(records, monkeypatch):
    partial = {10: {"head only": records("digits")[10]["head only"], "last stage": [], "LP-FT": records("digits")[10]["LP-FT"]}}
    monkeypatch.setattr(strategies, "recorded", lambda task: partial)
    assert list(recorded_depths("digits")[10]) == ["head only"]
    assert "handwritten not yet" in freezing_figure("digits", 1, 10)[1]
    fig, text = freezing_figure("digits", 1, 2)
    assert "No depth is recorded yet for digits with 2 per class." in text
    assert "no depth is recorded" in fig.axes[1].texts[0].get_text()

    def nothing(task):
        raise KeyError(task)

    monkeypatch.setattr(strategies, "recorded", nothing)
    assert freezing_figure("digits", 1, None)[1].endswith("No depth is recorded yet for digits.")
    assert not FreezingExplorer().labels.options


def test_freezing_shows_what_is_in_the_file():
    for labels, by in recorded_depths("digits").items():
        text = freezing_figure("digits", 0, labels)[1]
        if "head only" in by:
            assert f"handwritten {np.mean([one.inside for one in by['head only']]):.3f}" in text


def test_freezing_begins_with_labels_that_are_recorded_and_keeps_to_them():
    explorer = explore_freezing()
    for task in ("digits", "docstrings", "digits"):
        explorer.task.value = task
        assert explorer.labels.value in recorded_depths(task) and "no depth is recorded" not in explorer.picture.value.lower()


def test_freezing_at_an_impossible_depth_is_told():
    message = r"^depth must be a whole number from 0 to 5, got 6. 0 trains the head alone.$"
    with pytest.raises(ValueError, match=message):
        freezing_figure("digits", 6, 10)
    with pytest.raises(ValueError, match=r"^task must be one of 'digits', 'docstrings', got 'letters'.$"):
        freezing_figure("letters", 0, 10)


@pytest.mark.slow
def test_every_corner_of_the_freezing_explorer_draws_another_figure(records):
    explorer, seen = FreezingExplorer(), set()
    for task, stages, total in (("digits", 5, "308,538"), ("docstrings", 7, "22,567,686")):
        explorer.task.value = task
        assert list(explorer.depth.options) == list(depths(task)) and len(depths(task)) == stages + 1
        for labels, depth in itertools.product((2, 10), ("head only", "last stage", "everything")):
            explorer.labels.value, explorer.depth.value = labels, depth
            text = alt(explorer.picture.value)
            assert task in text and f", {depth}: {depths(task)[depth].trainable:,} of {total}" in text
            assert f"with {labels} labels" in text and ("letters kept" in text) == (task == "digits")
            seen.add(picture(explorer.picture.value).tobytes())
    assert len(seen) == 2 * 2 * 3
    assert not plt.get_fignums(), "no figure is left for pyplot to show"


@pytest.mark.slow
def test_changing_the_backbone_draws_once_and_keeps_the_depth_that_it_has_too(records):
    explorer, drawn = FreezingExplorer(), []
    explorer.depth.value = "last 2 stages"
    explorer.picture.observe(lambda change: drawn.append(change["new"]), "value")
    explorer.task.value = "docstrings"
    assert len(drawn) == 1 and explorer.depth.value == "last 2 stages"
    explorer.depth.value = "last 6 stages"
    explorer.task.value = "digits"
    assert len(drawn) == 3 and explorer.depth.value == "head only"


@pytest.mark.slow
def test_knobs_of_freezing_turned_at_once_leave_the_figure_of_their_last_positions(records):
    explorer = FreezingExplorer()

    def turn(number):
        control = (explorer.depth, explorer.labels, explorer.task)[number % 3]
        control.value = (("head only", "everything"), (2, 10), tuple(TASKS))[number % 3][number // 3 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(59)))
    depth = list(depths(explorer.task.value)).index(explorer.depth.value)
    wanted = image(*freezing_figure(explorer.task.value, depth, explorer.labels.value))
    assert np.array_equal(picture(explorer.picture.value), picture(wanted)) and alt(explorer.picture.value) == alt(wanted)


# --- chapter 05 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, paper, ink",
    [("as they are", 0, 1), ("grey paper", 0.25, 1), ("dim ink", 0, 0.75), ("inverted", 0.25, 0.75)],
)
def test_paper_and_ink_are_where_the_strength_puts_them(kind, paper, ink):
    clean, found = digits("test").inputs[::2], shifted(kind, 0.25)
    assert torch.allclose(found.inputs, paper + (ink - paper) * clean, atol=1e-6)
    assert torch.equal(found.labels, digits("test").labels[::2])
    if kind != "as they are":
        assert described(kind, 0.25) == f"{kind}: paper at {paper:.2f}, ink at {ink:.2f}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_strength_0_is_none_and_one_of_1_is_not(kind):
    clean = digits("test").inputs[::2]
    assert torch.allclose(shifted(kind, 0.0).inputs, clean)
    assert torch.equal(shifted(kind, 1.0).inputs, shifted(kind, 1.0).inputs), "the same again"
    assert torch.allclose(shifted(kind, 1.0).inputs, clean) == (kind == "as they are")


def test_noise_has_its_standard_deviation_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    noise = shifted("noise", 0.4).inputs - shifted("noise", 0.0).inputs
    assert noise.std().item() == pytest.approx(0.2, rel=0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_blur_is_the_gaussian_of_scipy():
    from scipy.ndimage import gaussian_filter

    found = shifted("blur", 0.5).inputs[:3, 0].numpy()
    wanted = [gaussian_filter(one, 2.0, mode="constant", truncate=3.5) for one in digits("test").inputs[:6:2, 0].numpy()]
    assert np.allclose(found, wanted, atol=1e-5)


def test_printed_digits_are_a_share_of_the_images_with_their_own_labels():
    clean, half, all_of_them = (shifted("printed", strength) for strength in (0.0, 0.5, 1.0))
    other = (half.inputs != clean.inputs).flatten(1).any(1)
    assert other.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(half.labels, torch.where(other, all_of_them.labels, clean.labels))
    assert torch.equal(all_of_them.inputs, strategies.printed().inputs[:400])


def test_a_shift_that_there_is_not_is_told():
    with pytest.raises(ValueError, match=r"^kind must be one of 'as they are', .*, got 'blue paper'.$"):
        shifted("blue paper", 0.5)
    with pytest.raises(ValueError, match=r"^strength must be from 0 to 1, got 1.5. At 0 the digits are as they are.$"):
        shifted("noise", 1.5)
    with pytest.raises(ValueError, match=r"^statistics must be one of 'stored', 'recomputed', got 'old'.$"):
        measure("noise", 0.5, "old")


@pytest.mark.slow
def test_what_is_measured_is_what_the_parts_give():
    """Accuracy with a head trained on clean digits; drift of the network as it is, and after AdaBN."""
    clean, images = digits("train", 10), shifted("grey paper", 0.3)
    backbone = drop_head(glyphnet())
    probe = linear_probe(extract(backbone, clean.inputs), clean.labels, 10, penalty=1e-2)
    adapted = adabn(backbone, [images.inputs], passes="one")
    for statistics, model in (("stored", backbone), ("recomputed", adapted)):
        found = measure("grey paper", 0.3, statistics)
        with torch.no_grad():
            assert found.accuracy == pytest.approx(accuracy(probe(extract(model, images.inputs)), images.labels), abs=1 / 400)
        for one, wanted in zip(found.drift, drift(model, [images.inputs]), strict=True):
            assert one.name == wanted.name
            assert one[1:] == pytest.approx(wanted[1:], abs=1e-4)
    assert measure("grey paper", 0.3).accuracy + 0.3 < measure("grey paper", 0.3, "recomputed").accuracy


@pytest.mark.slow
def test_measuring_leaves_the_network_the_threads_and_the_random_state_alone():
    model, threads, states = network(), torch.get_num_threads(), torch.get_rng_state()
    assert not moved(model, lambda: [measure.__wrapped__("noise", 0.5, which) for which in ("stored", "recomputed")])
    assert model.training and not model._forward_hooks
    network.__wrapped__()
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), states)


@pytest.mark.slow
@pytest.mark.parametrize("using", ["stored", "recomputed"])
def test_drift_shows_what_is_measured(using):
    fig, text = drift_figure("dim ink", 0.9, using)
    means, spreads, _, scores = fig.axes
    found = measure("dim ink", 0.9, using)
    assert [label.get_text() for label in means.get_yticklabels()] == [layer.name for layer in found.drift]
    assert [note.get_text() for note in means.texts] == [f"{layer.mean_shift:.2f}" for layer in found.drift]
    assert [note.get_text() for note in spreads.texts] == [f"{layer.std_ratio:.2f}" for layer in found.drift]
    for layer in found.drift:
        assert f"{layer.name} {layer.mean_shift:.2f} and {layer.std_ratio:.2f}" in text
    for which in ("stored", "recomputed"):
        value = measure("dim ink", 0.9, which).accuracy
        assert f"{value:.3f} with {which}" in text and f"{value:.3f}" in [note.get_text() for note in scores.texts]
    assert "ink at 0.10" in text and "ink at 0.10" in fig.get_suptitle()


@pytest.mark.slow
def test_every_corner_of_the_drift_explorer_draws_a_figure():
    explorer, seen = DriftExplorer(), set()
    for kind, strength, using in itertools.product(KINDS, (0.0, 1.0), ("stored", "recomputed")):
        explorer.kind.value, explorer.strength.value, explorer.using.value = kind, strength, using
        assert explorer.strength.disabled == (kind == "as they are")
        text = alt(explorer.picture.value)
        assert described(kind, strength) in text and f"With {using} statistics" in text
        assert "nan" not in text and "inf" not in text
        seen.add(picture(explorer.picture.value).tobytes())
    assert len(seen) == 2 * (2 * len(KINDS) - 1), "as they are looks the same at any strength"
    assert not plt.get_fignums()


@pytest.mark.slow
def test_knobs_of_drift_turned_at_once_leave_the_figure_of_their_last_positions():
    explorer = DriftExplorer()

    def turn(number):
        control = (explorer.kind, explorer.strength, explorer.using)[number % 3]
        control.value = (("noise", "dim ink"), (0.3, 0.9), ("recomputed", "stored"))[number % 3][number // 3 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(29)))
    wanted = image(*drift_figure(explorer.kind.value, explorer.strength.value, explorer.using.value))
    assert np.array_equal(picture(explorer.picture.value), picture(wanted)) and alt(explorer.picture.value) == alt(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("explore, shown", [(explore_freezing, "AdamW"), (explore_drift, "grey paper")])
def test_every_explorer_is_a_figure_where_no_widgets_run(explore, shown, monkeypatch):
    bundle = explore()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].count("<img") == 2 and shown in bundle["text/plain"]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    without = explore()
    assert isinstance(without, StaticFigure)
    assert without._repr_mimebundle_() == {key: bundle[key] for key in ("text/html", "text/plain")}
