"""Curves and lengths as plots: the only module that imports matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phlora.extras import require


def plot_loss(
    training: Sequence[Sequence[float]], evaluation: Sequence[Sequence[float]], *, ax: Any = None
) -> Any:
    """Losses over optimizer steps.

    Args:
        training: (step, loss) of each logged step.
        evaluation: (step, held-out loss) of each evaluation.
        ax: where to draw; None makes a figure.

    Returns:
        The `matplotlib.axes.Axes`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ax = _axes(ax)
    if training:
        ax.plot(*zip(*training, strict=True), label="training", color="#2563eb", linewidth=1.5)
    if evaluation:
        ax.plot(*zip(*evaluation, strict=True), label="held out", color="#d97706", marker="o", linewidth=1.5)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss a trained token")
    if training or evaluation:
        ax.legend()
    return ax


def plot_lengths(
    bins: Sequence[tuple[int, int, int]], *, max_length: int | None = None, ax: Any = None
) -> Any:
    """How many rows have how many tokens.

    Args:
        bins: (fewest tokens, most tokens, rows), both ends included.
        max_length: the limit, shown as a line where it is within the plot.
        ax: where to draw; None makes a figure.

    Returns:
        The `matplotlib.axes.Axes`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ax = _axes(ax)
    lows, widths = [low for low, _, _ in bins], [high - low + 1 for low, high, _ in bins]
    ax.bar(
        lows, [count for _, _, count in bins], width=widths, align="edge", color="#2563eb", edgecolor="white"
    )
    if max_length is not None and bins and max_length <= bins[-1][1] + widths[-1]:
        ax.axvline(max_length, color="#d97706", linestyle="--", label=f"max_length {max_length:,}")
        ax.legend()
    ax.set_xlabel("tokens a row")
    ax.set_ylabel("rows")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    require({"matplotlib": "plots"})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6.5, 3.5), layout="constrained")[1]
