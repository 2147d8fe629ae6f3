"""Peak memory of a piece of work, counted to the byte.

    peak of a training step = held_bytes(what is there before it) + peak_bytes(the step)

The resident set of a process will not do: it is counted in pages, holds what was freed and not yet given back, and
keeps the maximum of everything before. What is counted is what torch's own allocator is asked for and given back.

- On the CPU, torch.profiler records every one of these events, those of temporary tensors inside an operator included.
  The peak is the highest sum on the way. What MKL or oneDNN allocate by themselves is not in it.
- On a GPU, the caching allocator keeps the peak itself. It counts in blocks of 512 bytes.

Source: PyTorch's documentation of torch.profiler and of torch.cuda.max_memory_allocated.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler says on stderr when it starts and stops


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that `work` holds at any time, in bytes, beyond what was there when it began.

    Tensors from before that `work` frees are not taken off: let it begin and end with the same ones.

    Args:
        work: called once. Call it before, so that what the first call alone allocates, an optimizer's state or a
            library's work space, is there.
        device: whose memory, "cpu" or "cuda".
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    highest = current = 0
    for change in _changes(profiler):
        current += change
        highest = max(highest, current)
    return highest


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`; one that several of them share counts once."""
    storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def _changes(profiler: profile) -> list[int]:
    """Bytes allocated (above 0) and freed (below 0) on the CPU, in the order in which it happened."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))  # the only documented way to the single events
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
