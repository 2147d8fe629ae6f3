"""A progress bar is on stdout, and leaves nothing behind."""

import re

from helpers.progress import progress_bar


def test_a_bar_gives_its_items_counts_them_on_stdout_and_wipes_itself_out(capsys):
    assert list(progress_bar(range(3), "counting")) == [0, 1, 2]
    print("done")
    out, err = capsys.readouterr()
    assert "counting:   0%" in out and "0/3" in out and err == ""
    assert re.sub(r".*\r", "", out) == "done\n", "as a notebook shows it"


def test_a_hidden_bar_gives_its_items_and_says_nothing(capsys):
    assert list(progress_bar(range(3), "counting", show=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
