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
from PIL import Image

from helpers.explorer import StaticFigure, TransferExplorer, explore_transfer, transfer_figure
from helpers.figures import image
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
