"""What learners read of the exercises is complete, and belongs to something."""

import pytest

from grader import words
from grader.checks import TOPICS, exercises
from grader.experiment import Exercise, Experiment

ALL = [pytest.param(exercise, id=exercise.number) for topic in TOPICS.values() for exercise in exercises(topic).values()]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the words of a topic "made" that this test alone sees."""
    monkeypatch.setattr(words, "FOLDER", tmp_path)
    words._read.cache_clear()
    yield lambda text: (tmp_path / "made.toml").write_text(text, encoding="utf-8")
    words._read.cache_clear()


def made():
    return Exercise("grader.checks.made.thing", "9.1", lambda: None, "thing")


@pytest.mark.parametrize("exercise", ALL)
def test_each_key_of_the_code_has_its_words_and_each_key_of_the_words_its_code(exercise):
    assert sorted(exercise.words.claims) == sorted(experiment.key for experiment in exercise.experiments)
    assert sorted(exercise.words.misconceptions) == sorted(wrong.key for wrong in exercise.misconceptions)


@pytest.mark.parametrize("exercise", ALL)
def test_words_are_sentences_and_hints_come_in_three(exercise):
    assert len(exercise.hints) == 3
    sentences = [*exercise.hints, *exercise.words.claims.values(), *(wrong.hint for wrong in exercise.misconceptions)]
    assert [text for text in sentences if not text.endswith((".", "?", ":"))] == []
    assert all(wrong.source for wrong in exercise.misconceptions)


@pytest.mark.parametrize("topic", TOPICS.values())
def test_no_words_are_left_of_an_exercise_that_is_gone(topic):
    assert sorted(words._read(topic)) == sorted(exercises(topic))


def test_a_teacher_rewrites_claims_names_and_hints_without_touching_code(file):
    file("""
        ["9.1"]
        hints = ["one?", "two.", "three."]
        ["9.1".claims]
        "it adds" = "La somme est juste."
        ["9.1".misconceptions."adds one"]
        name = "un de trop"
        hint = "Combien ?"
        source = "a test"
    """)
    exercise = made()

    @exercise.experiment("it adds")
    class AnyName(Experiment):
        """Nobody reads this."""

    exercise.misconception("adds one")(lambda x: x + 1)
    (experiment,), (wrong,) = exercise.experiments, exercise.misconceptions
    assert (experiment.key, experiment.claim) == ("it adds", "La somme est juste.")
    assert (wrong.key, wrong.name, wrong.hint) == ("adds one", "un de trop", "Combien ?")


HINTS = '["9.1"]\nhints = ["?", ".", "."]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'must have a table ["9.1"] with the words of that exercise, and has none. Add it.'),
        ('["9.1"]\nhints = ["?"]', 'must have 3 hints in ["9.1"], got 1: a question, an observation, the formula.'),
        (HINTS, 'must have the key "it adds" in ["9.1".claims], but does not. Add it.'),
        (
            HINTS + '["9.1".claims]\n"it adds" = "It adds."',
            'must have the key "adds one" in ["9.1".misconceptions], but does not. Add it.',
        ),
        (
            HINTS + '["9.1".claims]\n"it adds" = "It adds."\n["9.1".misconceptions."adds one"]\nsource = "a test"',
            'must have the key "hint" in ["9.1".misconceptions."adds one"], but does not. Add it.',
        ),
        (
            '["9.1"\n',
            "must be TOML, got: Expected ']' at the end of a table declaration (at line 1, column 7). Mend that line.",
        ),
    ],
)
def test_what_is_missing_in_the_words_is_said_with_its_place(file, text, message):
    file(text)
    with pytest.raises(words.NoWords) as error:
        made().experiment("it adds")(Experiment)
        made().misconception("adds one")(lambda x: x)
    assert str(error.value) == f"grader/words/made.toml {message}"


def test_misconceptions_may_be_a_solution_with_one_piece_changed(file):
    file("""
        ["9.1"]
        hints = ["?", ".", "."]
        ["9.1".claims]
        ["9.1".misconceptions]
        "adds two" = { hint = "?", source = "a test" }
        "times two" = { hint = "?", source = "a test" }
    """)
    exercise = made()

    def add(x, step=1):
        return x + step

    class Add:
        def __new__(cls, x):
            return cls.change(x)

        @staticmethod
        def change(x):
            return x + 1

    exercise.misconceptions_of(add, {"adds two": {"step": 2}})
    exercise.misconceptions_of(Add, {"times two": {"change": staticmethod(lambda x: x * 2)}})
    assert [wrong.subject(5) for wrong in exercise.misconceptions] == [7, 10]
    assert exercise.misconceptions[1].subject.__module__ == __name__
