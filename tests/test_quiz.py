import re

import pytest

from grader.quiz import FOLDER, LEVELS, Quiz, quiz

TOPICS = [file.stem for file in sorted(FOLDER.glob("*.toml"))]


@pytest.mark.parametrize("topic", TOPICS)
def test_every_choice_has_a_reason_and_one_is_right(topic):
    questions = quiz(topic).questions
    assert len(questions) >= 6
    assert {question["level"] for question in questions} == set(LEVELS)
    for question in questions:
        assert question["question"].endswith("?")
        assert 3 <= len(question["choices"]) <= 6
        assert sum(choice["right"] for choice in question["choices"]) == 1
        assert all(choice["reason"].endswith((".", "!")) and choice["text"] for choice in question["choices"])
        assert len({choice["reason"] for choice in question["choices"]}) == len(question["choices"])


@pytest.mark.parametrize("topic", TOPICS)
def test_the_right_choice_cannot_be_told_from_its_length(topic):
    def right(question, pick):
        return pick(question["choices"], key=lambda choice: len(choice["text"]))["right"]

    questions = quiz(topic).questions
    assert sum(right(question, max) for question in questions) < len(questions)


def test_choices_come_in_another_order_each_time_and_keep_their_reasons():
    orders = {tuple(choice["text"] for choice in quiz("features", seed).questions[0]["choices"]) for seed in range(30)}
    assert len(orders) == 6  # all orders of three choices
    first_questions = [quiz("features").questions[0]["choices"] for _ in range(60)]
    assert {[choice["right"] for choice in choices].index(True) for choices in first_questions} == {0, 1, 2}
    reasons = {c["text"]: c["reason"] for c in quiz("features", 1).questions[0]["choices"]}
    assert reasons == {c["text"]: c["reason"] for c in quiz("features", 2).questions[0]["choices"]}


QUESTION = {
    "question": "Is `1 < 2`?",
    "level": "easy",
    "choices": [
        {"text": "yes & no", "right": False, "reason": "Not `both`."},
        {"text": "yes", "right": True, "reason": "It is."},
    ],
}


def test_a_page_hides_each_answer_behind_its_choice_and_escapes_what_it_shows():
    page = Quiz([QUESTION])._repr_html_()
    assert "Is <code>1 &lt; 2</code>?" in page and "yes &amp; no" in page
    folded = dict(re.findall(r"<summary>(.*?)</summary>.*?<b>(Right|No)\.</b>", page))
    assert folded == {"yes": "Right", "yes &amp; no": "No"}
    assert page.count("<details") == 2 and " open" not in page


def test_without_a_page_a_quiz_is_text_and_is_answered_by_letter(capsys):
    small = Quiz([QUESTION], seed=0)
    letters = {choice["text"]: letter for letter, choice in zip("ab", small.questions[0]["choices"], strict=True)}
    assert f"   {letters['yes']}) yes\n" in repr(small) and 'Answer with .answer(1, "b").' in repr(small)
    small.answer(1, letters["yes"])
    small.answer(1, letters["yes & no"])
    assert capsys.readouterr().out == "Right. It is.\nNo. Not `both`.\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quiz("feature"), "topic must be one of 'batchnorm', 'export', 'features', 'finetune', 'lora', got 'feature'."),
        (lambda: Quiz([QUESTION]).answer(2, "a"), "question must be a whole number from 1 to 1, got 2."),
        (lambda: Quiz([QUESTION]).answer(1, "c"), "choice must be one of a, b, got 'c'."),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
