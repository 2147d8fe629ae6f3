import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import export, imports, lora
from benchmarks.__main__ import GROUPS, RESULTS, measured, row
from benchmarks.memory import held_bytes, peak_bytes
from benchmarks.timing import Comparison, Timing, interleaved
from helpers.timing import timed


class Clock:
    """Tells the time that was set."""

    now = 0.0

    def __call__(self):
        return self.now


def taking(clock, seconds, log, name):
    """A function that takes so long by `clock`, each call the next of `seconds`."""
    durations = iter(seconds)

    def run():
        log.append(name)
        clock.now += next(durations)

    return timed(run, clock)


def test_two_functions_take_turns_and_the_first_round_does_not_count():
    clock, log = Clock(), []
    timing = interleaved(taking(clock, [50, 2, 3], log, "ours"), taking(clock, [90, 1, 2], log, "peer"), rounds=2)
    assert log == ["ours", "peer"] * 3
    assert (timing.ours, timing.peer) == ([2, 3], [1, 2])


def test_the_ratio_is_that_of_each_round_not_that_of_the_medians():
    timing = Timing(ours=[1, 2, 30, 4, 5], peer=[1, 1, 10, 1, 1])  # the third round fell into a busy moment
    assert timing.medians == (4, 1)
    assert timing.ratio == (2, 3, 4)


def test_the_quartiles_of_two_rounds_lie_between_them():
    assert Timing([1.0, 2.0], [1.0, 1.0]).ratio == (1.25, 1.5, 1.75)


@pytest.mark.parametrize(("target", "cells"), [(1.05, "at most 1.05 | yes"), (1.04, "at most 1.04 | no"), (None, " | ")])
def test_a_row_says_whether_the_median_ratio_meets_the_target(target, cells):
    comparison = Comparison("what", "ours", "peer", build=None, rounds=3, target=target)
    timing = Timing([0.1, 0.105, 2.0], [0.1, 0.1, 1.0])
    assert row(comparison, timing) == f"| what | ours: 105 ms | peer: 100 ms | 1.05 (1.02 to 1.52) | {cells} |"


def test_the_results_list_every_comparison_that_there_is():
    names = [comparison.what for group in GROUPS.values() for comparison in group.COMPARISONS]
    assert len(names) == len(set(names))
    assert re.findall(r"^\| (?!what |---)(.+?) \|", RESULTS.read_text(encoding="utf-8"), re.MULTILINE) == names


def test_the_results_name_the_machine():
    text = RESULTS.read_text(encoding="utf-8")
    assert re.search(r"on \d+ \w+ \d{4}: .+, \d+ cores, \d+ threads, .+ Python 3\.\d+\.\d+, torch 2\.\d+", text)


def test_every_module_of_helpers_has_its_import_timed(root):
    timed_names = set(imports.modules())
    for path in (root / "helpers").rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        assert module == "helpers" or module in timed_names or module.rpartition(".")[0] in timed_names, module


def test_what_a_module_must_import_is_what_it_and_those_it_imports_name_of_others():
    assert imports.required("helpers.expect") == ["from numbers import Integral, Real", "from torch import Tensor, nn"]
    statements = imports.required("helpers.predict")
    assert "import statistics" in statements and "from numbers import Integral, Real" in statements
    assert not any("helpers" in statement for statement in statements)


def test_a_row_says_why_it_was_not_measured():
    def build():
        import a_package_that_is_not_there  # noqa: F401

    assert measured(Comparison("what", "ours", "peer", build, rounds=2)) == (
        "| what | ours | peer | not measured: ModuleNotFoundError: No module named 'a_package_that_is_not_there' |  |  |"
    )


def test_peak_memory_is_the_most_that_is_held_at_one_time():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(250_000)

    def together():
        return [torch.zeros(250_000) for _ in range(3)]

    assert peak_bytes(one_after_the_other) == 1_000_000
    assert peak_bytes(together) == 3_000_000


def test_memory_behind_several_views_counts_once():
    x = torch.zeros(1000)
    assert held_bytes([x, x[:10], x.view(10, 100), torch.zeros(1)]) == 4004


def test_a_step_of_ours_trains_what_a_step_of_peft_trains_from_the_same_loss():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    task = lora.minilm(batch=2, tokens=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    models = [variant(task).eval() for variant in (lora.ours, lora.peft)]
    sizes = [sorted(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    assert sizes[0] == sizes[1] == sorted([*[8 * 16] * 8, 16 * 10, 10])
    with torch.no_grad():
        assert torch.equal(*(model(*task.inputs) for model in models))


def test_a_training_step_holds_at_least_the_weights_and_moves_what_trains_alone():
    torch.manual_seed(0)
    task = lora.minilm(batch=2, tokens=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    step = lora.Step(lora.head(task), task, "cpu")
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    step()
    moved = [name for name, tensor in step.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["head.weight", "head.bias"]
    assert step.peak_bytes() > held_bytes(step.model.parameters())


@pytest.mark.slow
def test_latency_is_that_of_the_same_outputs():
    model, inputs = export._model("glyphnet", "cpu")
    with torch.no_grad():
        assert torch.allclose(export._session("glyphnet", "cpu")(*inputs), model(*inputs), atol=1e-4)


def gpu_script(root, *steps, **environment):
    command = ["bash", str(root / "benchmarks/gpu.sh"), *steps]
    given = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() or sys.platform == "win32", reason="about machines without a GPU")
def test_the_script_for_a_gpu_says_that_there_is_none(root):
    done = gpu_script(root)
    assert done.returncode == 1 and done.stderr.strip() == (
        "gpu.sh needs a CUDA GPU, and torch sees none here. Run it on a machine with one, or REHEARSE=1 to try the steps."
    )
    done = gpu_script(root, "sing", REHEARSE="1")
    assert done.returncode == 2 and done.stderr.strip() == "no step sing: choose from tests, record, speed."
