"""How much memory there is to be had, by everyone's count: the machine's, the container's, the process's, the GPU's."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# What older kernels write for no limit: the largest number of pages.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class FreeMemory:
    """What can be allocated in one place before something gives.

    Attributes:
        num_bytes: None where it cannot be told.
        limit: what sets it: the machine, a container's limit, a limit of the process, a GPU.
    """

    num_bytes: int | None
    limit: str


def free_memory(device: torch.device) -> FreeMemory:
    """What a run on this device can still take there, besides what this process holds already."""
    if device.type == "cuda":
        return FreeMemory(torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device))
    return host_memory()


def host_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> FreeMemory:
    """The least of what the machine, the containers around this process and its own limits leave.

    On Linux `MemAvailable`, which counts caches that can be dropped, the limits of cgroups (versions 1 and 2, the
    process's own group and those around it), and the limit of the address space; elsewhere what psutil says, where it
    is installed.
    """
    found = [FreeMemory(number, name) for name, number in _limits(proc, cgroup) if number is not None]
    if not found:
        return FreeMemory(_by_psutil(), "this machine")
    least = min(found, key=lambda each: each.num_bytes or 0)
    return FreeMemory(max(0, least.num_bytes or 0), least.limit)


def resident_bytes(proc: Path = _PROC) -> int:
    """What this process holds of the machine's memory now; 0 where it cannot be told."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", _read(proc / "self" / "status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _limits(proc: Path, cgroup: Path) -> list[tuple[str, int | None]]:
    return [
        ("this machine", _available(proc)),
        ("the container's limit", _left_in_cgroups(proc, cgroup)),
        ("the limit of the address space (ulimit -v)", _left_of_address_space(proc)),
    ]


def _available(proc: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


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
    found = re.search(r"^VmSize:\s+(\d+) kB", _read(proc / "self" / "status"), re.MULTILINE)
    return most - int(found[1]) * 1024 if found else None


def _by_psutil() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
