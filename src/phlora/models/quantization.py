"""The base model in 4 or 8 bits, for adapters that train on top of it (QLoRA), and the way back to a dense one.

Every linear layer of the blocks is quantised by itself, where possible while the model is loaded, and is then on the
device where it will be used; head, embeddings and norms stay as they are. Whatever the model was loaded from, a `.gguf`
file included, goes the same way, and the fingerprint is that of the weights before they were rounded.

NF4: blocks of 64 values share one scale, each value is one of 16 quantiles of a normal distribution. With double
quantisation the scales are stored in 8 bits themselves. Source: QLoRA (Dettmers et al. 2023), section 3.
int8: each row of a weight has one scale and 255 steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phlora.config import QuantizationConfig, quantization_config
from phlora.errors import ConfigError, ModelError
from phlora.extras import require
from phlora.models.causal_lm import embedding_weight
from phlora.models.device import DTYPES
from phlora.models.families import block_linears
from phlora.models.fingerprint import identity_of, keep_identity
from phlora.models.operands import is_quantized

_WHERE = "model.quantization"


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What quantising a model changed.

    Attributes:
        storage: `nf4` or `int8`.
        num_layers: linear layers that were quantised.
        layer_bytes: their weights before and after, scales included.
        model_bytes: the whole model before and after.
        dense_dtype: of everything that was left as it is.
    """

    storage: str
    num_layers: int
    layer_bytes: tuple[int, int]
    model_bytes: tuple[int, int]
    dense_dtype: torch.dtype

    def __str__(self) -> str:
        (layers_before, layers_after), (before, after) = self.layer_bytes, self.model_bytes
        dtype = str(self.dense_dtype).removeprefix("torch.")
        return (
            f"{self.storage}: {self.num_layers} linear layers take {layers_after / 1e6:.1f} MB in place of "
            f"{layers_before / 1e6:.1f} MB, the whole model {after / 1e6:.1f} MB in place of {before / 1e6:.1f} MB; "
            f"head and embeddings stay {dtype}"
        )


def require_bitsandbytes() -> None:
    """Raises:
    MissingExtraError: bitsandbytes is not installed.
    """
    require({"bitsandbytes": "a quantised base model"})


def require_unquantized(model: nn.Module, *, setting: str) -> None:
    """
    Raises:
        ConfigError: the model is quantised already, so that this setting of `model` cannot be obeyed.
    """
    if getattr(model, "is_quantized", False) or _has_quantized_layers(model):
        raise ConfigError(
            "The model is quantised already",
            where=f"model.{setting}",
            fix=f"leave `{setting}` out, or name its 16-bit original",
        )


def quantize(
    model: PreTrainedModel, quantization: QuantizationConfig, *, device: torch.device
) -> QuantizationReport:
    """Store every linear layer of the blocks in 4 or 8 bits, in place; the layers are on `device` afterwards.

    Raises:
        MissingExtraError, ConfigError, ModelError: as `layers_to_quantize`.
    """
    layers = layers_to_quantize(model, quantization, device=device)
    keep_identity(model, identity_of(model), storage=storage_name(quantization))
    layers.put_all()
    return layers.report()


def layers_to_quantize(
    model: PreTrainedModel, quantization: QuantizationConfig, *, device: torch.device
) -> QuantizedLayers:
    """The linear layers of the blocks of a model that has its weights; none is quantised yet.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: the model is quantised already.
        ModelError: it has no linear layers.
    """
    require_bitsandbytes()
    require_unquantized(model, setting="quantization")
    layers = QuantizedLayers(model, quantization, device=device)
    if not layers.names:
        raise ModelError("The model has no linear layer that could be quantised", where=_WHERE)
    return layers


class QuantizedLayers:
    """The linear layers of a model's blocks, quantised one at a time as their weights come.

    Args:
        model: with these layers dense, perhaps without memory for their weights.
        device: where a layer is once it is quantised.
    """

    def __init__(
        self, model: PreTrainedModel, quantization: QuantizationConfig, *, device: torch.device
    ) -> None:
        self.names = frozenset(block_linears(model))
        self._model, self._quantization, self._device = model, quantization, device
        self._model_before, self._layers_before = stored_bytes(model), _layer_bytes(model, self.names)

    def put(self, name: str, weight: Tensor) -> None:
        """Give a layer this weight, quantised.

        Raises:
            ModelError: int8 goes through float16, and that cannot hold a number of the weight.
        """
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layer = _quantized_linear(linear, self._quantization, self._device, name=f"{name}.weight")
        self._model.set_submodule(name, layer)

    def put_all(self) -> None:
        """Quantise each with the weight that it has."""
        for name in sorted(self.names):
            weight = self._model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            self.put(name, weight.detach())

    def report(self) -> QuantizationReport:
        """What changed, once every layer has its weight."""
        return QuantizationReport(
            storage=self._quantization.type,
            num_layers=len(self.names),
            layer_bytes=(self._layers_before, _layer_bytes(self._model, self.names)),
            model_bytes=(self._model_before, stored_bytes(self._model)),
            dense_dtype=embedding_weight(self._model).dtype,
        )


def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a quantised model dense linear layers again, in place, with the rounded weights that it computed with.

    On this base an adapter that was trained on the quantised one can be merged without a further loss; the original
    16-bit base is the other candidate. An adapter on the model stays where it is.

    Args:
        model: a transformers model, bare or under PEFT; one without quantised layers is left as it is.
        dtype: of the dense layers, which are the matrices that products in this dtype multiply by; by default that
            of the weights before they were quantised.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(name, _dense_linear(module, dtype))
    return model


def use_operands(model: nn.Module) -> None:
    """Let the layers that transformers had bitsandbytes quantise be multiplied by as operands, in place."""
    if _has_quantized_layers(model):
        # Imported here: an optional package, without which there would be no such layer.
        from phlora.models import bnb

        bnb.use_operands(model)


@contextmanager
def adapted_as_linear(model: nn.Module) -> Iterator[None]:
    """While PEFT puts an adapter on it: layers in 4 or 8 bits get the adapter of any linear layer.

    PEFT's own layers for them know nothing of row blocks. It tells such a model by two attributes, which are taken
    back for a while; what is multiplied by is the layer's business, see `use_operands`.
    """
    use_operands(model)
    marks = [mark for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(model, mark, False)]
    for mark in marks:
        setattr(model, mark, False)
    try:
        yield
    finally:
        for mark in marks:
            setattr(model, mark, True)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a model holds, quantisation scales included and shared tensors once."""
    tensors = model.state_dict(keep_vars=True).values()
    # What has no memory yet has no address either.
    return sum({tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in tensors}.values())


def storage_name(quantization: QuantizationConfig) -> str:
    """By what an adapter knows the base again: other rounding, other name."""
    single = quantization.type == "nf4" and not quantization.double_quant
    return "nf4-single" if single else quantization.type


def quantization_of(storage: str) -> QuantizationConfig | None:
    """How a base was quantised that a fingerprint names so; None for an empty name."""
    if not storage:
        return None
    kind, _, single = storage.partition("-")
    return quantization_config({"type": kind, "double_quant": not single})


def _quantized_linear(
    linear: nn.Linear, quantization: QuantizationConfig, device: torch.device, *, name: str
) -> nn.Module:
    from phlora.models import bnb

    compute_dtype = DTYPES.get(quantization.compute_dtype)
    if quantization.type == "int8":
        return bnb.linear_int8(linear, compute_dtype=compute_dtype, device=device, name=name)
    return bnb.linear_nf4(
        linear, double_quant=quantization.double_quant, compute_dtype=compute_dtype, device=device
    )


def _dense_linear(layer: Any, dtype: torch.dtype | None) -> nn.Linear:
    from phlora.models import bnb

    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    weight = bnb.dense_weight(layer) if dtype is None else bnb.operand(layer).dense(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.train(bool(layer.training))


def _has_quantized_layers(model: nn.Module) -> bool:
    return any(is_quantized(module) for module in model.modules())


def _layer_bytes(model: nn.Module, names: Iterable[str]) -> int:
    return stored_bytes(nn.ModuleList(model.get_submodule(name) for name in names))
