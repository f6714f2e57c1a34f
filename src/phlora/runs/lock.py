"""A lock on a run folder, so that two processes never train into one.

The lock is the operating system's, on a file in the folder: it ends with the process that holds it, however that ends,
so no stale lock ever stands in the way. POSIX record locks also hold between the machines of a network file system,
and a forked data worker does not inherit them. Where a file system has no locks at all, the file's own words decide:
it names its process, and a process of this machine that is gone holds nothing.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phlora.errors import RunError

LOCK_FILE = ".lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Windows locks bytes that others then cannot read; this one is never read.
_LOCKED_BYTE = 1 << 30
# A process may take a record lock of its own twice, so those of this process are listed.
_held: set[str] = set()


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which has to exist.

    Raises:
        RunError: another process holds it, or this one does already.
        OSError: the folder cannot be written.
    """
    file = folder / LOCK_FILE
    key = os.path.realpath(file)
    if key in _held:
        raise _busy(file)
    descriptor = _acquire(file)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        _release(descriptor, file)


def require_unlocked(folder: Path) -> None:
    """Refuse a folder that a process trains into now; nothing is written.

    Raises:
        RunError: its lock is held.
    """
    file = folder / LOCK_FILE
    if os.path.realpath(file) in _held:
        raise _busy(file)
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        # There is none, or it is not ours to lock, and then training will say so.
        return
    try:
        _lock(descriptor, file)
        _unlock(descriptor)
    finally:
        os.close(descriptor)


def _acquire(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, file)
            # Whoever held it may have removed it between the two calls; a lock on a removed file is none.
            if _is_same(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time())}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())
    return descriptor


def _release(descriptor: int, file: Path) -> None:
    # Windows removes no file that is open; elsewhere removing it first leaves no moment for another to take it.
    with suppress(OSError):
        file.unlink()
    with suppress(OSError):
        os.close(descriptor)
    if sys.platform == "win32":
        with suppress(OSError):
            file.unlink()


def _lock(descriptor: int, file: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            if _names_a_living_process(file):
                raise _busy(file) from None
        elif error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise _busy(file) from None
        else:
            raise


def _unlock(descriptor: int) -> None:
    with suppress(OSError):
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_UN)


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> dict[str, Any]:
    """What a lock file says about its process; empty where it says nothing that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names_a_living_process(file: Path) -> bool:
    holder = _holder(file)
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        # It cannot be asked from here; the message says which file to remove.
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _busy(file: Path) -> RunError:
    holder = _holder(file)
    by = f" (process {holder['pid']} on {holder.get('host')})" if "pid" in holder else ""
    return RunError(
        f"Another process trains into this folder{by}",
        where=str(file.parent),
        fix="wait for it or stop it, or name another --output; if it is gone for certain, "
        f"remove {file.name} in the folder",
    )
