"""Between LoRA on row blocks and the plain form that stock PEFT reads; tensors only.

Blocks `i` of a fused weight `W (N, K)` add `s_i · B_i A_i` to their own rows. One plain LoRA of rank `ΣR_i` says the
same: `A` is the stack of the A_i, and `B (N, ΣR_i)` is block-diagonal, with zero rows for what is not adapted:

        q   [ B_q   0  ]      [ A_q ]
    W + k   [  0    0  ]  s   [ A_v ]
        v   [  0   B_v ]

A plain LoRA has one scaling `s`. Where the blocks' scalings differ, `s` is the smallest and `B_i` is multiplied by
`c_i = s_i / s`. Multiplying by a power of two is exact; for any other factor `B` is stored in float64, so that the way
back rounds to the very same numbers.

Legend: `N` out, `K` in, `R` rank; the sums run over the adapted blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora.errors import ModelError
from phlora.lora.blocks import RowBlock, rank_slices


def plain_rank(blocks: Sequence[RowBlock]) -> int:
    """`ΣR_i`: the rank of the plain form."""
    return sum(block.r for block in blocks)


def plain_scaling(blocks: Sequence[RowBlock]) -> float:
    """`s`: the one scaling of the plain form."""
    return min(block.scaling for block in blocks)


def plain_alpha(blocks: Sequence[RowBlock], *, use_rslora: bool = False) -> float:
    """The `lora_alpha` that gives `plain_scaling` at `plain_rank`; whole numbers as int."""
    rank = plain_rank(blocks)
    alpha = plain_scaling(blocks) * (math.sqrt(rank) if use_rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def block_factors(blocks: Sequence[RowBlock]) -> tuple[float, ...]:
    """`c_i = s_i / s` of every block."""
    scaling = plain_scaling(blocks)
    return tuple(block.scaling / scaling for block in blocks)


def to_block_diagonal(lora_B: Sequence[Tensor], blocks: Sequence[RowBlock], *, out_features: int) -> Tensor:
    """The block-diagonal `B (N, ΣR_i)` of the plain form; its `A` is the stacked `lora_A (ΣR_i, K)` as it is.

    Args:
        lora_B: the B_i (N_i, R_i), in the order of `blocks`.
        blocks: their rows, ranks and scalings.
        out_features: N, the rows of the fused weight.

    Returns:
        (N, ΣR_i) in the dtype of the B_i, or in float64 where a factor is no power of two. Differentiable.
    """
    factors = block_factors(blocks)
    exact = all(math.frexp(factor)[0] == 0.5 for factor in factors)
    dtype = lora_B[0].dtype if exact else torch.float64
    plain = lora_B[0].new_zeros(out_features, plain_rank(blocks), dtype=dtype)
    for block, columns, factor, B in zip(blocks, rank_slices(blocks), factors, lora_B, strict=True):
        plain[block.rows, columns] = B.to(dtype) * factor
    return plain


def from_block_diagonal(
    lora_B: Tensor, blocks: Sequence[RowBlock], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The B_i (N_i, R_i) of a block-diagonal `lora_B (N, ΣR_i)`, bit for bit those of `to_block_diagonal`.

    Args:
        lora_B: the plain form's B.
        blocks: rows, ranks and scalings of the blocks that it is made of.
        dtype: of the result; by default that of `lora_B`, float32 for float64.

    Raises:
        ModelError: the ranks do not add up, a block lies outside, or something lies outside the blocks.
    """
    rank, stop = plain_rank(blocks), max(block.stop for block in blocks)
    if lora_B.shape[1] != rank or lora_B.shape[0] < stop:
        raise ModelError(
            f"lora_B has the shape {tuple(lora_B.shape)}",
            expected=f"rank {rank}, the sum over {_names(blocks)}, and at least {stop} rows",
        )
    if count := _count_outside(lora_B, blocks):
        raise ModelError(
            f"{count:,} values of lora_B lie outside the blocks {_names(blocks)}",
            expected="a block-diagonal lora_B: every rank serves one block",
            fix="use the adapter in its plain form",
        )
    dtype = dtype or (torch.float32 if lora_B.dtype == torch.float64 else lora_B.dtype)
    parts = zip(blocks, rank_slices(blocks), block_factors(blocks), strict=True)
    return tuple((lora_B[block.rows, columns] / factor).to(dtype) for block, columns, factor in parts)


def fitting_blocks(lora_B: Tensor, blocks: Sequence[RowBlock]) -> tuple[RowBlock, ...]:
    """The blocks with the ranks that they have in a plain `lora_B (N, R)`, `R` any; as they are where that fits.

    Where it is not block-diagonal on them, the result is one block of all rows, which any `lora_B` is.
    """
    rank = lora_B.shape[1]
    if rank == plain_rank(blocks) and not _count_outside(lora_B, blocks):
        return tuple(blocks)
    stops = [0]
    for block in blocks[:-1]:
        used = lora_B[block.rows].any(0).nonzero()
        stops.append(max(stops[-1], int(used.max()) + 1 if len(used) else 0))
    ranks = [stop - start for start, stop in itertools.pairwise([*stops, rank])]
    ranked = tuple(dataclasses.replace(block, r=r) for block, r in zip(blocks, ranks, strict=True))
    if all(ranks) and not _count_outside(lora_B, ranked):
        return ranked
    scaling = plain_scaling(blocks)
    return (RowBlock(name="all", start=0, stop=lora_B.shape[0], r=rank, scaling=scaling),)


def _count_outside(lora_B: Tensor, blocks: Sequence[RowBlock]) -> int:
    """How many values of `lora_B` are not zero and in no block."""
    outside = lora_B.detach().clone()
    for block, columns in zip(blocks, rank_slices(blocks), strict=True):
        outside[block.rows, columns] = 0
    return int(outside.count_nonzero())


def _names(blocks: Sequence[RowBlock]) -> str:
    return ", ".join(block.name for block in blocks)
