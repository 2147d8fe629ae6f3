"""Where and how precisely an experiment is run: the CPU, a GPU, or a fake GPU."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader import fake_gpu
from grader.state import matmul_precision, set_matmul_precision

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """A device and a precision.

    precision "float32": as IEEE 754 has it, so without TF32. "bfloat16": inside `torch.autocast`, which computes products
    in bfloat16.
    """

    device: str  # "cpu", "cuda" or "fake"
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.device} {self.precision}"

    @property
    def there(self) -> bool:
        """Whether this machine can run it."""
        return self.device != "cuda" or torch.cuda.is_available()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the `with`, torch computes as precisely as this says, and knows the fake device; afterwards as before."""
        if self.device == "cuda":
            _wake()
        matmul, conv = matmul_precision(), _conv_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            with ExitStack() as stack:
                if self.precision == "bfloat16":
                    stack.enter_context(torch.autocast(self.device, torch.bfloat16))
                if self.device == "fake":
                    stack.enter_context(fake_gpu.fake_gpu())
                yield
        finally:
            set_matmul_precision(matmul)
            _set_conv_precision(conv)

    def put(self, inputs: Any) -> Any:
        """Inputs as drawn, moved to the device: tensors, parameters and buffers of modules, and optimizers of these.

        Tensors come as copies; modules and optimizers are changed in place.
        """
        put = {"cpu": lambda x: x, "cuda": _to_gpu, "fake": fake_gpu.put}[self.device]
        return inputs if self.device == "cpu" else _Moving(put)(inputs)

    def fetch(self, raw: Any) -> Any:
        """Raw results, their tensors moved to the CPU."""
        if self.device == "cpu":  # a subject may have taken the GPU that it found
            return _Moving(lambda x: x.detach().cpu() if x.is_cuda else x)(raw) if torch.cuda.is_initialized() else raw
        return _Moving(fake_gpu.fetch if self.device == "fake" else lambda x: x.detach().cpu())(raw)


CPU = Setting("cpu")
GPU = Setting("cuda")
FAKE_GPU = Setting("fake")


@cache
def _wake() -> None:
    """Start CUDA and load its libraries, once: seconds that are not the subject's, and random states to put back."""
    with suppress(RuntimeError), warnings.catch_warnings():  # of a GPU that cannot compute, the experiment will tell
        warnings.simplefilter("ignore")
        x = torch.ones(1, 1, 2, 2, device="cuda", requires_grad=True)
        (F.conv2d(x, x) + (x @ x).sum()).sum().backward()
        torch.cuda.synchronize()


def _conv_precision() -> bool | tuple[str, str]:
    """Whether cuDNN may use TF32 or, where torch refuses to say because newer settings disagree, these."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision


def _set_conv_precision(value: bool | tuple[str, str]) -> None:
    if isinstance(value, bool):
        torch.backends.cudnn.allow_tf32 = value
    else:
        torch.backends.cudnn.allow_tf32 = True  # the default, under which somebody set these
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = value


def _to_gpu(x: Tensor) -> Tensor:
    if x.device.type != "cpu":  # "meta", where there is nothing to move
        return x
    if isinstance(x, nn.Parameter):
        x.data = x.data.to("cuda")
        return x
    return x.detach().to("cuda").requires_grad_(x.requires_grad)


class _Moving:
    """Applies `put` to all tensors of a tree; what is there twice stays one."""

    def __init__(self, put: Callable[[Tensor], Tensor]) -> None:
        self._put = put
        self._moved: dict[int, tuple[Any, Any]] = {}  # keeps the old one alive, so that no other gets its id

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor | nn.Module | torch.optim.Optimizer):
            if id(value) not in self._moved:
                self._moved[id(value)] = value, self._move(value)
            return self._moved[id(value)][1]
        if isinstance(value, dict):
            return type(value)((key, self(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            items = [self(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _move(self, value: Tensor | nn.Module | torch.optim.Optimizer) -> Any:
        if isinstance(value, Tensor):
            gradient, moved = value.grad if value.is_leaf else None, self._put(value)
            if gradient is not None:
                moved.grad = self._put(gradient)
            return moved
        if isinstance(value, torch.optim.Optimizer):
            for group in value.param_groups:
                group["params"] = [self(parameter) for parameter in group["params"]]
            state = {self(parameter): self(values) for parameter, values in value.state.items()}
            value.state.clear()
            value.state.update(state)
            return value
        for module in value.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: self(tensor) for name, tensor in tensors.items() if tensor is not None})
        return value
