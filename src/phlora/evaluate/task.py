"""What kind of answers is expected, and which figure therefore leads.

Being equal word for word is the right question for JSON, labels and short facts. For open text it is hardly ever true
of a good answer, so there the loss leads, which asks how likely the model finds the expected answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len

from phlora.evaluate.metrics import parsed_json

Kind = Literal["json", "short", "open"]

# An answer of half a line: a label, a number, a name, one short sentence.
_SHORT_COLUMNS = 40
# Most characters of an answer that are looked at: how long a long one is does not matter.
_LOOKED_AT = 1000

# `auto` in evaluation.metrics. The first one that applies decides which answers are right.
_METRICS: dict[Kind, tuple[str, ...]] = {
    "json": ("exact_match", "json_valid", "json_equal"),
    "short": ("exact_match",),
    "open": ("rouge_l",),
}


@dataclass(frozen=True)
class Task:
    """What the expected answers look like.

    Attributes:
        kind: `json`: half of them or more are a JSON object or array; `short`: half of them or more take at most 40
            columns on one line; `open`: anything else.
        reason: what was seen, as a sentence without the final full stop.
    """

    kind: Kind
    reason: str

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that fit these answers, in the place of `auto`."""
        return _METRICS[self.kind]

    def judges(self, metric: str) -> bool:
        """Whether a metric can call an answer right or wrong here; word overlap never can."""
        if metric.startswith("rouge"):
            return False
        return self.kind != "open" or metric not in ("exact_match", "json_valid", "json_equal")


def task_of(references: Sequence[str]) -> Task:
    """Look at the expected answers. Without any, they count as short."""
    if not references:
        return Task("short", "no answers were expected")
    beginnings = [reference.strip()[:_LOOKED_AT] for reference in references]
    num_json = sum(parsed_json(reference) is not None for reference in references)
    if 2 * num_json >= len(references):
        return Task("json", f"{num_json} of {len(references)} expected answers are JSON")
    widths = [cell_len(text) if "\n" not in text else _SHORT_COLUMNS + len(text) for text in beginnings]
    num_short = sum(width <= _SHORT_COLUMNS for width in widths)
    if 2 * num_short >= len(references):
        return Task("short", f"{num_short} of {len(references)} expected answers are short")
    words = round(statistics.median(len(reference.split()) for reference in references))
    return Task("open", f"the expected answers are open text (median {words} words)")
