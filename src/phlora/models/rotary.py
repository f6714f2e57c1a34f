"""Rotary factors of longrope models, chosen for each row as if it were alone.

Legend: `B` rows of a batch, `T` positions, `E` rotated part of a head.

A longrope model (Phi-3-mini-128k, Phi-4-mini) has two sets of rotary factors: short ones for a row of up to
`original_max_position_embeddings` tokens, long ones for a longer row. transformers 5.23 looks at the largest position
of the whole batch, so that one long row changes what every short row beside it computes. Here each row decides for
itself, in padded batches, in packs, and where rows share their first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phlora.data.prefixes import Segments
from phlora.errors import ModelError
from phlora.models.causal_lm import Decoder
from phlora.models.families import longrope_limit


@contextmanager
def rotated_by_row(trunk: Decoder, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the trunk rotates each row of these inputs with the factors that it would have alone.

    Raises:
        ModelError: rows on both sides of the limit share their first tokens.
    """
    limit = longrope_limit(trunk.config)
    if limit is None or inputs["input_ids"].shape[-1] <= limit:
        yield
        return
    is_long = (_row_lengths(inputs, limit) > limit).unsqueeze(-1)

    def choose(
        rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
    ) -> tuple[Tensor, ...]:
        x, positions = args[0], kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        short = rotary.forward(x, positions.clamp(max=limit - 1))
        long = rotary.forward(x, F.pad(positions, (0, 1), value=limit))
        return tuple(torch.where(is_long, b[:, :-1], a) for a, b in zip(short, long, strict=True))

    hook = trunk.rotary_emb.register_forward_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _row_lengths(inputs: Mapping[str, Any], limit: int) -> Tensor:
    """Tokens of the row that each position belongs to: (B, T), or (B, 1) where a batch row is one row."""
    ids: Tensor = inputs["input_ids"]
    mask: Tensor | None = inputs.get("attention_mask")
    positions: Tensor | None = inputs.get("position_ids")
    if inputs.get("segments") is not None:
        return torch.tensor([_lengths_along(inputs["segments"], limit)], device=ids.device)
    if positions is not None:
        # A row begins wherever positions do.
        row = (positions == 0).cumsum(-1)
        longest = positions.new_zeros(len(positions), positions.shape[-1] + 1)
        return longest.scatter_reduce(-1, row, positions + 1, "amax").gather(-1, row)
    if mask is not None:
        return mask.sum(-1, keepdim=True)
    return torch.full((len(ids), 1), ids.shape[-1], device=ids.device)


def _lengths_along(segments: Segments, limit: int) -> list[int]:
    longest = [0] * segments.num_positions
    for path in segments.paths.values():
        for position in path:
            shorter, longer = sorted((longest[position] or len(path), len(path)))
            if shorter <= limit < longer:
                raise ModelError(
                    f"Rows of {shorter} and {longer} tokens share their first tokens, which the model rotates "
                    f"with other factors past {limit}",
                    fix=f"collate them with SharedPrefixCollator(rope_limit={limit})",
                )
            longest[position] = longer
    return longest
