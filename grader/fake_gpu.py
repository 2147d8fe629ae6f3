"""A fake GPU: tensors that say they are on "cuda" while their numbers stay on the CPU.

Real code runs on it and gives real numbers, so that whatever a GPU would refuse is found on a machine without one:
a tensor that was made on the CPU and meets one of the GPU, and `.numpy()`.

    with fake_gpu():
        x = torch.ones(3).to("cuda")        # x.device is cuda:0
        x + torch.ones(3)                   # TwoDevices
        x.numpy()                           # NotOnTheCPU

It is less strict than a GPU, never more: an operator that CUDA lacks, and memory that is full, go unnoticed.
What it cannot do (compiling, exporting, saving without a move to the CPU) raises something else, or `Unsupported`.

Each such tensor wraps one of the CPU. Underneath, torch takes it for one on "meta", the only device without numbers for
which autograd asks no driver. Source: PyTorch's documentation of `__torch_dispatch__` and of `torch.overrides`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)  # what its tensors say
_BELOW = torch.device("meta")  # what torch sees
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default}
_INDICES = {  # which may be on the CPU where what they index is not
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
    _aten._pack_padded_sequence.default,
}


class Refused(Exception):
    """What a real GPU would refuse as well."""


class TwoDevices(Refused, RuntimeError):
    """One operation was given tensors of two devices."""


class NotOnTheCPU(Refused, TypeError):
    """NumPy was to read a tensor of a GPU."""


class Unsupported(Exception):
    """What the fake GPU cannot do; a real GPU may."""


class _Fake(Tensor):
    """A tensor on the fake GPU; `inner` holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_Fake":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=_BELOW
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return repr(self.inner).removesuffix(")") + f", device='{DEVICE}')"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is _aten._local_scalar_dense.default:  # .item()
            return func(args[0].inner)
        _refuse_two_devices(func, args, kwargs)
        target = kwargs.pop("device", None)
        out = func(*_inside(args), **_inside(kwargs), **({} if target is None else {"device": "cpu"}))
        if target is not None and torch.device(target) != _BELOW:  # a copy to the CPU
            return out
        if func is _aten.copy_.default and not isinstance(args[0], _Fake):
            return args[0]
        if not _gives_an_input_back(func):
            return _wrapped(out)
        with torch.inference_mode(False):  # of views, torch would refuse to count the versions there
            return return_and_correct_aliasing(func, args, kwargs, _wrapped(out))


class _Put(torch.autograd.Function):
    """A move to the fake GPU through which gradients come back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _Fake(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.inner


class _Fetch(torch.autograd.Function):
    """A move to the CPU through which gradients come back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Fake(gradient)


class _Calls(TorchFunctionMode):
    """Catches, on their way into torch, the calls that name a device."""

    def __init__(self, factories: "_Factories") -> None:
        super().__init__()
        self._factories = factories

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        there = isinstance(x, _Fake)
        made_there = name != "to" and _is(kwargs.get("device"), "cuda")  # even if it is made like one on "meta"
        if _is(kwargs.get("device"), "meta") or (isinstance(x, Tensor) and x.is_meta and not there and not made_there):
            with self._factories.asleep():  # the real "meta": a subject may use it too
                return func(*args, **kwargs)
        _refuse_generator(there or _is(kwargs.get("device"), "cuda"), kwargs.get("generator"))
        if there and func in _ATTRIBUTES:
            return _ATTRIBUTES[func]
        if there and func == Tensor.data.__set__:
            func(*args, **kwargs)
            x.inner = args[1].inner
            return None
        if there and name == "numpy" and kwargs.get("force"):
            return x.inner.detach().clone().numpy(force=True)
        if there and name in ("numpy", "__array__", "__dlpack__"):
            raise NotOnTheCPU(
                f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy it to host memory."
            )
        if there and name == "tolist":
            return x.inner.tolist()
        if there and name == "__format__":
            return format(x.inner, *args[1:])
        if there and name == "new_tensor":
            return put(x.inner.new_tensor(*args[1:], **{key: value for key, value in kwargs.items() if key != "device"}))
        if there and name in ("__getitem__", "__setitem__"):
            args = (x, _index(args[1]), *args[2:])
        if name == "cuda" and isinstance(x, Tensor):
            return put(x)
        if name == "cpu" and there:
            return _Fetch.apply(x)
        if name == "to" and isinstance(x, Tensor):
            return _to(func, x, args[1:], kwargs)
        if _is(kwargs.get("device"), "cuda"):
            if any(isinstance(leaf, _Fake) for leaf in _tensors((args, kwargs))):  # zeros_like(x, device=...)
                return func(*args, **kwargs | {"device": None})
            requires_grad = kwargs.pop("requires_grad", False)
            return put(func(*args, **kwargs | {"device": "cpu"})).requires_grad_(requires_grad)
        return func(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Catches the tensors that torch's own C++ makes, for which there is no call to catch.

    What it makes like such a tensor, as for `x[0] = 1.0` or in `one_hot`, would be on "meta", where there are no numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._awake = True

    @contextmanager
    def asleep(self) -> Iterator[None]:
        before, self._awake = self._awake, False
        try:
            yield
        finally:
            self._awake = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self._awake and _is(kwargs.get("device"), "meta") and all(x.device.type == "cpu" for x in _tensors((args, kwargs))):
            return _wrapped(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


_ATTRIBUTES = {
    Tensor.device.__get__: DEVICE,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.is_meta.__get__: False,
    Tensor.get_device: DEVICE.index,
}


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside the `with`, "cuda" can be named wherever a device can, and who asks torch for a GPU is told that there is one.

    torch's own modules are not told that there is a GPU: they would call its driver.
    """
    factories = _Factories()
    with ExitStack() as stack:
        for module, name, answer in _ASKED:
            stack.enter_context(mock.patch.object(module, name, _answering(getattr(module, name), answer)))
        for name in ("trace", "script", "load"):
            stack.enter_context(mock.patch.object(torch.jit, name, _unsupported))
        stack.enter_context(factories)
        stack.enter_context(_Calls(factories))
        yield


def put(x: Tensor) -> Tensor:
    """A copy on the fake GPU; a parameter stays one, and gradients reach what `x` was computed from.

    What is not on the CPU stays where it is.
    """
    if isinstance(x, _Fake) or x.device.type != "cpu":
        return x
    if isinstance(x, nn.Parameter):
        return nn.Parameter(_Fake(x.detach().clone()), x.requires_grad)
    if x.requires_grad:
        return _Fake(x.detach().clone()).requires_grad_(True) if x.is_leaf else _Put.apply(x)
    return _Fake(x.clone())


def fetch(x: Tensor) -> Tensor:
    """What `x` holds, on the CPU, detached; a tensor of the CPU as it is."""
    return x.inner.detach() if isinstance(x, _Fake) else x


def _to(func, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """x.to(device, dtype, ...) in all its forms."""
    like = next((a for a in (*args, kwargs.get("other")) if isinstance(a, Tensor)), None)
    target = kwargs.get("device")
    if like is not None:
        target = DEVICE if isinstance(like, _Fake) else like.device
    else:
        target = next((a for a in args if isinstance(a, str | int | torch.device) and not isinstance(a, bool)), target)
    dtype = kwargs.get("dtype") if like is None else like.dtype
    dtype = dtype or next((a for a in args if isinstance(a, torch.dtype)), x.dtype)
    if target is None:
        return func(x, *args, **kwargs)
    if _is(target, "cuda"):
        return put(x).to(dtype)
    if isinstance(x, _Fake):
        x = _Fetch.apply(x)
    return func(x, target, dtype)


def _index(index: Any) -> Any:
    """An index with a tensor of the CPU for each list in it; what torch makes of a list would have no numbers."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, list | range):
        return torch.tensor(index) if len(index) else torch.tensor(index, dtype=torch.int64)
    return index


def _is(device: Any, kind: str) -> bool:
    """Whether a call's `device` is of that kind; a number is that of a GPU."""
    if device is None or isinstance(device, bool):
        return False
    return kind == "cuda" if isinstance(device, int) else torch.device(device).type == kind


def _refuse_generator(there: bool, generator: torch.Generator | None) -> None:
    if there and isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        raise TwoDevices("Expected a 'cuda' device type for generator but found 'cpu'")


def _refuse_two_devices(func, args: tuple, kwargs: dict) -> None:
    leaves = _tensors((args, kwargs))
    plain = [leaf for leaf in leaves if not isinstance(leaf, _Fake)]
    if any(leaf.device == _BELOW for leaf in plain):
        raise Unsupported(f"{func} got a tensor without numbers, which torch made by itself.")
    if not any(leaf.ndim for leaf in plain) or func in _COPIES or (func in _INDICES and isinstance(leaves[0], _Fake)):
        return
    raise TwoDevices(f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu!")


def _inside(tree: Any) -> Any:
    """Arguments with what the tensors of the fake GPU hold in place of them."""
    return _mapped(tree, lambda x: x.inner if isinstance(x, _Fake) else x)


def _wrapped(tree: Any) -> Any:
    return _mapped(tree, _Fake)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments or results of an operation: tensors, in lists, tuples and dicts. torch's own pytree takes ten times as long."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(item, change) for item in tree])
    if isinstance(tree, dict):
        return {key: _mapped(item, change) for key, item in tree.items()}
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    _mapped(tree, lambda x: leaves.append(x) or x)
    return leaves


@cache
def _gives_an_input_back(func: Callable) -> bool:
    """Whether an operation returns an input, or a view of it."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _unsupported(*_: object, **__: object) -> None:
    raise Unsupported("TorchScript kills the process when it meets tensors of the fake GPU.")


# How code asks for a GPU, and the answer.
_ASKED = (
    (torch.cuda, "is_available", True),
    (torch.cuda, "device_count", 1),
    (torch.cuda, "current_device", DEVICE.index),
    (torch.accelerator, "is_available", True),
    (torch.accelerator, "current_accelerator", DEVICE),
)


def _answering(real: Callable, answer: Any) -> Callable:
    """The answer for everybody but torch itself, which gets the real one."""

    def asked(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return real(*args, **kwargs) if caller.partition(".")[0] == "torch" else answer

    return asked
