"""The forward passes that a training will make of its rows: the largest one, a typical one, and how many a step has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phlora.data.collate import Batch, collator_of
from phlora.data.packing import TokenSequences
from phlora.data.table import IGNORED, TokenizedRow
from phlora.forecast.trace import PassShape
from phlora.models.families import longrope_limit
from phlora.models.lm_head import targets_and_weights
from phlora.models.prefix_attention import copy_cost
from phlora.models.prefix_sharing import first_steps

# Rows that are laid out to know the passes: a moment for any data set.
_ROWS = 2048


@dataclass(frozen=True)
class Layout:
    """How rows become batches.

    Attributes:
        batch_size: sequences of a micro-batch.
        accumulated: micro-batches of an optimizer step.
        shared: whether rows share their common starts.
        packed: whether a sequence is a pack of rows.
        pad_token_id: fills padded rows.
        seed: of the shuffled epoch that is looked at.
    """

    batch_size: int
    accumulated: int = 1
    shared: bool = False
    packed: bool = False
    pad_token_id: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Passes:
    """What the forward passes of a training are like.

    Attributes:
        largest: by positions, of those of the first steps and, where rows are padded, of the batch with the longest.
        typical: the batch of the pass that is closest to the mean.
        most_of_a_step: passes of the step that has most.
        positions: of a step, on average.
        typical_positions: of the typical batch.
        tokens: of the rows of a step, on average.
    """

    largest: PassShape
    typical: Batch
    most_of_a_step: int
    positions: float
    typical_positions: int
    tokens: float


def passes_of(
    sequences: Sequence[Sequence[TokenizedRow]],
    layout: Layout,
    *,
    config: Any,
    device: torch.device,
    most_typical: int | None = None,
) -> Passes:
    """The passes of the first steps of a shuffled epoch.

    Args:
        sequences: rows, or packs of rows, at least one.
        config: of the model: how far rotary factors reach, and windows.
        most_typical: positions of the typical batch, of which only so many rows are taken, but one at least.
    """
    limit = longrope_limit(config)
    longest = max(
        sequences.rows.lengths.tolist()
        if isinstance(sequences, TokenSequences)
        else [len(row.input_ids) for rows in sequences for row in rows]
    )
    steps = list(
        first_steps(
            sequences,
            layout.batch_size,
            accumulated=layout.accumulated,
            rope_limit=limit,
            copy_cost=copy_cost(_Only(config), device, longest=longest),  # type: ignore[arg-type]
            seed=layout.seed,
            most_rows=_ROWS,
        )
    )
    passes = [[rows for rows, _ in step.shared] if layout.shared else step.parts for step in steps]
    sizes = [
        [_positions(step.shared[n][1] if layout.shared else None, rows, layout) for n, rows in enumerate(of)]
        for step, of in zip(steps, passes, strict=True)
    ]
    flat = [
        (size, rows)
        for of, many in zip(passes, sizes, strict=True)
        for size, rows in zip(many, of, strict=True)
    ]
    mean = sum(size for size, _ in flat) / len(flat)
    _, typical = min(flat, key=lambda pair: abs(pair[0] - mean))
    batch_of_few = _batch_of_few(typical, layout, limit, most_typical)
    _, largest = max(flat, key=lambda pair: pair[0])
    batch = collate(largest, layout, limit)
    shape = shape_of(batch)
    if not layout.shared and not layout.packed and len(sequences) >= layout.batch_size:
        # The longest row stands in some batch of every epoch.
        shape = PassShape(layout.batch_size, max(longest, shape.length), shape.trained, masked=shape.masked)
    return Passes(
        largest=shape,
        typical=batch_of_few,
        most_of_a_step=max(map(len, passes)),
        positions=sum(size for size, _ in flat) / len(steps),
        typical_positions=batch_of_few["input_ids"].numel(),
        tokens=sum(len(row.input_ids) for step in steps for rows in step.parts for row in rows) / len(steps),
    )


def _batch_of_few(
    rows: Sequence[TokenizedRow], layout: Layout, rope_limit: int | None, most: int | None
) -> Batch:
    """The first rows whose batch has at most so many positions; one at least."""
    while True:
        batch = collate(rows, layout, rope_limit)
        positions = batch["input_ids"].numel()
        if most is None or positions <= most or len(rows) == 1:
            return batch
        rows = rows[: max(1, min(len(rows) - 1, len(rows) * most // positions))]


def collate(rows: Sequence[TokenizedRow], layout: Layout, rope_limit: int | None) -> Batch:
    """The batch that the trainer makes of these rows."""
    made = collator_of(
        shared=layout.shared, packed=layout.packed, pad_token_id=layout.pad_token_id, rope_limit=rope_limit
    )
    return made(rows)


def shape_of(batch: Batch) -> PassShape:
    """What of a batch decides how much memory its pass takes."""
    rows, length = batch["input_ids"].shape
    trained = int((targets_and_weights(batch)[0] != IGNORED).sum())
    mask = batch.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    packed = "position_ids" in batch and batch.get("segments") is None
    return PassShape(rows, length, trained, segments=batch.get("segments"), masked=padded or packed)


def _positions(segments: Any, rows: Sequence[TokenizedRow], layout: Layout) -> int:
    if segments is not None:
        return int(segments.num_positions)
    lengths = [len(row.input_ids) for row in rows]
    return sum(lengths) if layout.packed else max(lengths) * len(lengths)


@dataclass(frozen=True)
class _Only:
    """What is asked of a model here."""

    config: Any
