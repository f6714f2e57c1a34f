"""Matrix products by whichever of torch's libraries is faster: the one place that decides.

In float32 on a CPU torch multiplies with its BLAS, although oneDNN, which comes with it too, is faster for the
products of a LoRA step: by 5 to 20 % where both sides are wide, up to twice where one is as narrow as a rank. Here
oneDNN is called where that pays; every other dtype, device and layout goes torch's own way. Both compute in the same
precision and differ in the order of summation only.

oneDNN's product is not recorded by autograd. It is taken only where nothing is to be recorded: inside autograd
functions, and without gradients.

oneDNN makes code for every shape that it meets, a third of a megabyte, and keeps that of the last 1,024. Training meets
new shapes in every step; the peak of the demo was 0.5 GiB higher for them. `_PREPARED` is enough for a few steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phlora.lora.autograd import sees_through

_PREPARED = 64
# Read once, when oneDNN meets its first shape; what the user set stays.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_PREPARED))

# Private in torch, whose compiler calls it; None in a build without oneDNN.
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn_allowed = bool(torch._C._has_mkldnn) and _onednn_linear is not None
# Multiply-adds below which a call costs more than it saves.
_LEAST_WORK = 1 << 20
# Subclasses of Tensor mean something else than their numbers.
_PLAIN = (Tensor, nn.Parameter)


def backend(device: torch.device | str = "cpu") -> str:
    """The name of what multiplies in float32 on this device, for logs."""
    on_cpu = torch.device(device).type == "cpu"
    return "oneDNN" if on_cpu and _onednn_allowed else "torch's BLAS"


@contextmanager
def torch_alone() -> Iterator[None]:
    """Multiply as torch does by itself, to compare with; for the whole process."""
    global _onednn_allowed
    before, _onednn_allowed = _onednn_allowed, False
    try:
        yield
    finally:
        _onednn_allowed = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + bias`: (..., K), (N, K), (N,) -> (..., N)."""
    if _suits_onednn(x, weight):
        y: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor, *, alpha: float = 1.0) -> Tensor:
    """`alpha · left right`: (T, K), (K, N) -> (T, N). In 16 bits rounded once, as `addmm` does."""
    if _suits_onednn(left, right.t()):
        product: Tensor = _onednn_linear(left, right.t(), None, "none", [], "")
        return product if alpha == 1 else product.mul_(alpha)
    if alpha == 1:
        return left @ right
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=alpha)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `x Wᵀ` is a product that oneDNN may and should do; cheap checks first."""
    if not _onednn_allowed or x.dtype is not torch.float32 or not x.device.type == "cpu":
        return False
    if weight.dtype is not torch.float32 or type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return False
    if x.numel() * weight.shape[0] < _LEAST_WORK:
        return False
    # Rows with gaps between them, as slices have, would be multiplied number by number.
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return not sees_through() and torch.get_float32_matmul_precision() == "highest"
