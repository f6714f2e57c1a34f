"""The signals that ask a program to end: an interruption like Ctrl-C, wherever they arrive."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# A closed terminal or lost connection sends SIGHUP; Windows has none.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# The last of them that came; SIGINT leaves no trace here.
_asked: int | None = None
# Long enough for what swallowed an interruption to be over.
_SECONDS_TO_ANOTHER = 0.01


def is_ignored(number: int) -> bool:
    """Whether whoever started the program had it ignore a signal, as `nohup` does with SIGHUP."""
    return number != signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def interrupted_by_stop() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does everywhere, and none of them is lost."""
    global _asked
    _asked = None
    before: dict[int, Any] = {}
    # Python delivers signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number != signal.SIGINT and not is_ignored(number):
                before[number] = signal.signal(number, _interrupt)
    try:
        with _swallowed_ones_repeated():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _swallowed_ones_repeated() -> Iterator[None]:
    """Interrupt again where an interruption fell into a `__del__` or a callback of C code.

    Python drops what is raised there, prints a traceback, and the program would go on.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # Not at once: within this hook it would be dropped too.
        again = threading.Timer(_SECONDS_TO_ANOTHER, _signal_again)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _signal_again() -> None:
    number = _asked or signal.SIGINT
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        # On Windows; it does not wake a program that waits.
        _thread.interrupt_main(signal.Signals(number))


def was_asked() -> bool:
    """Whether such a signal has come: an import that it cut short may raise something else."""
    return _asked is not None


def _interrupt(number: int, frame: Any) -> NoReturn:
    global _asked
    _asked = number
    raise KeyboardInterrupt
