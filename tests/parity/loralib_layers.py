"""What the tests beside loralib share: layers in both, and how near they have to be."""

from __future__ import annotations

import torch

# Relative to the largest value (at least 1) of what is compared.
TOLERANCE = {
    "forward": 2e-6,  # the same products of at most 60 terms, added in another order
    "gradient": 5e-6,  # one product more
    "merged": 1e-6,  # one product, one sum
    "training": 1e-4,  # 30 steps of AdamW, whose early steps turn a rounding of a small gradient into lr
}


def assert_near(ours, theirs, what):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.abs().max().clamp(min=1)
    assert ((ours - theirs).abs().max() / scale).item() <= TOLERANCE[what]


def rows(*shape):
    return lambda: torch.randn(shape)
