"""The explorer's figures and every callback, at the ends of what the controls allow."""

import base64
import html
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import backbones, lora
from helpers.backbones import glyphnet
from helpers.batchnorm import adabn, drift, moved
from helpers.data import digits
from helpers.explorers import (
    DriftExplorer,
    ExportExplorer,
    FreezingExplorer,
    LoraExplorer,
    StaticFigure,
    TransferExplorer,
    explore_drift,
    explore_export,
    explore_freezing,
    explore_lora,
    explore_transfer,
)
from helpers.explorers import lora as explorer_lora
from helpers.explorers.export import export_figure, fastest
from helpers.explorers.figures import depths, drift_figure, freezing_figure, recorded_depths, transfer_figure
from helpers.explorers.lora import BACKBONES, OPTIMIZERS, PRECISIONS, lora_figure, memory, ranks, recorded_accuracy
from helpers.features import drop_head, extract, linear_probe
from helpers.figures import image
from helpers.forgetting import printed
from helpers.parity import BatchParity, Parity
from helpers.recordings import formats, strategies
from helpers.recordings.strategies import Scores
from helpers.recordings.transfer import TASKS, recorded
from helpers.shifts import KINDS, described, measure, network, shifted
from helpers.training import accuracy


def picture(shown):
    data = re.search(r'src="data:image/png;base64,([^"]+)"', shown)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))


def alt(shown):
    return re.search(r'alt="([^"]+)"', shown)[1]


@pytest.fixture
def drawn(monkeypatch):
    """Figures of explorers, which become pictures here only where a test asks: most are of knobs on their way."""
    figures, drawing = [], threading.Lock()

    def kept(fig, text):
        assert drawing.acquire(blocking=False), "only one explorer draws at a time"
        figures.append((fig, text))  # keeps it, so that no other gets its id
        time.sleep(0.01)  # lets other threads go on, as drawing does
        drawing.release()
        return f'<img alt="{html.escape(text)}" id="{id(fig)}">'

    monkeypatch.setattr(sys.modules["helpers.explorers.widgets"], "image", kept)
    return figures


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


def assert_shows(explorer, drawn, wanted):
    """The figure in an explorer's picture, of all that it drew, and its text alternative are those that are wanted."""
    shown = explorer.picture.value
    assert html.unescape(alt(shown)) == wanted[1]
    (fig,) = [fig for fig, _ in drawn if f'id="{id(fig)}"' in shown]
    assert np.array_equal(picture(image(fig, wanted[1])), picture(image(*wanted)))


@pytest.fixture
def explorer():
    return TransferExplorer()


def test_every_corner_of_the_controls_draws_another_figure(drawn, explorer):
    pictures = set()
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
            shown = picture(image(*drawn[-1]))
            assert shown.std() > 10
            pictures.add(shown.tobytes())
    assert len(pictures) == 2 * 2 * 3
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
        list(pool.map(turn, range(30)))
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
    for name, counted in depths("digits").items():
        model = backbones.classifier(drop_head(glyphnet()), 10)
        strategies.train(name, model, examples, lr=1e-3, steps=1, batch_size=2, seed=0)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert counted.trainable == sum(p.numel() for p in trainable)
        assert counted.gradient_bytes == sum(p.grad.numel() * p.grad.element_size() for p in trainable)


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
        mean = np.mean([getattr(draw, score) for draw in scores])
        assert f"{label} {mean:.3f}" in text
        assert f"{label} {mean:.3f}" in [entry.get_text() for entry in right.get_legend().get_texts()]
    dots = np.concatenate([line.get_xydata() for line in right.lines if line.get_linestyle() == "None"])
    assert len(dots) == 3 * 3 * len(depths("digits")), "every draw of each score at each depth"
    assert {round(y, 3) for x, y in dots if abs(x - depth) < 0.3} == {
        round(getattr(draw, score), 3) for draw in scores for score in ("inside", "outside", "source")
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
            assert f"handwritten {np.mean([draw.inside for draw in by['head only']]):.3f}" in text


@pytest.mark.slow
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
def test_every_corner_of_the_freezing_explorer_draws_another_figure(records, drawn):
    explorer, pictures = FreezingExplorer(), set()
    for task, stages, total in (("digits", 5, "308,538"), ("docstrings", 7, "22,567,686")):
        explorer.task.value = task
        assert list(explorer.depth.options) == list(depths(task)) and len(depths(task)) == stages + 1
        for labels, depth in itertools.product((2, 10), ("head only", "last stage", "everything")):
            explorer.labels.value, explorer.depth.value = labels, depth
            text = alt(explorer.picture.value)
            assert task in text and f", {depth}: {depths(task)[depth].trainable:,} of {total}" in text
            assert f"with {labels} labels" in text and ("letters kept" in text) == (task == "digits")
            pictures.add(picture(image(*drawn[-1])).tobytes())
    assert len(pictures) == 2 * 2 * 3
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
def test_knobs_of_freezing_turned_at_once_leave_the_figure_of_their_last_positions(records, drawn):
    explorer = FreezingExplorer()

    def turn(number):
        control = (explorer.depth, explorer.labels, explorer.task)[number % 3]
        control.value = (("head only", "everything"), (2, 10), tuple(TASKS))[number % 3][number // 3 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(59)))
    depth = list(depths(explorer.task.value)).index(explorer.depth.value)
    assert_shows(explorer, drawn, freezing_figure(explorer.task.value, depth, explorer.labels.value))


# --- chapter 05 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, paper, ink",
    [("as they are", 0, 1), ("grey paper", 0.25, 1), ("dim ink", 0, 0.75), ("inverted", 0.25, 0.75)],
)
def test_paper_and_ink_are_where_the_strength_puts_them(kind, paper, ink):
    clean, examples = digits("test").inputs[::2], shifted(kind, 0.25)
    assert torch.allclose(examples.inputs, paper + (ink - paper) * clean, atol=1e-6)
    assert torch.equal(examples.labels, digits("test").labels[::2])
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

    blurred = shifted("blur", 0.5).inputs[:3, 0].numpy()
    wanted = [gaussian_filter(digit, 2.0, mode="constant", truncate=3.5) for digit in digits("test").inputs[:6:2, 0].numpy()]
    assert np.allclose(blurred, wanted, atol=1e-5)


def test_printed_digits_are_a_share_of_the_images_with_their_own_labels():
    clean, half, all_of_them = (shifted("printed", strength) for strength in (0.0, 0.5, 1.0))
    replaced = (half.inputs != clean.inputs).flatten(1).any(1)
    assert replaced.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(half.labels, torch.where(replaced, all_of_them.labels, clean.labels))
    assert torch.equal(all_of_them.inputs, printed().inputs[:400])


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
        result = measure("grey paper", 0.3, statistics)
        with torch.no_grad():
            assert result.accuracy == pytest.approx(accuracy(probe(extract(model, images.inputs)), images.labels), abs=1 / 400)
        for layer, wanted in zip(result.drift, drift(model, [images.inputs]), strict=True):
            assert layer.name == wanted.name
            assert layer[1:] == pytest.approx(wanted[1:], abs=1e-4)
    assert measure("grey paper", 0.3).accuracy + 0.3 < measure("grey paper", 0.3, "recomputed").accuracy


@pytest.mark.slow
def test_measuring_leaves_the_network_the_threads_and_the_random_state_alone():
    model, threads, states = network(), torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        assert not moved(model, lambda: [measure.__wrapped__("noise", 0.5, which) for which in ("stored", "recomputed")])
        assert model.training and not model._forward_hooks
        network.__wrapped__()
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), states)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("using", ["stored", "recomputed"])
def test_drift_shows_what_is_measured(using):
    fig, text = drift_figure("dim ink", 0.9, using)
    means, spreads, _, scores = fig.axes
    measured = measure("dim ink", 0.9, using)
    assert [label.get_text() for label in means.get_yticklabels()] == [layer.name for layer in measured.drift]
    assert [note.get_text() for note in means.texts] == [f"{layer.mean_shift:.2f}" for layer in measured.drift]
    assert [note.get_text() for note in spreads.texts] == [f"{layer.std_ratio:.2f}" for layer in measured.drift]
    for layer in measured.drift:
        assert f"{layer.name} {layer.mean_shift:.2f} and {layer.std_ratio:.2f}" in text
    for which in ("stored", "recomputed"):
        value = measure("dim ink", 0.9, which).accuracy
        assert f"{value:.3f} with {which}" in text and f"{value:.3f}" in [note.get_text() for note in scores.texts]
    assert "ink at 0.10" in text and "ink at 0.10" in fig.get_suptitle()


@pytest.mark.slow
def test_every_corner_of_the_drift_explorer_draws_a_figure(drawn):
    explorer, texts, pictures = DriftExplorer(), set(), set()
    for using, strength, kind in itertools.product(("stored", "recomputed"), (0.0, 1.0), KINDS):
        explorer.using.value, explorer.strength.value, explorer.kind.value = using, strength, kind
        assert explorer.strength.disabled == (kind == "as they are")
        text = alt(explorer.picture.value)
        assert described(kind, strength) in text and f"With {using} statistics" in text
        assert "nan" not in text and "inf" not in text
        texts.add(text)
        if strength == 1:  # at 0 all of them are as they are
            pictures.add(picture(image(*drawn[-1])).tobytes())
    assert len(texts) == 2 * (2 * len(KINDS) - 1), "as they are is the same at any strength"
    assert len(pictures) == 2 * len(KINDS)
    assert not plt.get_fignums()


@pytest.mark.slow
def test_knobs_of_drift_turned_at_once_leave_the_figure_of_their_last_positions(drawn):
    explorer = DriftExplorer()

    def turn(number):
        control = (explorer.kind, explorer.strength, explorer.using)[number % 3]
        control.value = (("noise", "dim ink"), (0.3, 0.9), ("recomputed", "stored"))[number % 3][number // 3 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(29)))
    assert_shows(explorer, drawn, drift_figure(explorer.kind.value, explorer.strength.value, explorer.using.value))


@pytest.mark.slow
@pytest.mark.parametrize(
    "explore, shown",
    [(explore_freezing, "AdamW"), (explore_drift, "grey paper"), (explore_lora, "rank 8"), (explore_export, "resnet18")],
)
def test_every_explorer_is_a_figure_where_no_widgets_run(explore, shown, monkeypatch):
    bundle = explore()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].count("<img") >= 2 and shown in bundle["text/plain"]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    without = explore()
    assert isinstance(without, StaticFigure)
    assert without._repr_mimebundle_() == {key: bundle[key] for key in ("text/html", "text/plain")}


# --- chapter 06 ---------------------------------------------------------------------------------------------------


def classifier(backbone):
    """The model itself, whose shapes the explorer takes from its file."""
    known = BACKBONES[backbone]
    return backbones.classifier(strategies.TASKS[known.task].backbone(True), known.classes)


@pytest.fixture
def lora_record(monkeypatch):
    """Scores in place of those recorded: both tasks, three draws, LoRA with two ranks, the higher one first."""

    def made(task):
        known = {backbone.task: backbone for backbone in BACKBONES.values()}[task]
        names = ("everything", "LP-FT", "LoRA rank 32", "LoRA rank 4", "head only")
        by = {
            name: [Scores(0.01, 0.9, 0.9 - place / 50 + draw / 100, None, None, 1) for draw in range(3)]
            for place, name in enumerate(names)
        }
        return {known.labels: by, 2: {}}

    monkeypatch.setattr(strategies, "recorded", made)
    return made


@pytest.mark.parametrize("backbone", [pytest.param("MiniLM", marks=pytest.mark.slow), "glyphnet"])
def test_what_is_counted_is_what_the_model_has_and_lora_trains(backbone):
    known = BACKBONES[backbone]
    inside = {
        "queries and values": lambda name: name.endswith(("query", "value")),
        "all attention": lambda name: "attention" in name,
        "last stage": lambda name: "layer4" in name,
    }
    for layers in known.layers:
        model = classifier(backbone)
        assert memory(backbone, layers, 1, "SGD", "float32")["everything"].trainable == sum(
            p.numel() for p in model.parameters()
        )
        assert explorer_lora.network(backbone).head == sum(p.numel() for p in model.head.parameters())
        names = [name for name, module in model.backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        names = [f"backbone.{name}" for name in names if inside.get(layers, str)(name)]
        if layers == known.recorded:
            assert names == strategies.adapted(model), "the layers that the record has"
        rank = ranks(backbone, layers)[-1]
        lora.inject(model, names, rank, train=["head"])
        counted = memory(backbone, layers, rank, "SGD", "float32")["LoRA"]
        assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert counted.weights == sum(p.numel() * p.element_size() for p in model.parameters())
        smallest = min(min(layer.A.shape[1], layer.B.shape[0]) for layer in lora.layers(model).values())
        assert rank == explorer_lora.HIGHEST or 2 * rank > smallest, "no higher rank could be offered"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_what_the_optimizer_keeps(optimizer):
    make = {"SGD": torch.optim.SGD, "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}
    for name, trains in (("head only", "head"), ("LoRA", ""), ("everything", "")):
        model = classifier("glyphnet").to(torch.bfloat16)
        if name == "LoRA":
            lora.inject(model, "layer4.0.conv1", 2, train=["head"])
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter_name.startswith(trains))
        trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.ones_like(parameter)
        steps = make.get(optimizer, torch.optim.AdamW)(trainable, lr=1e-3)
        steps.step()
        kept = [value for state in steps.state.values() for value in state.values() if torch.is_tensor(value) and value.ndim]
        cost = lora.cost([model.backbone.layer4[0].conv1], 2, OPTIMIZERS[optimizer])
        numbers = cost["optimizer_bytes"] // cost["gradient_bytes"]
        assert sum(x.numel() * x.element_size() for x in kept) == numbers * sum(p.grad.numel() * 2 for p in trainable)
    counted = memory("glyphnet", "last stage", 2, optimizer, "bfloat16")["everything"]
    assert counted.gradients == sum(p.grad.numel() * p.grad.element_size() for p in trainable)
    assert counted.state == sum(x.numel() * x.element_size() for x in kept)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_head_has_the_classes_of_its_task(backbone):
    known = BACKBONES[backbone]
    assert len(strategies.TASKS[known.task].examples("test").classes) == known.classes


@pytest.mark.parametrize(
    "settings", [("MiniLM", "queries and values", 8, "AdamW", "float32"), ("glyphnet", "last stage", 64, "SGD", "bfloat16")]
)
def test_lora_shows_what_is_counted(lora_record, settings):
    fig, text = lora_figure(*settings)
    left, _ = fig.axes
    memories = memory(*settings)
    shown = [note.get_text() for note in left.texts]
    for part in ("weights", "gradients", "state"):
        for cost in memories.values():
            count = getattr(cost, part)
            assert (explorer_lora.size(count) if count else "0") in shown
    bars = sorted(bar.get_x() + bar.get_width() for bar in left.patches)
    wanted = sorted(max(1e3, getattr(cost, part)) for cost in memories.values() for part in ("weights", "gradients", "state"))
    assert bars == pytest.approx(wanted), "each bar ends at its number of bytes"
    assert left.get_xscale() == "log" and "logarithmic" in left.get_xlabel() and "activations" in left.get_xlabel()
    assert min(wanted) >= left.get_xlim()[0] and max(wanted) < left.get_xlim()[1]
    for words in settings[1:2] + (f"rank {settings[2]}",) + settings[3:]:
        assert words in text and words in fig.get_suptitle()
    assert f"{memories['LoRA'].trainable:,}" in text and f"{memories['everything'].trainable:,}" in text


def test_times_fewer_are_of_the_adapted_weights_and_of_the_whole_model(lora_record):
    text = lora_figure("MiniLM", "queries and values", 8, "AdamW", "float32")[1]
    full, adapter = 12 * 384 * 384, 12 * 8 * (384 + 384)
    assert f"train {adapter:,} numbers, {full / adapter:.0f} times fewer than the {full:,} weights they adapt" in text
    whole = memory("MiniLM", "queries and values", 8, "AdamW", "float32")["everything"].trainable
    assert f"With the head {adapter + 770:,} train, {whole / (adapter + 770):.0f} times fewer than all {whole:,}" in text


def test_accuracy_is_beside_it_where_it_is_recorded(lora_record):
    fig, text = lora_figure("glyphnet", "every convolution", 4, "SGD", "bfloat16")
    right = fig.axes[1]
    means = {name: np.mean([scores.inside for scores in draws]) for name, draws in lora_record("digits")[10].items()}
    order = ["head only", "LoRA rank 4", "LoRA rank 32", "everything"]
    assert [label.get_text() for label in right.get_yticklabels()] == order[::-1]
    assert ", ".join(f"{name} {means[name]:.3f}" for name in order) in text
    assert "not recorded" not in (text + right.get_xlabel()).lower() and len(right.patches) == 1
    assert "recorded with every convolution, AdamW, float32" in right.get_xlabel(), "whatever the knobs say"
    for layers, rank, missing in (("every convolution", 8, "rank 8"), ("last stage", 4, "last stage")):
        fig, text = lora_figure("glyphnet", layers, rank, "SGD", "bfloat16")
        assert text.endswith(f"Not recorded: {missing}.") and f"not recorded: {missing}" in fig.axes[1].get_xlabel()
        assert not fig.axes[1].patches, "no row is marked"


def test_lora_says_where_no_accuracy_is_recorded(monkeypatch):
    for kept in ({}, {100: {}}):
        monkeypatch.setattr(strategies, "recorded", lambda task, kept=kept: kept)
        assert "No accuracy is recorded yet for word order." in lora_figure("MiniLM", "all attention", 1, "SGD", "float32")[1]

    def nothing(task):
        raise KeyError(task)

    monkeypatch.setattr(strategies, "recorded", nothing)
    assert recorded_accuracy("MiniLM") == {}


def test_lora_of_what_there_is_not_is_told():
    right = ("glyphnet", "last stage", 4, "SGD", "float32")
    for place, wrong, message in (
        (0, "BERT", r"^backbone must be one of 'MiniLM', 'glyphnet', got 'BERT'.$"),
        (1, "all attention", r"^layers of glyphnet must be one of 'last stage', 'every convolution', got 'all attention'.$"),
        (2, 65, r"^rank must be a whole number from 1 to 64, got 65. A weight is the matrix \(128, 64\).$"),
        (3, "Adam", r"^optimizer must be one of 'SGD', 'SGD with momentum', 'AdamW', got 'Adam'.$"),
        (4, "int8", r"^precision must be one of 'float32', 'bfloat16', got 'int8'.$"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_figure(*right[:place], wrong, *right[place + 1 :])


@pytest.mark.slow
def test_every_corner_of_the_lora_explorer_draws_another_figure(lora_record, drawn):
    explorer, pictures = LoraExplorer(), set()
    for backbone, known in BACKBONES.items():
        explorer.backbone.value = backbone
        assert list(explorer.layers.options) == list(known.layers)
        for layers in known.layers:
            explorer.layers.value = layers
            assert list(explorer.rank.options) == ranks(backbone, layers)
            for rank, (optimizer, precision) in itertools.product(
                (explorer.rank.options[0], explorer.rank.options[-1]), zip(("SGD", "AdamW"), PRECISIONS, strict=True)
            ):
                explorer.rank.value, explorer.optimizer.value, explorer.precision.value = rank, optimizer, precision
                text = alt(explorer.picture.value)
                assert f"{known.title}, {layers}, rank {rank}, {optimizer}, {precision}." in text
                pictures.add(picture(image(*drawn[-1])).tobytes())
    assert len(pictures) == 5 * 2 * 2
    assert not plt.get_fignums(), "no figure is left for pyplot to show"


@pytest.mark.slow
def test_changing_the_backbone_of_lora_draws_once_and_keeps_the_rank_if_it_can(lora_record):
    explorer, drawn = LoraExplorer(), []
    explorer.picture.observe(lambda change: drawn.append(change["new"]), "value")
    explorer.backbone.value = "glyphnet"
    assert len(drawn) == 1 and (explorer.layers.value, explorer.rank.value) == ("last stage", 8)
    explorer.rank.value = 64
    explorer.layers.value = "every convolution"
    assert len(drawn) == 3 and explorer.rank.value == 1, "the smallest matrix allows 9"


@pytest.mark.slow
def test_knobs_of_lora_turned_at_once_leave_the_figure_of_their_last_positions(lora_record, drawn):
    explorer = LoraExplorer()

    def turn(number):
        control = (explorer.backbone, explorer.rank, explorer.optimizer, explorer.precision)[number % 4]
        control.value = (tuple(BACKBONES), (1, 4), tuple(OPTIMIZERS), tuple(PRECISIONS))[number % 4][number // 4 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(23)))
    assert_shows(explorer, drawn, lora_figure(*explorer.settings()))


# --- chapter 08 ---------------------------------------------------------------------------------------------------


def made_format(name, batch, median, error=0.0, file=1_000_000):
    report = Parity("it", torch.float32, 1e-5, "rounding", (BatchParity(batch, error, 10 * error),))
    return formats.Format(name, formats.NEEDS[name].python, file, 1.25, (0.9 * median, median, 1.2 * median), report)


@pytest.fixture
def formats_record(tmp_path, monkeypatch):
    """Invented numbers in place of those recorded: two batches, one format beyond tolerance, two without numbers."""
    notes = {"TensorRT": "TensorRT needs a GPU.", "torch.compile": "InductorError: no working compiler, " + "and so on " * 20}

    def made(scale):
        entries = {}
        for place, name in enumerate(formats.NEEDS):
            rows = {
                batch: made_format(name, batch, scale * batch * (10 - place), 2e-5 * (name == "AOTInductor"))
                for batch in (1, 8)
            }
            without = dict.fromkeys(rows, formats.Format(name, formats.NEEDS[name].python, note=notes.get(name, "")))
            entries[name] = formats._kept(without if name in notes else rows)
        return entries

    kept = {
        "models": {"glyphnet": made(0.1), "resnet18": made(40)},
        "machine": "a processor, Linux",
        "gpu": None,
        "threads": 1,
        "versions": {"torch": "2.14.0"},
        "date": "2026-11-11",
    }
    monkeypatch.setattr(formats, "RECORD", tmp_path / "formats.json")
    formats.RECORD.write_text(json.dumps(kept), encoding="utf-8")
    return kept


def test_a_record_gives_back_what_was_measured(formats_record):
    rows = {row.name: row for row in formats.recorded("resnet18")[8]}
    assert list(rows) == list(formats.NEEDS)
    assert rows["eager"] == made_format("eager", 8, 3200.0) or rows["eager"].milliseconds == pytest.approx((2880, 3200, 3840))
    assert not rows["AOTInductor"].parity.ok and rows["AOTInductor"].parity.error == 2e-5
    assert rows["TensorRT"].note == "TensorRT needs a GPU." and rows["TensorRT"].milliseconds is None
    assert "ONNX Runtime     no         1000     1.25" in str(formats.recorded("resnet18")[8])
    assert list(formats.recorded("glyphnet")) == [1, 8]
    assert formats.circumstances()["machine"] == "a processor, Linux" and "models" not in formats.circumstances()


def test_a_record_that_there_is_not_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^model must be one of 'glyphnet', 'resnet18', 'MiniLM', got 'bert'.$"):
        formats.record(["bert"], {1: 1})
    monkeypatch.setattr(formats, "RECORD", tmp_path / "formats.json")
    message = r"^formats.json must be beside formats.py, got none. Run: python -m helpers.recordings.formats$"
    with pytest.raises(FileNotFoundError, match=message):
        formats.recorded("glyphnet")
    assert export_figure("glyphnet", None, ())[1] == "No formats are recorded yet for glyphnet."
    assert not ExportExplorer().batch.options


@pytest.mark.parametrize("model", formats.MODELS)
def test_the_record_has_every_format_measured_or_a_reason(model):
    assert list(formats.recorded(model)) == list(formats.ROUNDS)
    text = export_figure(model, 1, ())[1]
    for rows in formats.recorded(model).values():
        assert [row.name for row in rows] == list(formats.NEEDS)
        for row in rows:
            low, middle, high = row.milliseconds or (0, 0, 0)
            assert bool(row.note) == (row.milliseconds is None) == (row.parity is None) == (row.seconds is None)
            assert row.note or 0 < low <= middle <= high
            assert (row.bytes is None) == (bool(row.note) or row.name == "torch.compile")
            assert row.name in text
    assert formats.circumstances()["threads"] == 1


@pytest.mark.slow
def test_recording_measures_each_model_in_each_format(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = formats.Model("tiny", lambda: (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), torch.randn(4, 3)))
    monkeypatch.setattr(formats, "MODELS", {"tiny": tiny})
    state = torch.get_rng_state()
    kept = json.loads(json.dumps(formats.record(["tiny"], {1: 2, 8: 1}, compiled=False)))
    assert torch.equal(torch.get_rng_state(), state) and "tiny, batch of 8" in capsys.readouterr().out
    assert kept["gpu"] is None and torch.__version__.startswith(kept["versions"]["torch"])
    monkeypatch.setattr(formats, "RECORD", tmp_path / "formats.json")
    formats.RECORD.write_text(json.dumps(kept), encoding="utf-8")
    for rows in formats.recorded("tiny").values():
        for row in rows:
            assert bool(row.note) == (row.name == "TensorRT")
            assert row.note or (row.parity.ok and [compared.batch for compared in row.parity.rows] == [1, 8])


@pytest.mark.parametrize("absent", [(), ("Python",), ("PyTorch",), ("Python", "PyTorch")])
def test_formats_that_do_not_fit_are_grey_and_crossed(formats_record, absent):
    fig, text = export_figure("glyphnet", 8, absent)
    needs, sizes, times, _ = fig.axes
    fits = {
        (): set(formats.NEEDS),
        ("Python",): {"TorchScript", "ONNX Runtime", "TensorRT", "AOTInductor"},
        ("PyTorch",): {"ONNX Runtime", "TensorRT"},
        ("Python", "PyTorch"): {"ONNX Runtime", "TensorRT"},
    }[absent]
    assert {label.get_text() for label in needs.get_yticklabels() if label.get_color() == "black"} == fits
    assert {name for name in formats.NEEDS if f"{name} (does not fit)" in text} == set(formats.NEEDS) - fits
    crosses = sum(line.get_marker() == "X" for line in needs.lines)
    assert crosses == sum({"Python": 3, "PyTorch": 5}[name] for name in absent)
    for ax in (sizes, times):
        grey = [bar.get_y() + 0.3 for bar in ax.patches if bar.get_facecolor()[:3] == (0.8, 0.8, 0.8)]
        rows = [place for place, name in enumerate(formats.NEEDS) if name not in fits | {"torch.compile"}]
        assert grey == pytest.approx(rows)


def test_formats_show_what_is_recorded(formats_record):
    fig, text = export_figure("resnet18", 1, ())
    _, sizes, times, proof = fig.axes
    assert [note.get_text().strip() for note in times.texts] == ["400 ms", "360 ms", "320 ms", "280 ms", "160 ms"]
    assert "ONNX Runtime 1.0 MB, 280 ms (252 ms to 336 ms), error 0;" in text
    assert [note.get_text().strip() for note in sizes.texts][
        4
    ] == "not recorded: no GPU" and "TensorRT not recorded: no GPU" in text
    assert [note.get_text().strip() for note in sizes.texts][5].startswith("not recorded: InductorError: no working compiler")
    assert "AOTInductor 1.0 MB, 160 ms (144 ms to 192 ms), error 2e-05, beyond tolerance." in text
    assert [note.get_text() for note in proof.texts if note.get_fontweight() == "bold"] == ["2e-05"]
    assert [bar.get_hatch() for bar in times.patches] == [None] * 4 + ["///"]
    assert "fastest: ONNX Runtime" in fig.get_suptitle(), "not what computes something else"
    assert "a processor, Linux" in fig.get_supxlabel() and "batch of 1" in fig.get_suptitle()
    assert export_figure("resnet18", None, ())[1] == text, "None takes the first"


def test_formats_whose_quartiles_overlap_are_not_told_apart():
    rows = [made_format("eager", 1, 4.0), made_format("TorchScript", 1, 1.3), made_format("ONNX Runtime", 1, 1.0)]
    assert fastest(rows) == "ONNX Runtime, not told apart from TorchScript"
    more = [made_format(name, 1, 1.1) for name in ("torch.export", "AOTInductor")]
    assert fastest([*rows, *more]) == "ONNX Runtime, not told apart from torch.export, AOTInductor and TorchScript"
    assert fastest(rows[:2]) == "TorchScript"
    wrong = formats.Format("TensorRT", False, note="no GPU")
    assert fastest([wrong, made_format("eager", 1, 1.0, error=1e-4)]) == ""


def test_formats_of_what_there_is_not_are_told(formats_record):
    for settings, message in (
        (("bert", 1, ()), r"^model must be one of 'glyphnet', 'resnet18', 'MiniLM', got 'bert'.$"),
        (("glyphnet", 3, ()), r"^batch of glyphnet must be one of 1, 8, got 3.$"),
        (("glyphnet", 1, ("C++",)), r"^absent must be one of 'Python', 'PyTorch', got 'C\+\+'.$"),
    ):
        with pytest.raises(ValueError, match=message):
            export_figure(*settings)


@pytest.mark.slow
def test_every_corner_of_the_export_explorer_draws_another_figure(formats_record, drawn):
    explorer, pictures = ExportExplorer(), set()
    for model, batch, absent in itertools.product(("glyphnet", "resnet18"), (1, 8), itertools.product((False, True), repeat=2)):
        explorer.model.value, explorer.batch.value = model, batch
        for box, value in zip(explorer.absent, absent, strict=True):
            box.value = value
        text = alt(explorer.picture.value)
        assert formats.MODELS[model].about in text.replace("&#x27;", "'") and f"batch of {batch}" in text
        pictures.add(picture(image(*drawn[-1])).tobytes())
    assert len(pictures) == 2 * 2 * 4
    explorer.model.value = "MiniLM"
    assert "No formats are recorded yet for MiniLM." in explorer.picture.value and not explorer.batch.options
    explorer.model.value = "glyphnet"
    assert explorer.batch.value == 1
    assert not plt.get_fignums(), "no figure is left for pyplot to show"


@pytest.mark.slow
def test_knobs_of_export_turned_at_once_leave_the_figure_of_their_last_positions(formats_record, drawn):
    explorer = ExportExplorer()

    def turn(number):
        control = (explorer.model, explorer.batch, *explorer.absent)[number % 4]
        control.value = (("glyphnet", "resnet18"), (8, 1), (True, False), (True, False))[number % 4][number // 4 % 2]

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(23)))
    assert_shows(explorer, drawn, export_figure(*explorer.settings()))


@pytest.mark.slow
def test_explorers_come_without_the_packages_of_exports_and_encoders():
    heavy = "{'onnx', 'onnxscript', 'onnxruntime', 'torchvision', 'peft', 'transformers'}"
    shown = "from helpers.explorers import explore_export, explore_lora; explore_lora(); explore_export()"
    code = f"import sys; {shown}; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)
