"""Token rows to tensors: padded, packed, or with shared starts standing once.

Legend: `B` rows, `T` tokens. What is padding follows from the lengths, never from an id: the pad token may
be a token that is trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from phlora.data.prefixes import Segments, share_in_passes, share_prefixes
from phlora.data.rows import Origin, kind_of
from phlora.data.table import IGNORED, TokenizedRow
from phlora.errors import DataError

Feature: TypeAlias = TokenizedRow | Mapping[str, Any]
Batch: TypeAlias = dict[str, Any]

# Beyond every other key.
_LONG_ROW = 1 << 80


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right.

    Returns `input_ids`, `attention_mask` and `labels` (B, T) int64, and `loss_weights` (B, T) float32 only
    when a row has weights (0 at padding).

    Args:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: round T up.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Feature]) -> Batch:
        rows = [_parts(feature) for feature in features]
        length = max(len(ids) for ids, _, _ in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(values: Sequence[Any], fill: float) -> list[Any]:
            return [*values, *[fill] * (length - len(values))]

        batch = {
            "input_ids": torch.tensor([padded(ids, self.pad_token_id) for ids, _, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _, _ in rows]),
            "labels": torch.tensor([padded(labels, IGNORED) for _, labels, _ in rows]),
        }
        if any(weights is not None for _, _, weights in rows):
            batch["loss_weights"] = torch.tensor(
                [padded(_weights(labels, weights), 0.0) for _, labels, weights in rows], dtype=torch.float32
            )
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Lays the rows of one pack end to end.

    Returns `input_ids`, `labels` and `position_ids` (1, T) int64, with positions that restart at 0 in each
    row and no attention mask (transformers finds the rows by their positions only without one), and
    `loss_weights` (1, T) float32 only when a row has weights. The first label of each row is -100: the
    token before it belongs to another row.
    """

    def __call__(self, features: Sequence[Feature]) -> Batch:
        rows = [_parts(feature) for feature in features]
        batch = {
            "input_ids": torch.tensor([[token for ids, _, _ in rows for token in ids]]),
            "labels": torch.tensor([[label for _, labels, _ in rows for label in (IGNORED, *labels[1:])]]),
            "position_ids": torch.tensor([[place for ids, _, _ in rows for place in range(len(ids))]]),
        }
        if any(weights is not None for _, _, weights in rows):
            flat = [weight for _, labels, weights in rows for weight in (0.0, *_weights(labels, weights)[1:])]
            batch["loss_weights"] = torch.tensor([flat], dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class SharedPrefixCollator:
    """Lays rows out as one stream of groups, in which a common start of several rows stands once.

    Returns `segments` (`phlora.data.prefixes.Segments`) and, each (1, T), `input_ids` and `position_ids` int64,
    `shift_labels` int64: the token that each position is trained to predict, -100 where none, and
    `loss_weights` float32: the weight of that prediction, summed over the rows that share it. Labels are
    shifted here because a shared token is followed by a tail, not by its successor. What follows the last position
    that predicts a trained token is left out: nothing depends on it. `num_tokens` counts the rows in full, and
    `rows` is what `share_step` lays out anew.

    Args:
        rope_limit: rows that are longer share nothing with those that are not: a longrope model rotates them with
            other factors (`phlora.models.rotary.longrope_limit`).
    """

    rope_limit: int | None = None

    def __call__(self, features: Sequence[Feature]) -> Batch:
        rows = tuple(_Row.of(feature, self.rope_limit) for feature in features)
        return {**_shared(rows), "rows": rows}


def collator_of(
    *, shared: bool, packed: bool, pad_token_id: int, rope_limit: int | None
) -> Callable[[Sequence[Feature]], Batch]:
    """How the rows of a training become a batch: with shared starts standing once, packed, or padded."""
    if shared:
        return SharedPrefixCollator(rope_limit)
    return PackedCollator() if packed else Collator(pad_token_id)


def share_step(
    batches: Sequence[Batch], *, max_positions: int | None = None, copy_cost: float = 0.0
) -> list[Batch]:
    """The rows of several batches laid out together, so that rows of different batches share their starts.

    Args:
        batches: of one optimizer step, as `SharedPrefixCollator` returns them.
        max_positions: of one forward pass; None: as many as the largest of the batches has with its rows padded.
        copy_cost: as in `share_in_passes`.

    Returns:
        At most as many batches, with the same rows and no more positions in all; the batches themselves where
        best fit finds nothing as good.
    """
    if max_positions is None:
        max_positions = max(
            len(batch["rows"]) * max(row.num_tokens for row in batch["rows"]) for batch in batches
        )
    rows = [row for batch in batches for row in batch["rows"]]
    passes = share_in_passes([row.keys for row in rows], max_positions=max_positions, copy_cost=copy_cost)
    before = sum(batch["segments"].num_positions for batch in batches)
    if len(passes) > len(batches) or sum(segments.num_positions for segments in passes) > before:
        return list(batches)
    return [_stream(rows, segments) for segments in passes]


def _stream(rows: Sequence[_Row], segments: Segments) -> Batch:
    """The tensors of the rows that stand in the segments."""
    ids, places, targets = ([0] * segments.num_positions for _ in range(3))
    weights = [0.0] * segments.num_positions
    for number, group in enumerate(segments.groups):
        if group.shared:
            members = [rows[row] for row in segments.rows_of(number)]
            span = slice(group.shared.start, group.shared.stop)
            shared = range(group.num_shared - len(group.shared), group.num_shared)
            ids[span] = members[0].ids[shared.start : shared.stop]
            places[span] = shared
            targets[span] = [max(row.targets[place] for row in members) for place in shared]
            weights[span] = [sum(row.weights[place] for row in members) for place in shared]
        for row, start, length in group.tails():
            span, own = slice(start, start + length), slice(group.num_shared, None)
            ids[span] = rows[row].ids[own]
            places[span] = range(group.num_shared, group.num_shared + length)
            targets[span] = rows[row].targets[own]
            weights[span] = rows[row].weights[own]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([places]),
        "shift_labels": torch.tensor([targets]),
        "loss_weights": torch.tensor([weights], dtype=torch.float32),
        "segments": segments,
        "num_tokens": sum(rows[row].num_tokens for row in segments.rows_of(0)),
        "rows": tuple(rows[row] for row in segments.rows_of(0)),
    }


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """A batch as two with half of its rows each, in the same layout; None where it is one row, or cannot be told apart.

    The losses of the two sum to that of the whole: nothing of one row depends on another.

    Args:
        batch: as a collator of this module or of TRL returns it; `origins`, where there are some, are divided too.
    """
    if batch.get("segments") is not None:
        rows = batch.get("rows", ())
        if len(rows) < 2:
            return None
        middle = len(rows) // 2
        first, second = (_shared(part) for part in (rows[:middle], rows[middle:]))
        return first, second
    num_rows, length = batch["input_ids"].shape
    if num_rows > 1:
        middle = num_rows // 2
        return _some_rows(batch, slice(0, middle)), _some_rows(batch, slice(middle, num_rows))
    starts = _starts_of_rows(batch)
    if len(starts) < 2:
        return None
    number = min(range(1, len(starts)), key=lambda number: abs(2 * starts[number] - length))
    border = starts[number]
    return (
        _some_positions(batch, slice(0, border), slice(0, number)),
        _some_positions(batch, slice(border, length), slice(number, len(starts))),
    )


def _shared(rows: Sequence[_Row]) -> Batch:
    return _stream(rows, share_prefixes([row.keys for row in rows]))


def _some_rows(batch: Batch, span: slice) -> Batch:
    """Rows of a padded batch, without the columns that are padding in all of them."""
    num_rows, length = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    longest = int(mask[span].any(0).nonzero().max()) + 1 if mask is not None and mask[span].any() else length

    def part(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value[span]
        return value[span, :longest] if value.shape[1:2] == (length,) else value[span]

    return {
        name: part(value) for name, value in batch.items() if value is not None and len(value) == num_rows
    }


def _starts_of_rows(batch: Batch) -> list[int]:
    """Where the rows of a packed batch begin; none where that cannot be told, or something else depends on it."""
    places, shape = batch.get("position_ids"), batch["input_ids"].shape
    others = [value for name, value in batch.items() if name != "origins"]
    if places is None or any(not isinstance(v, torch.Tensor) or v.shape != shape for v in others):
        return []
    starts: list[int] = (places[0] == 0).nonzero().flatten().tolist()
    return starts if starts and starts[0] == 0 else []


def _some_positions(batch: Batch, span: slice, rows: slice) -> Batch:
    return {name: v[rows] if name == "origins" else v[:, span] for name, v in batch.items()}


@dataclass(frozen=True)
class _Row:
    """The positions of a row with what each predicts and with what weight, and keys that are equal where rows can
    share; `num_tokens` counts the whole row, which stands at `origin`."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    keys: list[int]
    num_tokens: int
    origin: Origin | None = None

    @classmethod
    def of(cls, feature: Feature, rope_limit: int | None) -> _Row:
        ids, labels, weights = _parts(feature)
        keys = sharing_keys(feature, rope_limit=rope_limit)
        predicted = slice(1, len(keys) + 1)
        targets = [*labels[predicted], IGNORED][: len(keys)]
        weights = [*_weights(labels, weights)[predicted], 0.0]
        weights = [float(w) if label != IGNORED else 0.0 for w, label in zip(weights, targets, strict=False)]
        origin = feature.origin if isinstance(feature, TokenizedRow) else None
        return cls(list(ids[: len(keys)]), targets, weights, keys, len(ids), origin)


def sharing_keys(feature: Feature, *, rope_limit: int | None = None) -> list[int]:
    """A number for each position of a row that is computed, the last of which predicts its last trained token.

    Rows may share the tokens up to which their numbers are equal.
    """
    ids, labels, _ = _parts(feature)
    num_positions = next((place for place in range(len(labels) - 1, 0, -1) if labels[place] != IGNORED), 1)
    if rope_limit is not None and len(ids) > rope_limit:
        # What is left out must not make a long row a short one.
        num_positions = max(num_positions, rope_limit + 1)
    # A label that is not the token itself: such positions are shared only with the same label.
    keys = [
        token if label in (IGNORED, token) else -1 - (token << 32 | label)
        for token, label in zip(ids[:num_positions], labels, strict=False)
    ]
    if rope_limit is not None and len(ids) > rope_limit:
        keys[0] += _LONG_ROW
    return keys


def _parts(feature: Feature) -> tuple[Sequence[int], Sequence[int], Sequence[float] | None]:
    if isinstance(feature, TokenizedRow):
        return feature.input_ids, feature.labels, feature.weights
    try:
        return feature["input_ids"], feature["labels"], feature.get("weights")
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"{kind_of(feature)} without `input_ids` and `labels` was given to a collator",
            expected="rows as tokens",
            fix="phlora.tokenize_rows(rows, tokenizer).rows",
        ) from None


def _weights(labels: Sequence[int], weights: Sequence[float] | None) -> Sequence[float]:
    return [float(label != IGNORED) for label in labels] if weights is None else weights
