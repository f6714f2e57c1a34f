"""What a long step shows in a Jupyter notebook: one block of the cell's output, updated in place.

Lines on standard error would fill the cell, in most front ends on red. The block is plain HTML with the browser's own
progress bars: it needs no widgets, stays in the file when the notebook is saved, and is shown by
front ends that know no widgets (GitHub, nbconvert, editors).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from phlora.markup import block, escaped, line, preformatted

# Front ends take a while for each update.
_SECONDS_BETWEEN_UPDATES = 0.25
_KINDS = {"stage": "lead", "note": "dim", "warn": "warn"}


def in_notebook() -> bool:
    """Whether the program is the kernel of a notebook: Jupyter's, an editor's or Colab's, and no terminal's IPython."""
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _number_of_cell() -> Any:
    return getattr(_shell(), "execution_count", None)


class Page:
    """The block: lines as they come, and the bars of what is under way below them."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._texts: list[str] = []
        self._bars: list[NotebookBar] = []
        self._handle: Any = None
        self._cell = _number_of_cell()
        self._updated = 0.0

    def _begin_anew_in_another_cell(self) -> None:
        """What another cell shows belongs below that cell."""
        cell = _number_of_cell()
        if cell != self._cell:
            self._cell, self._handle = cell, None
            self._parts, self._texts = [], []

    def tell(self, kind: str, text: str) -> None:
        """Add a line: a `stage`, a `note`, a `warn`ing, or text to `show` as it is set."""
        self._begin_anew_in_another_cell()
        self._parts.append(preformatted(text) if kind == "show" else line(text, _KINDS[kind]))
        self._texts.append(text)
        self.update()

    def bar(self, title: str, total: int | None, unit: str, done: int = 0) -> NotebookBar:
        self._begin_anew_in_another_cell()
        bar = NotebookBar(self, title, total, unit, done)
        self._bars.append(bar)
        self.update()
        return bar

    def update(self, *, if_due: bool = False) -> None:
        """Show how things are now; `if_due` not more often than a front end can take."""
        now = time.monotonic()
        if if_due and now - self._updated < _SECONDS_BETWEEN_UPDATES:
            return
        self._updated = now
        bars = "".join(bar.html() for bar in self._bars)
        content = {
            "text/html": block(f'<div class="log"><div>{"".join(self._parts)}</div></div>', bars),
            "text/plain": "\n".join([*self._texts, *(bar.text() for bar in self._bars)]),
        }
        if self._handle is None:
            from IPython import display

            show: Any = display.display
            self._handle = show(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def drop(self, bar: NotebookBar) -> None:
        """What is done becomes a line among the others."""
        if bar in self._bars:
            self._bars.remove(bar)
            self.tell("note", bar.text())


class NotebookBar:
    """How far one thing is."""

    def __init__(self, page: Page, title: str, total: int | None, unit: str, done: int) -> None:
        self.page, self.title, self.total, self.unit, self.done, self.shown = (
            page,
            title,
            total,
            unit,
            done,
            "",
        )
        self.started = time.monotonic()

    def advance(self, done: int) -> None:
        self.show(self.done + done, self.shown)

    def show(self, done: int, text: str = "") -> None:
        self.done, self.shown = done, text
        self.page.update(if_due=True)

    def close(self) -> None:
        self.page.drop(self)

    def text(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        seconds = time.monotonic() - self.started
        return f"{self.title}: {self.done:,}{of} {self.unit}, {seconds:.0f} s  {self.shown}".rstrip()

    def html(self) -> str:
        value = "" if self.total is None else f' value="{self.done}" max="{max(1, self.total)}"'
        return f'<div dir="auto"><progress{value}></progress> {escaped(self.text())}</div>'
