"""Whether the rows of a run share the computation of their common starts, and what that saves, forecast."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from phlora.config import Speed
from phlora.data.collate import sharing_keys
from phlora.data.packing import TokenSequences
from phlora.data.prefixes import Segments, share_in_passes, share_prefixes
from phlora.data.table import TokenizedRow, TokenTable
from phlora.models.families import longrope_limit
from phlora.models.prefix_attention import copy_cost, sharing_obstacle

# Sharing is worth its layout from this share of saved positions on.
_WORTHWHILE_SHARING = 0.1
# On a CPU short passes are slow: rows of 110 tokens take 1.2 times as long one by one as in streams of 256. Fewer
# passes are worth the layout from this share of them on, though none of their positions is saved.
_WORTHWHILE_MERGING = 0.2
# Rows that a forecast looks at: enough for a share to within a few percent, a moment for any data set.
_FORECAST_ROWS = 1024

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Forecast:
    """Counts over the first optimizer steps of a shuffled epoch.

    Attributes:
        tokens: of the rows.
        padded_positions: computed in the plain layout: padded rows, or packs.
        positions: computed with common starts standing once.
        micro_batches: in the plain layout.
        passes: that the rows of these micro-batches take.
    """

    tokens: int = 0
    padded_positions: int = 0
    positions: int = 0
    micro_batches: int = 0
    passes: int = 0

    @property
    def saved(self) -> float:
        """Share of the positions that need not be computed."""
        return 1 - self.positions / self.padded_positions

    @property
    def merged(self) -> float:
        """Share of the passes that need not be made."""
        return 1 - self.passes / self.micro_batches

    def describe(self) -> str:
        """`74% fewer positions to compute, 4 micro-batches as 1`."""
        merged = ""
        if self.passes < self.micro_batches:
            merged = f", {self.micro_batches:,} micro-batches as {self.passes:,}"
        return f"{self.saved:.0%} fewer positions to compute{merged}"


@dataclass(frozen=True)
class Sharing:
    """Whether rows of an optimizer step share the computation of their common starts, and why (not).

    Attributes:
        forecast: None where sharing would not be exact or is turned off.
    """

    on: bool
    reason: str
    forecast: Forecast | None = None

    def describe(self) -> str:
        """One line for the log."""
        return f"{'on' if self.on else 'off'}: {self.reason}"


def decide_sharing(
    model: Any,
    sequences: Sequence[Sequence[TokenizedRow]],
    *,
    speed: Speed,
    batch_size: int,
    args: Any = None,
    held_out: TokenTable | None = None,
    device: torch.device | None = None,
) -> Sharing:
    """Share where it is exact and computes at least a tenth fewer positions than the plain layout, or on a CPU takes a
    fifth fewer passes for them.

    Args:
        model: of transformers, plain or as a PeftModel.
        sequences: rows or packs of rows, `batch_size` of which meet in a forward pass.
        speed: the run's setting.
        args: the `trl.SFTConfig` of the training; None for an evaluation.
        held_out: rows that the training evaluates in the same layout.
        device: where the model will compute, if not where it is.
    """
    if speed == "reference":
        return Sharing(False, "speed is reference")
    lengths = _row_lengths(sequences) + (held_out.lengths.tolist() if held_out is not None else [])
    if not lengths:
        return Sharing(False, "there are no rows")
    obstacle = (args and _training_obstacle(args)) or sharing_obstacle(model, training=args is not None)
    if obstacle:
        return Sharing(False, obstacle)
    packed = args is not None and bool(args.packing)
    forecast = _forecast(
        sequences,
        batch_size,
        accumulated=args.gradient_accumulation_steps if args else 1,
        rope_limit=longrope_limit(model.config),
        copy_cost=copy_cost(model, device or model.device, longest=max(lengths)),
        packed=packed,
        seed=args.seed if args else 0,
    )
    # Packs lie in one stream either way, and this one's attention does no work between rows.
    on_cpu = (device or model.device).type == "cpu"
    merges = on_cpu and forecast.merged >= _WORTHWHILE_MERGING
    if packed or merges or forecast.saved >= _WORTHWHILE_SHARING:
        return Sharing(True, forecast.describe(), forecast)
    return Sharing(False, f"it would save {forecast.saved:.0%} of the positions, too few to pay", forecast)


def _row_lengths(sequences: Sequence[Sequence[TokenizedRow]]) -> list[int]:
    """Tokens of each row."""
    if isinstance(sequences, TokenSequences):
        lengths: list[int] = sequences.rows.lengths.tolist()
        return lengths
    return [len(row.input_ids) for rows in sequences for row in rows]


def _training_obstacle(args: Any) -> str | None:
    """What, of the trainer's settings, needs the plain layout."""
    obstacles = {
        "neftune_noise_alpha is set: rows would share one noise": args.neftune_noise_alpha,
        f"loss_type {args.loss_type} needs the logits of whole rows": args.loss_type != "nll",
        "torch_compile would compile each new layout": args.torch_compile,
        "several devices in one process would cut the stream apart": args.n_gpu > 1,
        "split_batches would cut the stream apart": args.accelerator_config.split_batches,
        "dispatch_batches would cut the stream apart": args.accelerator_config.dispatch_batches,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


@dataclass(frozen=True)
class LaidOut:
    """The rows of one optimizer step.

    Attributes:
        parts: the rows of each micro-batch, in the plain layout.
        shared: the passes that they take with common starts standing once; the rows of each pass are beside it.
    """

    parts: list[list[TokenizedRow]]
    shared: list[tuple[list[TokenizedRow], Segments]]


def first_steps(
    sequences: Sequence[Sequence[TokenizedRow]],
    batch_size: int,
    *,
    accumulated: int,
    rope_limit: int | None,
    copy_cost: float,
    seed: int,
    most_rows: int = _FORECAST_ROWS,
) -> Iterator[LaidOut]:
    """The first steps of a shuffled epoch, `accumulated` batches of which are laid out together."""
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    most = batch_size * max(_lengths(sequences))
    seen = 0
    for start in range(0, len(order), batch_size * accumulated):
        if seen >= most_rows:
            break
        step = [sequences[n] for n in order[start : start + batch_size * accumulated]]
        parts = [_flat(step[first : first + batch_size]) for first in range(0, len(step), batch_size)]
        batches = [[sharing_keys(row, rope_limit=rope_limit) for row in rows] for rows in parts]
        together, rows = (
            share_in_passes(_flat(batches), max_positions=most, copy_cost=copy_cost),
            _flat(parts),
        )
        shared = [([rows[n] for n in segments.rows_of(0)], segments) for segments in together]
        if len(batches) == 1 or len(together) > len(batches):
            alone = [share_prefixes(keys) for keys in batches]
            shared = list(zip(parts, alone, strict=True))
        seen += len(rows)
        yield LaidOut(parts, shared)


def _forecast(
    sequences: Sequence[Sequence[TokenizedRow]],
    batch_size: int,
    *,
    accumulated: int,
    rope_limit: int | None,
    copy_cost: float,
    packed: bool,
    seed: int,
) -> Forecast:
    tokens = padded = positions = micro_batches = passes = 0
    for step in first_steps(
        sequences,
        batch_size,
        accumulated=accumulated,
        rope_limit=rope_limit,
        copy_cost=copy_cost,
        seed=seed,
    ):
        for rows in step.parts:
            lengths = [len(row.input_ids) for row in rows]
            tokens += sum(lengths)
            padded += sum(lengths) if packed else max(lengths) * len(lengths)
        positions += sum(segments.num_positions for _, segments in step.shared)
        micro_batches += len(step.parts)
        passes += len(step.shared)
    return Forecast(tokens, padded, positions, micro_batches, passes)


def _flat(lists: Iterable[Iterable[_Item]]) -> list[_Item]:
    return [item for items in lists for item in items]


def _lengths(sequences: Sequence[Sequence[TokenizedRow]]) -> list[int]:
    """Tokens of each sequence."""
    if isinstance(sequences, TokenSequences):
        return sequences.lengths
    return [sum(len(row.input_ids) for row in rows) for rows in sequences]
