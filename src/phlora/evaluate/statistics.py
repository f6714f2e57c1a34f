"""How sure a difference between two models on the same rows is.

Scores that are 0 or 1 have an exact interval, which is wide where rows are few and never has width zero. Other scores
have a bootstrap, which knows nothing of what its rows did not show, and so is not asked below `MIN_ROWS` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Method = Literal["exact", "score", "bootstrap", "bound"]
Array = np.ndarray[Any, Any]

# Below this many rows nothing is said of better or worse: chance alone can turn all of them.
MIN_ROWS = 10
# Above it the exact interval takes seconds, and the score interval differs from it by less than a point.
_MAX_EXACT_ROWS = 100
# A draw of the bootstrap never holds more row numbers than this at once.
_MAX_DRAWN = 4_000_000
# Values of the nuisance parameter, and of the difference, at which the exact test is computed.
_NUISANCE_POINTS = 41
_SCAN_POINTS = 64


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of `tuned - base` over rows, with the interval that holds it at the confidence asked for.

    Attributes:
        mean_difference: what was seen.
        low, high: the interval.
        num_rows: rows behind it.
        method: `exact` and `score` for scores of 0 and 1, `bootstrap` for others, `bound` where no row differs.
        p_value: of the exact McNemar test, for scores of 0 and 1.
    """

    mean_difference: float
    low: float
    high: float
    num_rows: int
    method: Method
    p_value: float | None = None


def paired_interval(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    is_share: bool = True,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval | None:
    """The interval of the mean difference by the method that fits the scores; None where no honest one is known.

    Args:
        base, tuned: (rows,) the scores of the same rows.
        weights: (rows,) for a weighted mean, such as the tokens of each row.
        is_share: the scores lie between 0 and 1.
        seed: of the bootstrap.
        confidence: share of repetitions in which the interval holds the true difference.

    Raises:
        ValueError: no rows, or lists of different lengths.
    """
    _check_pairs(base, tuned, weights)
    if weights is None and {*base, *tuned} <= {0, 1}:
        pairs = list(zip(base, tuned, strict=True))
        improved, worsened = sum(b < t for b, t in pairs), sum(b > t for b, t in pairs)
        return exact_interval(improved, worsened, len(base), confidence=confidence)
    if len({t - b for b, t in zip(base, tuned, strict=True)}) == 1:
        can_be_bounded = is_share and weights is None
        return _of_equal_differences(tuned[0] - base[0], len(base), confidence) if can_be_bounded else None
    if len(base) < MIN_ROWS:
        return None
    return paired_bootstrap(base, tuned, weights=weights, seed=seed, confidence=confidence)


# ------------------------------------------------------------------------------------------------- right or wrong


def mcnemar_p_value(improved: int, worsened: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the changed rows is by chance alone.

    Source: McNemar, Psychometrika 12, 1947; exact as a sign test of the changed rows.
    """
    from scipy.stats import binomtest

    changed = improved + worsened
    return float(binomtest(improved, changed, 0.5).pvalue) if changed else 1.0


@cache
def exact_interval(improved: int, worsened: int, num_rows: int, *, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two shares on the same rows: (improved - worsened) / num_rows.

    Up to `_MAX_EXACT_ROWS` rows the test of every difference is inverted exactly: a difference is outside when, at
    every possible share of changed rows, outcomes whose score statistic is at least as far off have a probability of
    at most (1 - confidence) / 2. Above, the score statistic is taken as normal.

    Args:
        improved: rows that went from 0 to 1.
        worsened: rows that went from 1 to 0.
        num_rows: all rows, changed or not.

    Source: Tango, Statistics in Medicine 17, 1998 (the statistic); Hsueh, Liu and Chen, Biometrics 57, 2001 (exact).
    """
    limit = _exact_lower_limit if num_rows <= _MAX_EXACT_ROWS else _score_lower_limit
    tail = (1 - confidence) / 2
    return Interval(
        mean_difference=(improved - worsened) / num_rows,
        low=limit(improved, worsened, num_rows, tail),
        high=-limit(worsened, improved, num_rows, tail),
        num_rows=num_rows,
        method="exact" if num_rows <= _MAX_EXACT_ROWS else "score",
        p_value=mcnemar_p_value(improved, worsened),
    )


def _score_statistic(improved: Array, worsened: Array, num_rows: int, difference: float) -> Array:
    """Tango's statistic: how many standard errors the seen difference lies above `difference`."""
    n, d = num_rows, difference
    # Half of a quadratic: the likeliest share of worsened rows where the true difference is d.
    linear = -improved - worsened + (2 * n - improved + worsened) * d
    constant = -worsened * d * (1 - d)
    share = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = np.maximum(n * (2 * share + d * (1 - d)), 0)
    above = improved - worsened - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(above) < 1e-9, 0.0, above / np.sqrt(variance))


def _score_lower_limit(improved: int, worsened: int, num_rows: int, tail: float) -> float:
    from scipy.stats import norm

    quantile = float(norm.ppf(1 - tail))
    b, c = np.array([float(improved)]), np.array([float(worsened)])

    def is_outside(difference: float) -> bool:
        return bool(_score_statistic(b, c, num_rows, difference)[0] >= quantile)

    return _first_inside(is_outside, (improved - worsened) / num_rows)


def _exact_lower_limit(improved: int, worsened: int, num_rows: int, tail: float) -> float:
    tables = _tables(num_rows)
    seen = np.array([float(improved)]), np.array([float(worsened)])

    def is_outside(difference: float) -> bool:
        statistic = _score_statistic(tables.improved, tables.worsened, num_rows, difference)
        as_extreme = statistic >= _score_statistic(*seen, num_rows, difference)[0] - 1e-9
        return bool(tables.probability(as_extreme, difference).max() <= tail)

    return _first_inside(is_outside, (improved - worsened) / num_rows)


def _first_inside(is_outside: Callable[[float], bool], seen: float) -> float:
    """The smallest difference between -1 and what was seen that is not outside, from below."""
    grid = np.linspace(-1.0, seen, _SCAN_POINTS + 1)
    last_outside = -1.0
    for point in grid:
        if not is_outside(float(point)):
            break
        last_outside = float(point)
    else:
        return seen
    low, high = last_outside, float(point)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if is_outside(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class _Tables:
    """All outcomes (improved, worsened) of so many rows, and the logarithm of the ways to each."""

    improved: Array
    worsened: Array
    log_ways: Array
    num_rows: int

    def probability(self, chosen: Array, difference: float) -> Array:
        """Of the chosen outcomes together, at each possible share of worsened rows; (points,)."""
        from scipy.special import xlogy

        down = np.linspace(max(0.0, -difference), (1 - difference) / 2, _NUISANCE_POINTS)[:, None]
        up, same = down + difference, np.maximum(1 - 2 * down - difference, 0)
        b, c = self.improved[chosen], self.worsened[chosen]
        logs = self.log_ways[chosen] + xlogy(b, np.maximum(up, 0)) + xlogy(c, down)
        logs = logs + xlogy(self.num_rows - b - c, same)
        return np.asarray(np.exp(logs).sum(axis=1))


@cache
def _tables(num_rows: int) -> _Tables:
    from scipy.special import gammaln

    b, c = (grid.ravel().astype(float) for grid in np.indices((num_rows + 1, num_rows + 1)))
    possible = b + c <= num_rows
    b, c = b[possible], c[possible]
    ways = gammaln(num_rows + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(num_rows - b - c + 1)
    return _Tables(b, c, ways, num_rows)


# -------------------------------------------------------------------------------------------- scores of any size


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Expanded percentile bootstrap of the mean difference, drawing rows with both of their scores.

    The percentiles lie further out than those of the plain bootstrap, as much as Student's t lies beyond the normal
    distribution: the plain one is too narrow where rows are few.

    Args:
        base: (rows,) score of each row.
        tuned: (rows,) score of the same rows.
        weights: (rows,) for a weighted mean, such as the tokens of each row; None: all rows alike.
        seed: of the draws.
        num_resamples: how many sets of rows are drawn.
        confidence: share of the resampled means inside the interval.

    Raises:
        ValueError: no rows, or lists of different lengths.

    Source: Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015, 3.4.
    """
    _check_pairs(base, tuned, weights)
    mass = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=np.float64)
    difference = (np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)) * mass
    means = _resampled_means(difference, mass, seed=seed, num_resamples=num_resamples)
    tail = _expanded_tail((1 - confidence) / 2, len(base))
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = float(difference.sum() / mass.sum())
    return Interval(
        mean_difference=mean, low=float(low), high=float(high), num_rows=len(base), method="bootstrap"
    )


def _expanded_tail(tail: float, num_rows: int) -> float:
    from scipy.stats import norm, t

    if num_rows < 2:
        return tail
    return float(norm.cdf(math.sqrt(num_rows / (num_rows - 1)) * t.ppf(tail, num_rows - 1)))


def _of_equal_differences(difference: float, num_rows: int, confidence: float) -> Interval:
    """Where every row changed by the same amount: at most this share of all rows can do otherwise, by up to 1."""
    others = 1 - ((1 - confidence) / 2) ** (1 / num_rows)
    low, high = (difference * (1 - others) + end * others for end in (-1, 1))
    return Interval(mean_difference=difference, low=low, high=high, num_rows=num_rows, method="bound")


def _resampled_means(sums: Array, mass: Array, *, seed: int, num_resamples: int) -> Array:
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWN // len(sums))
    means = []
    for start in range(0, num_resamples, at_once):
        rows = generator.integers(len(sums), size=(min(at_once, num_resamples - start), len(sums)))
        means.append(sums[rows].sum(axis=1) / mass[rows].sum(axis=1))
    return np.concatenate(means)


def _check_pairs(base: Sequence[float], tuned: Sequence[float], weights: Sequence[float] | None) -> None:
    if not len(base) or len(base) != len(tuned) or (weights is not None and len(weights) != len(base)):
        raise ValueError(f"paired scores are needed, got {len(base)} and {len(tuned)}")
