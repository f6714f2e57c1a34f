"""The least of what the machine, containers and the process leave is what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora.measure import FreeMemory, available_bytes, free_memory, host_memory, resident_bytes

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


def test_free_memory_is_that_of_the_container(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "proc" / "self" / "cgroup"
    inner = root / "box" / "job"
    inner.mkdir(parents=True)
    own.parent.mkdir(parents=True)
    for group, limit, used in ((root / "box", "1000000", "400000"), (inner, "max", "300000")):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(used + "\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    own.write_text("0::/box/job\n")
    assert host_memory(tmp_path / "proc", root) == FreeMemory(650000, "the container's limit")
    assert host_memory(tmp_path / "none", root).limit == "this machine"
    assert available_bytes() > 0


def test_free_memory_under_the_first_version_of_control_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "proc" / "self" / "cgroup"
    group = root / "memory"
    group.mkdir(parents=True)
    own.parent.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("1200\n")
    (group / "memory.stat").write_text("total_inactive_file 100\n")
    own.write_text("5:cpu:/x\n4:memory:/docker/abc\n")
    assert host_memory(tmp_path / "proc", root) == FreeMemory(0, "the container's limit")


def test_what_is_planned_with_and_what_is_loaded_with_is_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import torch

    held = 1 << 40
    monkeypatch.setattr(resource, "getrlimit", lambda _: (held, held))
    monkeypatch.setattr(
        "phlora.measure._kilobytes", lambda _, name: held - GIB if name == "VmSize" else 9 * GIB
    )
    assert available_bytes(torch.device("cpu")) == host_memory().num_bytes <= GIB
    for name, number in (("memory_reserved", 7), ("memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 20))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    gpu = torch.device("cuda")
    assert free_memory(gpu) == FreeMemory(13, "a GPU") and available_bytes(gpu) == 13
