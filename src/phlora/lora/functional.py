"""LoRA as readable formulas: the truth that `fused.py` is tested against, with the same names and signatures.

    y = x Wᵀ + bias;   y[:, rows_i] += scaling_i · dropout(x) A_iᵀ B_iᵀ   for each adapted row block i

Legend: `T` tokens (any leading dimensions), `N` out, `K` in, `R` rank.
Source: LoRA (Hu et al. 2021), section 4.1; dropout on the input of A as in its reference implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from phlora.lora.blocks import RowBlock, rank_slices
from phlora.lora.operands import DenseWeight, FrozenWeight


def lora_blocks(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    *,
    blocks: Sequence[RowBlock],
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`y = x Wᵀ + bias`, and `scaling_i · dropout(x) A_iᵀ B_iᵀ` in the rows of each adapted block.

    Shapes: x (T, K), weight (N, K), lora_A (ΣR_i, K), lora_B [(N_i, R_i), ...], bias (N,) -> (T, N).
    All blocks see the same dropped-out `x`. A plain LoRA is one block of all rows. The adapter is computed in the
    wider of its own dtype and that of `x`, and rounded once.
    """
    operand = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    y = operand.matmul(x, bias)
    return add_lora_blocks(y, F.dropout(x, dropout), lora_A, lora_B, blocks=blocks)


def add_lora_blocks(
    y: Tensor, dropped: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock]
) -> Tensor:
    """`y`, and `scaling_i · dropped A_iᵀ B_iᵀ` in the rows of each block, rounded once to the dtype of `y`.

    Shapes: y (T, N), dropped (T, K), lora_A (ΣR_i, K), lora_B [(N_i, R_i), ...] -> (T, N).
    """
    wide = torch.promote_types(dropped.dtype, lora_A.dtype)
    u = F.linear(dropped.to(wide), lora_A.to(wide))
    parts = []
    for block, columns, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
        parts.append(F.linear(u[..., columns], B.to(wide)) * block.scaling)
    return (y + in_rows(parts, blocks, dim=-1, size=y.shape[-1])).to(y.dtype)


def delta_weight(
    lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock], out_features: int
) -> Tensor:
    """`ΔW (N, K)`: `scaling_i · B_i A_i` in the rows of each block, zero elsewhere."""
    parts = []
    for block, rows, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
        parts.append(block.scaling * (B @ lora_A[rows]))
    return in_rows(parts, blocks, dim=0, size=out_features)


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock]
) -> Tensor:
    """`W + ΔW (N, K)`, added in fp32 at least and rounded once to the dtype of `weight`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide_B = [B.to(dtype) for B in lora_B]
    delta = delta_weight(lora_A.to(dtype), wide_B, blocks=blocks, out_features=weight.shape[0])
    return (weight.to(dtype) + delta).to(weight.dtype)


def in_rows(parts: Sequence[Tensor], blocks: Sequence[RowBlock], *, dim: int, size: int) -> Tensor:
    """The parts in the places of their blocks along `dim`, and zeros between: `size` in all.

    Writes into nothing, for vmap's sake.
    """
    pieces, start = [], 0
    for part, block in zip(parts, blocks, strict=True):
        pieces += [_zeros(part, dim, block.start - start), part]
        start = block.stop
    pieces.append(_zeros(parts[-1], dim, size - start))
    pieces = [piece for piece in pieces if piece.shape[dim]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)
