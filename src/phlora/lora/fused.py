"""The formulas of `functional.py` as one autograd node per adapted linear: same values, less traffic.

    forward    y = x Wᵀ + b;  u = x̃ Aᵀ;  y[:, i] += s_i · u_i B_iᵀ
    backward   g_i = s_i · dy[:, i] B_i;  dB_i = s_i · dy[:, i]ᵀ u_i;  dA = gᵀ x̃;  dx = dy W;  dx += g A

with `x̃ = dropout(x)`. Each `+=` is done by the product itself, in place (addmm_), and `g` is formed once.

Kept for backward are `x (T, K)` and `u (T, ΣR)` only: no dropped-out copy and no mask
(the seed is kept and the mask drawn again), no scaled or summed copy of `(T, N)`. Where `x` says how it is computed
again, what that takes is kept in its place. A frozen weight gets no gradient product, an input that needs no gradient
none either.

Where A and B are wider than `x` (fp32 beside 16 bits) the adapter is computed in their dtype and rounded once, when it
is added; under autocast everything is in its dtype.

Second derivatives come from the reference formulas (`lora.autograd`). These stand in altogether for `torch.func`'s
transforms and for forward-mode differentiation, and while torch.compile traces: the compiler plans memory and redraws
dropout masks itself.

Legend: `T` tokens, `N` out, `K` in, `R` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from phlora.lora import functional, matmul
from phlora.lora.autograd import is_recorded_backward, only_first, recorded_gradients, sees_through
from phlora.lora.blocks import RowBlock, rank_slices
from phlora.lora.operands import DenseWeight, FrozenWeight
from phlora.lora.recompute import Recompute, recompute_of

# Numbers of fp32 that a core of today's CPUs has in its cache: 2 MiB.
_CACHED = 1 << 19


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
    """A frozen linear layer with LoRA on row blocks of its weight; see `functional.lora_blocks`.

    Kept for backward: x (T, K), x Aᵀ (T, ΣR_i), references to the parameters.
    Under autocast everything is computed in the autocast dtype, as torch's own linear is.
    """
    if sees_through():
        return functional.lora_blocks(x, weight, lora_A, lora_B, blocks=blocks, bias=bias, dropout=dropout)
    autocast = x.dtype != torch.float64 and _autocast_is_on(x.device.type)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dense, operand = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    y: Tensor = _LoraBlocks.apply(  # type: ignore[no-untyped-call]
        x, dense, bias, lora_A, operand, tuple(blocks), dropout, autocast, recompute_of(x), *lora_B
    )
    return y


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """`y = x Wᵀ + bias` that keeps nothing for backward but the weight: (..., K) -> (..., N)."""
    if not torch.is_grad_enabled() or sees_through():
        return weight.matmul(x, bias)
    y: Tensor = _FrozenLinear.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return y


def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], *, blocks: Sequence[RowBlock]
) -> Tensor:
    """`W + ΔW (N, K)` in fp32 at least, rounded once, without gradient; see `functional.merged_weight`."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.detach().to(dtype, copy=True)
    return _add_delta_(merged, lora_A, lora_B, blocks).to(weight.dtype)


@torch.no_grad()
def _add_delta_(
    weight: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], blocks: Sequence[RowBlock]
) -> Tensor:
    """Adds `scaling_i · B_i A_i` to the rows of each block in place."""
    for block, rows, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
        A = lora_A[rows].to(weight.dtype)
        weight[block.rows].addmm_(B.to(weight.dtype), A, alpha=block.scaling)
    return weight


class _LoraBlocks(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,), lora_A (ΣR_i, K), lora_B [(N_i, R_i), ...] -> (..., N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        operand: FrozenWeight | None,
        blocks: tuple[RowBlock, ...],
        dropout: float,
        autocast: bool,
        recompute: Recompute | None,
        *lora_B: Tensor,
    ) -> Tensor:
        with _without_autocast(x.device.type):
            if weight is not None:
                operand = DenseWeight(weight.to(x.dtype) if autocast else weight)
            assert operand is not None
            flat_x = _flat(x)
            y = operand.matmul(flat_x, None if bias is None else bias.to(x.dtype))
            seed = torch.empty((), dtype=torch.int64).random_() if dropout else None
            keep = _share_kept(dropout)
            dropped = flat_x if seed is None else _draw_mask(flat_x.shape, dropout, seed, like=x).mul_(flat_x)
            wide = x.dtype if autocast else torch.promote_types(x.dtype, lora_A.dtype)
            u = _onto_rank(dropped, lora_A.to(wide))
            for block, columns, B in zip(blocks, rank_slices(blocks), lora_B, strict=True):
                _addmm_(y[:, block.rows], u[:, columns], B.to(wide).t(), alpha=block.scaling / keep)

        _, need_weight, _, need_A = ctx.needs_input_grad[:4]
        need_B = any(ctx.needs_input_grad[9:])
        kept: tuple[Tensor, ...] = ()
        if need_A or need_weight:
            kept = recompute.inputs if recompute else (x,)
        # The seed is saved as a tensor, so that checkpointing replaces it together with the `u` made with it.
        ctx.save_for_backward(u if need_B else None, seed, weight, lora_A, *lora_B, *kept)
        ctx.recompute_x = recompute.function if recompute else None
        # A dense weight goes through save_for_backward only, where torch notices if it is overwritten.
        ctx.operand = operand if weight is None else None
        ctx.blocks, ctx.dropout, ctx.bias_dtype = blocks, dropout, None if bias is None else bias.dtype
        ctx.wide = wide
        # A plain view would forbid in-place activations after the layer, and FSDP2 warns of it.
        shaped: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if is_recorded_backward():
            return _recorded_backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    u, seed, weight, lora_A, *rest = ctx.saved_tensors
    lora_B, kept = rest[: len(ctx.blocks)], rest[len(ctx.blocks) :]
    need_x, need_weight, need_bias, need_A = ctx.needs_input_grad[:4]
    need_B = ctx.needs_input_grad[9:]
    blocks, keep, wide = ctx.blocks, _share_kept(ctx.dropout), ctx.wide
    dx = dA = None
    with _without_autocast(dy.device.type):
        leading, dy = dy.shape[:-1], _flat(dy).contiguous()
        if need_A or need_weight:
            x = _flat(ctx.recompute_x(*kept) if ctx.recompute_x else kept[0])
        g, dB = _rank_and_up_gradients(
            dy, u, lora_B, blocks, keep, wide=wide, need_g=need_x or need_A, need_B=need_B
        )
        if need_x or need_A:
            shape = len(dy), lora_A.shape[1]
            mask = None if seed is None else _draw_mask(shape, ctx.dropout, seed, like=dy)
        if need_x:
            operand = ctx.operand if weight is None else DenseWeight(weight.to(dy.dtype))
            dx = _add_masked_(operand.matmul_t(dy), g, lora_A.to(wide), mask).view(*leading, shape[1])
        if need_A:
            dropped = x if mask is None else mask.mul_(x)
            dA = _down_gradient(g, dropped).to(lora_A.dtype)
        dW = matmul.matmul(dy.t(), x).to(weight.dtype) if need_weight else None
        dbias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
    return dx, dW, dbias, dA, None, None, None, None, None, *dB


def _recorded_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients, of the reference formulas on the inputs of forward, so that they can be differentiated."""
    _, seed, weight, lora_A, *rest = ctx.saved_tensors
    lora_B, kept = rest[: len(ctx.blocks)], rest[len(ctx.blocks) :]
    need_x, _, need_bias, _ = ctx.needs_input_grad[:4]
    if kept:
        x = ctx.recompute_x(*kept) if ctx.recompute_x else kept[0]
    else:
        x = dy.new_zeros(*dy.shape[:-1], lora_A.shape[1]).requires_grad_(need_x)
    # With A frozen, x is not kept, and dB depends on it.
    if (need_x and not x.requires_grad) or (not kept and any(ctx.needs_input_grad[9:])):
        with torch.no_grad():
            sources = [dy, weight, lora_A, *lora_B]
            results = _backward(ctx, dy)
        return only_first(results, sources, "A LoRA layer that does not keep its input")
    bias = None
    if ctx.bias_dtype is not None:
        bias = dy.new_zeros(dy.shape[-1], dtype=ctx.bias_dtype).requires_grad_(need_bias)
    mask = None
    if seed is not None:
        mask = _draw_mask(_flat(x).shape, ctx.dropout, seed, like=x.detach()).view(x.shape)
        mask = mask.to(ctx.wide) / _share_kept(ctx.dropout)

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, *B: Tensor) -> Tensor:
        operand = ctx.operand if weight is None else DenseWeight(weight.to(x.dtype))
        y = operand.matmul(x, None if bias is None else bias.to(x.dtype))
        dropped = x.to(ctx.wide) if mask is None else x * mask
        wide_B = [factor.to(ctx.wide) for factor in B]
        return functional.add_lora_blocks(y, dropped, A.to(ctx.wide), wide_B, blocks=ctx.blocks)

    with _without_autocast(dy.device.type):
        found = recorded_gradients(formula, (x, weight, bias, lora_A, *lora_B), dy)
    return *found[:4], None, None, None, None, None, *found[4:]


class _FrozenLinear(torch.autograd.Function):
    """x (..., K), bias (N,) -> (..., N); keeps the operand only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, operand: FrozenWeight) -> Tensor:
        ctx.operand, ctx.bias_dtype = operand, None if bias is None else bias.dtype
        return operand.matmul(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Linear in dy and made of plain operations, and so differentiable as it stands.
        need_x, need_bias, _ = ctx.needs_input_grad
        flat_dy = _flat(dy).contiguous()
        dx = ctx.operand.matmul_t(flat_dy).view(*dy.shape[:-1], -1) if need_x else None
        dbias = flat_dy.sum(0).to(ctx.bias_dtype) if need_bias else None
        return dx, dbias, None


def _onto_rank(x: Tensor, lora_A: Tensor) -> Tensor:
    """`u (T, ΣR_i) = x Aᵀ`, in the dtype of A."""
    if x.dtype == lora_A.dtype:
        return matmul.linear(x, lora_A)
    parts = [matmul.linear(x[rows].to(lora_A.dtype), lora_A) for rows in _widened(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _down_gradient(g: Tensor, x: Tensor) -> Tensor:
    """`dA (ΣR_i, K) = gᵀ x`, in the dtype of g."""
    if x.dtype == g.dtype:
        return matmul.matmul(g.t(), x)
    dA = g.new_zeros(g.shape[1], x.shape[1])
    for rows in _widened(x):
        dA.addmm_(g[rows].t(), x[rows].to(g.dtype))
    return dA


def _rank_and_up_gradients(
    dy: Tensor,
    u: Tensor | None,
    lora_B: Sequence[Tensor],
    blocks: Sequence[RowBlock],
    keep: float,
    *,
    wide: torch.dtype,
    need_g: bool,
    need_B: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """`g` (see `_rank_gradient`; no columns where it is not needed) and the dB_i (see `_up_gradients`), from one pass
    over a narrower dy."""
    if dy.dtype == wide:
        g = _rank_gradient(dy, lora_B, blocks, keep) if need_g else dy.new_empty(len(dy), 0)
        return g, _up_gradients(dy, u, lora_B, blocks, keep, need_B)
    lora_B, dtypes = [B.to(wide) for B in lora_B], [B.dtype for B in lora_B]
    g_parts: list[Tensor] = []
    sums: list[Tensor | None] = [
        None if u is None or not needed else B.new_zeros(B.shape[1], B.shape[0])
        for B, needed in zip(lora_B, need_B, strict=True)
    ]
    for rows in _widened(dy):
        part = dy[rows].to(wide)
        if need_g:
            g_parts.append(_rank_gradient(part, lora_B, blocks, keep))
        for block, columns, total in zip(blocks, rank_slices(blocks), sums, strict=True):
            if u is not None and total is not None:
                total.addmm_(u[rows, columns].t(), part[:, block.rows], alpha=block.scaling / keep)
    g = torch.cat(g_parts) if g_parts else dy.new_empty(len(dy), 0, dtype=wide)
    dB = [
        None if total is None else total.t().contiguous().to(dtype)
        for total, dtype in zip(sums, dtypes, strict=True)
    ]
    return g, dB


def _rank_gradient(dy: Tensor, lora_B: Sequence[Tensor], blocks: Sequence[RowBlock], keep: float) -> Tensor:
    """`g (T, ΣR_i)`: `scaling_i / keep · dy[:, rows_i] B_i`, side by side."""
    parts = [
        matmul.matmul(dy[:, block.rows], B.to(dy.dtype), alpha=block.scaling / keep)
        for block, B in zip(blocks, lora_B, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_masked_(dx: Tensor, g: Tensor, lora_A: Tensor, mask: Tensor | None) -> Tensor:
    """`dx += mask ⊙ (g A)` in place, rounded once."""
    if mask is None:
        return _addmm_(dx, g, lora_A)
    if dx.dtype == g.dtype:
        return dx.addcmul_(g @ lora_A, mask)
    return dx.copy_(dx.to(g.dtype).addcmul_(g @ lora_A, mask.to(g.dtype)))


def _addmm_(y: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`y += alpha · left right` in place; in the dtype of the factors and rounded once where `y` is narrower."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=alpha)
    for rows in _widened(y):
        part = y[rows]
        part.copy_(part.to(left.dtype).addmm_(left[rows], right, alpha=alpha))
    return y


def _widened(x: Tensor) -> Iterator[slice]:
    """Rows of x (T, N), as many at once as stay in a core's cache while they are in a wider dtype; on a GPU all."""
    rows = max(1, len(x) if x.device.type != "cpu" else _CACHED // max(1, x.shape[1]))
    return (slice(start, start + rows) for start in range(0, max(1, len(x)), rows))


def _up_gradients(
    dy: Tensor,
    u: Tensor | None,
    lora_B: Sequence[Tensor],
    blocks: Sequence[RowBlock],
    keep: float,
    need_B: Sequence[bool],
) -> list[Tensor | None]:
    """`dB_i (N_i, R_i) = scaling_i / keep · dy[:, rows_i]ᵀ u_i`, None where it is not wanted."""
    gradients: list[Tensor | None] = []
    for block, columns, B, needed in zip(blocks, rank_slices(blocks), lora_B, need_B, strict=True):
        if u is None or not needed:
            gradients.append(None)
            continue
        # The narrow factor first: the product with the wide one transposed is the slower of the two.
        dB = matmul.matmul(u[:, columns].t(), dy[:, block.rows], alpha=block.scaling / keep)
        gradients.append(dB.t().contiguous().to(B.dtype))
    return gradients


def _flat(x: Tensor) -> Tensor:
    """(..., K) as (T, K)."""
    return x.reshape(-1, x.shape[-1])


def _share_kept(dropout: float) -> float:
    """`1 - dropout` as a mask of 16 bits can have it: a multiple of 2⁻¹⁶ above 0, and 1 without dropout only."""
    return min(max(round((1 - dropout) * 65536), 1), 65535) / 65536 if dropout else 1.0


def _draw_mask(shape: Sequence[int], dropout: float, seed: Tensor, *, like: Tensor) -> Tensor:
    """A 0/1 mask in the dtype of `like` that depends on shape and seed only.

    An element is kept where its 16 random bits reach a threshold: eight times faster on a CPU than `bernoulli_`.
    """
    generator = torch.Generator(like.device).manual_seed(int(seed))
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count].view(*shape)
    threshold = 32768 - round(_share_kept(dropout) * 65536)
    return torch.ge(bits, threshold, out=like.new_empty(shape))


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would cast the plain products but not the in-place ones, on whatever thread backward runs."""
    if _autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
