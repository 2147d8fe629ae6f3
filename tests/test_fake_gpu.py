"""The fake GPU refuses what a real one refuses, and otherwise computes what the CPU computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grader.fake_gpu import NotOnTheCPU, TwoDevices, Unsupported, fake_gpu, fetch


@pytest.fixture
def x():
    """Numbers (4, 3) on the fake GPU."""
    with fake_gpu():
        yield torch.arange(12.0).view(4, 3).to("cuda")


def same(here: torch.Tensor, there: torch.Tensor) -> bool:
    return there.is_cuda and torch.equal(fetch(there), here)


def test_it_says_that_it_is_on_a_gpu(x):
    assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (torch.device("cuda", 0), True, False, 0)
    assert repr(x).endswith("device='cuda:0')") and f"{x.mean():.2f} of {x[0, 1]:.0f}" == "5.50 of 1"


def test_whoever_asks_for_a_gpu_is_told_of_one(x):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator() == x.device


def test_outside_there_is_no_gpu_more_than_before():
    before = torch.cuda.is_available()
    with fake_gpu():
        pass
    assert torch.cuda.is_available() == before and torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(4, 3)]),
        lambda x: F.linear(x, torch.ones(2, 3)),
        lambda x: nn.Linear(3, 2)(x),
        lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
        lambda x: F.embedding(torch.tensor([0, 1]), x),
        lambda x: torch.ones(4)[x[:, 0].long() * 0],
        lambda x: torch.where(torch.ones(4, 1) > 0, x, x),
        lambda x: torch.equal(x, torch.ones(4, 3)),
        lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
        lambda x: x.normal_(generator=torch.Generator()),
    ],
)
def test_two_devices_in_one_operation_are_refused(x, use):
    with pytest.raises(TwoDevices) as caught:
        use(x)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("use", [lambda x: x.numpy(), np.asarray, lambda x: np.stack(list(x))])
def test_numpy_is_refused(x, use):
    with pytest.raises(NotOnTheCPU):
        use(x)


def test_numpy_copies_where_it_is_told_to(x):
    assert x.numpy(force=True).tolist() == fetch(x).tolist()


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * torch.tensor(2.0),  # a number
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.ones_like(x).copy_(torch.full((4, 3), 5.0)),
        lambda x: torch._foreach_copy_([torch.zeros_like(x)], [torch.full((4, 3), 5.0)])[0],
        lambda x: F.one_hot(x[:, 0].long(), 10),
        lambda x: F.dropout(x, 0.0),
        lambda x: torch.linalg.svdvals(x),
        lambda x: x.new_zeros(3),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.zeros(2, device=x.device),
        lambda x: torch.as_tensor([1.0, 2.0], device="cuda:0"),
        lambda x: torch.ones(3).to(x),
        lambda x: torch.ones(3).to(device="cuda", dtype=torch.float64),
        lambda x: x.to(torch.float16),
        lambda x: x.split(2)[1].T,
        lambda x: torch.einsum("ij,kj->ik", x, x),
    ],
)
def test_what_a_gpu_can_do_gives_the_numbers_of_the_cpu(x, use):
    there = use(x)
    with _on_the_cpu():
        here = use(fetch(x))
    assert same(here, there) and there.dtype == here.dtype


class _on_the_cpu(torch.overrides.TorchFunctionMode):  # noqa: N801 - used as a `with`
    """The same expressions, whatever device they name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = (
            tuple("cpu" if a in ("cuda", "cuda:0") else a for a in args) if all(isinstance(a, str) for a in args[1:]) else args
        )
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": "cpu"} if kwargs.get("device") is not None else kwargs))


def test_writing_into_it_reaches_it_and_its_views(x):
    row = x[1]
    row[:] = 7.0
    x[x > 9] = 0.0
    x += 1
    assert fetch(x).tolist() == [[1, 2, 3], [8, 8, 8], [7, 8, 9], [10, 1, 1]]


def test_gradients_cross_in_both_directions(x):
    start = torch.ones(3, requires_grad=True)
    ((start * 2).to("cuda") * x[1]).cpu().sum().backward()
    assert start.grad.tolist() == [6, 8, 10] and start.grad.is_cpu


def test_training_gives_the_numbers_of_the_cpu():
    def train(device: str) -> list:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
        net.to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(images.to(device)), labels.to(device)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        return [fetch(value) for value in copy.deepcopy(net).to("cpu").state_dict().values()]

    with fake_gpu():
        there = train("cuda")
    for cpu_value, gpu_value in zip(train("cpu"), there, strict=True):
        torch.testing.assert_close(cpu_value, gpu_value, rtol=0, atol=0)


def test_a_module_and_its_copy_are_there(x):
    layer = nn.Linear(3, 2).cuda().double()
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.is_cuda and twin.weight.dtype == torch.float64
    with torch.no_grad():
        twin.weight.zero_()
    assert fetch(layer.weight).any() and same(fetch(layer.bias).expand(4, 2), twin(x.double()))


def test_torchscript_is_stopped_before_it_kills_the_process(x):
    with pytest.raises(Unsupported, match=r"^TorchScript kills the process when it meets tensors of the fake GPU.$"):
        torch.jit.trace(nn.Linear(3, 2).cuda(), x)


def test_inference_mode_and_the_real_meta_device_stay_usable(x):
    with torch.inference_mode():
        assert same(fetch(x)[:2].flatten(1), x[:2].flatten(1))
    assert nn.Linear(3, 2, device="meta").weight.is_meta and torch.ones(2, device="meta").new_zeros(3).is_meta
