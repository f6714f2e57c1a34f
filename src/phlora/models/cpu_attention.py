"""Attention on a CPU with its log-sum-exp, both ways and causal or not: the parts that a softmax is merged from.

Legend: `B` rows, `H` query heads, `G` kv heads, `S` queries, `E` head width.

A softmax over several sets of keys is merged from those of the sets, by the log-sum-exp of each (`merge_`). Backward
takes the merged output and log-sum-exp for each set: `e^(s - l)` are then the probabilities of the whole softmax, and
the gradients of the sets add up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Queries of a long row that meet their keys in one call of the CPU's kernel: a sixth of the row, within these bounds.
_NARROWEST_STRETCH, _WIDEST_STRETCH = 64, 256
# Gradients in bfloat16, of which the CPU's kernel is up to five times slower than of float32: of up to so many queries
# times keys in a row by that kernel in float32, of more by plain products, of so many scores of all heads at once.
_FEW_PAIRS, _MOST_SCORES = 1 << 12, 1 << 20

# Private in torch, and the only ones on CPU that give the log-sum-exp; None where a version lacks them.
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def is_there() -> bool:
    """Whether this version of torch has the kernels."""
    return bool(_flash and _flash_backward)


def forget_masks() -> None:
    """Let go of what attention looks up by sizes alone: after a forecast it is tensors without numbers."""
    _stretch_mask.cache_clear()


def unmasked(inputs: Sequence[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, S, E) to all of k and v (B, G, T, E), and its log-sum-exp (B, H, S)."""
    out, lse = _flash(*inputs, 0.0, False, scale=scaling)
    return out, lse


def causal(inputs: Sequence[Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, S, E), k and v (B, G, S, E), and its log-sum-exp (B, H, S)."""
    query, key, value = inputs
    parts = [
        _flash(
            query[:, :, span],
            key[:, :, :stop],
            value[:, :, :stop],
            0.0,
            mask is None,
            **_extra(mask, scaling),
        )
        for span, stop, mask in _stretches(query)
    ]
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def causal_backward(grad: Tensor, saved: Sequence[Tensor], scaling: float) -> Sequence[Tensor]:
    """Gradients of q, k and v; `saved` are these, the output and the log-sum-exp of the whole softmax."""
    query, key, value, output, norm = saved
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for span, stop, mask in _stretches(query):
        met = [
            grad[:, :, span],
            query[:, :, span],
            key[:, :, :stop],
            value[:, :, :stop],
            output[:, :, span],
        ]
        ours = gradients(met, norm[:, :, span], mask, scaling, causal=True)
        if mask is None:
            return ours
        grads[0][:, :, span] = ours[0]
        grads[1][:, :, :stop] += ours[1]
        grads[2][:, :, :stop] += ours[2]
    return grads


def gradients(
    tensors: Sequence[Tensor], norm: Tensor, mask: Tensor | None, scaling: float, *, causal: bool
) -> Sequence[Tensor]:
    """Gradients of q, k and v from dy, q, k, v and y, and the log-sum-exp (B, H, S) of the whole softmax.

    Args:
        mask: what the kernel adds to the scores; the causal one where there is one.
        causal: whether the last query sees all keys, the one before it all but one, and so on.
    """
    _, query, key, *_ = tensors
    dtype, pairs = query.dtype, query.shape[2] * key.shape[2]
    in_float32 = dtype.itemsize == 2 and pairs <= _FEW_PAIRS
    if dtype is torch.bfloat16 and not in_float32 and query.shape[1] == key.shape[1]:
        return _gradients_by_products(tensors, norm, scaling, causal=causal)
    if in_float32:
        tensors = [x.float() for x in tensors]
        mask = None if mask is None else mask.float()
    is_causal = causal and mask is None
    found: Sequence[Tensor] = _flash_backward(*tensors, norm, 0.0, is_causal, **_extra(mask, scaling))
    return [x.to(dtype) for x in found] if in_float32 else found


def _gradients_by_products(
    tensors: Sequence[Tensor], norm: Tensor, scaling: float, *, causal: bool
) -> Sequence[Tensor]:
    """`gradients` in bfloat16 by plain products, as precise as those of torch's kernel and faster.

    With scale s, `P = exp(s Q Kᵀ - l)` and `Z = s P ⊙ (dY Vᵀ - rowsum(dY ⊙ Y))`: `dQ = Z K`, `dK = Zᵀ Q`, `dV = Pᵀ dY`.
    Scores and Z are made in float32; P and Z are rounded to 16 bits for the products that sum over them.
    """
    query, key, value = tensors[1:4]
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    queries, keys = query.shape[2], key.shape[2]
    heads = max(1, _MOST_SCORES // (queries * keys))
    for row in range(len(query)):
        for first in range(0, query.shape[1], heads):
            part = slice(first, first + heads)
            dy, q, k, v, y = (x[row, part] for x in tensors)
            wide_dy = dy.float()
            sums = (wide_dy * y).sum(-1, keepdim=True)
            p = torch.baddbmm(
                norm[row, part, :, None], q.float(), k.float().mT, beta=-1, alpha=scaling
            ).exp_()
            if causal:
                p.tril_(keys - queries)
            z = torch.baddbmm(sums, wide_dy, v.float().mT, beta=-scaling, alpha=scaling).mul_(p)
            z, p = z.to(q.dtype), p.to(q.dtype)
            for whole, x in zip(grads, (z @ k, z.mT @ q, p.mT @ dy), strict=True):
                whole[row, part] = x
    return grads


def _extra(mask: Tensor | None, scaling: float) -> dict[str, Any]:
    return {"attn_mask": mask, "scale": scaling}


def _stretches(query: Tensor) -> Iterator[tuple[slice, int, Tensor | None]]:
    """What q (B, H, S, E) is cut into: (queries, how many keys they meet, mask), without a mask where it is one piece.

    torch's causal kernel computes the whole square of up to 512 keys. Stretches of queries that meet only the keys up
    to their own last one compute little more than half of it.
    """
    length = query.shape[2]
    width = min(max(_NARROWEST_STRETCH, -(-length // 6)), _WIDEST_STRETCH)
    if length < 2 * width:
        yield slice(0, length), length, None
        return
    mask = _stretch_mask(width, -(-length // _WIDEST_STRETCH) * _WIDEST_STRETCH, query.dtype)
    for first in range(0, length, width):
        stop = min(first + width, length)
        before = mask.shape[1] - width - first
        yield slice(first, stop), stop, mask[None, None, : stop - first, before : before + stop]


@functools.lru_cache(maxsize=8)
def _stretch_mask(width: int, before: int, dtype: torch.dtype) -> Tensor:
    """(width, before + width), added to scores: `before` keys that all queries see, then a causal triangle."""
    return torch.full((width, before + width), -torch.inf, dtype=dtype).triu_(before + 1)


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Make `out` and `lse` those of both sets of keys."""
    merged = torch.logaddexp(lse, other_lse)
    ours, theirs = ((x - merged).exp_().unsqueeze(-1).to(out.dtype) for x in (lse, other_lse))
    out.mul_(ours).addcmul_(other, theirs)
    lse.copy_(merged)
