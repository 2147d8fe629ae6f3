import re
import statistics

import matplotlib.pyplot as plt
import pytest

from helpers.figures import COLORS, image, plot_spread, show, style


def test_a_line_goes_through_the_means_with_the_spread_beside_it():
    fig, ax = plt.subplots()
    plot_spread(ax, {"a": {1: [0.2, 0.4], 10: [0.5, 0.9]}, "b": {1: [0.1], 10: [0.2]}}, {"a": 0, "b": 1})
    (line, _, (bars,)), (_, _, _) = (container for container in ax.containers)
    assert line.get_ydata() == pytest.approx([0.3, 0.7])
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(statistics.stdev([0.2, 0.4]))
    assert line.get_xdata() == pytest.approx([1, 10], rel=0.02)
    plt.close(fig)


def test_every_name_has_its_own_colour_and_marker():
    assert len({tuple(style(number).values()) for number in range(len(COLORS))}) == len(COLORS)


def test_a_shown_figure_has_a_text_alternative_and_is_closed(capsys):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    show(fig, "a line that rises")
    assert "a line that rises" in capsys.readouterr().out and not plt.get_fignums()


def test_a_text_alternative_is_escaped():
    fig, _ = plt.subplots()
    assert re.search(r'alt="1 &lt; 2 &quot;twice&quot;"', image(fig, '1 < 2 "twice"'))
    plt.close(fig)
