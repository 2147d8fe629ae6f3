"""Formats by size, latency and portability: the figure of `helpers.explorers.explore_export`.

The numbers are kept results of `helpers.recordings.formats`, `formats.recorded`.
"""

import textwrap
from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.explorers.figures import GREY, choice, size
from helpers.figures import COLORS
from helpers.parity import listed
from helpers.recordings import formats

ABSENT = {"Python": "python", "PyTorch": "torch"}  # what may be missing where a format runs -> of formats.Needs
HEADERS = ("Python", "PyTorch", "compiler\nto make it", "one kind\nof GPU")  # of formats.Needs, in order
FAINT = "0.45"  # text of what does not fit
WRONG = COLORS[1]


def export_figure(model: str, batch: int | None, absent: Collection[str]) -> tuple[Figure, str]:
    """What each format needs, its size, its latency and its error; grey is what cannot run where something is absent.

    Args:
        model: one of `formats.MODELS`.
        batch: rows; one of `formats.recorded(model)`. None takes the first.
        absent: of `ABSENT`, what there is not where the model is to run.

    Returns:
        The figure, and its text alternative.
    """
    known = choice("model", model, formats.MODELS)
    unmet = [choice("absent", name, ABSENT) for name in absent]
    results = batches(model)
    fig = Figure(figsize=(9, 3.9), layout="constrained")
    if not results:
        message = f"No formats are recorded yet for {model}."
        fig.text(0.5, 0.5, message, ha="center")
        return fig, message
    batch = next(iter(results)) if batch is None else batch
    rows = choice(f"batch of {model}", batch, results)
    fits = [not any(getattr(formats.NEEDS[row.name], need) for need in unmet) for row in rows]
    axes = fig.subplots(1, 4, sharey=True, width_ratios=(5, 4, 5, 3))
    _plot_needs(axes[0], rows, fits, unmet)
    _plot_sizes(axes[1], rows, fits)
    _plot_times(axes[2], rows, fits, batch)
    _plot_proof(axes[3], rows, fits)
    where = f" without {' and '.join(absent)}" if absent else ""
    best = fastest([row for row, fit in zip(rows, fits, strict=True) if fit])
    headline = f"fastest{where}: {best or 'none is recorded'}"
    about = formats.circumstances()
    fig.suptitle(f"{known.about}; batch of {batch}\n{headline}", fontsize=10)
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    caption = f"{threads}, {about['machine']}, torch {about['versions']['torch']}, {about['date']}"
    fig.supxlabel(caption, fontsize=8, color="0.3")
    descriptions = "; ".join(_described(row, fit) for row, fit in zip(rows, fits, strict=True))
    return fig, f"Formats of {known.about}, batch of {batch}, {threads}. {headline[0].upper()}{headline[1:]}. {descriptions}."


def batches(model: str) -> dict[int, formats.Formats]:
    """`formats.recorded`; empty where nothing has been recorded yet."""
    try:
        return formats.recorded(model)
    except (FileNotFoundError, KeyError):
        return {}


def fastest(rows: Sequence[formats.Format]) -> str:
    """The format with the least median of those that compute what the model computes, and which it is not told apart from.

    Two formats whose quartiles overlap have not been told apart. "" if there is none.
    """
    right = [row for row in rows if row.milliseconds and row.parity.ok]
    if not right:
        return ""
    first, *slower = sorted(right, key=lambda row: row.milliseconds[1])
    close = [row.name for row in slower if row.milliseconds[0] <= first.milliseconds[2]]
    return f"{first.name}, not told apart from {listed(close)}" if close else first.name


def why_not(row: formats.Format) -> str:
    """Why a format has no numbers."""
    if formats.NEEDS[row.name].gpu and formats.circumstances()["gpu"] is None:
        return "not recorded: no GPU"
    return f"not recorded: {textwrap.shorten(row.note, 60, placeholder=' …')}"


def _plot_needs(ax: Axes, rows: formats.Formats, fits: list[bool], unmet: list[str]) -> None:
    """A table of dots: what each format needs; crosses where that is absent."""
    for place, (row, fit) in enumerate(zip(rows, fits, strict=True)):
        for column, (need, needed) in enumerate(formats.NEEDS[row.name]._asdict().items()):
            clash = needed and need in unmet
            mark, color = ("X", WRONG) if clash else ("o", "0.3" if fit else GREY)
            if needed:
                ax.plot(column, place, marker=mark, color=color, markersize=7)
            else:
                ax.plot(column, place, marker="_", color=GREY, markersize=6)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, fit in zip(ax.get_yticklabels(), fits, strict=True):
        label.set_color("black" if fit else FAINT)
    ax.set(xlim=(-0.6, len(HEADERS) - 0.4), ylim=(len(rows) - 0.4, -0.6))
    ax.set_xticks(range(len(HEADERS)), HEADERS, fontsize=8)
    ax.set_xlabel("needs")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _plot_sizes(ax: Axes, rows: formats.Formats, fits: list[bool]) -> None:
    largest = max(row.bytes or 0 for row in rows)
    for place, (row, fit) in enumerate(zip(rows, fits, strict=True)):
        if row.note:  # across this panel and the next, which makes no room for it
            text = ax.text(0, place, f" {why_not(row)}", va="center", fontsize=8.5, color="0.3" if fit else FAINT)
            text.set_in_layout(False)
            continue
        ax.barh(place, row.bytes or 0, height=0.6, color=COLORS[0] if fit else GREY)
        label = f" {size(row.bytes)}" if row.bytes else " no file"
        ax.text(row.bytes or 0, place, label, va="center", fontsize=8.5, color="black" if fit else FAINT)
    ax.set(xlim=(0, 1.55 * largest), xticks=[], xlabel="size of the file")
    _bare(ax)


def _plot_times(ax: Axes, rows: formats.Formats, fits: list[bool], batch: int) -> None:
    """Medians as bars, from quartile to quartile as lines; striped where the export computes something else."""
    ax.patch.set_visible(False)
    slowest = max((row.milliseconds[2] for row in rows if row.milliseconds), default=1)
    for place, (row, fit) in enumerate(zip(rows, fits, strict=True)):
        if not row.milliseconds:
            continue
        low, middle, high = row.milliseconds
        stripes = {} if row.parity.ok else {"hatch": "///", "edgecolor": "white"}
        ax.barh(place, middle, height=0.6, color=COLORS[0] if fit else GREY, **stripes)
        ax.plot([low, high], [place, place], color="black" if fit else FAINT, linewidth=1.5, marker="|", markersize=7)
        ax.text(high, place, f"  {_milliseconds(middle)}", va="center", fontsize=8.5, color="black" if fit else FAINT)
    ax.set(xlim=(0, 1.5 * slowest), xticks=[], xlabel=f"median time of a batch of {batch}\n(lines: quartiles)")
    _bare(ax)


def _plot_proof(ax: Axes, rows: formats.Formats, fits: list[bool]) -> None:
    """Columns of text: seconds to make it, and the largest error."""
    ax.patch.set_visible(False)
    for place, (row, fit) in enumerate(zip(rows, fits, strict=True)):
        if not row.milliseconds:
            continue
        color = {"color": "black" if fit else FAINT}
        ax.text(
            0.25, place, f"{row.seconds:.{1 if row.seconds >= 1 else 2}f} s", ha="center", va="center", fontsize=8.5, **color
        )
        if not row.parity.ok:
            color = {"color": WRONG, "fontweight": "bold"}
        ax.text(0.75, place, _error(row), ha="center", va="center", fontsize=8.5, **color)
    ax.set(xlim=(0, 1), xlabel="bold: beyond\ntolerance" if any(row.parity and not row.parity.ok for row in rows) else "")
    ax.set_xticks([0.25, 0.75], ["made in", "largest\nerror"], fontsize=8)
    ax.tick_params(length=0)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.spines[:].set_visible(False)


def _described(row: formats.Format, fit: bool) -> str:
    """A row in words."""
    start = row.name if fit else f"{row.name} (does not fit)"
    if not row.milliseconds:
        return f"{start} {why_not(row)}"
    low, middle, high = map(_milliseconds, row.milliseconds)
    beyond = "" if row.parity.ok else ", beyond tolerance"
    file = size(row.bytes) if row.bytes else "no file"
    return f"{start} {file}, {middle} ({low} to {high}), error {_error(row)}{beyond}"


def _milliseconds(number: float) -> str:
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} ms"


def _error(row: formats.Format) -> str:
    return f"{row.parity.error:.0e}" if row.parity.error else "0"
