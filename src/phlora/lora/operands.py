"""The frozen weight as an operand with two operations, whatever it is stored as.

The fused functions multiply by `W (N, K)` and by its transpose, and ask nothing else of it. Dense weights are
here, in the dtype of the products or narrower; a quantised storage (NF4, int8) is one more class with these two
methods, kept by whoever owns that package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from phlora.lora import matmul
from phlora.lora.autograd import sees_through
from phlora.lora.workspace import borrowed


class FrozenWeight(Protocol):
    """A weight `W (N, K)` that receives no gradient.

    Both operations compute in the dtype of their argument and return a fresh tensor: the caller writes into
    it. `matmul` is made of operations that autograd can follow, so that the reference formulas work with it
    too.
    """

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`y = x Wᵀ + bias`: (..., K) -> (..., N)."""
        ...

    def matmul_t(self, dy: Tensor) -> Tensor:
        """`dx = dy W`: (..., N) -> (..., K)."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A plain tensor `weight (N, K)`; a transposed view of a `(K, N)` one will do as well."""

    weight: Tensor

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return matmul.linear(x, self.weight, bias)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return matmul.matmul(dy, self.weight)


# Rows of a wide weight are widened together as long as they take no more than this.
_MOST_NUMBERS = 1 << 26
# Up to so many tokens a product takes less time than reading its weight. Widened in pieces that stay in the processor's
# cache, the weight is read once, in 16 bits.
_FEW_TOKENS = 8
_CACHED_NUMBERS = 1 << 20


def may_borrow(weight: Tensor, x: Tensor) -> bool:
    """Whether `x` may be multiplied by a matrix in the shared buffer, made of how `weight` is stored.

    Not where autograd or a compiler keeps the matrix for later, and on the CPU alone.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return weight.device.type == "cpu" and not recorded and not sees_through()


@dataclass(frozen=True)
class WidenedWeight:
    """A weight `(N, K)` that is stored in 16 bits and multiplied by in the wider dtype of what it meets.

    Each product widens it, whole or some rows at a time, into one buffer that all of them share (`lora.workspace`).
    Every number of 16 bits is one of 32: the products are those of the widened matrix, and nothing is rounded.
    """

    weight: Tensor

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if x.dtype == self.weight.dtype:
            return matmul.linear(x, self.weight, bias)
        if not may_borrow(self.weight, x):
            return matmul.linear(x, self.weight.to(x.dtype), bias)
        flat = x.reshape(-1, x.shape[-1])
        few = len(flat) <= _FEW_TOKENS
        parts = self._parts(_CACHED_NUMBERS if few else _MOST_NUMBERS)
        if len(parts) == 1:
            with self._widened(parts[0], x.dtype) as dense:
                return matmul.linear(x, dense, bias)
        y = flat.new_empty(len(flat), len(self.weight))
        for rows in parts:
            with self._widened(rows, x.dtype) as dense:
                if few:
                    torch.mm(flat, dense.t(), out=y[:, rows])
                else:
                    y[:, rows] = matmul.linear(flat, dense)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1)

    def matmul_t(self, dy: Tensor) -> Tensor:
        if dy.dtype == self.weight.dtype:
            return matmul.matmul(dy, self.weight)
        if not may_borrow(self.weight, dy):
            return matmul.matmul(dy, self.weight.to(dy.dtype))
        dx: Tensor | None = None
        for rows in self._parts(_MOST_NUMBERS):
            with self._widened(rows, dy.dtype) as dense:
                part = matmul.matmul(dy[..., rows], dense)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None
        return dx

    def _parts(self, most: int) -> list[slice]:
        """The rows in parts of equal size, each with at most so many numbers."""
        rows, width = self.weight.shape
        count = -(-rows // max(1, most // width))
        size = -(-rows // count)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    @contextmanager
    def _widened(self, rows: slice, dtype: torch.dtype) -> Iterator[Tensor]:
        part = self.weight.detach()[rows]
        with borrowed(part.numel(), dtype) as buffer:
            yield buffer.view(part.shape).copy_(part)
