"""The least of what the machine, containers and the process leave is what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora.forecast.machine import host_memory, resident_bytes

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", f"MemTotal: 1 kB\nMemAvailable:   {16 * GIB // 1024} kB\n")
    write(proc / "self" / "status", f"VmRSS:\t  {GIB // 1024} kB\nVmSize:\t 1 kB\n")
    return proc, cgroup


def test_without_limits_it_is_what_the_machine_has(system: tuple[Path, Path]) -> None:
    free = host_memory(*system)
    assert (free.num_bytes, free.limit) == (16 * GIB, "this machine")
    assert resident_bytes(system[0]) == GIB


@pytest.mark.parametrize("where", ["jobs/mine", "jobs", ""])
def test_a_limit_of_any_group_around_the_process_counts(system: tuple[Path, Path], where: str) -> None:
    proc, cgroup = system
    write(proc / "self" / "cgroup", "0::/jobs/mine\n")
    write(cgroup / "jobs" / "mine" / "memory.max", "max\n")
    write(cgroup / where / "memory.max", f"{4 * GIB}\n")
    write(cgroup / where / "memory.current", f"{3 * GIB}\n")
    write(cgroup / where / "memory.stat", f"anon 5\ninactive_file {GIB}\n")
    free = host_memory(proc, cgroup)
    assert (free.num_bytes, free.limit) == (2 * GIB, "the container's limit")


def test_the_first_version_of_cgroups_counts_too(system: tuple[Path, Path]) -> None:
    proc, cgroup = system
    write(proc / "self" / "cgroup", "7:cpu:/\n5:memory,blkio:/docker/abc\n")
    # Inside the container its group is mounted at the top.
    write(cgroup / "memory" / "memory.limit_in_bytes", f"{2 * GIB}\n")
    write(cgroup / "memory" / "memory.usage_in_bytes", f"{GIB}\n")
    assert host_memory(proc, cgroup).num_bytes == GIB
    write(cgroup / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert host_memory(proc, cgroup).num_bytes == 16 * GIB


def test_a_group_over_its_limit_leaves_nothing(system: tuple[Path, Path]) -> None:
    proc, cgroup = system
    write(proc / "self" / "cgroup", "0::/\n")
    write(cgroup / "memory.max", f"{GIB}\n")
    write(cgroup / "memory.current", f"{2 * GIB}\n")
    assert host_memory(proc, cgroup).num_bytes == 0


def test_this_machine_says_something() -> None:
    assert (host_memory().num_bytes or 1) > 0
