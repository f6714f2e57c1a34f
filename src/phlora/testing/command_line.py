"""Commands run in the process of a test, which is left as it was."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from phlora.cli import main
from phlora.cli.console import recent_records

# Their loggers are taken over by a command.
_LIBRARIES = ("transformers", "datasets", "huggingface_hub")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output read as one JSON document."""
        return json.loads(self.out)


def invoke(*arguments: object, stdin: str | bytes = "") -> Outcome:
    """Run `phlora ARGUMENTS...` for real, without a process of its own.

    Environment, logging and standard streams are afterwards as they were before. Neither the current folder nor
    `PHLORA_CACHE` is changed for it: set them where the files of a command matter.

    Args:
        arguments: words of the command line; paths and numbers are turned into text.
        stdin: what stands on standard input, which is no terminal.

    >>> invoke("train", "--model", "./none", "--data", "d.jsonl").code
    2
    """
    out, err = _stream(), _stream()
    with _process_kept(), mock.patch.multiple(sys, stdin=_stream(stdin), stdout=out, stderr=err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, _text(out), _text(err))


def _stream(content: str | bytes = "") -> io.TextIOWrapper:
    raw = content.encode() if isinstance(content, str) else content
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline="")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Commands set environment variables and Python's logging, as a process of their own may."""
    names = ("", *_LIBRARIES)
    loggers = {logging.getLogger(name) for name in names}
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    shows = warnings.showwarning
    captured = shows is getattr(logging, "_showwarning", None)
    # Asked for twice it does nothing, though pytest may have put its own `showwarning` there in between.
    logging.captureWarnings(False)
    if not captured:
        warnings.showwarning = shows
    shows = warnings.showwarning
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = shows
        logging.captureWarnings(captured)
        for logger, handlers, level, propagate in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        recent_records.lines.clear()
