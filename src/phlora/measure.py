"""Seconds and bytes: how long the parts of a run take, and the most memory that the process has held."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine; torch's error for the CPU is a plain `RuntimeError`.

    The out-of-memory killer of Linux raises none.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    # Not that of cuDNN, which is about a layout.
    return should_reduce_batch_size(error) and "CUDNN_STATUS" not in str(error)


def peak_bytes() -> int:
    """The most memory this process has held: the GPU's where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # ru_maxrss would carry over from the process that started this one.
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
