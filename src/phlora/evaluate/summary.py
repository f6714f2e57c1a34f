"""The before/after table as plain text, for a terminal of any width or a file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from phlora.display import printable
from phlora.evaluate.findings import Line

_HEAD = ("", "base", "tuned", "change", "95 % interval")
# A label is shortened to this much before the interval moves to a line of its own.
_LEAST_LABEL = 14


def table(lines: Sequence[Line], *, width: int | None = None) -> list[str]:
    """One line for each figure: before, after, change and interval.

    Args:
        lines: the figures.
        width: columns of the terminal: labels are shortened to fit, and where that is not enough the interval gets
            a line of its own below its figure; None: as wide as it comes.
    """
    rows = [_HEAD, *map(_cells, lines)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HEAD))]
    room = None if width is None else width - sum(widths[1:]) - 2 * (len(_HEAD) - 1)
    if room is None or room >= min(_LEAST_LABEL, widths[0]):
        widths[0] = widths[0] if room is None else min(widths[0], room)
        text = [_aligned(row, widths) for row in rows]
    else:
        assert width is not None
        widths[0] = max(4, min(widths[0], width - sum(widths[1:-1]) - 2 * (len(_HEAD) - 2)))
        text = [line for row in rows for line in _in_two(row, widths)]
    text.insert(text.index(text[0]) + 1, "-" * max(map(cell_len, text)))
    return [line.rstrip() for line in text]


def wrapped(text: str, width: int | None) -> str:
    """The text with lines of at most `width` columns; None: as it is."""
    if width is None:
        return text
    return "\n".join(textwrap.fill(line, max(20, width), break_on_hyphens=False) for line in text.split("\n"))


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [" " * (width - cell_len(text)) + text for text, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join([_fitted(row[0], widths[0]), *numbers])


def _in_two(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    figures = _aligned(row[:-1], widths[:-1])
    return [figures, f"  {row[-1]}"] if row[-1] and row is not _HEAD else [figures]


def _fitted(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text + " " * (width - cell_len(text))
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 1 else "…"


def _cells(line: Line) -> tuple[str, ...]:
    label = printable(" ".join(line.label.split()))
    return (label, line.base_text, line.tuned_text, line.change_text, line.interval_text)
