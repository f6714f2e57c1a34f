"""Types of tensors in GGUF files: which a tensor gets in a file of a type, and how its rows are written in it.

Files named `..._m` mix types by tensor as llama.cpp's own quantiser does (llama-quant.cpp, 2026): more bits for the
values of the attention and for `ffn_down` in the first and last eighth of the layers and in every third between, and
for the head. Rows that a type's blocks do not divide get the type that llama.cpp falls back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from phlora.errors import ConfigError, ModelError, did_you_mean, shown
from phlora.extras import require

# File type -> the type of most of its tensors, and llama.cpp's number for the file.
TYPES: Mapping[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18),
    "q5_k_m": ("Q5_K", 17),
    "q4_k_m": ("Q4_K", 15),
}
# Blocks of 256 columns -> what is taken where they do not divide a row, with blocks of 32.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FLOATS = ("F32", "F16", "BF16")
_LARGEST_F16 = 65504.0


def require_type(name: str) -> str:
    """The name of a type, in lower case.

    Raises:
        ConfigError: there is none such.
        MissingExtraError: what writes it is not installed.
    """
    wanted = name.lower()
    if wanted not in TYPES:
        raise ConfigError(f"There is no type {shown(name)}", where="--type", fix=did_you_mean(wanted, TYPES))
    needs = {"gguf": "writing a GGUF file"}
    if "_k" in wanted:
        needs["libgguf"] = f"rounding to {wanted}"
    require(needs, where="--type", instead="take --type q8_0" if "_k" in wanted else "")
    return wanted


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: str, *, layer: int | None, num_layers: int, is_head: bool
) -> str:
    """The type of a tensor, by its name in the GGUF file.

    Args:
        layer: that it belongs to; None for embedding, head and norm.
        is_head: it multiplies the last states: the head, or an embedding that is tied to it.
    """
    usual = TYPES[file_type][0]
    if len(shape) == 1:
        return "F32"
    wanted = usual
    if usual in _FALLBACK:
        more = layer is not None and _has_more_bits(layer, num_layers)
        if is_head:
            wanted = "Q6_K"
        elif file_type.endswith("_m"):
            if ("attn_v." in name or "ffn_down." in name) and more:
                wanted = "Q6_K"
            elif "attn_qkv." in name:
                wanted = {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[usual]
    columns = shape[-1]
    if wanted in _FALLBACK and columns % 256:
        wanted = _FALLBACK[wanted]
    return "F16" if wanted not in _FLOATS and columns % 32 else wanted


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def encode(tensor: Tensor, type_name: str, *, name: str) -> np.ndarray[Any, Any]:
    """The rows of a tensor in a type, as bytes or numbers that a GGUF file holds.

    Raises:
        ModelError: values that float16 cannot hold.
    """
    import gguf

    rows = tensor.float().contiguous().numpy()
    if type_name == "F32":
        return rows
    if type_name == "F16":
        if float(np.abs(rows).max(initial=0)) > _LARGEST_F16:
            raise ModelError(
                f"{name} holds values beyond those of float16", where="--type f16", fix="take --type bf16"
            )
        return rows.astype(np.float16)
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in ("BF16", "Q8_0"):
        encoded: np.ndarray[Any, Any] = gguf.quants.quantize(rows, kind)
        return encoded
    import libgguf

    packed: np.ndarray[Any, Any] = libgguf.quantize_rows(rows, int(kind))
    return packed


def encoded_shape(shape: tuple[int, ...], type_name: str) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype and bytes of a tensor once it is encoded."""
    import gguf

    if type_name in ("F32", "F16"):
        dtype = np.dtype(np.float32 if type_name == "F32" else np.float16)
        return shape, dtype, int(np.prod(shape)) * dtype.itemsize
    kind = gguf.GGMLQuantizationType[type_name]
    in_bytes = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    return tuple(in_bytes), np.dtype(np.uint8), int(np.prod(in_bytes))
