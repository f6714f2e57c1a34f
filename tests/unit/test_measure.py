"""Seconds and bytes of a run."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from phlora.measure import Clock, peak_bytes


def test_a_lap_is_the_time_since_the_last_one() -> None:
    clock = Clock()
    time.sleep(0.03)
    clock.lap("first")
    clock.lap("second")
    assert 0.02 <= clock.seconds["first"] < 5 and clock.seconds["second"] < clock.seconds["first"]
    assert list(clock.seconds) == ["first", "second"]


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_the_peak_covers_what_was_held_and_given_back() -> None:
    code = (
        "from phlora.measure import peak_bytes\n"
        "before = peak_bytes(); held = bytearray(b'x' * 300_000_000); del held\n"
        "print(peak_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 250e6 < int(done.stdout) < 700e6


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes on Linux only")
def test_the_peak_agrees_with_the_system() -> None:
    # The system's own count may hold the process that started this one, so it is no smaller.
    assert peak_bytes() <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 1.05


def test_the_peak_is_the_gpu_s_where_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    assert peak_bytes() == 12345


@pytest.mark.parametrize(("platform", "factor"), [("darwin", 1), ("freebsd", 1024)])
def test_the_unit_of_the_peak_is_the_system_s(
    monkeypatch: pytest.MonkeyPatch, platform: str, factor: int
) -> None:
    usage = SimpleNamespace(ru_maxrss=777)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_bytes() == 777 * factor
