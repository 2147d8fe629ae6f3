import pytest
import torch
from torch import nn

from helpers import expect


def test_what_is_wanted_is_passed_on():
    assert expect.whole_number("n", 3) == 3 and expect.positive("lr", 0.5) == 0.5
    layer, rows = nn.Linear(1, 1), torch.zeros(2, 3)
    assert expect.module("model", layer) is layer
    assert expect.tensor("x", rows, ("n", 3)) is rows
    assert expect.tensor("x", rows, ("n", "...")) is rows
    assert expect.tensor("x", rows[0], ("n", "...")).shape == (3,)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: expect.whole_number("n", True), ValueError, "n must be a whole number of at least 1, got True."),
        (lambda: expect.whole_number("n", 5, most=4), ValueError, "n must be a whole number from 1 to 4, got 5."),
        (lambda: expect.positive("lr", float("nan")), ValueError, "lr must be a number above 0, got nan."),
        (lambda: expect.positive("lr", "1"), ValueError, "lr must be a number above 0, got '1'."),
        (
            lambda: expect.module("model", nn.Linear),
            TypeError,
            "model must be an nn.Module, got a type. Pass the model itself.",
        ),
        (lambda: expect.tensor("x", torch.zeros(2), ("n", 3)), ValueError, "x must have shape (n, 3), got (2,)."),
        (lambda: expect.tensor("x", torch.zeros(0, 3), ("n", 3)), ValueError, "x must have shape (n, 3), got (0, 3)."),
        (lambda: expect.tensor("x", torch.zeros(()), ("n", "...")), ValueError, "x must have shape (n, ...), got ()."),
        (lambda: expect.tensor("x", None, (2,)), TypeError, "x must be a tensor of shape (2,), got None."),
    ],
)
def test_what_is_not_is_told_in_one_sentence(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_what_came_is_described_in_a_few_words():
    described = [expect.describe(x) for x in (torch.zeros(1, 2), None, 1.5, {}, [], object())]
    assert described == ["a tensor of shape (1, 2)", "None", "1.5", "a dict", "a list", "an object"]
    assert len(expect.describe("x" * 500)) < 70
