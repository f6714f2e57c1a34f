"""Seconds and bytes: how long the parts of a run take, the memory that the process holds, and what is free.

Free is by everyone's count: the machine's, the containers', the process's own limits', the GPU's.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# What older kernels write for no limit: the largest number of pages.
_NO_LIMIT = 1 << 60
# What running out of memory is raised as; torch's own error is a RuntimeError.
MEMORY_ERRORS = (MemoryError, RuntimeError)


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str, *, also: float = 0.0) -> None:
        """Book the time since the last lap under a name, and what it took of other processes before this one."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last + also, 2)
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
        found = _kilobytes(_PROC / "self" / "status", "VmHWM")
        if found is not None:
            return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: torch.device | None = None) -> int:
    """The memory that this process may still take of a device, or of the machine."""
    free = host_memory() if device is None else free_memory(device)
    assert free.num_bytes is not None
    return free.num_bytes


@dataclass(frozen=True)
class FreeMemory:
    """What can be allocated in one place before something gives.

    Attributes:
        num_bytes: None where it cannot be told.
        limit: what sets it: the machine, a container's limit, a limit of the process, a GPU.
    """

    num_bytes: int | None
    limit: str

    def plus(self, num_bytes: int) -> FreeMemory:
        """The same before so much of it was taken."""
        return self if self.num_bytes is None else FreeMemory(self.num_bytes + num_bytes, self.limit)


def free_memory(device: torch.device) -> FreeMemory:
    """What a run on this device can still take there, besides what this process holds already."""
    if device.type == "cuda":
        # What torch keeps for later is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FreeMemory(torch.cuda.mem_get_info(device)[0] + kept, torch.cuda.get_device_name(device))
    return host_memory()


def host_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> FreeMemory:
    """The least of what the machine, the containers around this process and its own limits leave.

    On Linux `MemAvailable`, which counts caches that can be dropped, the limits of cgroups (versions 1 and 2, the
    process's own group and those around it), and the limit of the address space; elsewhere what psutil says.
    """
    found = [FreeMemory(number, name) for name, number in _limits(proc, cgroup) if number is not None]
    if not found:
        import psutil

        return FreeMemory(int(psutil.virtual_memory().available), "this machine")
    least = min(found, key=lambda each: each.num_bytes or 0)
    return FreeMemory(max(0, least.num_bytes or 0), least.limit)


def resident_bytes(proc: Path = _PROC) -> int:
    """What this process holds of the machine's memory now; 0 where it cannot be told."""
    return _kilobytes(proc / "self" / "status", "VmRSS") or 0


def _limits(proc: Path, cgroup: Path) -> list[tuple[str, int | None]]:
    return [
        ("this machine", _kilobytes(proc / "meminfo", "MemAvailable")),
        ("the container's limit", _left_in_cgroups(proc, cgroup)),
        ("the limit of the address space (ulimit -v)", _left_of_address_space(proc)),
    ]


def _left_in_cgroups(proc: Path, cgroup: Path) -> int | None:
    """The least that any group around this process has left; what files cache in it can be dropped."""
    left: list[int] = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            top, names = cgroup, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = cgroup / "memory"
        else:
            continue
        here = top / path.strip("/")
        # In a container the path is that of the host, and the group is mounted at the top.
        for folder in {here, *(p for p in here.parents if p.is_relative_to(top)), top}:
            most, used = (_number(folder / name) for name in names[:2])
            if most is not None and used is not None and most < _NO_LIMIT:
                stat = re.search(rf"^{names[2]} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                left.append(most - used + (int(stat[1]) if stat else 0))
    return min(left, default=None)


def _left_of_address_space(proc: Path) -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    held = _kilobytes(proc / "self" / "status", "VmSize")
    return most - held if held is not None else None


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes that a line such as `VmRSS:  12 kB` gives."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
