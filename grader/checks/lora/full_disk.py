"""A disk that is full half-way through a file, for the exercise on saving."""

import builtins
import errno
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import safetensors
from safetensors import SafetensorError

MESSAGE = "No space left on device"


@contextmanager
def full_disk() -> Iterator[list[str]]:
    """Whatever this thread writes into binary files ends half-way; yields a list that gets the names of those files."""
    thread, files = threading.get_ident(), []
    original_open, original_serialize_file = builtins.open, safetensors.serialize_file

    class HalfFile(io.FileIO):
        def write(self, data):
            files.append(str(self.name))
            super().write(memoryview(data).cast("B")[: len(data) // 2])
            raise OSError(errno.ENOSPC, MESSAGE)

    def open_file(file, mode="r", *args, opener=None, **settings):
        if threading.get_ident() == thread and "b" in mode and set(mode) & set("wxa+"):
            return HalfFile(file, mode, opener=opener)
        return original_open(file, mode, *args, opener=opener, **settings)

    def serialize_file(tensors, filename, *args, **settings):
        files.append(str(filename))
        original_serialize_file(tensors, filename, *args, **settings)
        os.truncate(filename, Path(filename).stat().st_size // 2)
        raise SafetensorError(f"Error while serializing: I/O error: {MESSAGE}")

    with ExitStack() as patches:
        for module in ("safetensors.torch", "safetensors.numpy"):
            if module in sys.modules:
                patches.enter_context(patch.object(sys.modules[module], "serialize_file", serialize_file))
        for module in ("builtins", "io", "_io"):
            patches.enter_context(patch.object(sys.modules[module], "open", open_file))
        yield files
