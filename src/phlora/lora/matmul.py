"""Matrix products by whichever of torch's libraries is faster: the one place that decides.

In float32 on a CPU torch multiplies with its BLAS, although oneDNN comes with it too. Which of them is faster depends
on the CPU and on the kind of product (`Kind`): by a fifth one way or the other where both sides are wide, up to twice
where one is as narrow as a rank. So each kind has its library (`use_libraries`; `models.products` times them on a
model's own shapes), at first oneDNN. Every other dtype, device and layout goes torch's own way. Both compute in the
same precision and differ in the order of summation only.

oneDNN's product is not recorded by autograd. It is taken only where nothing is to be recorded: inside autograd
functions, and without gradients.

oneDNN makes code for every shape that it meets, a third of a megabyte, and keeps that of the last 1,024; torch keeps
another 1,024 prepared products over it, with their buffers. Training meets new shapes in every step, and what stays of
old ones pins holes in the heap, so that memory never levels off. A pass through a model has some 40 different
products, so that `_PREPARED` of each kind lose no time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phlora.lora.autograd import sees_through

_PREPARED = 64
# Of oneDNN's own cache and of torch's over it. Read once, at the first product; what the user set stays.
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, str(_PREPARED))

# Private in torch, whose compiler calls it; None in a build without oneDNN.
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn_allowed = bool(torch._C._has_mkldnn) and _onednn_linear is not None
# Multiply-adds below which a call costs more than it saves.
_LEAST_WORK = 1 << 20
# Fewer rows are a model that answers: those products are bound by reading the weight, and stay with oneDNN.
_FEW_ROWS = 16
# A weight with this many rows for each column, and as many rows in all as a vocabulary has, is a language-model head.
_HEAD_RATIO, _LEAST_VOCABULARY = 8, 16_384
# A side that is this many times shorter than the other one is a rank.
_RANK_RATIO, _WIDEST_RANK = 4, 256
# Subclasses of Tensor mean something else than their numbers.
_PLAIN = (Tensor, nn.Parameter)


class Library(StrEnum):
    """What multiplies."""

    ONEDNN = "oneDNN"
    BLAS = "torch's BLAS"


class Kind(StrEnum):
    """Products that differ in which library is faster: (T, K) by (N, K), T tokens."""

    FORWARD = "forward"
    BACKWARD = "backward"
    ONTO_RANK = "onto the rank"
    FACTOR_GRADIENTS = "factor gradients"
    HEAD_FORWARD = "head forward"
    HEAD_BACKWARD = "head backward"


_libraries: dict[Kind, Library] = dict.fromkeys(Kind, Library.ONEDNN)


def libraries() -> dict[str, str]:
    """Which library multiplies each kind, as plain words: what a run records and `use_libraries` takes."""
    return {kind.value: library.value for kind, library in _libraries.items()}


def use_libraries(chosen: Mapping[str, str]) -> None:
    """Let each kind be multiplied by the library that is given for it; kinds that are not named stay as they are.

    For the whole process. Names of neither are passed over: what another version has recorded.
    """
    names, known = set(Kind), set(Library)
    _libraries.update({Kind(k): Library(v) for k, v in chosen.items() if k in names and v in known})


def can_choose(device: torch.device | str = "cpu") -> bool:
    """Whether there are two libraries on this device."""
    return torch.device(device).type == "cpu" and _onednn_allowed


def backend(device: torch.device | str = "cpu") -> str:
    """The name of what multiplies in float32 on this device, for logs."""
    if not can_choose(device):
        return Library.BLAS
    onednn = [kind for kind, library in _libraries.items() if library is Library.ONEDNN]
    if len(onednn) in (0, len(Kind)):
        return Library.ONEDNN if onednn else Library.BLAS
    return f"{Library.BLAS}, {', '.join(onednn)} by {Library.ONEDNN}"


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
    if _suits_onednn(x, weight) and (bias is None or _suits_as_bias(bias, weight)):
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
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return False
    if x.numel() * weight.shape[0] < _LEAST_WORK:
        return False
    # Rows with gaps between them, as slices have, would be multiplied number by number.
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        return False
    kind = kind_of(x, weight)
    answers = kind is not Kind.FACTOR_GRADIENTS and x.numel() < _FEW_ROWS * weight.shape[1]
    if _libraries[kind] is Library.BLAS and not answers:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return not sees_through() and torch.get_float32_matmul_precision() == "highest"


def _suits_as_bias(bias: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN adds it as torch would: it reads (N,) numbers in one run, whatever a view or its dtype says."""
    if type(bias) not in _PLAIN or bias.dtype is not torch.float32 or bias.device.type != "cpu":
        return False
    if bias.shape != weight.shape[:1] or not bias.is_contiguous() or bias.is_neg():
        return False
    return not (torch.is_grad_enabled() and bias.requires_grad)


def kind_of(x: Tensor, weight: Tensor) -> Kind:
    """The kind of `x Wᵀ`: x (..., K), weight (N, K); told by sizes and by how the numbers lie."""
    outputs, inputs = weight.shape
    if x.stride(-1) != 1:
        return Kind.FACTOR_GRADIENTS
    if outputs <= _WIDEST_RANK and outputs * _RANK_RATIO <= inputs:
        return Kind.ONTO_RANK
    is_forward = weight.is_contiguous()
    rows, columns = (outputs, inputs) if is_forward else (inputs, outputs)
    if rows >= _LEAST_VOCABULARY and rows > _HEAD_RATIO * columns:
        return Kind.HEAD_FORWARD if is_forward else Kind.HEAD_BACKWARD
    return Kind.FORWARD if is_forward else Kind.BACKWARD
