import re
import statistics

import matplotlib.pyplot as plt
import pytest

from helpers.figures import COLORS, accuracy_figure, image, plot_accuracy, show, style


def test_a_line_goes_through_the_means_with_the_spread_beside_it():
    fig, ax = plt.subplots()
    plot_accuracy(ax, {"a": {1: [0.2, 0.4], 10: [0.5, 0.9]}, "b": {1: [0.1], 10: [0.2]}}, "images per class")
    (line, _, (bars,)), (_, _, _) = (container for container in ax.containers)
    assert line.get_ydata() == pytest.approx([0.3, 0.7])
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(statistics.stdev([0.2, 0.4]))
    assert line.get_xdata() == pytest.approx([1, 10], rel=0.02)
    assert ax.get_xlabel() == "labelled images per class" and [t.get_text() for t in ax.get_xticklabels()] == ["1", "10"]
    plt.close(fig)


def test_a_figure_of_accuracies_says_its_means_in_words():
    fig, text = accuracy_figure({"a": {1: [0.2, 0.4], 10: [0.5, 0.9]}}, "texts per topic", chance=0.25)
    assert text == (
        "Accuracy against labelled texts per topic, mean and standard deviation over draws: a 0.30 at 1, 0.70 at 10."
    )
    assert [entry.get_text() for entry in fig.axes[0].get_legend().get_texts()] == ["chance", "a"]
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
