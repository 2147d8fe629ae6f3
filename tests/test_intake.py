"""What is said of each file that was handed in, before nbgrader sees it."""

import json
from dataclasses import astuple

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from grader.intake import examine, take_in

CHAPTER = "02_features"
CELLS = ["answer-2_1", "check-2_1", "answer-2_2", "check-2_2"]


def notebook(*grade_ids):
    cells = [new_code_cell("1", metadata={"nbgrader": {"grade_id": grade_id}}) for grade_id in ("run-1", *grade_ids)]
    return nbformat.writes(new_notebook(cells=[*cells, new_code_cell("2")])).encode()


def look(file, content):
    return astuple(examine(file, content, CHAPTER, CELLS))


def test_a_notebook_as_it_should_be():
    assert look("ada_02_features.ipynb", notebook(*CELLS)) == ("ada_02_features.ipynb", "ada", True, "")


@pytest.mark.parametrize("student", ["jane_doe", "Jane Doe", "42", "a.b@c.org"])
def test_the_student_is_all_that_stands_before_the_chapter(student):
    file = f"{student}_02_features.ipynb"
    assert look(file, notebook(*CELLS)) == (file, student, True, "")


@pytest.mark.parametrize("name", ["ada_02_features (1).ipynb", "ada_02_features(2).ipynb", "ada_02_features-Copy1.ipynb"])
def test_a_copy_as_browsers_and_jupyterlab_name_it_is_graded(name):
    note = f"expected ada_02_features.ipynb, got {name}: graded as that, nothing to do."
    assert look(name, notebook(*CELLS)) == (name, "ada", True, note)


@pytest.mark.parametrize(
    "name",
    [
        "homework.ipynb",
        "ada_homework.ipynb",
        "jane_doe.ipynb",
        "02_features.ipynb",
        "_02_features.ipynb",
        "._ada_02_features.ipynb",
        "ada_00_start.ipynb",
        "*_02_features.ipynb",
        "ada[1]_02_features.ipynb",
        "ada_02_features.pdf",
        "ada_02_features.ipynb.txt",
    ],
)
def test_a_name_that_does_not_say_whose_it_is(name):
    assert look(name, notebook(*CELLS)) == (
        name,
        "",
        False,
        f"expected a name like ada_02_features.ipynb, got {name}, which does not say for certain whose it is. "
        "Find out, rename it, and grade again.",
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected a notebook, got an empty file (0 bytes)."),
        (b" \n", "expected a notebook, got an empty file (2 bytes)."),
        (b'{\n "cells": [\n  {', "expected a notebook, got 17 bytes cut off or damaged in line 3."),
        (b"\xef\xbb\xbf{}", "expected a notebook, got 5 bytes cut off or damaged in line 1."),
        (b"\x89PNG\r\n\xff", "expected a notebook, got 7 bytes of something else."),
        (b"[" * 100_000, "expected a notebook, got 100000 bytes of something else."),
        (b"[]", "expected a notebook, got JSON of something else."),
        (b"{}", "expected a notebook, got JSON of something else."),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "expected a notebook, got JSON of something else."),
        (
            b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}',
            "expected a notebook, got JSON of something else.",
        ),
        (notebook("answer-0_1", "check-0_1"), "expected the exercises of 02_features, got 00_start."),
        (notebook("answer-0_1a"), "expected the exercises of 02_features, got 00_start."),  # a step
        (notebook("answer-99_1", "check-0_1"), "expected the exercises of 02_features, got 00_start and chapter 99."),
        (notebook(), "expected the exercises of 02_features, got none."),
        (notebook(None, 7, ["check-2_1"]), "expected the exercises of 02_features, got none."),
    ],
)
def test_content_that_cannot_be_graded(content, sentence):
    note = f"{sentence} Ask ada to hand in 02_features.ipynb again."
    assert look("ada_02_features.ipynb", content) == ("ada_02_features.ipynb", "ada", False, note)


@pytest.mark.parametrize(
    ("cells", "note"),
    [
        (["answer-2_1", "answer-2_2"], "expected check-2_1, check-2_2, got no such cell: put back and scored, nothing to do."),
        (
            [*CELLS[:3], "check-2_1", "check-2_2"],
            "expected check-2_1 once, got copies: the last counts, the others run unscored. Nothing to do.",
        ),
        (["check-0_1", *CELLS[1:]], "expected answer-2_1, got no such cell: without an answer in another cell it scores 0."),
        (
            ["answer-2_1", "check-2_1", "check-2_1", "answer-2_2"],
            "expected check-2_2, got no such cell: put back and scored, nothing to do. "
            "expected check-2_1 once, got copies: the last counts, the others run unscored. Nothing to do.",
        ),
    ],
)
def test_missing_and_copied_cells_are_graded_and_said(cells, note):
    assert look("ada_02_features.ipynb", notebook(*cells)) == ("ada_02_features.ipynb", "ada", True, note)


def test_metadata_that_is_no_dictionary_is_not_our_business():
    content = json.loads(notebook(*CELLS))
    content["cells"][0]["metadata"]["nbgrader"] = None
    assert look("ada_02_features.ipynb", json.dumps(content).encode())[2:] == (True, "")


@pytest.fixture
def class_of(tmp_path):
    def hand_in(files):
        released = tmp_path / f"{CHAPTER}.ipynb"
        released.write_bytes(notebook(*CELLS))
        for file in files:
            path = tmp_path / "archive" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(notebook(*CELLS))
        return take_in(tmp_path / "archive", released)

    return hand_in


def test_every_file_is_looked_at_in_the_order_of_the_names(class_of):
    submissions = class_of(["b_02_features.ipynb", "section 2/a_02_features.ipynb", "x.ipynb"])
    assert [(submission.file, submission.gradable) for submission in submissions] == [
        ("b_02_features.ipynb", True),
        ("section 2/a_02_features.ipynb", True),
        ("x.ipynb", False),
    ]


def test_of_several_files_the_one_with_the_expected_name_counts(class_of):
    copy, expected, of_bob = class_of(["ada_02_features (1).ipynb", "ada_02_features.ipynb", "bob_02_features.ipynb"])
    assert (expected.gradable, expected.note, of_bob.gradable, of_bob.note) == (True, "", True, "")
    assert not copy.gradable
    assert copy.note == (
        "expected one file of ada, got ada_02_features (1).ipynb, ada_02_features.ipynb. ada_02_features.ipynb counts; "
        "if it should not, name that one ada_02_features.ipynb, remove the others, and grade again."
    )


@pytest.mark.parametrize(
    "files",
    [
        ("ada_02_features (1).ipynb", "ada_02_features (2).ipynb"),
        ("monday/ada_02_features.ipynb", "tuesday/ada_02_features.ipynb"),
    ],
)
def test_of_several_files_with_equal_right_none_is_graded(class_of, files):
    assert [astuple(submission)[1:] for submission in class_of(files)] == 2 * [
        (
            "ada",
            False,
            f"expected one file of ada, got {', '.join(files)}. Ask which counts, "
            "name that one ada_02_features.ipynb, remove the others, and grade again.",
        )
    ]


def test_files_that_do_not_say_whose_they_are_have_nothing_in_common(class_of):
    assert all("one file of" not in submission.note for submission in class_of(["a.ipynb", "b.ipynb"]))
