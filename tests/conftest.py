import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# One thread, in kernels that tests start too: on networks this small several wait for each other, at many times the cost.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import grader  # noqa: F401
from grader.fake_gpu import fake_gpu
from grader.setting import GPU

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--cost", action="store_true", help="print what each test file costs, in CPU seconds")


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def pytest_runtest_logstart():
    global _measured
    _measured = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    global _measured
    report = yield  # of the test, or of the fixtures before or after it
    before, _measured = _measured, _cpu_seconds()
    report.cpu_seconds = _measured - before
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--cost"):
        return
    costs = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        costs[getattr(report, "nodeid", "").partition("::")[0]] += getattr(report, "cpu_seconds", 0)
    terminalreporter.section("CPU seconds of each file")
    for file, seconds in costs.most_common():
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
    terminalreporter.write_line(f"{costs.total():8.1f}  all")


def pytest_itemcollected(item):
    """What is not slow is fast."""
    if "slow" not in item.keywords:
        item.add_marker("fast")


def pytest_collection_modifyitems(items):
    """The longest files come first and single proofs last, so that no process waits long for another at the end."""
    places = {"test_course": 0, "test_lab": 1, "test_nbgrader": 2, "test_proof": 4}
    items.sort(key=lambda item: places.get(item.path.stem, 3))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody calls it
def pytest_xdist_make_scheduler(config, log):
    """Processes side by side take what `_together` puts together: its tests share what is made once.

    `--dist loadgroup` of pytest-xdist 3.8 puts nothing together in pytest 9.2, and says nothing. Any `--dist` but the one
    that `--numprocesses` stands for, "load", is left to pytest-xdist.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _together(nodeid)

    config.option.loadscopereorder = False  # the order above, not the files with most tests first
    return Scheduling(config, log)


def _together(nodeid: str) -> str:
    """A file, of the notebooks a chapter, of the proofs one."""
    file, _, test = nodeid.partition("::")
    if file.endswith("test_proof.py"):
        return nodeid
    chapter = re.search(r"(?:chapter_|\[)(\d\d)_", test) if file.endswith("test_course.py") else None
    return f"{file} {chapter[1]}" if chapter else file


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


DEVICES = ["cpu", "cuda" if torch.cuda.is_available() else pytest.param("fake", marks=pytest.mark.slow)]


class _OnTheGPU(TorchFunctionMode):
    """What is made without naming a device is made on the CPU, so that random numbers are the same, and moved to "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs).to("cuda")
        return made.requires_grad_() if requires_grad else made


@pytest.fixture(params=DEVICES)
def device(request):
    """Makes a test for the CPU one for each device. Without a GPU, the fake one stands in: see `grader.fake_gpu`.

    A test marked `cpu` is left as it is; one marked `real` does not run on the fake GPU.
    """
    for marker, devices in (("cpu", ("cuda", "fake")), ("real", ("fake",))):
        mark = request.node.get_closest_marker(marker)
        if mark is not None and request.param in devices:
            pytest.skip(mark.kwargs["reason"])
    with ExitStack() as stack:
        if request.param == "fake":
            stack.enter_context(fake_gpu())
        if request.param == "cuda":  # as exact, and as repeatable, as a GPU can be
            stack.enter_context(GPU.applied())
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if request.param != "cpu":
            stack.enter_context(_OnTheGPU())
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
