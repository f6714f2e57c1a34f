"""Layers whose weight is stored in 16 bits and computed with in a wider dtype.

Made by exchanging the class of `nn.Linear` and `nn.Embedding`, and back the same way: the weight stays a parameter in
the layer, so that PEFT, TRL and what saves a model see a linear layer in bfloat16, whose products are those of float32.
Every number of 16 bits is one of 32, so that such a model computes what the same weights in float32 do.

Only matrices are stored so. Norms and biases take a ten-thousandth of a model's memory and have the dtype of the
computation. A weight that trains is widened: the steps of an optimizer are smaller than 16 bits can add.

Legend: `N` out, `K` in, `V` vocabulary, `D` model width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phlora.errors import ModelError
from phlora.lora.autograd import sees_through
from phlora.lora.fused import frozen_linear
from phlora.lora.operands import WidenedWeight


class _Stored(nn.Module):
    """What both kinds of layers do once their weight trains, whoever made it train."""

    weight: Tensor
    compute_dtype: torch.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stored:
        """A copy of the layer alone is widened: PEFT trains whole layers as copies (`modules_to_save`), and TRL's head
        reads the weight past `forward`."""
        alone = not memo
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        if alone:
            widen(copied)
        return copied

    def _widen_in_training(self) -> None:
        """The parameter stays the same one, so that an optimizer which has it already trains it."""
        trains = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        if trains and self.weight.dtype != self.compute_dtype and not sees_through():
            self.weight.data = self.weight.data.to(self.compute_dtype)


class StoredLinear(_Stored, nn.Linear):
    """`y = x Wᵀ + b` in the dtype of `x`, with `W (N, K)` stored in a narrower one; keeps nothing for backward but `W`.

    Attributes:
        compute_dtype: of the activations that it is meant for, and of its weight once that trains.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._widen_in_training()
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        if trains or sees_through():
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        return frozen_linear(x, WidenedWeight(self.weight), self.bias)


class StoredEmbedding(_Stored, nn.Embedding):
    """Rows of a weight `(V, D)`, widened to the dtype of the computation once they are chosen: (...) -> (..., D)."""

    def forward(self, input: Tensor) -> Tensor:
        self._widen_in_training()
        rows = super().forward(input)
        return rows.to(torch.promote_types(rows.dtype, self.compute_dtype))


_STORED: dict[type[nn.Module], Any] = {nn.Linear: StoredLinear, nn.Embedding: StoredEmbedding}
_PLAIN = {stored: plain for plain, stored in _STORED.items()}


def is_storable(module: nn.Module) -> bool:
    """Whether this layer's weight may be stored in a narrower dtype than it is computed with."""
    return type(module) in _STORED


def is_stored(module: nn.Module) -> bool:
    """Whether this layer's weight is stored in a narrower dtype than it is computed with."""
    return type(module) in _PLAIN


def as_stored(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let a linear layer or an embedding, whose weight is narrow or will be, compute in `compute_dtype`; in place."""
    module.__class__ = _STORED[type(module)]
    module.compute_dtype = compute_dtype  # type: ignore[assignment]


def rounded(tensor: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    """A tensor in another dtype; one of whole numbers as it is.

    Raises:
        ModelError: see `require_finite`.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    require_finite(narrow, name=name)
    return narrow


def require_finite(tensor: Tensor, *, name: str) -> None:
    """
    Raises:
        ModelError: a number was too large for float16; the other dtypes reach as far as float32.
    """
    if tensor.dtype != torch.float16 or not tensor.numel():
        return
    if any(bound.isinf() for bound in torch.aminmax(tensor.detach())):
        raise ModelError(
            f"The tensor {name} has numbers beyond {torch.finfo(torch.float16).max:.0f}, which float16 cannot hold",
            fix="take bfloat16 or float32 in the place of float16",
        )


def store(model: nn.Module, dtype: torch.dtype) -> int:
    """Store the matrices of a model in `dtype`, in place, one after the other, and compute with them as before.

    Weights that layers share stay shared.

    Returns:
        How many layers are stored so; none where `dtype` is not narrower than that of the weights.

    Raises:
        ModelError: see `require_finite`.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_storable(module)}
    layers = {name: layer for name, layer in layers.items() if layer.weight.dtype.itemsize > dtype.itemsize}
    dtypes = [layer.weight.dtype for layer in layers.values()]
    for name, layer in layers.items():
        layer.weight.data = rounded(layer.weight.data, dtype, name=f"{name}.weight")
    for layer, before in zip(layers.values(), dtypes, strict=True):
        as_stored(layer, before)
    return len(layers)


def compute_wider(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model whose weights are in 16 bits compute in a wider dtype, in place; what is no matrix is widened."""
    for module in model.modules():
        stays = is_storable(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and not (stays and name == "weight"):
                parameter.data = parameter.data.to(dtype)
        if stays:
            as_stored(module, dtype)


def widen(module: nn.Module) -> None:
    """Give a stored layer its weight in the dtype that it computes in, and its own class; in place."""
    layer: Any = module
    layer.weight.data = layer.weight.data.to(layer.compute_dtype)
    del layer.compute_dtype
    layer.__class__ = _PLAIN[type(layer)]


def widen_named(model: nn.Module, names: Collection[str]) -> None:
    """Widen the stored layers whose names end in one of these, as PEFT names modules: those that will train."""
    for path, module in list(model.named_modules()):
        if is_stored(module) and any(path == name or path.endswith(f".{name}") for name in names):
            widen(module)


def widen_trained(model: nn.Module) -> int:
    """Widen the stored layers whose own weight trains, before an optimizer or DDP looks at them; returns how many."""
    layers: list[Any] = [module for module in model.modules() if is_stored(module)]
    trained = [layer for layer in layers if layer.weight.requires_grad]
    for layer in trained:
        widen(layer)
    return len(trained)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's activations, which is that of its weights where these are not stored otherwise."""
    for module in model.modules():
        if is_stored(module):
            found: torch.dtype = module.compute_dtype  # type: ignore[assignment]
            return found
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())
