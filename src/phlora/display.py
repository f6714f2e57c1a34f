"""What a person sees while a long step runs: rich bars on a terminal, plain lines in a log.

Results go to standard output and belong to the commands; everything here goes to standard error.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from phlora.errors import masked

Advance = Callable[[int], None]

# A log gets a line at every tenth of a step, but not more often than this.
_SECONDS_BETWEEN_LINES = 5.0


# All control characters but tab and newline; what turns the direction of a whole line, breaks it, or is not seen;
# halves of surrogate pairs. The joiners of Persian and Hindi and the marks of right-to-left texts stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text with control characters spelled out: data and models must not command a terminal, or mislead.

    >>> printable("\x1b[31m and \u202e")
    '\\\\x1b[31m and \\\\u202e'
    """
    return _UNPRINTABLE.sub(lambda match: _spelled_out(ord(match[0])), text)


def _spelled_out(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def counted(count: int, word: str) -> str:
    """A number with its word.

    >>> counted(1, "row"), counted(1234, "training row")
    ('1 row', '1,234 training rows')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


class Display:
    """Stages, notes and progress of one command.

    Args:
        stream: where to write; standard error by default.
        quiet: write nothing but warnings.
        fancy: rich bars; by default when the stream is a terminal.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, fancy: bool | None = None
    ) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.fancy = self.stream.isatty() if fancy is None else fancy

    def stage(self, text: str) -> None:
        """Say which step of the story begins."""
        if not self.quiet:
            text = printable(masked(text))
            self._print(f"[bold]›[/bold] {_escape(text)}" if self.fancy else f"> {text}")

    def note(self, text: str) -> None:
        """Say a fact that a person should know but need not act on."""
        if not self.quiet:
            text = printable(masked(text))
            self._print(f"  [dim]{_escape(text)}[/dim]" if self.fancy else f"  {text}")

    def warn(self, text: str) -> None:
        """Say something that a person should look at; also when quiet."""
        text = printable(masked(text))
        self._print(f"[yellow]![/yellow] {_escape(text)}" if self.fancy else f"! {text}")

    def show(self, text: str) -> None:
        """Write a block of text, such as a table, as it is."""
        if not self.quiet:
            text = printable(text)
            self._print(_escape(text) if self.fancy else text)

    @contextmanager
    def progress(self, title: str, total: int, *, unit: str = "rows") -> Iterator[Advance]:
        """A bar (terminal) or a few lines (log); call the yielded function with the number of units done."""
        if self.quiet or total <= 0:
            yield lambda done: None
        elif self.fancy:
            with self.bar("{task.completed}/{task.total} " + unit) as bar:
                task = bar.add_task(_escape(title), total=total)
                yield lambda done: bar.update(task, advance=done)
        else:
            yield _Lines(self, title, total, unit).advance

    @contextmanager
    def counting(self, title: str, *, unit: str = "rows") -> Iterator[Advance]:
        """A count of what has no known end; call the yielded function with the number of units done."""
        if self.quiet:
            yield lambda done: None
        elif self.fancy:
            with self.bar("{task.completed:,} " + unit) as bar:
                task = bar.add_task(_escape(title), total=None)
                yield lambda done: bar.update(task, advance=done)
        else:
            yield _Count(self, title, unit).advance

    def bar(self, *columns: str) -> Any:
        """A rich progress bar with text columns, written to this display's stream."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            *[TextColumn(column) for column in columns],
            TimeRemainingColumn(),
            console=Console(file=self.stream),
            transient=False,
        )

    def _print(self, text: str) -> None:
        if self.fancy:
            from rich.console import Console

            Console(file=self.stream, highlight=False, soft_wrap=True).print(text)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()


class _Lines:
    """Progress for a log: a line at every tenth, no more than one in a few seconds, and one at the end."""

    def __init__(self, display: Display, title: str, total: int, unit: str) -> None:
        self.display, self.title, self.total, self.unit = display, title, total, unit
        self.done = 0
        self.started = self.last = time.monotonic()

    def advance(self, done: int) -> None:
        before, self.done = self.done, self.done + done
        now = time.monotonic()
        crossed = 10 * before // self.total != 10 * self.done // self.total
        finished = before < self.total <= self.done
        if finished or (crossed and now - self.last >= _SECONDS_BETWEEN_LINES):
            self.last = now
            self.display.note(
                f"{self.title}: {self.done}/{self.total} {self.unit}, {now - self.started:.0f} s"
            )


class _Count:
    """A count for a log: a line every few seconds, none for what is quick."""

    def __init__(self, display: Display, title: str, unit: str) -> None:
        self.display, self.title, self.unit, self.done = display, title, unit, 0
        self.started = self.last = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            self.display.note(f"{self.title}: {self.done:,} {self.unit}, {now - self.started:.0f} s")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
