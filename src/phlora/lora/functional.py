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
    All blocks see the same dropped-out `x`. A plain LoRA is one block of all rows. The adapter is computed in the dtype
    of `x`; its own parameters may have another one.
    """
    operand = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    y = operand.matmul(x, bias)
    u = F.linear(F.dropout(x, dropout), lora_A.to(x.dtype))
    for block, columns, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
        y[..., block.rows] += F.linear(u[..., columns], B.to(x.dtype)) * block.scaling
    return y


def delta_weight(
    lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock], out_features: int
) -> Tensor:
    """`ΔW (N, K)`: `scaling_i · B_i A_i` in the rows of each block, zero elsewhere."""
    delta = lora_A.new_zeros(out_features, lora_A.shape[1])
    for block, rows, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
        delta[block.rows] = block.scaling * (B @ lora_A[rows])
    return delta


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock]
) -> Tensor:
    """`W + ΔW (N, K)`, added in fp32 at least and rounded once to the dtype of `weight`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide_B = [B.to(dtype) for B in lora_B]
    delta = delta_weight(lora_A.to(dtype), wide_B, blocks=blocks, out_features=weight.shape[0])
    return (weight.to(dtype) + delta).to(weight.dtype)
