"""What the tests of fused.py share: a layer's tensors, and how near to functional.py its results have to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phlora.lora import row_blocks

# Relative to the largest value of the compared tensor.
TOLERANCE = {
    torch.float64: 1e-13,  # a few roundings of 2e-16
    torch.float32: 2e-6,  # sums of at most 40 products, added in another order
    torch.bfloat16: 2e-2,  # the reference rounds x Aᵀ Bᵀ, its scaling and the sum apart; each 2^-9
}


@dataclass
class Problem:
    """One adapted fused weight, with everything that can have a gradient as a leaf."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: list[Tensor]
    blocks: tuple

    def run(self, module, *, dropout: float = 0.0, weight=None):
        weight = self.weight if weight is None else weight
        return module.lora_blocks(
            self.x, weight, self.A, self.B, blocks=self.blocks, bias=self.bias, dropout=dropout
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.A, *self.B) if t is not None]

    def gradients(self, module, **kwargs) -> list[Tensor | None]:
        for leaf in self.leaves():
            leaf.grad = None
        y = self.run(module, **kwargs)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        return [y.detach(), *(None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves())]


SIZES = {"q": 7, "k": 3, "v": 5}


RANKS = {"q": 4, "k": 1, "v": 2}


def make(
    sizes=SIZES,
    enabled=("q", "v"),
    *,
    leading=(2, 3),
    K=9,
    r=RANKS,
    bias=True,
    dtype=torch.float32,
    lora_dtype=None,
    seed=0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    scaling = {name: 0.3 * (i + 1) for i, name in enumerate(sizes)}
    blocks = row_blocks(sizes, enabled, r=r, scaling=scaling)
    N = sum(sizes.values())
    lora_dtype = lora_dtype or dtype
    problem = Problem(
        x=draw(*leading, K).requires_grad_(),
        weight=draw(N, K),
        bias=draw(N) if bias else None,
        A=draw(sum(b.r for b in blocks), K, dtype=lora_dtype).requires_grad_(),
        B=[draw(b.size, b.r, dtype=lora_dtype).requires_grad_() for b in blocks],
        blocks=blocks,
    )
    return problem


def assert_close(ours, expected, *, dtype):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = b.abs().max().clamp(min=1e-3)
            assert ((a - b).abs().max() / scale).item() <= TOLERANCE[dtype]


def kept_tensors(function) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function()
    return y, kept
