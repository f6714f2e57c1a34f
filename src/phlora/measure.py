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


def available_bytes(device: torch.device | None = None) -> int:
    """The memory that this process may still take without swapping: of a GPU, or the machine's within its limits."""
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the limits of the control groups around this process leave to it, as in a container; Linux only."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, limit_name, used_name = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (root, "memory.max", "memory.current")
        )
        # In a container the path is that of the host, and its own group is the root.
        groups = [base, *(base.joinpath(*Path(path).parts[1:depth]) for depth in range(2, 32))]
        for group in dict.fromkeys(groups):
            left += _left_in(group, limit_name, used_name)
    return left


def _left_in(group: Path, limit_name: str, used_name: str) -> list[int]:
    try:
        limit, used = int((group / limit_name).read_text()), int((group / used_name).read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    # Pages of files count as used and are given up when they are needed.
    cached = int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    return [max(0, limit - used + cached)]
