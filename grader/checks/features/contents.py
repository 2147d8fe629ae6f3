"""What a cache has to know about: backbones, images and settings, and changes of them that no cache may miss.

A change is (what it is, in words, and the inputs after it). Some change the backbone in place and put it back afterwards,
so look at one before the next is made.
"""

import builtins
import hashlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grader.experiment import Subject, Trial

Changes = Iterator[tuple[str, dict]]


def task(trial: Trial) -> dict:
    """A backbone, images of more than 1000 pixels whose sums are exact in any order, and one setting."""
    return {
        "backbone": network(trial, width=trial.integer(4, 7)),
        "images": torch.randint(0, 256, (20, 1, 8, 8), generator=trial.generator) / 256,
        "settings": {"mean": trial.integer(3, 7) / 16},
    }


def network(trial: Trial, width: int) -> nn.Sequential:
    """A small network in eval mode, partly frozen, for images of any size.

    All its numbers are odd sixteenths: printed with four digits, each is exact.
    """
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width)).eval()
    with torch.no_grad():
        for tensor in _changeable(backbone):
            tensor.copy_(2 * torch.randint(-4, 4, tensor.shape, generator=trial.generator) + 1).div_(16)
        backbone[-1].running_var.abs_()
    backbone[2].requires_grad_(False)
    return backbone


def features(backbone: nn.Module, images: Tensor, settings: dict) -> Tensor:
    with torch.no_grad():
        return backbone((images - settings.get("mean", 0.0)) / settings.get("std", 1.0))


def _changeable(backbone: nn.Sequential) -> list[Tensor]:
    """All that features depend on: the parameters, and two of the three buffers."""
    return [*backbone.parameters(), backbone[-1].running_mean, backbone[-1].running_var]


def other_weights(inputs: dict) -> Changes:
    for tensor in _changeable(inputs["backbone"]):
        before = tensor.detach().clone()
        middle = tensor.numel() // 2
        tensor.detach().view(-1)[middle] += 1e-5  # a small step of an optimizer
        yield f"one number of a {'parameter' if isinstance(tensor, nn.Parameter) else 'buffer'} changed", inputs
        tensor.detach().copy_(before)


def exchanged_weights(inputs: dict) -> Changes:
    """What keeps every sum of numbers, and then every set of tensors."""
    linear, norm = inputs["backbone"][2:]
    numbers = linear.weight.detach().view(-1)
    before, ends = numbers.clone(), torch.stack([numbers.argmin(), numbers.argmax()])
    numbers[ends] = before[ends.flip(0)]
    yield "two numbers of a parameter exchanged", inputs
    numbers.copy_(before)
    norm.bias.detach().copy_(linear.bias.detach() + 1 / 32)
    yield "another parameter", inputs
    first, second = (bias.detach().clone() for bias in (linear.bias, norm.bias))
    linear.bias.detach().copy_(second)
    norm.bias.detach().copy_(first)
    yield "the numbers of two parameters exchanged", inputs


def other_images(inputs: dict) -> Changes:
    last = len(inputs["images"]) - 1
    for where, image, pixel in (
        ("at the edge", 0, 0),
        ("at the edge", last, 7),
        ("in the middle", 0, 3),
        ("in the middle", last // 2, 4),
    ):
        images = inputs["images"].clone()
        images[image, 0, pixel, pixel] += 1 / 256
        yield f"one pixel {where} of an image changed", inputs | {"images": images}
    yield "the same images in another order", inputs | {"images": inputs["images"].roll(7, dims=0)}


def exchanged_images(inputs: dict) -> Changes:
    images = inputs["images"].clone()
    images[7:9] = images[7:9].flip(0)
    yield "two images in the middle exchanged", inputs | {"images": images}
    yield "each image turned round", inputs | {"images": inputs["images"].flip(-1)}


def other_settings(inputs: dict) -> Changes:
    value = inputs["settings"]["mean"]
    yield "one value changed", inputs | {"settings": {"mean": value + 1 / 64}}
    yield "the same value under another name", inputs | {"settings": {"std": value}}


def exchanged_settings(inputs: dict) -> Changes:
    value = inputs["settings"]["mean"]
    yield "one more setting", inputs | {"settings": {"mean": value, "std": value + 1 / 2}}
    yield "the values of two settings exchanged", inputs | {"settings": {"mean": value + 1 / 2, "std": value}}


def close_settings(inputs: dict) -> Changes:
    for mean in (0.1307, 0.1309, 0.13070001, math.nextafter(0.1307, 1)):
        yield "a value that differs in its last digits", inputs | {"settings": {"mean": mean}}


def other_shapes(inputs: dict) -> Changes:
    black = inputs["images"].new_zeros(20, 1, 8, 8)
    yield "black images", inputs | {"images": black}
    yield "black images, four times as many of a quarter of the size", inputs | {"images": black.view(80, 1, 4, 4).clone()}


@contextmanager
def next_kernel(subject: Subject) -> Iterator[None]:
    """Give the subject's `hash` other numbers for texts and bytes, as Python's own has in every new process."""
    subject = subject.func if isinstance(subject, partial) else subject
    call = subject if inspect.isroutine(subject) else type(subject).__call__
    names = getattr(inspect.unwrap(call), "__globals__", {})
    if "hash" in names:
        yield
        return
    names["hash"] = lambda thing: builtins.hash(thing) ^ _holds_text(thing)
    try:
        yield
    finally:
        names.pop("hash", None)


def _holds_text(thing: object) -> bool:
    return isinstance(thing, str | bytes) or (isinstance(thing, tuple | frozenset) and any(map(_holds_text, thing)))


# What solutions, right and wrong, make a key of.


def contents(*tensors: Tensor) -> list:
    """Forms and numbers."""
    return [(str(tensor.dtype), tuple(tensor.shape), tensor.detach().numpy().tobytes()) for tensor in tensors]


def state(backbone: nn.Module) -> list:
    """All that a backbone computes with, buffers that its state dict leaves out included."""
    return contents(*backbone.parameters(), *backbone.buffers())


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
