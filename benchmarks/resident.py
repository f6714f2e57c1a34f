"""Memory of this process, as the system counts it. Nothing of Phlora is imported: peers in another Python use it."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """What the process holds in memory now; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that the process has held since `forget_peak`: the GPU's where one is used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak_of("self")


def peak_of(process: int | str) -> int:
    """The most resident memory that a process has held; 0 where the system does not say, or the process has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def forget_peak(*, trim: bool) -> int:
    """Begin a new peak; returns the bytes that are held now.

    Args:
        trim: give free memory back first. Training keeps it from one step to the next, so timed steps need it warm.
    """
    gc.collect()
    if torch.cuda.is_available():
        if trim:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return 0
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes()


def end_first_when_memory_is_short(process: int | str = "self") -> None:
    """Where the machine runs out of memory the system ends this process before any other one."""
    if sys.platform == "linux":
        Path(f"/proc/{process}/oom_score_adj").write_text("1000", encoding="ascii")
