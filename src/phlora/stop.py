"""The signals that ask a program to end: an interruption like Ctrl-C, wherever they arrive."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# A closed terminal or lost connection sends SIGHUP; Windows has none.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_asked = False


def is_ignored(number: int) -> bool:
    """Whether whoever started the program had it ignore a signal, as `nohup` does with SIGHUP."""
    return number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def interrupted_by_stop() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does everywhere."""
    global _asked
    _asked = False
    before: dict[int, Any] = {}
    # Python delivers signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGINT and not is_ignored(number):
                before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def was_asked() -> bool:
    """Whether such a signal has come: an import that it cut short may raise something else."""
    return _asked


def _interrupt(number: int, frame: Any) -> NoReturn:
    global _asked
    _asked = True
    raise KeyboardInterrupt
