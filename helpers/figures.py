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


def plot_spread(ax: Axes, results: Mapping[str, Mapping[float, Sequence[float]]], numbers: Mapping[str, int]) -> None:
    """One line for each name through the means, with a bar of one standard deviation on each side.

    Args:
        ax: where to draw.
        results: {name: {x: one value per draw}}.
        numbers: {name: number for `style`}.
    """
    for place, (name, values) in enumerate(results.items()):
        shift = 1 + 0.02 * (place - (len(results) - 1) / 2)  # beside each other, so that bars do not hide bars
        means = [statistics.mean(draws) for draws in values.values()]
        spread = [statistics.stdev(draws) if len(draws) > 1 else 0 for draws in values.values()]
        ax.errorbar([x * shift for x in values], means, spread, label=name, capsize=2, markersize=5, **style(numbers[name]))


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
