"""The code cells of a notebook as one module, so that a name of one cell is known in the next; and back again.

What is IPython's and not Python's (`%matplotlib inline`, `!pip install x`, `files = !ls`, `obj?`) is a name of its own
meanwhile. Cells in another language (`%%bash`, `%%writefile`) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Magics of whole cells whose text is Python all the same.
_PYTHON_MAGICS = frozenset(
    {"capture", "time", "timeit", "prun", "python", "python3", "debug", "memray_flamegraph", "memit"}
)
_CELL_MAGIC = re.compile(r"\s*%%(\S*)")
_BOUNDARY = "_phlora_cell_{}_"
_STAND_IN = "_phlora_line_{}_"
_IS_BOUNDARY = re.compile(r"^_phlora_cell_(\d+)_[ \t]*$", re.MULTILINE)
_IS_STAND_IN = re.compile(r"_phlora_line_(\d+)_")
# A line that is IPython's as a whole, and an assignment of what it gives.
_LINE = re.compile(r"(?P<indent>[ \t]*)(?P<text>(?:[%!]|\?{1,2}\w|[\w.]+\?{1,2}\s*$).*)", re.DOTALL)
_ASSIGNED = re.compile(r"(?P<head>[ \t]*[\w.,\s]+=[ \t]*)(?P<text>[%!][^=].*)", re.DOTALL)


# What a line of IPython's calls: `%time`, `!pip`.
_CALLED = re.compile(r"(?:%|!+)\s*[\w.-]+")


@dataclass(frozen=True)
class Hidden:
    """A line that is IPython's, with those that it goes on in.

    Attributes:
        cell: the place of its cell among all cells of the notebook.
        number: the line in the cell, counted from 1.
    """

    text: str
    cell: int
    number: int

    @property
    def name(self) -> str:
        """What it runs, as `%time` or `!pip`; empty where it runs nothing: a question, the magic of its whole cell."""
        match = _CALLED.match(self.text)
        return match[0] if match is not None else ""


@dataclass(frozen=True)
class Cells:
    """Code cells as one module.

    Attributes:
        text: the module.
        numbers: the cells that are in it, by their place among all cells of the notebook.
        hidden: the lines that are IPython's, in the order of their names.
        skipped: the place of each cell in another language -> its magic's name.
    """

    text: str
    numbers: tuple[int, ...]
    hidden: tuple[Hidden, ...]
    skipped: Mapping[int, str] = field(default_factory=dict)
    _starts: tuple[int, ...] = field(default=(), repr=False)

    def place(self, line: int) -> tuple[int, int]:
        """The cell and the line in it, counted from 1, of a line of the module."""
        index = max((i for i, start in enumerate(self._starts) if start < line), default=0)
        return self.numbers[index] if self.numbers else 0, line - (self._starts[index] if self._starts else 0)

    def split(self, text: str) -> dict[int, str]:
        """The cells of a changed module, by their place among all cells."""
        parts = _IS_BOUNDARY.split(text)
        found = {}
        for index, body in zip(parts[1::2], parts[2::2], strict=True):
            body = body.removeprefix("\n").removesuffix("\n")
            found[int(index)] = _IS_STAND_IN.sub(lambda match: self.hidden[int(match[1])].text, body)
        return found


def join(sources: Sequence[tuple[int, str]]) -> Cells:
    """Code cells, each with its place in the notebook, as one module."""
    lines: list[str] = []
    numbers: list[int] = []
    starts: list[int] = []
    hidden: list[Hidden] = []
    skipped: dict[int, str] = {}
    for number, source in sources:
        magic = _CELL_MAGIC.match(source)
        if magic is not None and magic[1] not in _PYTHON_MAGICS:
            skipped[number] = magic[1]
            continue
        lines.append(_BOUNDARY.format(number))
        numbers.append(number)
        starts.append(len(lines))
        lines += _without_magics(source, number, hidden)
    text = "\n".join(lines) + "\n" if lines else ""
    return Cells(text, tuple(numbers), tuple(hidden), skipped, tuple(starts))


def _without_magics(source: str, cell: int, hidden: list[Hidden]) -> list[str]:
    """The lines of a cell with stand-ins for what is IPython's; as many lines as before."""
    result: list[str] = []
    lines = source.split("\n")
    state = _Reader()
    index = 0
    while index < len(lines):
        line = lines[index]
        match = None
        if state.is_between_statements:
            match = _LINE.fullmatch(line) or _ASSIGNED.fullmatch(line)
        if match is None:
            state.read(line)
            result.append(line)
            index += 1
            continue
        whole = [match["text"]]
        while whole[-1].endswith("\\") and index + len(whole) < len(lines):
            whole.append(lines[index + len(whole)])
        head = match.groupdict().get("head") or match.groupdict().get("indent") or ""
        result.append(head + _STAND_IN.format(len(hidden)))
        hidden.append(Hidden("\n".join(whole), cell, index + 1))
        index += len(whole)
    return result


class _Reader:
    """Where a line of Python ends: within brackets, within a text of three quotes, or between two statements."""

    def __init__(self) -> None:
        self.depth = 0
        self.quotes = ""
        self.goes_on = False

    @property
    def is_between_statements(self) -> bool:
        return not self.depth and not self.quotes and not self.goes_on

    def read(self, line: str) -> None:
        self.goes_on = False
        at = 0
        while at < len(line):
            if self.quotes:
                at = self._in_text(line, at)
                continue
            character = line[at]
            if character == "#":
                return
            if character in "\"'":
                self.quotes = character * 3 if line.startswith(character * 3, at) else character
                at += len(self.quotes)
                continue
            if character in "([{":
                self.depth += 1
            elif character in ")]}":
                self.depth = max(0, self.depth - 1)
            elif character == "\\" and at == len(line) - 1:
                self.goes_on = True
            at += 1
        if len(self.quotes) == 1:
            # A text of one quote ends with its line, unless the line goes on.
            if line.endswith("\\"):
                return
            self.quotes = ""

    def _in_text(self, line: str, at: int) -> int:
        if line[at] == "\\":
            return at + 2
        if line.startswith(self.quotes, at):
            at += len(self.quotes)
            self.quotes = ""
            return at
        return at + 1
