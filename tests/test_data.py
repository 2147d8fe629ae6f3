import subprocess
import sys
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.data import LETTERS, digits, docstrings, image_folder, jitter, letters, pets, printed_digits, text_table
from helpers.docstrings import ALIKE, LIST, TOPICS, listed


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


def test_printed_digits_have_the_classes_of_the_handwritten_ones_and_are_drawn_as_letters_are():
    drawn, again = printed_digits(300, seed=2), printed_digits(300, seed=2)
    assert drawn.inputs.shape == (300, 1, 32, 32) and drawn.inputs.dtype == torch.float32
    assert drawn.classes == digits("test").classes and set(drawn.labels.tolist()) == set(range(10))
    assert drawn.inputs.min() >= 0 and drawn.inputs.max() <= 1
    assert torch.equal(drawn.inputs, again.inputs) and not torch.equal(drawn.inputs, printed_digits(300, seed=3).inputs)
    with pytest.raises(
        ValueError, match=r"^count must be a whole number of at least 1, got 0. Ask for, say, printed_digits\(1000\).$"
    ):
        printed_digits(0)


def test_jitter_makes_copies_that_differ_a_little_and_keep_their_labels():
    some = digits("train", labels_per_class=2)
    many, again = jitter(some, copies=3, seed=1), jitter(some, copies=3, seed=1)
    assert many.inputs.shape == (60, 1, 32, 32) and torch.equal(many.labels, some.labels.repeat(3))
    assert torch.equal(many.inputs, again.inputs) and not torch.equal(many.inputs, jitter(some, 3, seed=2).inputs)
    distance = torch.cdist(many.inputs.flatten(1), some.inputs.flatten(1))
    own = distance[torch.arange(60), torch.arange(20).repeat(3)]
    assert (own > 0.1).all() and own.mean() < 0.8 * distance.mean()
    with pytest.raises(TypeError, match=r"^inputs must be a tensor of shape \(n, channels, height, width\), got a list.$"):
        jitter(docstrings("train", labels_per_class=2), copies=2)


def test_data_is_on_the_cpu_whatever_torch_makes_tensors_on(device):
    drawn = letters(2), digits(labels_per_class=1), docstrings(labels_per_class=1)
    assert {tensor.device.type for examples in drawn for tensor in examples if isinstance(tensor, torch.Tensor)} == {"cpu"}
    moved = drawn[0]._replace(inputs=torch.zeros(2, 1, 32, 32) + 1, labels=torch.arange(2))
    copies = jitter(moved, 3)
    assert copies.inputs.device == moved.inputs.device and len(copies.labels) == 6


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
    few, redrawn = digits("train", 5, draw=0), digits("train", 5, draw=1)
    assert few.labels.bincount().tolist() == [5] * 10
    assert not torch.equal(few.inputs, redrawn.inputs)
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


# --- docstrings ---------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test")


def test_docstring_splits_are_disjoint_and_the_held_out_ones_balanced():
    splits = {name: docstrings(name) for name in SPLITS}
    texts = [text.lower() for examples in splits.values() for text in examples.inputs]
    assert len(set(texts)) == len(texts)
    assert splits["train"].classes == tuple(TOPICS) and len(TOPICS) == 6
    for split in splits.values():
        assert len(split.inputs) == len(split.labels)
        assert all(len(text.split()) >= 4 and "\n" not in text for text in split.inputs)
    # Other patch releases than those in `helpers.docstrings` may have reworded a few.
    assert (splits["test"].labels.bincount() - 60).abs().max() <= 5
    assert (splits["validation"].labels.bincount() - 36).abs().max() <= 5
    assert splits["train"].labels.bincount().min() >= 190


@pytest.fixture(scope="module")
def read_once():
    """The listed docstrings: reading them parses a part of the standard library."""
    return listed()


def test_no_module_is_in_two_splits(read_once):
    modules = {split: {docstring.module for docstring in read_once if docstring.split == split} for split in SPLITS}
    assert not modules["train"] & modules["test"] and not modules["train"] & modules["validation"]
    assert not modules["validation"] & modules["test"]


def test_no_training_text_is_nearly_a_held_out_one():
    def words(text):
        return frozenset(text.lower().strip(".").split())

    held_out = [words(text) for split in ("validation", "test") for text in docstrings(split).inputs]
    for text in docstrings("train").inputs:
        own = words(text)
        assert max(len(own & theirs) / len(own | theirs) for theirs in held_out) < ALIKE


def test_docstrings_are_what_this_python_says_of_itself(read_once):
    import fractions
    import inspect

    first = next(d for d in read_once if (d.module, d.name) == ("fractions", "Fraction"))
    assert " ".join(inspect.getdoc(fractions.Fraction).split("\n\n")[0].split()) == first.text


def runs(python):
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_docstrings_are_the_same_in_every_python_that_is_here():
    keys = set(LIST.read_text(encoding="utf-8").split())
    pythons = [path for minor in (11, 12, 13) if (path := which(f"python3.{minor}")) and runs(path)]
    for python in (sys.executable, *pythons):
        code = "import docstrings as d; print(*sorted({x.key for x in d.collect()}))"
        done = subprocess.run([python, "-W", "ignore", "-c", code], cwd=LIST.parent, capture_output=True, text=True, check=True)
        assert len(keys - set(done.stdout.split())) <= 0.03 * len(keys), python


def test_docstrings_draw_labelled_texts_like_the_digits():
    few, redrawn = docstrings("train", 5, draw=0), docstrings("train", 5, draw=1)
    assert few.labels.bincount().tolist() == [5] * 6
    assert few.inputs != redrawn.inputs and few.inputs == docstrings("train", 5, draw=0).inputs
    assert set(few.inputs) <= set(docstrings("train").inputs)


# --- your own -----------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for name, count in (("cat", 10), ("dog", 20)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.fromarray(np.full((8 + number, 9, 3), number, np.uint8)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_folder_of_images_has_the_same_call_shape(photos):
    splits = [image_folder(photos, name) for name in SPLITS]
    assert all(split.classes == ("cat", "dog") for split in splits)
    paths = [path for split in splits for path in split.inputs]
    assert len(paths) == len(set(paths)) == 30 and all(isinstance(path, Path) for path in paths)
    for split in splits:
        assert [path.parent.name for path in split.inputs] == [split.classes[label] for label in split.labels]
        assert set(split.labels.tolist()) == {0, 1}
    assert image_folder(photos, "train", 3, draw=1).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert image_folder(str(photos), "train", 3).inputs == image_folder(photos, "train", 3).inputs


def test_pets_are_read_from_their_lists(tmp_path, monkeypatch):
    """The published files' layout, with 12 photographs of three breeds; the real ones are 800 MB."""
    folder = tmp_path / "datasets" / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    breeds = ("Abyssinian", "american_bulldog", "yorkshire_terrier")
    for half, numbers in (("trainval", range(10)), ("test", range(10, 13))):
        lines = [f"{breed}_{n} {place} 1 1" for n in numbers for place, breed in enumerate(breeds, 1)]
        (folder / "annotations" / f"{half}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    train, validation, test = (pets(split) for split in SPLITS)
    assert train.classes == breeds
    assert [len(split.inputs) for split in (train, validation, test)] == [24, 6, 9]
    assert {path.stem.rpartition("_")[2] for path in test.inputs} == {"10", "11", "12"}
    for split in (train, validation, test):
        assert [path.stem.rpartition("_")[0] for path in split.inputs] == [breeds[label] for label in split.labels]
        assert all(path.parent == folder / "images" and path.suffix == ".jpg" for path in split.inputs)
    assert pets("train", 2).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_pets_that_cannot_be_had_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("WARMSTART_OFFLINE", "1")
    with pytest.raises(OSError) as error:
        pets()
    assert str(error.value) == (
        "could not get the Oxford-IIIT Pets from www.robots.ox.ac.uk: WARMSTART_OFFLINE is set, and they are not there. "
        f'Put them into {tmp_path}/datasets/oxford-iiit-pet, or go on without it: the profile "embedded" needs no network.'
    )
    assert not (tmp_path / "datasets").exists()


@pytest.fixture
def mails(tmp_path):
    lines = ["number,text,label", *(f'{n},"text, {n}",{"spam" if n % 3 else "ham"}' for n in range(30)), '3,"text, 3",ham']
    file = tmp_path / "mails.csv"
    file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    return file


def test_a_table_of_texts_has_the_same_call_shape(mails):
    splits = [text_table(mails, name) for name in SPLITS]
    texts = [text for split in splits for text in split.inputs]
    assert sorted(texts) == sorted(f"text, {n}" for n in range(30)), "a text that occurs twice is kept once"
    for split in splits:
        assert split.classes == ("ham", "spam")
        assert [int(text.split()[1]) % 3 > 0 for text in split.inputs] == (split.labels == 1).tolist()
    assert text_table(mails, "train", 2).labels.tolist() == [0, 0, 1, 1]


def test_own_data_that_cannot_be_used_is_told_in_one_sentence(tmp_path, photos):
    def refusal(text):
        file = tmp_path / "table.csv"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            text_table(file)
        return str(error.value).replace(str(file), "table.csv")

    message = "table.csv must have the columns 'text' and 'label', got ['a', 'b']. Name them in its first line."
    assert refusal("a,b\n1,2\n") == message
    assert refusal("text,label\na,x\na,y\n") == (
        "line 3 of table.csv must have a text and one label, got text 'a' with label 'y' and, in an earlier line, 'x'. "
        "Correct it or take it out."
    )
    assert refusal("text,label\na,x\nb,x\n") == "table.csv must have texts of two or more labels, got ['x']."
    few = "text,label\na,x\nb,x\nc,x\nd,x\ne,y\n"
    assert refusal(few) == "every class must have at least 4 examples, got 1 of 'y'. Add some, or drop it."
    empty = tmp_path / "none"
    with pytest.raises(ValueError) as error:
        image_folder(empty)
    assert str(error.value) == (
        f"{empty} must hold a folder of images for each of two or more classes: {empty}/cat, {empty}/dog."
    )
    (photos / "bird").mkdir()
    with pytest.raises(
        ValueError, match=r"^every class must have at least 4 examples, got 0 of 'bird'. Add some, or drop it.$"
    ):
        image_folder(photos)


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
