"""Whether the C library keeps the memory that a step frees for the next one."""

from __future__ import annotations

import ctypes
import sys

# glibc's names for what it gives back to the system, and from which size on it asks the system for each piece anew.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger pieces, such as a chunk of logits, are given back: kept, they would leave holes that nothing else fits into.
_MOST_KEPT, _LARGEST_KEPT = 512 << 20, 32 << 20
# The largest that glibc raises both to by itself, as soon as a process has freed a piece of that size.
_MOST_KEPT_BY_DEFAULT, _LARGEST_KEPT_BY_DEFAULT = 64 << 20, 32 << 20
# What both are at first.
_SMALLEST_PIECE = 128 << 10


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for reuse, until `return_freed_memory`; whether it could be told to.

    A training step frees and asks for the same large buffers over and over. By default glibc returns them to the
    system, which hands them out again page by page, cleared: measured at 8 % of a step.
    """
    libc = _glibc()
    if libc is None:
        return False
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
    return bool(kept)


def return_at_once() -> None:
    """Give back what is free, and from now on each piece when it is freed, until one of the others is called.

    For many pieces that each are needed for a moment, beside ever more that stay: what is kept would leave holes.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_PIECE)
        libc.mallopt(_M_TRIM_THRESHOLD, _SMALLEST_PIECE)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`: what is free goes back to the system, now and from now on.

    glibc raises neither threshold any more once one of them was set, so both are set to what it would raise them to:
    else pieces from 128 KiB on might be asked of the system, and cleared by it, each time anew.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BY_DEFAULT)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT_BY_DEFAULT)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
