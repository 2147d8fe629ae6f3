import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

import grader  # noqa: F401

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """What is not slow is fast."""
    for item in items:
        if "slow" not in item.keywords:
            item.add_marker("fast")


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
