"""One buffer for matrices that are needed for the time of a product, freed when none has been needed for a while.

A fresh buffer for every product would cost more than filling it: the system clears each page of it first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Long against a step's pauses, short against a person's.
IDLE_SECONDS = 5.0


class _Workspace:
    """The buffers that nobody uses at the moment, one for each dtype; every thread may borrow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[torch.dtype, Tensor] = {}
        self._last_used = 0.0
        self._reaper: threading.Thread | None = None

    @contextmanager
    def borrowed(self, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
        with self._lock:
            buffer = self._idle.pop(dtype, None)
        if buffer is None or len(buffer) < count:
            buffer = None  # before the larger one comes
            # One that inference mode made could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = torch.empty(count, dtype=dtype)
        try:
            yield buffer[:count]
        finally:
            self._give_back(buffer)

    def held_bytes(self) -> int:
        with self._lock:
            return sum(buffer.nbytes for buffer in self._idle.values())

    def _give_back(self, buffer: Tensor) -> None:
        with self._lock:
            other = self._idle.get(buffer.dtype)
            if other is None or len(other) < len(buffer):
                self._idle[buffer.dtype] = buffer
            self._last_used = time.monotonic()
            # A thread does not live on in a forked process.
            if self._reaper is None or not self._reaper.is_alive():
                self._reaper = threading.Thread(target=self._free_when_idle, daemon=True)
                self._reaper.start()

    def _free_when_idle(self) -> None:
        while True:
            time.sleep(IDLE_SECONDS)
            with self._lock:
                if time.monotonic() - self._last_used >= IDLE_SECONDS:
                    self._idle.clear()
                    self._reaper = None
                    return


_workspace = _Workspace()


def _begin_anew() -> None:
    """In a forked process, whose parent may have held the lock."""
    global _workspace
    _workspace = _Workspace()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def borrowed(count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A flat tensor `(count,)` on the CPU with any values, for as long as the context lasts."""
    with _workspace.borrowed(count, dtype) as buffer:
        yield buffer


def held_bytes() -> int:
    """Bytes that are kept for the next product."""
    return _workspace.held_bytes()
