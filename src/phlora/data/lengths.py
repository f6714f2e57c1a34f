"""How long rows are in tokens, and how many of them a limit keeps whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_BINS = 12
_SHARES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


def histogram(lengths: Sequence[int], *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Lengths in tokens counted in at most `num_bins` bins of equal width."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // num_bins)
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    return tuple(
        Bin(low + index * width, low + (index + 1) * width - 1, count) for index, count in enumerate(counts)
    )


def percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """The length that so many percent of the rows do not exceed; empty without rows."""
    if not lengths:
        return {}
    found = np.percentile(np.asarray(lengths), _SHARES, method="inverted_cdf")
    return {share: int(length) for share, length in zip(_SHARES, found, strict=True)}


def limits_text(shares: Mapping[int, float]) -> str:
    """What `whole_at` found, as a line."""
    kept = ", ".join(f"{limit} keeps {100 * share:.4g} %" for limit, share in shares.items())
    return f"max_length {kept} of the rows whole"


def percentiles_text(found: Mapping[int, int]) -> str:
    """What `percentiles` found, as a line."""
    half, most, nearly_all, longest = found.values()
    return (
        f"tokens per row, before anything is cut: half have at most {half}, 90 % {most}, 99 % {nearly_all}; "
        f"the longest has {longest}"
    )


def whole_at(lengths: Sequence[int], max_length: int) -> dict[int, float]:
    """The share of rows that are whole at a limit, at its half and double and so on, as far as that tells."""
    ordered = np.sort(np.asarray(lengths))
    limits = sorted({max_length, max_length // 4, max_length // 2, max_length * 2, max_length * 4})
    shares = {n: float(np.searchsorted(ordered, n, side="right") / max(1, len(ordered))) for n in limits if n}
    full = min((n for n, share in shares.items() if share == 1), default=None)
    return {
        n: share for n, share in shares.items() if n == max_length or (share and (full is None or n <= full))
    }
