import pytest
import torch

from helpers.data import LETTERS, digits, letters


def test_letters_are_drawn_as_documented():
    drawn = letters(300, seed=3)
    assert drawn.inputs.shape == (300, 1, 32, 32)
    assert drawn.inputs.dtype == torch.float32
    assert drawn.inputs.min() >= 0 and drawn.inputs.max() <= 1
    assert drawn.classes == tuple(LETTERS) and len(LETTERS) == 43
    assert not set("0123456789") & set(LETTERS)
    assert len(drawn.labels.unique()) == 43


def test_same_seed_draws_the_same_letters_whatever_was_drawn_before():
    first = letters(20, seed=5)
    torch.rand(100)
    again = letters(20, seed=5)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.inputs, letters(20, seed=6).inputs)


def test_drawing_letters_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    letters(5)
    assert torch.equal(before, torch.get_rng_state())


def test_every_letter_leaves_ink_on_every_image():
    assert (letters(500, seed=1).inputs.amax((1, 2, 3)) > 0.3).all()


def test_digit_splits_are_disjoint_balanced_and_complete():
    splits = {name: digits(name) for name in ("train", "validation", "test")}
    assert [len(s.labels) for s in splits.values()] == [797, 200, 800]
    rows = torch.cat([s.inputs for s in splits.values()]).flatten(1)
    from sklearn.datasets import load_digits

    assert len(rows.unique(dim=0)) == len(torch.from_numpy(load_digits().data).unique(dim=0))
    for split in splits.values():
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.15 * counts.float().mean() + 1


def test_labels_per_class_are_drawn_from_train_and_differ_by_draw():
    few, other = digits("train", 5, draw=0), digits("train", 5, draw=1)
    assert few.labels.bincount().tolist() == [5] * 10
    assert not torch.equal(few.inputs, other.inputs)
    assert torch.equal(few.inputs, digits("train", 5, draw=0).inputs)
    whole = {row.numpy().tobytes() for row in digits("train").inputs}
    assert all(row.numpy().tobytes() in whole for row in few.inputs)


def test_digits_are_the_originals_enlarged():
    from sklearn.datasets import load_digits

    raw, test = load_digits(), digits("test")
    small = torch.nn.functional.avg_pool2d(test.inputs, 4).flatten(1)  # 32 x 32 -> 8 x 8, blurred by the way up
    distances = torch.cdist(small, torch.from_numpy(raw.data).float() / 16)
    assert distances.min(1).values.max() < 1.0  # images have a norm of about 4
    assert (torch.from_numpy(raw.target)[distances.argmin(1)] == test.labels).float().mean() > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: letters(0), "count must be a whole number of at least 1, got 0. Ask for, say, letters(1000)."),
        (lambda: letters(2.5), "count must be a whole number of at least 1, got 2.5. Ask for, say, letters(1000)."),
        (lambda: letters(3, seed=-1), "seed must be a whole number of at least 0, got -1."),
        (lambda: digits("train", 2, draw="a"), "draw must be a whole number of at least 0, got 'a'."),
        (lambda: digits("tset"), "split must be one of 'train', 'validation' and 'test', got 'tset'."),
        (
            lambda: digits("train", 100),
            "labels_per_class must be a whole number from 1 to 78, got 100. "
            "That is all of the train split; leave labels_per_class out to get all 797 examples.",
        ),
        (
            lambda: digits("train", 0),
            "labels_per_class must be a whole number from 1 to 78, got 0. "
            "That is all of the train split; leave labels_per_class out to get all 797 examples.",
        ),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
