from __future__ import annotations

import math

import pytest

from phlora.evaluate.charts import loss_curve, nice_ticks, sparkline, thinned


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0, 2.31, 4), (0, 150, 6), (0, 0.0007, 4), (0, 1e6, 5), (-1, 3, 4), (2, 2, 4)]
)
def test_ticks_are_even_and_enclose_the_values(low, high, count) -> None:
    ticks = nice_ticks(low, high, count)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 2 * count + 2
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps))


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 2.31, 4) == [0, 1, 2, 3]
    assert nice_ticks(0, 0.3, 3) == [0, 0.1, 0.2, 0.3]


def test_curve_runs_from_high_to_low_inside_the_plot() -> None:
    curve = loss_curve([(0, 4.0), (50, 2.0), (100, 0.0)], [(100, 1.0)])
    assert curve.line == "0,0 50,50 100,100"
    (dot,) = curve.dots
    assert (dot.x, dot.y) == (100, 75)
    assert curve.training_end.label == "0.000" and curve.evaluation_end.label == "1.000"


def test_end_labels_do_not_touch() -> None:
    curve = loss_curve([(0, 4.0), (100, 0.50)], [(100, 0.51)])
    assert abs(curve.training_end.y - curve.evaluation_end.y) >= 8
    assert curve.training_end.y > curve.evaluation_end.y
    # Nor do they touch the steps below the plot.
    curve = loss_curve([(0, 4.0), (100, 0.01)], [(100, 0.0)])
    assert abs(curve.training_end.y - curve.evaluation_end.y) >= 8
    assert max(curve.training_end.y, curve.evaluation_end.y) <= 97


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, math.nan), (3, math.inf)]])
def test_too_little_to_draw(points) -> None:
    assert loss_curve(points, []) is None
    assert sparkline(points) is None


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    assert loss_curve([(0, 2.0), (1, math.nan), (2, 0.0)], []).line == "0,0 100,100"


def test_a_long_curve_is_thinned_but_ends_where_it_ended() -> None:
    points = [(step, 10_000 - step) for step in range(10_000)]
    few = thinned(points)
    assert len(few) <= 502 and few[-1] == points[-1]
    assert all(loss == pytest.approx(10_000 - step) for step, loss in few)
    assert thinned(points[:400]) == points[:400]


def test_sparkline_spans_its_peak() -> None:
    assert sparkline([(0, 0.0), (5, 3e-4), (10, 1.5e-4)]) == "0,100 50,0 100,50"
    assert sparkline([(0, 0.0), (1, 0.0)]) is None
