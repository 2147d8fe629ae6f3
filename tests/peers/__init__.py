"""Ours beside other libraries'.

Where a peer falls short, the test of ours and the same assertion on the peer stand together, the latter as a strict
xfail with the version that was run: if a newer one does better, the test says so.
"""

import importlib
import warnings

import pytest


def load(name: str):
    """A module of a peer; where the peer is not installed, the test is skipped.

    What a peer does at import that others deprecate is its own affair: fastai and fvcore call `torch.jit.script`, and
    fastai sets an option of pandas that has no effect any more.
    """
    pytest.importorskip(name.partition(".")[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
        warnings.filterwarnings("ignore", message="The 'mode.chained_assignment' option is deprecated")
        return importlib.import_module(name)


def falls_short(peer, reason: str, raises: type[BaseException] = AssertionError):
    """A case of `parametrize`: `peer` fails the assertion that ours passes, by `raises`."""
    return pytest.param(peer, marks=pytest.mark.xfail(strict=True, raises=raises, reason=reason))
