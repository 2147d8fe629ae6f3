"""Figures that everybody can read: colours safe for colour-blind eyes, a marker for each line, text for who cannot see.

The colours are those of Okabe & Ito 2008, "Color Universal Design", without yellow, which is faint on white.
"""

import base64
import html
import io
import statistics
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"


def style(number: int) -> dict[str, str]:
    """Colour and marker of the line or arm of that number, the same in every figure of a chapter."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def plot_accuracy(
    ax: Axes, results: Mapping[str, Mapping[int, Sequence[float]]], per: str, numbers: Mapping[str, int] | None = None
) -> None:
    """Accuracy against labelled examples: a line through the means, with one standard deviation on each side.

    Args:
        ax: where to draw.
        results: {name: {labelled examples: one accuracy per draw}}.
        per: what there are that many labelled examples of, "images per class".
        numbers: {name: number for `style`}; None counts from 0.
    """
    numbers = numbers or {name: number for number, name in enumerate(results)}
    for place, (name, values) in enumerate(results.items()):
        shift = 1 + 0.02 * (place - (len(results) - 1) / 2)  # beside each other, so that bars do not hide bars
        means = [statistics.mean(draws) for draws in values.values()]
        spread = [statistics.stdev(draws) if len(draws) > 1 else 0 for draws in values.values()]
        ax.errorbar([x * shift for x in values], means, spread, label=name, capsize=2, markersize=5, **style(numbers[name]))
    ticks = sorted({labels for values in results.values() for labels in values})
    ax.set(xscale="log", ylim=(0, 1), xlabel=f"labelled {per}", ylabel="accuracy on test examples")
    ax.set_xticks(ticks, [str(labels) for labels in ticks])
    ax.minorticks_off()


def accuracy_figure(
    results: Mapping[str, Mapping[int, Sequence[float]]], per: str, chance: float | None = None
) -> tuple[Figure, str]:
    """`plot_accuracy` as a figure with a legend, and its text alternative with the means."""
    fig = Figure(figsize=(6.5, 3.6), layout="constrained")
    ax = fig.subplots()
    plot_accuracy(ax, results, per)
    if chance is not None:
        ax.axhline(chance, color="0.6", linewidth=1, linestyle=":", zorder=0, label="chance")
    ax.legend(frameon=False, ncols=2, fontsize=9)
    lines = [
        f"{name} " + ", ".join(f"{statistics.mean(draws):.2f} at {labels}" for labels, draws in values.items())
        for name, values in results.items()
    ]
    return fig, f"Accuracy against labelled {per}, mean and standard deviation over draws: {'; '.join(lines)}."


def plot_draws(ax: Axes, results: Mapping[str, Sequence[float]], numbers: Mapping[str, int] | None = None) -> None:
    """One row for each name: a dot for each draw, a bar at their mean with its value above it.

    Args:
        ax: where to draw; rows go from bottom to top.
        results: {name: one value per draw}.
        numbers: {name: number for `style`}; None counts from 0.
    """
    numbers = numbers or {name: number for number, name in enumerate(results)}
    for place, (name, draws) in enumerate(results.items()):
        ax.plot(draws, [place] * len(draws), linestyle="", alpha=0.6, **style(numbers[name]))
        mean = statistics.mean(draws)
        ax.plot([mean] * 2, [place - 0.3, place + 0.3], color=style(numbers[name])["color"], linewidth=3)
        ax.annotate(f"{mean:.3f}", (mean, place + 0.34), ha="center", va="bottom", fontsize=9)
    ax.set_yticks(range(len(results)), list(results))
    ax.set_ylim(-0.6, max(len(results), 1) - 0.2)


def draws_figure(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[Figure, str]:
    """`plot_draws` for several measures of the same names, side by side on one scale, the first name on top.

    Args:
        panels: {title: {name: one value per draw}}.

    Returns:
        The figure, and its text alternative with the means.
    """
    fig = Figure(figsize=(9, 0.7 + 0.5 * max(map(len, panels.values()))), layout="constrained")
    axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (title, results) in zip(axes, panels.items(), strict=True):
        numbers = {name: number for number, name in enumerate(results)}
        plot_draws(ax, dict(reversed(results.items())), numbers)
        ax.set_xlabel(title)
        ax.margins(x=0.15)
    lines = [
        f"{title}: " + ", ".join(f"{name} {statistics.mean(draws):.3f}" for name, draws in results.items())
        for title, results in panels.items()
    ]
    return fig, f"Dots are draws, bars their means. {'. '.join(lines)}."


def show(fig: Figure, alt: str) -> None:
    """Display a figure in the notebook with `alt` as its text alternative, and close it.

    Args:
        fig: a matplotlib figure.
        alt: what the figure shows, in a sentence or two, for readers who cannot see it.
    """
    from IPython.display import display

    png = _png(fig)
    bundle = {"text/html": image(png, alt), "image/png": base64.b64encode(png).decode(), "text/plain": alt}
    display(bundle, raw=True)
    plt.close(fig)


def image(figure: Figure | bytes, alt: str) -> str:
    """A figure, or its PNG, as an HTML image with `alt` as its text alternative."""
    png = figure if isinstance(figure, bytes) else _png(figure)
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" style="background: white; max-width: 100%">'


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()
