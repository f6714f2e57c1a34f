"""The frozen weight as an operand with two operations, whatever it is stored as.

The fused functions multiply by `W (N, K)` and by its transpose, and ask nothing else of it. Dense weights are
here; a quantised storage (NF4, int8) is one more class with these two methods, kept by whoever owns that
package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from phlora.lora import matmul


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
