"""The before/after table and some answers, as a cell of a notebook shows them; report.html has all of it."""

from __future__ import annotations

from collections.abc import Sequence

from phlora.evaluate.compare import AnsweredItem
from phlora.evaluate.findings import Line
from phlora.markup import block, folded, line, table

_SHOWN_ANSWERS = 8
_MOST_SHOWN = 600


def report_cell(
    verdict: str,
    lines: Sequence[Line],
    footnotes: Sequence[str],
    answers: Sequence[AnsweredItem],
    *,
    page: str,
) -> str:
    """HTML for a notebook.

    Args:
        answers: those that changed sides first.
        page: where the whole report is; empty: nowhere.
    """
    figures = table(
        ("", "base", "tuned", "change", "95 % interval"),
        [(f.label, f.base_text, f.tuned_text, f.change_text, f.interval_text) for f in lines],
        numbers=(1, 2, 3, 4),
    )
    shown = [_answer(item) for item in answers[:_SHOWN_ANSWERS]]
    title = f"Answers side by side ({len(shown)} of {len(answers)})"
    return block(
        line(verdict, "lead"),
        figures,
        *(line(note, "dim") for note in footnotes),
        folded(title, *shown) if shown else "",
        line(f"The whole report: {page}", "dim") if page else "",
    )


def _answer(item: AnsweredItem) -> str:
    question = item.messages[-1].get("content") if item.messages else ""
    rows = [
        ("asked", _clipped(str(question or ""))),
        ("expected", _clipped(item.reference)),
        ("base", _clipped(item.base_answer)),
        ("tuned", _clipped(item.tuned_answer)),
    ]
    return table((item.change or "unchanged", item.origin), rows)


def _clipped(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} …"
