"""What the explorers of `helpers.explorers` show: one figure and its text alternative for one setting of the controls.

Those of chapters 02, 04 and 05 are here, and what all have in common; `lora` and `export` beside it have the rest.
"""

import statistics
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import cache
from typing import TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from helpers import expect, shifts
from helpers.figures import COLORS, plot_accuracy, plot_draws, style
from helpers.finetune import Report, report, train_last
from helpers.recordings import strategies
from helpers.recordings.transfer import TASKS, recorded

SCORES = {
    "digits": {"inside": "handwritten", "outside": "printed", "source": "letters kept"},
    "docstrings": {"inside": "test docstrings"},
}
Chosen = TypeVar("Chosen")
GREY = "0.8"  # frozen, or not chosen


def size(count: int) -> str:
    """Bytes in words: kilobytes below 0.1 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def choice(name: str, value: str, options: Mapping[str, Chosen]) -> Chosen:
    """What an option stands for.

    Raises:
        ValueError: there is no such option.
    """
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return options[value]


# --- chapter 02 ---------------------------------------------------------------------------------------------------


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


# --- chapter 04 ---------------------------------------------------------------------------------------------------


def freezing_figure(task: str, depth: int, labels_per_class: int | None) -> tuple[Figure, str]:
    """Which stages train and what that takes, beside the recorded accuracy at every depth.

    Args:
        task: "digits" (glyphnet) or "docstrings" (all-MiniLM-L6-v2).
        depth: how many stages before the head train, from 0 to all, `len(depths(task)) - 1`.
        labels_per_class: whose accuracy to show; where none is recorded, the figure says so.

    Returns:
        The figure, and its text alternative.
    """
    reports = depths(task)
    expect.whole_number("depth", depth, least=0, most=len(reports) - 1, advice="0 trains the head alone.")
    strategy, chosen = list(reports.items())[depth]
    fig = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1, 1))
    memory = _plot_parameters(left, chosen)
    accuracy = _plot_depths(right, task, depth, labels_per_class)
    given = f"; recorded with {labels_per_class} labels per class" if labels_per_class in recorded_depths(task) else ""
    fig.suptitle(f"{task}, {strategy}: {chosen.trainable:,} of {chosen.all:,} parameters train{given}", fontsize=10)
    trains = [f"{_short(stage)} {count:,}" for stage, (trainable, count) in chosen.stages.items() if trainable]
    return fig, (
        f"Freezing on {task}, {strategy}: {chosen.trainable:,} of {chosen.all:,} parameters train ({', '.join(trains)}). "
        f"Training takes {memory}. {accuracy}"
    )


@cache
def depths(task: str) -> dict[str, Report]:
    """What training takes at each depth, by the name of the strategy, from "head only" to "everything".

    Counted on the pre-trained backbone of the task with its new head; made once.
    """
    choice("task", task, TASKS)
    with torch.random.fork_rng(devices=[]):  # building a network draws numbers
        backbone = TASKS[task].backbone(True)
    head = nn.Linear(backbone.width, TASKS[task].classes, device="meta")  # counted, never run
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head))
    names = ["head only", "last stage", *(f"last {k} stages" for k in range(2, len(backbone.stages))), "everything"]
    reports = {}
    for depth, name in enumerate(names):
        train_last(model, 1 + depth)
        reports[name] = report(model)
    return reports


def recorded_depths(task: str) -> dict[int, dict[str, list[strategies.Scores]]]:
    """Of the recorded strategies those that are depths: {labels per class: {strategy: scores of each draw}}."""
    try:
        results = strategies.recorded(task)
    except KeyError:  # the task has not been recorded yet
        return {}
    kept = {labels: {name: by[name] for name in depths(task) if by.get(name)} for labels, by in results.items()}
    return {labels: by for labels, by in sorted(kept.items()) if by}


def _plot_parameters(ax: Axes, chosen: Report) -> str:
    """A bar for each stage, the stem on top; what training takes, in words."""
    largest = max(count for _, count in chosen.stages.values())
    for place, (trainable, count) in enumerate(chosen.stages.values()):
        ax.barh(place, count, color=GREY)
        ax.barh(place, trainable, color=COLORS[0])
        color, weight = (COLORS[0], "bold") if trainable else ("0.4", "normal")
        ax.text(count + 0.02 * largest, place, f"{count:,}", va="center", fontsize=9, color=color, fontweight=weight)
    ax.set_yticks(range(len(chosen.stages)), [_short(stage) for stage in chosen.stages])
    ax.set(xlim=(0, 1.3 * largest), ylim=(len(chosen.stages) - 0.4, -0.6), xticks=[])
    memory = f"{size(chosen.gradient_bytes)} of gradients and {size(chosen.adamw_bytes)} of AdamW state"
    ax.set_xlabel(f"parameters; coloured ones train, which takes\n{memory}")
    ax.spines[["top", "right"]].set_visible(False)
    return memory


def _plot_depths(ax: Axes, task: str, depth: int, labels_per_class: int | None) -> str:
    """A dot for each recorded draw at each depth, a line through the means; what they are at the chosen one, in words."""
    names, everything = list(depths(task)), recorded_depths(task)
    results = everything.get(labels_per_class, {})
    ax.axvspan(depth - 0.35, depth + 0.35, color="0.92", zorder=0)
    ax.set_xticks(range(len(names)), ["head", *map(str, range(1, len(names) - 1)), "all"])
    ax.set(xlim=(-0.6, len(names) - 0.4), xlabel="stages before the head that train; dots are draws", ylabel="accuracy")
    if not results:
        ax.set_yticks([])
        message = f"no depth is recorded yet for {task}" + (f"\nwith {labels_per_class} per class" if everything else "")
        ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes)
        return message.replace("\n", " ").capitalize() + "."
    labels = []
    for number, (score, label) in enumerate(SCORES[task].items()):
        draws = {place: _values(results[name], score) for place, name in enumerate(names) if name in results}
        means = {place: statistics.mean(values) for place, values in draws.items()}
        now = f"{label} {means[depth]:.3f}" if depth in means else f"{label} not yet"
        shift = 0.1 * (number - (len(SCORES[task]) - 1) / 2)  # beside each other, so that dots do not hide dots
        for place, values in draws.items():
            ax.plot([place + shift] * len(values), values, linestyle="", alpha=0.5, markersize=5, **style(number))
        ax.plot([place + shift for place in means], list(means.values()), color=style(number)["color"])
        ax.plot([], [], label=now, **style(number))
        labels.append(now)
    values = [v for by in everything.values() for draws in by.values() for score in SCORES[task] for v in _values(draws, score)]
    ax.set_ylim(min(values) - 0.03, max(1, *values) + 0.015)  # the same for all numbers of labels
    small = {"fontsize": 8.5, "handlelength": 1.5, "columnspacing": 1, "handletextpad": 0.5, "borderpad": 0}
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=len(labels), frameon=False, **small)
    return f"Accuracy recorded with {labels_per_class} labels per class, mean over draws: {', '.join(labels)}."


def _values(draws: list[strategies.Scores], score: str) -> list[float]:
    return [getattr(scores, score) for scores in draws]


def _short(stage: str) -> str:
    """The end of a stage's name that tells it from the others: "layer4", "layer.0"."""
    *_, parent, last = ("", *stage.split("."))
    return f"{parent}.{last}" if last.isdigit() else last


# --- chapter 05 ---------------------------------------------------------------------------------------------------


def drift_figure(kind: str, strength: float, using: str) -> tuple[Figure, str]:
    """How far each BatchNorm's input is from its statistics, and what the network gets right; measured when it is drawn.

    Left in standard deviations of the statistics in use, `Drift.mean_shift`; in the middle `Drift.std_ratio`.

    Args:
        kind, strength: what the images are, as for `helpers.shifts.shifted`.
        using: "stored" or "recomputed" statistics, as for `helpers.shifts.measure`. With "recomputed" the stored ones
            stay as an outline.

    Returns:
        The figure, and its text alternative.
    """
    chosen = shifts.measure(kind, strength, using)
    by = {name: shifts.measure(kind, strength, name) for name in shifts.STATISTICS}
    color = dict(zip(by, COLORS, strict=False))
    fig = Figure(figsize=(9, 3.4), layout="constrained")
    grid = fig.add_gridspec(2, 3, width_ratios=(3, 2, 3), height_ratios=(3, 2))
    means = fig.add_subplot(grid[:, 0])
    spreads = fig.add_subplot(grid[:, 1], sharey=means)
    places, before = range(len(chosen.drift)), by["stored"].drift
    if using != "stored":
        means.barh(places, [layer.mean_shift for layer in before], fill=False, edgecolor="0.6", linewidth=0.8)
        spreads.plot([layer.std_ratio for layer in before], places, "o", fillstyle="none", color="0.6", markersize=5)
    means.barh(places, [layer.mean_shift for layer in chosen.drift], color=color[using])
    small = {"va": "center", "fontsize": 8, "color": color[using]}
    for place, now, stored in zip(places, chosen.drift, before, strict=True):
        means.text(max(now.mean_shift, stored.mean_shift) + 0.02, place, f"{now.mean_shift:.2f}", **small)
        spreads.text(max(now.std_ratio, stored.std_ratio) * 1.2, place, f"{now.std_ratio:.2f}", **small)
    spreads.plot([layer.std_ratio for layer in chosen.drift], places, "o", color=color[using], markersize=5)
    means.set_yticks(places, [layer.name for layer in chosen.drift], fontsize=8)
    means.set_ylim(len(chosen.drift) - 0.4, -0.6)
    means.set(
        xlim=(0, max(1.7, 1.2 * max(layer.mean_shift for layer in before))), xlabel="mean off by so many\nstandard deviations"
    )
    spreads.tick_params(labelleft=False)
    spreads.set(xscale="log", xlim=(0.85, 40), xlabel="standard deviation\noff by a factor of")
    spreads.set_xticks((1, 2, 4, 8, 16), ["1", "2", "4", "8", "16"])
    spreads.minorticks_off()
    for ax in (means, spreads):
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
    _plot_images(fig.add_subplot(grid[0, 2]), kind, strength)
    _plot_two(fig.add_subplot(grid[1, 2]), {name: measured.accuracy for name, measured in by.items()}, color, using)
    title = shifts.described(kind, strength)
    outlines = " (outlines: stored)" if using != "stored" else ""
    fig.suptitle(f"digits, {title}; {using} statistics{outlines}, measured on {shifts.COUNT} images", fontsize=10)
    layers = ", ".join(f"{layer.name} {layer.mean_shift:.2f} and {layer.std_ratio:.2f}" for layer in chosen.drift)
    scores = " and ".join(f"{measured.accuracy:.3f} with {name}" for name, measured in by.items())
    return fig, (
        f"Drift on digits, {title}. Accuracy {scores} statistics. With {using} statistics, from stem to head, the mean is off "
        f"by so many of their standard deviations, and the standard deviation by a factor of: {layers}."
    )


def _plot_images(ax: Axes, kind: str, strength: float) -> None:
    """Eight images, of the digits 0 to 7, ink black."""
    examples = shifts.shifted(kind, strength)
    first = [int((examples.labels == label).nonzero()[0]) for label in range(8)]
    framed = nn.functional.pad(examples.inputs[first, 0], (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(half), dim=1) for half in framed.split(4)]
    ax.imshow(torch.cat(rows).numpy(), cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()


def _plot_two(ax: Axes, accuracies: dict[str, float], color: dict[str, str], using: str) -> None:
    for place, (name, accuracy) in enumerate(accuracies.items()):
        ax.barh(place, accuracy, color=color[name], alpha=1 if name == using else 0.35)
        ax.text(accuracy + 0.02, place, f"{accuracy:.3f}", va="center", fontweight="bold" if name == using else "normal")
    ax.set_yticks(range(len(accuracies)), list(accuracies))
    ax.axvline(0.1, color="0.4", linewidth=1, linestyle=":")
    ax.set(xlim=(0, 1.2), ylim=(len(accuracies) - 0.5, -0.5), xticks=[0, 0.5, 1], xlabel="accuracy; dotted: chance")
