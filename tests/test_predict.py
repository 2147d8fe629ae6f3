import pytest

from helpers.predict import predict


def test_a_prediction_is_kept_and_shown_beside_the_result(capsys):
    guess = predict(pixels=0.8, features=0.95)
    assert capsys.readouterr().out == "kept: pixels 0.8, features 0.95\n"
    guess.beside({"pixels": [0.84, 0.86], "features": 0.9})
    assert capsys.readouterr().out.splitlines() == [
        "          measured        predicted",
        "pixels    0.850 ± 0.014   0.800  off by 0.050",
        "features  0.900           0.950  off by 0.050",
    ]


def test_no_prediction_is_said_and_does_not_stop_anything(capsys):
    guess = predict(pixels=None, features=...)
    assert capsys.readouterr().out.startswith("no prediction yet of: pixels, features. ")
    guess.beside({"pixels": 0.5, "features": 0.6, "besides": 0.7})
    assert capsys.readouterr().out.count("   -\n") == 3


def test_bad_input_is_told_in_one_sentence():
    with pytest.raises(ValueError, match=r"^pixels must be a number such as 0.7, or None, got 'much'.$"):
        predict(pixels="much")
    with pytest.raises(
        ValueError, match=r"^results must have \['pixels'\], got \['features'\]. Use the names of the prediction.$"
    ):
        predict(pixels=0.5).beside({"features": 0.5})
