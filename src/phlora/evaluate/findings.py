"""What a comparison found, in words and rows of a table."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from phlora.evaluate.compare import Comparison, ModelScores
from phlora.evaluate.metrics import KNOWN_AS
from phlora.evaluate.statistics import MIN_ROWS

Number = float | None

_LABELS = {
    "exact_match": "Exact match",
    "json_valid": "Valid JSON",
    "json_equal": "Equal JSON",
    "rouge_l": "ROUGE-L",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_lsum": "ROUGE-Lsum",
    "loss": "Loss",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
}
_LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the before/after table. Shares are 0 to 1; None: does not apply, or is no finite number.

    `low` and `high` bound the change at 95 %; `num_rows` stand behind it.
    """

    name: str
    base: Number
    tuned: Number
    num_rows: int
    low: Number = None
    high: Number = None
    p_value: Number = None

    @property
    def label(self) -> str:
        return label_of(self.name)

    @property
    def is_share(self) -> bool:
        return self.name not in _LOWER_IS_BETTER

    @property
    def change(self) -> Number:
        return None if self.base is None or self.tuned is None else self.tuned - self.base

    @property
    def direction(self) -> str:
        """`better` or `worse` where interval, test and number of rows leave no doubt, else `unclear`."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high or self.has_few_rows:
            return "unclear"
        if self.p_value is not None and self.p_value >= 0.05:
            return "unclear"
        return "better" if (self.low > 0) == self.is_share else "worse"

    @property
    def has_few_rows(self) -> bool:
        """Whether the rows are too few to call a change better or worse."""
        return self.num_rows < MIN_ROWS

    @property
    def base_text(self) -> str:
        return self._value_text(self.base)

    @property
    def tuned_text(self) -> str:
        return self._value_text(self.tuned)

    @property
    def change_text(self) -> str:
        return "" if self.change is None else self._signed(self.change)

    @property
    def interval_text(self) -> str:
        if self.low is None or self.high is None:
            is_missed = self.has_few_rows and self.change is not None and self.name != "perplexity"
            return "too few rows" if is_missed else ""
        return f"{self._signed(self.low)} to {self._signed(self.high)}"

    def _value_text(self, value: Number) -> str:
        if value is None:
            return "n/a"
        if self.is_share:
            return f"{100 * value:.1f} %"
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"

    def _signed(self, value: float) -> str:
        return f"{100 * value:+.1f}" if self.is_share else f"{value:+.3f}"


def figures(side: ModelScores) -> dict[str, Number]:
    """All figures of one side by name: the metrics in their order, then those of the trained tokens."""
    losses = {name: getattr(side.loss, name) for name in ("loss", "perplexity", "token_accuracy")}
    return {name: _finite(value) for name, value in {**side.metrics, **losses}.items()}


def lines_of(comparison: Comparison) -> list[Line]:
    """The before/after table."""
    tuned = figures(comparison.tuned)
    return [
        Line(
            name=name,
            base=value,
            tuned=tuned[name],
            num_rows=comparison.num_rows(name),
            **_bounds(comparison, name),
        )
        for name, value in figures(comparison.base).items()
    ]


def headline(comparison: Comparison) -> Line:
    """The line that leads: the metric that tells right from wrong, where one can, else the loss."""
    name = comparison.decided_by or "loss"
    return next(line for line in lines_of(comparison) if line.name == name)


def verdict(comparison: Comparison, *, rows: str = "held-out") -> str:
    """One honest sentence about the deciding figure: before, after, on how many rows, and how sure.

    Args:
        rows: what they are called; nothing where training may have seen some.
    """
    if _changes_nothing(comparison):
        return (
            "The adapter changes nothing: answers and losses are those of the base model, to the last digit."
        )
    line = headline(comparison)
    if line.change is None:
        return f"{line.label} is no finite number, so the base and the tuned model cannot be compared."
    where = " ".join(filter(None, (f"on {line.num_rows}", rows, row_word(line.num_rows))))
    from_to = f"from {line.base_text} to {line.tuned_text}{_perplexities(comparison, line)} {where}"
    if line.direction == "unclear":
        went = f"stayed at {line.tuned_text} {where}" if line.change == 0 else f"went {from_to}"
        return _short(f"{line.label} {went}: {_why_unclear(line)}.")
    verb = "rose" if line.change > 0 else "fell"
    worse = ": the tuned model is worse" if line.direction == "worse" else ""
    return _short(f"{line.label} {verb} {from_to}{worse} ({_interval_words(line)}).")


def choice_of_headline(comparison: Comparison) -> str | None:
    """Why the loss leads where answers were generated; None where a metric leads."""
    if comparison.decided_by or not comparison.answers:
        return None
    if comparison.task.kind == "open":
        return (
            f"The loss leads, for {comparison.task.reason}: a good answer hardly ever equals the expected one "
            "word for word."
        )
    return "The loss leads, for no metric of this run tells a right answer from a wrong one."


def _perplexities(comparison: Comparison, line: Line) -> str:
    if line.name != "loss":
        return ""
    perplexity = next(line for line in lines_of(comparison) if line.name == "perplexity")
    return f" (perplexity {perplexity.base_text} to {perplexity.tuned_text})"


def _why_unclear(line: Line) -> str:
    verdict = (
        f"too few rows to say, {MIN_ROWS} are the least" if line.has_few_rows else "no proof of a change"
    )
    return verdict if line.low is None else f"{verdict} ({_interval_words(line)})"


def _interval_words(line: Line) -> str:
    return f"95 % interval of the change: {line.interval_text}{' points' if line.is_share else ''}"


def label_of(name: str) -> str:
    """A metric as people call it."""
    kind, colon, parameter = name.partition(":")
    return f"{kind.capitalize()} “{parameter}”" if colon else _LABELS.get(KNOWN_AS.get(name, name), name)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def row_word(count: int) -> str:
    return "row" if count == 1 else "rows"


def _changes_nothing(comparison: Comparison) -> bool:
    base, tuned = comparison.base, comparison.tuned
    return base.loss.per_row == tuned.loss.per_row and base.answers == tuned.answers


def _bounds(comparison: Comparison, name: str) -> dict[str, Number]:
    interval = comparison.intervals.get(name)
    if interval is None:
        return {}
    return {"low": _finite(interval.low), "high": _finite(interval.high), "p_value": interval.p_value}


def _finite(value: Number) -> Number:
    return value if value is not None and math.isfinite(value) else None


def _short(text: str) -> str:
    """Shares without the decimal that says nothing: 91.0 % -> 91 %."""
    return re.sub(r"(?<=\d)\.0(?!\d)", "", text)
