"""Standard output for the result, standard error for everything else, and the log."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from phlora.display import Display


def make_display(quiet: bool) -> Display:
    """What a command shows while it works; without even downloads when quiet."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return Display(quiet=quiet)


def terminal_width() -> int | None:
    """Columns of the terminal that results go to; None for a file or a pipe, which takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_result(result: str | Mapping[str, Any]) -> None:
    """Text or one JSON document on standard output."""
    text = (
        result if isinstance(result, str) else json.dumps(result, indent=2, ensure_ascii=False, default=str)
    )
    sys.stdout.write(text + "\n")


@contextlib.contextmanager
def standard_output_kept() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is for the result."""
    adopt_loggers()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def forbid_network() -> None:
    """Keep the libraries from asking a hub; before they are imported."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def is_debugging() -> bool:
    """Whether tracebacks and the logs of all libraries are wanted."""
    return os.environ.get("PHLORA_DEBUG", "") not in ("", "0")


class _RecentRecords(logging.Handler):
    """The last log records, kept for the report of a bug."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=200)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


recent_records = _RecentRecords()


def start_log() -> None:
    """Set up Python's logging, once: errors on the screen, warnings kept; all of it shown when debugging."""
    root = logging.getLogger()
    if recent_records in root.handlers:
        return
    screen = logging.StreamHandler()
    screen.setLevel(logging.INFO if is_debugging() else logging.ERROR)
    screen.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root.addHandler(recent_records)
    root.addHandler(screen)
    root.setLevel(logging.INFO if is_debugging() else logging.WARNING)
    logging.captureWarnings(True)
    if not is_debugging():
        # Read when the libraries are imported; their progress bars would disturb the display's own.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def adopt_loggers() -> None:
    """Let the libraries that log to the screen by themselves log to the root instead; after their import."""
    for name in ("transformers", "datasets", "huggingface_hub"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def use_utf8() -> None:
    """UTF-8 on every system; what is no text, such as the bytes of a strange file name, is escaped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                encoding="utf-8", errors="strict" if stream is sys.stdin else "backslashreplace"
            )
