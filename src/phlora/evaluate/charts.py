"""The pictures of the report as geometry; the template draws them as inline SVG.

All positions are percent of the plot, from its top left corner, so that the page can be any width while its letters
keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phlora.evaluate.findings import Line

Point = tuple[float, float]

# A longer curve is thinned to about this many points: the eye sees no more, and the file stays small.
_MAX_POINTS = 500
# Labels closer than this would touch.
_LABEL_HEIGHT = 8.0
_LOWEST_LABEL = 97.0


@dataclass(frozen=True)
class Mark:
    """A labelled place: a tick of an axis (one of x, y is 0), a dot, or the end of a line."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line over the steps with its axes; `dots` are the evaluations, `ends` name the last value of each."""

    x_ticks: list[Mark]
    y_ticks: list[Mark]
    line: str
    dots: list[Mark]
    training_end: Mark
    evaluation_end: Mark | None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One share before and after, in percent; `whisker` is where the interval of the change puts the tuned side."""

    line: Line
    base: float
    tuned: float
    whisker: tuple[float, float] | None


def loss_curve(training: Sequence[Point], evaluation: Sequence[Point]) -> Curve | None:
    """The picture of (step, loss) points, or None when there is no line to draw."""
    training, evaluation = _finite(training), _finite(evaluation)
    if len(training) < 2:
        return None
    points = [*training, *evaluation]
    last_step = max(step for step, _ in points)
    x_values = [v for v in nice_ticks(0, last_step, 6) if v <= last_step and v == int(v)]
    y_values = nice_ticks(min(0.0, *(loss for _, loss in points)), max(loss for _, loss in points), 4)

    def place(step: float, loss: float, label: str = "") -> Mark:
        span = y_values[-1] - y_values[0]
        return Mark(_round(100 * step / last_step), _round(100 * (y_values[-1] - loss) / span), label)

    drawn = [place(*point) for point in thinned(training)]
    dots = [place(step, loss, f"step {step:g}: {loss:.3f}") for step, loss in evaluation]
    ends = [place(*curve[-1], f"{curve[-1][1]:.3f}") for curve in (training, evaluation) if curve]
    ends = _apart(*ends) if len(ends) == 2 else ends
    return Curve(
        x_ticks=[place(v, y_values[0], f"{v:g}") for v in x_values],
        y_ticks=[place(0, v, f"{v:g}") for v in y_values],
        line=" ".join(f"{mark.x:g},{mark.y:g}" for mark in drawn),
        dots=dots,
        training_end=ends[0],
        evaluation_end=ends[1] if len(ends) == 2 else None,
    )


def sparkline(points: Sequence[Point]) -> str | None:
    """A line from 0 to its own peak, without axes, or None when there is nothing to see."""
    points = _finite(points)
    if len(points) < 2 or max(value for _, value in points) <= 0:
        return None
    last_step, peak = max(step for step, _ in points), max(value for _, value in points)
    return " ".join(
        f"{_round(100 * step / last_step):g},{_round(100 - 100 * value / peak):g}"
        for step, value in thinned(points)
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps of them."""
    high = high if high > low else low + 1
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * magnitude >= rough * 0.999) * magnitude
    return [
        round(index * step, 10)
        for index in range(math.floor(low / step), math.ceil(round(high / step, 9)) + 1)
    ]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Means of equal stretches, so that a long curve keeps its shape; the last point stays as it is."""
    stretch = -(-len(points) // _MAX_POINTS)
    if stretch <= 1:
        return list(points)
    parts = [points[start : start + stretch] for start in range(0, len(points) - 1, stretch)]
    means = [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]
    return [*means, points[-1]]


def _apart(first: Mark, second: Mark) -> list[Mark]:
    """Both labels, moved from each other where they would touch."""
    overlap = _LABEL_HEIGHT - abs(first.y - second.y)
    if overlap <= 0:
        return [first, second]
    shift = overlap / 2 if first.y > second.y else -overlap / 2
    moved = [first.y + shift, second.y - shift]
    # Below the plot stand the steps.
    up = max(0.0, max(moved) - _LOWEST_LABEL)
    return [Mark(mark.x, _round(y - up), mark.label) for mark, y in zip((first, second), moved, strict=True)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(step), float(value)) for step, value in points if math.isfinite(value)]


def _round(value: float) -> float:
    return round(value, 2)
