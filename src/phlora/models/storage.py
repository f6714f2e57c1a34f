"""What the frozen weights of a model are stored as, apart from what is computed with, and why.

float32, bfloat16, float16   matrices in this dtype; where it is narrower than that of the computation, each is
                             widened for its products (`models.stored_layers`)
nf4, int8                    the linear layers of the blocks in 4 or 8 bits (`models.quantization`), the rest in 16
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from phlora.config import ModelConfig, QuantizationConfig, quantization_config
from phlora.errors import ConfigError, NoRoomError, did_you_mean
from phlora.extras import install_command, is_installed
from phlora.measure import available_bytes
from phlora.models.device import DTYPES, Choice

QUANTIZED = ("nf4", "int8")
STORAGES = (*DTYPES, *QUANTIZED)
_WHERE = "model.storage_dtype"

# Weights take no more than this share of what is free: activations, gradients and the optimizer come on top.
_SHARE_OF_FREE = 0.8
# Below this share, storing what the computation uses costs nothing that anybody misses, and saves the widening.
_SMALL_SHARE = 0.25
# Bytes of a quantised weight with its scales: a block of 64 with an 8-bit scale and its share of the second ones, or
# with a 32-bit scale; a row.
_NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / 64 / 256, False: 0.5 + 4 / 64}
_INT8_BYTES = 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many numbers a model has.

    Attributes:
        linears: in the linear layers of the blocks, which may be quantised.
        matrices: in all layers that may be stored narrow: those, the embeddings and the head.
        rest: in norms, biases and whatever else.
        largest: in the largest one of the matrices.
        stored: the dtype that the checkpoint has.
    """

    linears: int
    matrices: int
    rest: int
    largest: int
    stored: torch.dtype

    def bytes_as(self, storage: Storage, compute: torch.dtype) -> int:
        """Of the whole model, stored so."""
        dense = self.matrices
        quantized = 0.0
        if storage.quantization is not None:
            dense -= self.linears
            double = storage.quantization.double_quant
            each = _INT8_BYTES if storage.quantization.type == "int8" else _NF4_BYTES[double]
            quantized = self.linears * each
        return int(quantized) + dense * storage.dtype.itemsize + self.rest * compute.itemsize


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a model is stored.

    Attributes:
        dtype: of the matrices that are not quantised.
        quantization: of the linear layers of the blocks; None: they have `dtype` too.
    """

    dtype: torch.dtype
    quantization: QuantizationConfig | None = None

    def __str__(self) -> str:
        return self.quantization.type if self.quantization else str(self.dtype).removeprefix("torch.")


def storage_settings(model: ModelConfig) -> ModelConfig:
    """The same settings with `storage_dtype: nf4` and `int8` written as the `quantization` that they are.

    Raises:
        ConfigError: there is no such storage, or it contradicts `quantization`.
    """
    name = str(model.storage_dtype).removeprefix("torch.")
    if name != "auto" and name not in STORAGES:
        raise ConfigError(
            f"There is no storage `{model.storage_dtype}`",
            where=_WHERE,
            fix=did_you_mean(name, ["auto", *STORAGES]),
        )
    if name not in QUANTIZED:
        return replace(model, storage_dtype=name)
    if model.quantization is not None and model.quantization.type != name:
        raise ConfigError(
            f"storage_dtype: {name} and quantization: {model.quantization.type} contradict each other",
            where=_WHERE,
            fix="leave one of them out",
        )
    return replace(model, storage_dtype="auto", quantization=model.quantization or quantization_config(name))


def choose_storage(
    model: ModelConfig, sizes: Sizes, *, dtype: torch.dtype, device: torch.device
) -> Choice[Storage]:
    """What to store the weights as, and why; never what does not fit into the memory that is free.

    `auto` takes what loses nothing: where the checkpoint is narrower than the computation, the checkpoint's own dtype,
    but for a model that is small beside the memory. Where that does not fit it takes NF4.

    Args:
        model: with `storage_settings`.
        dtype: of the computation.

    Raises:
        ConfigError: it would be stored wider than it is computed with.
        NoRoomError: it does not fit, in any way that was left open.
    """
    free = available_bytes(device)
    if model.storage_dtype != "auto":
        asked = asked_dtype(model.storage_dtype, compute=dtype)
        storage = Storage(dtype=asked, quantization=model.quantization)
        _require_fit(storage, sizes, dtype, free, device)
        return Choice(value=storage, reason="asked for")
    exact, reason = _exact(sizes, dtype, free)
    if model.quantization is not None:
        storage = Storage(dtype=exact, quantization=model.quantization)
        _require_fit(storage, sizes, dtype, free, device)
        return Choice(value=storage, reason="asked for")
    if _fits(Storage(dtype=exact), sizes, dtype, free):
        return Choice(value=Storage(dtype=exact), reason=reason)
    return _smaller(Storage(dtype=exact), sizes, dtype, free, device)


def asked_dtype(name: str, *, compute: torch.dtype) -> torch.dtype:
    """The dtype of this name, to store weights in.

    Raises:
        ConfigError: it is not what is computed with, and no narrower.
    """
    asked = DTYPES[name]
    if asked != compute and asked.itemsize >= compute.itemsize:
        computed = str(compute).removeprefix("torch.")
        raise ConfigError(
            f"Weights stored in {name} cannot be computed with in {computed}",
            where=_WHERE,
            expected=f"auto, {computed}, or something narrower",
        )
    return asked


def _exact(sizes: Sizes, compute: torch.dtype, free: int) -> tuple[torch.dtype, str]:
    """What loses nothing against computing with the checkpoint's weights in `compute`."""
    narrow = sizes.stored
    if narrow.itemsize >= compute.itemsize:
        return compute, "what is computed with"
    wide = sizes.bytes_as(Storage(dtype=compute), compute)
    if wide <= _SMALL_SHARE * free:
        return compute, "what is computed with; the model is small beside the memory that is free"
    saved = wide - sizes.bytes_as(Storage(dtype=narrow), compute)
    return narrow, f"as in the checkpoint, which saves {saved / 1e9:.1f} GB; widened exactly for each product"


def _smaller(
    wanted: Storage, sizes: Sizes, compute: torch.dtype, free: int, device: torch.device
) -> Choice[Storage]:
    """What fits where the exact storage does not."""
    why = f"{wanted} would take {_gigabytes(wanted, sizes, compute)} of the {free / 1e9:.1f} GB that are free"
    half = Storage(dtype=torch.bfloat16)
    if wanted.dtype == torch.float32 and _fits(half, sizes, compute, free):
        return Choice(value=half, reason=f"{why}; the weights are rounded to 8 bits of precision")
    nf4 = Storage(
        dtype=half.dtype if compute == torch.float32 else compute, quantization=quantization_config("nf4")
    )
    if sizes.linears and _fits(nf4, sizes, compute, free):
        if is_installed("bitsandbytes"):
            return Choice(value=nf4, reason=f"{why}; the weights are rounded to 4 bits")
        raise NoRoomError(
            f"The weights do not fit: {why}",
            where=_WHERE,
            fix=f"{install_command(['bitsandbytes'])}; then they are stored in 4 bits, which takes "
            f"{_gigabytes(nf4, sizes, compute)}",
        )
    raise _no_room(nf4 if sizes.linears else wanted, sizes, compute, free, device)


def _require_fit(
    storage: Storage, sizes: Sizes, compute: torch.dtype, free: int, device: torch.device
) -> None:
    if _needed(storage, sizes, compute) > free:
        raise _no_room(storage, sizes, compute, free, device)


def _fits(storage: Storage, sizes: Sizes, compute: torch.dtype, free: int) -> bool:
    return _needed(storage, sizes, compute) <= _SHARE_OF_FREE * free


def _needed(storage: Storage, sizes: Sizes, compute: torch.dtype) -> int:
    """The weights, and while they are loaded the largest matrix as it is read and as it is computed with."""
    return sizes.bytes_as(storage, compute) + sizes.largest * (sizes.stored.itemsize + compute.itemsize)


def _no_room(
    storage: Storage, sizes: Sizes, compute: torch.dtype, free: int, device: torch.device
) -> NoRoomError:
    return NoRoomError(
        f"The weights in {storage} take {_gigabytes(storage, sizes, compute)}, "
        f"and {device.type} has {free / 1e9:.1f} GB free",
        where=_WHERE,
        fix="end what else uses the memory, choose a smaller model"
        + ("" if storage.quantization else ", or set storage_dtype: nf4"),
    )


def _gigabytes(storage: Storage, sizes: Sizes, compute: torch.dtype) -> str:
    return f"{sizes.bytes_as(storage, compute) / 1e9:.1f} GB"
