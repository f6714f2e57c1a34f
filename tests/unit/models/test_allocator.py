"""The C library's own account of which pieces it asks the system for, each time in a new process."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from phlora.models import allocator

SIZES = (1, 8, 31, 40)
PROGRAM = """
import ctypes, json, sys
from phlora.models import allocator

class Account(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "a b c mapped e f g h i j".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Account
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def is_asked_of_the_system(size):
    before = libc.mallinfo2().mapped
    piece = libc.malloc(size << 20)
    after = libc.mallinfo2().mapped
    libc.free(piece)
    return after > before

for name in sys.argv[2:]:
    getattr(allocator, name)()
print(json.dumps([is_asked_of_the_system(size) for size in json.loads(sys.argv[1])]))
"""
needs_account = pytest.mark.skipif(
    allocator._glibc() is None or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="glibc's allocator, from 2.33 on",
)


def asked_of_the_system(*calls: str) -> list[bool]:
    """For pieces of `SIZES` MiB, after these calls."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(SIZES), *calls]
    found: list[bool] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@needs_account
@pytest.mark.parametrize(
    "calls",
    [
        ("keep_freed_memory",),
        ("return_freed_memory",),
        ("keep_freed_memory", "return_freed_memory"),
        ("return_freed_memory", "keep_freed_memory", "return_freed_memory", "return_freed_memory"),
        ("return_at_once", "return_freed_memory"),
    ],
    ids=" ".join,
)
def test_only_large_pieces_are_asked_of_the_system_each_time_whatever_was_called_before(calls):
    """What glibc comes to by itself, but not once it was told anything."""
    assert asked_of_the_system(*calls) == [False, False, False, True]


@needs_account
def test_every_piece_is_asked_of_the_system_while_pieces_are_returned_at_once():
    assert asked_of_the_system("keep_freed_memory", "return_at_once") == [True] * 4
