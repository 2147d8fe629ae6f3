"""What a check says of solutions that work on the CPU only, on a machine without a GPU and on one with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from grader import CheckFailed, check, on_gpu
from grader.checks import TOPICS, exercises
from grader.experiment import equal
from grader.golden import table_of
from grader.golden.records import right_solutions
from grader.observe import observe
from grader.on_gpu import try_on_gpu
from grader.setting import FAKE_GPU, GPU
from helpers.modes import eval_mode

ALL = [exercise for topic in TOPICS.values() for exercise in exercises(topic).values()]
EXERCISES = [pytest.param(exercise, id=exercise.number) for exercise in ALL]
# Right solutions that a GPU would refuse, and why: the only ones of which a check may say so.
NUMPY = "can't convert cuda:0 device type tensor to numpy"
MADE_THERE = "on the CPU, but its inputs are on the GPU"  # a tensor or a module made without naming a device
CPU_ONLY = {
    ("2.3", "by_gradient_descent"): MADE_THERE,
    ("2.3", "by_hand"): NUMPY,
    ("2.3", "by_scikit_learn"): NUMPY,
    ("2.3", "until_the_gradient_is_small"): MADE_THERE,
    ("2.4", "InSubfolders"): NUMPY,
    ("2.4", "by_a_database"): NUMPY,
    ("2.4", "with_a_list_of_contents"): NUMPY,
    ("2.4a", "by_arrays"): NUMPY,
    ("2.4a", "by_pickles"): NUMPY,
    ("2.5", "in_numpy_on_a_copy"): NUMPY,
    ("2.5", "through_pillow"): MADE_THERE,
    ("2.7", "Pool"): MADE_THERE,
    ("2.7", "by_running_mean"): MADE_THERE,
    ("2.7", "in_numpy"): NUMPY,
    ("2.7", "text_by_text"): MADE_THERE,
    ("2.8", "Embedder"): MADE_THERE,
    ("2.8", "HandedIn"): MADE_THERE,
    ("2.8", "one_at_a_time"): MADE_THERE,
    ("2.8", "pairs_sorted_back"): MADE_THERE,
    ("2.8", "tokenized_once"): MADE_THERE,
    ("2.8a", "in_numpy"): NUMPY,
    ("4.4", "by_gradient_descent"): MADE_THERE,
    ("4.4", "by_scikit_learn"): NUMPY,
    ("4.5", "History"): NUMPY,
    ("5.5", "in_numpy"): NUMPY,
    ("5.5", "summaries_first_and_then_all_at_once"): MADE_THERE,
    ("6.5", "GroupsAsSamples"): MADE_THERE,
    ("6.5", "Parametrized"): MADE_THERE,
    ("6.5", "Patches"): MADE_THERE,
    ("6.5", "Twin"): MADE_THERE,
    ("6.6", "PutBack"): MADE_THERE,
    ("6.7", "by_what_is_left"): NUMPY,
    ("6.7", "in_numpy"): NUMPY,
    ("8.1", "of_a_copy"): NUMPY,
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_reference_shows_its_facts_on_a_gpu_too(exercise):
    setting = GPU if GPU.there else FAKE_GPU
    for experiment in exercise.experiments:
        if setting == FAKE_GPU and not experiment.on_fake_gpu:
            continue
        expected = table_of(exercise)[experiment.key]["reference"]
        seen = observe(experiment, exercise.reference, 0, exercise.number, setting)
        assert seen.problem is None
        assert [fact for fact in expected if not equal(expected[fact], seen.facts.get(fact))] == []


@pytest.mark.slow
@pytest.mark.skipif(GPU.there, reason="about the fake GPU")
@pytest.mark.parametrize("exercise", EXERCISES)
def test_all_that_a_gpu_would_refuse_and_nothing_else_is_said_to_be_for_the_cpu_only(exercise):
    table, told = table_of(exercise), {}
    for who, subject in right_solutions(exercise).items():
        if lines := try_on_gpu(exercise, subject, table, 0):
            ((label, told[who]),) = lines
            assert label == "on a GPU"
    assert told.keys() == {who for number, who in CPU_ONLY if number == exercise.number}
    for who, sentence in told.items():
        assert CPU_ONLY[exercise.number, who] in sentence, sentence


def extract(backbone, images, batch_size, device=None):
    """Right, but for the device of the table that it fills: the CPU, unless one is given."""
    with eval_mode(backbone), torch.no_grad():
        rows = torch.zeros(len(images), backbone(images[:1]).shape[1], device=device)
        for start in range(0, len(images), batch_size):
            batch = backbone(images[start : start + batch_size])
            rows += torch.zeros_like(rows).index_copy_(
                0, torch.arange(start, start + len(batch), device=device), batch.to(rows.dtype)
            )
    return rows


def on_the_inputs_device(backbone, images, batch_size):
    return extract(backbone, images, batch_size, images.device)


def best_device(backbone, images, batch_size):
    """Takes the GPU where there is one, and moves everything there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return extract(backbone.to(device), images.to(device), batch_size, device)


def told(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("subject", [on_the_inputs_device, best_device])
def test_nothing_is_said_of_a_solution_that_asks_where_its_inputs_are(capsys, subject):
    check("2.2", subject)
    text = told(capsys)
    assert "CPU only" not in text and text.count("passed") == 1
    assert text.count("on a GPU it works there too.") == GPU.there


def test_a_tensor_made_on_the_wrong_device_is_told_with_its_line(capsys):
    assert check("2.2", extract) is None  # it passed
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 88
    assert text.count("passed") == 1 and text.count("on a GPU it works on the CPU only: line") == 1
    assert "of your cell, `rows += torch.zeros_like(rows).index_copy_(" in text
    assert "raised RuntimeError: Expected all tensors to be on the same device" in text and "It costs no points." in text


def test_numpy_on_a_tensor_of_a_gpu_is_told(capsys):
    def mean_pool(hidden, attention_mask):
        mask = attention_mask.numpy()[:, :, None]
        total = np.where(mask, np.nan_to_num(hidden.numpy()), 0).sum(1)
        return torch.from_numpy(total / np.maximum(mask.sum(1), 1)).to(hidden.dtype)

    check("2.7", mean_pool)
    text = told(capsys)
    assert "line" in text and "`mask = attention_mask.numpy()[:, :, None]`, raised TypeError: can't convert cuda:0" in text


def test_what_comes_back_on_the_cpu_is_told(capsys):
    def linear_probe(features, labels, classes, penalty):
        head = exercises("features")["2.3"].reference(features, labels, classes, penalty)
        twin = nn.Linear(features.shape[1], classes)
        twin.load_state_dict(head.state_dict())
        return twin

    reference = exercises("features")["2.3"].reference
    assert reference(torch.randn(6, 2), torch.arange(6) % 2, 2, 0.1).weight.device.type == "cpu"
    check("2.3", linear_probe)
    assert "it works on the CPU only: what your code returned is on the CPU, but its inputs are on the GPU." in told(capsys)


def test_autocast_is_tried_where_the_statement_says_so(capsys):
    def stops(backbone, images, batch_size):
        rows = []
        for batch in images.split(batch_size):
            found = on_the_inputs_device(backbone, batch, batch_size)
            if torch.is_autocast_enabled(images.device.type):
                raise ValueError("features must be float32")
            rows.append(found)
        return torch.cat(rows)

    check("2.2", on_the_inputs_device)
    assert "autocast" not in told(capsys)
    check("2.2", stops)
    text = told(capsys)
    assert "autocast line" in text and "raised ValueError: features must be float32. It costs no points." in text


def test_grading_does_not_look_at_it(capsys, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert check("2.2", extract) == exercises("features")["2.2"].points
    assert "GPU" not in told(capsys)


def test_what_did_not_pass_is_not_looked_at(capsys, monkeypatch):
    wrong = {m.key: m.subject for m in exercises("features")["2.2"].misconceptions}
    monkeypatch.setattr(on_gpu, "try_on_gpu", lambda *_: pytest.fail("it was looked at"))
    with pytest.raises(CheckFailed):
        check("2.2", wrong["everything at once"])


def test_the_verdict_is_there_before_it_is_looked_at(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(on_gpu, "try_on_gpu", lambda *_: shown.append(capsys.readouterr().out) or [])
    check("2.2", extract)
    assert shown[0].count("passed") == 1


def test_where_the_reference_fails_too_nothing_is_said(monkeypatch):
    """Then it is the check or the machine."""
    exercise = replace(exercises("features")["2.2"], reference=extract, autocast=False)
    table = table_of(exercises("features")["2.2"])
    assert try_on_gpu(exercise, extract, table, 0) == []
    monkeypatch.setattr(on_gpu, "GPU", FAKE_GPU)
    monkeypatch.setattr(on_gpu, "FAKE_GPU", GPU)  # so that every problem there counts
    assert try_on_gpu(exercise, extract, table, 0) == []


def test_on_a_gpu_it_says_so(capsys, monkeypatch):
    """With a fake GPU in the real one's place, where there is none."""
    monkeypatch.setattr(on_gpu, "GPU", GPU if GPU.there else FAKE_GPU)
    check("0.1", lambda logits, labels: (logits.argmax(dim=1) == labels).float().mean().item())
    assert told(capsys).count("on a GPU it works there too.") == 1
