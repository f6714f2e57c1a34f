"""A data check, and rows token by token, as cells of a notebook show them."""

from __future__ import annotations

from collections.abc import Sequence

from phlora.data.lengths import Bin
from phlora.data.problems import render_problem
from phlora.data.rows import Problem
from phlora.markup import bar, block, escaped, folded, line, table

_MOST_PROBLEMS = 50
_MOST_TOKENS = 3000


def check_cell(
    head: Sequence[str], limits: Sequence[str], bins: Sequence[Bin], problems: Sequence[Problem]
) -> str:
    """HTML of a check: what was read, what is wrong with it, errors first, and how long rows are."""
    kinds = {"error": "error", "warning": "warn"}
    found = [line(render_problem(p), kinds.get(p.severity, "dim")) for p in problems[:_MOST_PROBLEMS]]
    more = len(problems) - len(found)
    most = max((item.count for item in bins), default=1)
    lengths = table(
        ("tokens a row", "rows", ""),
        [(f"{item.low:,} - {item.high:,}", f"{item.count:,}", bar(item.count / most)) for item in bins],
        numbers=(0, 1),
    )
    return block(
        *(line(text, "lead" if number == 0 else "") for number, text in enumerate(head)),
        *found,
        line(f"and {more} more kinds of findings", "dim") if more > 0 else "",
        *(line(text, "dim") for text in limits),
        lengths if bins else "",
    )


def preview_cell(rows: Sequence[tuple[str, Sequence[tuple[str, bool, float]], str | None]]) -> str:
    """HTML of rows token by token.

    Args:
        rows: where each stands; its pieces with whether they are trained, and their weight; why it is left out.
    """
    legend = (
        '<div class="dim">Trained tokens are <span class="trained">marked</span>; those of another weight say it when '
        "pointed at.</div>"
    )
    return block(legend, *(_row(*row) for row in rows))


def _row(origin: str, pieces: Sequence[tuple[str, bool, float]], skipped: str | None) -> str:
    if skipped is not None:
        return line(f"{origin}: left out: {skipped}", "warn")
    trained = sum(is_trained for _, is_trained, _ in pieces)
    title = line(f"{origin}: {trained} of {len(pieces)} tokens trained", "dim")
    text = "".join(_piece(*piece) for piece in pieces[:_MOST_TOKENS])
    more = len(pieces) - _MOST_TOKENS
    rest = (
        folded(f"{more} more", _tokens("".join(_piece(*p) for p in pieces[_MOST_TOKENS:])))
        if more > 0
        else ""
    )
    return title + _tokens(text) + rest


def _tokens(text: str) -> str:
    return f'<div class="tokens" dir="auto">{text}</div>'


def _piece(text: str, is_trained: bool, weight: float) -> str:
    shown = escaped(text)
    if not is_trained:
        return f"<span>{shown}</span>"
    title = "" if weight == 1 else f' title="weight {weight:g}"'
    return f'<span class="trained"{title}>{shown}</span>'
