"""Explorers: turn a knob and see a measured number move. Where widgets do not run, they are figures.

`explore_transfer()` shows kept results of `helpers.transfer`: nothing is trained when a knob is turned.
"""

import statistics
import threading
from collections.abc import Collection

from matplotlib.figure import Figure

from helpers.figures import image, plot_accuracy, plot_draws
from helpers.transfer import TASKS, recorded


def transfer_figure(task: str, labels_per_class: int, arms: Collection[str]) -> tuple[Figure, str]:
    """Accuracy against labels per class, and every draw at one number of labels.

    Args:
        task: "digits" or "docstrings".
        labels_per_class: the number that the right half shows; one of `recorded(task)`.
        arms: which lines to draw, of `TASKS[task].arms`; with none, the figure asks for one.

    Returns:
        The figure, and its text alternative.
    """
    results, known = recorded(task), TASKS[task].arms
    if labels_per_class not in results:
        raise ValueError(f"labels_per_class must be one of {sorted(results)} for {task}, got {labels_per_class!r}.")
    shown = [arm for arm in known if arm in arms]
    fig = Figure(figsize=(9, 3.4), layout="constrained")  # not pyplot's, whose current figure all threads share
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    numbers = {arm: number for number, arm in enumerate(known)}
    plot_accuracy(
        left, {arm: {labels: by[arm] for labels, by in results.items()} for arm in shown}, "examples per class", numbers
    )
    left.axvline(labels_per_class, color="0.6", linewidth=1, linestyle=":", zorder=0)
    plot_draws(right, {arm: results[labels_per_class][arm] for arm in shown}, numbers)
    right.set(xlim=(0, 1), xlabel=f"accuracy, {labels_per_class} per class: dots are draws")
    if not shown:
        left.text(0.5, 0.5, "choose a strategy", ha="center", transform=left.transAxes)
    means = ", ".join(f"{arm} {statistics.mean(results[labels_per_class][arm]):.3f}" for arm in shown) or "no strategy chosen"
    draws = len(next(iter(results[labels_per_class].values())))
    fig.suptitle(f"{task}: recorded results, {draws} draws; bars are one standard deviation", fontsize=10)
    return fig, f"Accuracy against labelled examples per class on {task}. With {labels_per_class} per class: {means}."


class TransferExplorer:
    """The controls and their figure; displays as a widget, or as a static figure of everything where there are none.

    JupyterLab runs the callbacks of different controls in threads of their own, so each waits until none else is at work.
    """

    def __init__(self) -> None:
        import ipywidgets as widgets  # here: a figure needs no widgets

        self._one_at_a_time = threading.RLock()
        self.task = widgets.ToggleButtons(options=list(TASKS), description="task")
        self.labels = widgets.SelectionSlider(options=sorted(recorded("digits")), description="labels")
        self.arms = [widgets.Checkbox(value=True, description=arm, indent=False) for arm in TASKS["digits"].arms]
        self.picture = widgets.HTML()
        self.widget = widgets.VBox([self.task, self.labels, widgets.HBox(self.arms), self.picture])
        self.task.observe(self._change_task, "value")
        for control in (self.labels, *self.arms):
            control.observe(self._redraw, "value")
        self._redraw()

    def _change_task(self, _: object) -> None:
        with self._one_at_a_time:
            self.labels.unobserve(self._redraw, "value")  # one new figure, not one for every knob that moves along
            self.labels.options = sorted(recorded(self.task.value))
            self.labels.observe(self._redraw, "value")
            for box, arm in zip(self.arms, TASKS[self.task.value].arms, strict=True):
                box.description = arm
            self._redraw()

    def _redraw(self, _: object = None) -> None:
        with self._one_at_a_time:
            if self.labels.value not in recorded(self.task.value):
                return  # the task has just changed, and its own callback is waiting to put the labels right
            known = TASKS[self.task.value].arms
            chosen = [arm for arm, box in zip(known, self.arms, strict=True) if box.value]
            self.picture.value = image(*transfer_figure(self.task.value, self.labels.value, chosen))

    def _repr_mimebundle_(self, **options: object) -> dict:
        return self.widget._repr_mimebundle_(**options) | static_transfer()


def static_transfer() -> dict[str, str]:
    """Every arm of both tasks as a figure, for pages in which no kernel runs."""
    pictures, texts = [], []
    for task in TASKS:
        fig, alt = transfer_figure(task, 5, TASKS[task].arms)
        pictures.append(image(fig, alt))
        texts.append(alt)
    return {"text/html": "<br>".join(pictures), "text/plain": " ".join(texts)}


class StaticFigure:
    """What `explore_transfer` gives where ipywidgets is not installed."""

    def _repr_mimebundle_(self, **_: object) -> dict:
        return static_transfer()


def explore_transfer() -> TransferExplorer | StaticFigure:
    """Labels per class and strategy against accuracy, on digits and docstrings; put it on the last line of a cell."""
    try:
        return TransferExplorer()
    except ImportError:
        return StaticFigure()
