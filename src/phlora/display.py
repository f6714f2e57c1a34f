"""What a person sees while a long step runs: rich bars on a terminal, one block in a notebook, plain lines in a log.

Results go to standard output and belong to the commands; everything here goes to standard error, and within `logged`
into a file too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from phlora.errors import masked
from phlora.markup import printable as printable
from phlora.notebook import Page, in_notebook

Advance = Callable[[int], None]

# A log gets a line at every tenth of a step, but not more often than this.
_SECONDS_BETWEEN_LINES = 5.0
# What was said before there is a file for it.
_MOST_LINES_KEPT = 500
_LEVELS = {"stage": "INFO", "note": "INFO", "show": "INFO", "warn": "WARNING"}


def has_colours(stream: TextIO) -> bool:
    """Whether colours are shown there: on a terminal that has some, and as NO_COLOR, FORCE_COLOR and TERM say."""
    from rich.console import Console

    console = Console(file=stream)
    return console.color_system is not None and not console.no_color


class Bar(Protocol):
    """How far one thing is, where it is seen."""

    def advance(self, done: int) -> None:
        """So many units more are done."""

    def show(self, done: int, text: str = "") -> None:
        """So many units are done in all, with something to say beside it."""

    def close(self) -> None:
        """It is over."""


def counted(count: int, word: str) -> str:
    """A number with its word.

    >>> counted(1, "row"), counted(1234, "training row")
    ('1 row', '1,234 training rows')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


class Display:
    """Stages, notes and progress of one command; any thread may speak.

    Args:
        stream: where to write; standard error by default, or the output of the cell in a notebook.
        quiet: show nothing but warnings.
        fancy: rich bars; by default when the stream is a terminal.
    """

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, fancy: bool | None = None
    ) -> None:
        self.page = Page() if stream is None and fancy is None and in_notebook() else None
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.fancy = self.page is None and (self.stream.isatty() if fancy is None else fancy)
        self._terminal = _Terminal(self.stream)
        self._log: TextIO | None = None
        self._unwritten: deque[str] = deque(maxlen=_MOST_LINES_KEPT)
        self._lock = threading.RLock()

    def stage(self, text: str) -> None:
        """Say which step of the story begins."""
        self._tell("stage", printable(masked(text)))

    def note(self, text: str) -> None:
        """Say a fact that a person should know but need not act on."""
        self._tell("note", printable(masked(text)))

    def warn(self, text: str) -> None:
        """Say something that a person should look at; also when quiet."""
        self._tell("warn", printable(masked(text)))

    def show(self, text: str) -> None:
        """Show a block of text, such as a table, as it is."""
        self._tell("show", printable(text))

    def log(self, text: str, *, level: str = "INFO", source: str = "phlora") -> None:
        """Write into the file alone what is seen elsewhere, such as beside a bar."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            self._unwritten.append(f"{stamp} {level} {source}: {printable(masked(text))}\n")
            if self._log is not None:
                self._write_log()

    def relay(self, text: str, *, level: str, source: str, is_shown: bool) -> None:
        """Write what a library has logged into the file, and show it where it is to be seen."""
        self.log(text, level=level, source=source)
        if is_shown:
            kind = "warn" if level in ("WARNING", "ERROR", "CRITICAL") else "note"
            self._show(kind, printable(masked(f"{source}: {text}")))

    @contextmanager
    def logged(self, path: Path) -> Iterator[None]:
        """Within it, and from what was said before, everything is also added to a file, each entry with its time.

        What ends it early stands there too.
        """
        self._log = file = path.open("a", encoding="utf-8", errors="backslashreplace")
        try:
            self._write_log()
            yield
        except BaseException as error:
            self.log(f"{type(error).__name__}: {error}", level="ERROR")
            raise
        finally:
            with self._lock:
                self._log = None
                # What a full disk has not taken, and was said then, is tried once more here.
                with suppress(OSError):
                    file.close()

    @contextmanager
    def progress(self, title: str, total: int, *, unit: str = "rows") -> Iterator[Advance]:
        """A bar (terminal, notebook) or a few lines (log); call the yielded function with the number of units done."""
        bar = self.bar(title, total, unit) if total > 0 else None
        if bar is not None:
            yield from _advancing(bar)
        elif self.quiet or total <= 0:
            yield lambda done: None
        else:
            yield _Lines(self, title, total, unit).advance

    @contextmanager
    def counting(self, title: str, *, unit: str = "rows") -> Iterator[Advance]:
        """A count of what has no known end; call the yielded function with the number of units done."""
        bar = self.bar(title, None, unit)
        if bar is not None:
            yield from _advancing(bar)
        elif self.quiet:
            yield lambda done: None
        else:
            yield _Count(self, title, unit).advance

    def bar(self, title: str, total: int | None, unit: str, *, done: int = 0) -> Bar | None:
        """A bar that moves; None where only lines can be written, or nothing is to be seen."""
        if self.quiet:
            return None
        title = printable(masked(title))
        if self.page is not None:
            return self.page.bar(title, total, unit, done)
        return self._terminal.bar(title, total, unit, done) if self.fancy else None

    def _tell(self, kind: str, text: str) -> None:
        self.log(text if kind != "show" else f"\n{text}", level=_LEVELS[kind])
        self._show(kind, text)

    def _show(self, kind: str, text: str) -> None:
        if self.quiet and kind != "warn":
            return
        with self._lock:
            if self.page is not None:
                self.page.tell(kind, text)
            elif self.fancy:
                self._terminal.tell(kind, text)
            else:
                before = {"stage": "> ", "note": "  ", "warn": "! ", "show": ""}[kind]
                self.stream.write(f"{before}{text}\n")
                self.stream.flush()

    def _write_log(self) -> None:
        assert self._log is not None
        try:
            self._log.writelines(self._unwritten)
            self._log.flush()
        except OSError as error:
            # A full disk: a run is worth more than its log.
            self._log = None
            self.warn(f"The log is not written any more: {error.strerror}")
        self._unwritten.clear()


def _advancing(bar: Bar) -> Iterator[Advance]:
    try:
        yield bar.advance
    finally:
        bar.close()


class _Terminal:
    """Rich text and bars; lines that come while there are bars stand above them."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bars: Any = None
        self.num_open = 0

    def tell(self, kind: str, text: str) -> None:
        text = _escape(text)
        styled = {
            "stage": f"[bold]›[/bold] {text}",
            "note": f"  [dim]{text}[/dim]",
            "warn": f"[yellow]![/yellow] {text}",
            "show": text,
        }[kind]
        console = self.bars.console if self.bars is not None else self._console()
        console.print(styled, highlight=False, soft_wrap=True)

    def bar(self, title: str, total: int | None, unit: str, done: int) -> _TerminalBar:
        if self.bars is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("  {task.description}", "{task.fields[shown]}")
            self.bars = Progress(
                TextColumn(columns[0]),
                BarColumn(bar_width=24),
                TextColumn(columns[1]),
                TimeRemainingColumn(),
                console=self._console(),
            )
            self.bars.start()
        self.num_open += 1
        return _TerminalBar(self, title, total, unit, done)

    def close_one(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self.bars.stop()
            self.bars = None

    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self.stream)


class _TerminalBar:
    def __init__(self, terminal: _Terminal, title: str, total: int | None, unit: str, done: int) -> None:
        self.terminal, self.total, self.unit, self.done, self.is_open = terminal, total, unit, done, True
        self.bars = terminal.bars
        self.task = self.bars.add_task(
            _escape(title), total=total, completed=done, shown=self._shown(done, "")
        )

    def advance(self, done: int) -> None:
        self.show(self.done + done)

    def show(self, done: int, text: str = "") -> None:
        self.done = done
        self.bars.update(self.task, completed=done, shown=self._shown(done, text))

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.terminal.close_one()

    def _shown(self, done: int, text: str) -> str:
        count = f"{done:,} {self.unit}" if self.total is None else f"{done}/{self.total} {self.unit}"
        return _escape(f"{count} {text}".rstrip())


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
