"""Token rows to tensors, padded or packed.

Legend: `B` rows, `T` tokens. What is padding follows from the lengths, never from an id: the pad token may
be a token that is trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from phlora.data.tokenize import IGNORED, TokenizedRow

Feature: TypeAlias = TokenizedRow | Mapping[str, Any]
Batch: TypeAlias = dict[str, torch.Tensor]


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


def _parts(feature: Feature) -> tuple[Sequence[int], Sequence[int], Sequence[float] | None]:
    if isinstance(feature, TokenizedRow):
        return feature.input_ids, feature.labels, feature.weights
    return feature["input_ids"], feature["labels"], feature.get("weights")


def _weights(labels: Sequence[int], weights: Sequence[float] | None) -> Sequence[float]:
    return [float(label != IGNORED) for label in labels] if weights is None else weights
