import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: one BLAS thread each, in kernels that tests start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import grader  # noqa: F401
from grader.pretend import pretending

ROOT = Path(__file__).parents[1]


def pytest_itemcollected(item):
    """What is not slow is fast; of processes side by side each takes whole files, or one proof after the other."""
    if "slow" not in item.keywords:
        item.add_marker("fast")
    if item.path.stem != "test_proof":  # its tests share nothing
        item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


DEVICES = ["cpu", "cuda" if torch.cuda.is_available() else "pretended"]


@pytest.fixture(params=DEVICES)
def device(request):
    """Makes a test of one for the CPU one for each device: what it makes without naming a device is there.

    Without a GPU, one is pretended: see `grader.pretend`.
    """
    if request.param == "pretended":
        with pretending(), torch.device("cuda"):
            yield request.param
    elif request.param == "cuda":
        with torch.device("cuda"):
            yield request.param
    else:
        yield request.param


@pytest.fixture(autouse=True)
def own_session(monkeypatch):
    """No verdict of one test is seen by another, and no test is taken for a grading run."""
    monkeypatch.setattr(sys.modules["grader.check"], "_session", {})  # `grader.check` by name is the function
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.delenv("WARMSTART_SEEDS", raising=False)


@pytest.fixture
def digits_net():
    """A small network with BatchNorm and dropout, in train mode, and a head called fc."""
    from collections import OrderedDict

    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 4, 3, stride=2),
            bn=nn.BatchNorm2d(4),
            drop=nn.Dropout(0.5),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        )
    )
