"""Run one command, and turn whatever comes of it into words and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.main import get_command

import phlora
from phlora.cli.console import is_debugging, print_result, recent_records, start_log, use_utf8
from phlora.cli.program import app
from phlora.display import printable
from phlora.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EnvironmentProblem,
    InputError,
    NoRoomError,
    PhloraError,
    masked,
)
from phlora.stop import was_asked

# sysexits.h: EX_SOFTWARE. 1 means a finding here, so a crash must not look like one.
EXIT_BUG = 70
# What the dynamic loader says of a library for which there is no memory; its errors have no number.
_LOADERS_WORDS = ("failed to map segment", "cannot allocate memory", "cannot create shared object descriptor")
_NO_THREAD = "can't start new thread"
# Newer versions of typer carry a copy of click; this is the UsageError of the copy in use.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; the only place that catches whatever was raised."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    use_utf8()
    start_log()
    as_json = "--json" in arguments
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        code = _report("Interrupted", f"Interrupted. {stop}".strip(), EXIT_INTERRUPTED, as_json=as_json)
    except BrokenPipeError:
        _let_go_of_stdout()
        code = EXIT_DONE
    except Exception as error:
        code = _report_error(error, arguments, as_json=as_json)
    sys.exit(code)


def _invoke(arguments: list[str]) -> int:
    """The command's exit code.

    `app()` would turn Ctrl-C and usage errors into exits of its own before `main` could see them.
    """
    command = get_command(app)
    try:
        with command.make_context("phlora", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return EXIT_DONE


def _report_error(error: Exception, arguments: Sequence[str], *, as_json: bool) -> int:
    if was_asked():
        # What a stop has cut short may raise anything.
        if is_debugging():
            traceback.print_exception(error)
        return _report("Interrupted", "Interrupted.", EXIT_INTERRUPTED, as_json=as_json)
    if isinstance(error, _UsageError):
        error.show()
        return _report("UsageError", error.format_message(), error.exit_code, as_json=as_json, spoken=True)
    known = error if isinstance(error, PhloraError) else _known_problem(error)
    if known is None:
        message = _describe_bug(error, arguments)
        return _report("Bug", message, EXIT_BUG, as_json=as_json)
    if is_debugging():
        traceback.print_exception(error)
    details = {key: getattr(known, key) for key in ("found", "where", "expected", "fix")}
    return _report(type(known).__name__, f"Error: {known}", known.exit_code, as_json=as_json, **details)


def _report(
    kind: str, message: str, exit_code: int, *, as_json: bool, spoken: bool = False, **details: str
) -> int:
    """Say what went wrong on standard error and, with `--json`, as an object on standard output."""
    if not spoken:
        sys.stderr.write(printable(message) + "\n")
    if as_json:
        print_result(
            {
                "error": {
                    "kind": kind,
                    "message": message.removeprefix("Error: "),
                    **details,
                    "exit_code": exit_code,
                }
            }
        )
    return exit_code


def _known_problem(error: BaseException) -> PhloraError | None:
    """Problems of the machine or of a path that can come up anywhere."""
    where = str(getattr(error, "filename", None) or "")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return NoRoomError("The disk is full", where=where, fix="make room, then run the command again")
    if isinstance(error, PermissionError):
        return InputError("No permission to read or write this path", where=where, fix="name another path")
    if _NO_THREAD in str(error):
        return EnvironmentProblem(
            "This process may start no further thread",
            fix="end other programs, or raise the limit of processes (ulimit -u) or of memory (ulimit -v)",
        )
    if _is_out_of_memory(error):
        return NoRoomError(
            "The memory is full",
            fix="lower training_config.per_device_train_batch_size or training_config.max_length, "
            "or set training_config.activation_memory=recompute; `phlora plan` says what fits",
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Also where it is the cause of what was raised, as when transformers cannot import one of its modules."""
    if isinstance(error, MemoryError) or _is_loader_out_of_memory(error):
        return True
    if isinstance(error, RuntimeError):
        try:
            # Imported here: torch is, and what raises its errors has imported it.
            from phlora.measure import is_out_of_memory

            if is_out_of_memory(error):
                return True
        except (MemoryError, ImportError):
            return True
    cause = error.__cause__ or error.__context__
    return isinstance(error, ImportError | RuntimeError) and cause is not None and _is_out_of_memory(cause)


def _is_loader_out_of_memory(error: BaseException) -> bool:
    """Whether a library could not be loaded, or a file mapped, because there is no memory for it."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, ImportError | OSError) and any(words in said for words in _LOADERS_WORDS)


def _describe_bug(error: Exception, arguments: Sequence[str]) -> str:
    head = f"This is a bug in Phlora: {type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    if is_debugging():
        return f"{head}\n{trace}"
    facts = f"phlora {phlora.__version__}, Python {platform.python_version()}, {platform.platform()}"
    command = shlex.join(["phlora", *arguments])
    text = masked("\n".join([facts, command, trace, *recent_records.lines, ""]))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="phlora-", suffix=".log", encoding="utf-8", delete=False
        ) as file:
            file.write(text)
    except OSError:
        return f"{head}\n{trace}"
    return f"{head}\nPlease report it together with {file.name}, which holds the traceback."


def _let_go_of_stdout() -> None:
    """Whoever read the output has gone; Python's own flush at exit must not complain about it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
