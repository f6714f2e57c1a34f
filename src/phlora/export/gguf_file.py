"""A merged model, or an adapter alone, as a GGUF file for llama.cpp and what stands on it; nothing is compiled.

Tensor by tensor: `W + s·BA` is formed in float32 from the base's files, rounded once to the type of the file, written
and forgotten, so that no more than the largest tensor is in memory. Phi-3's layout is llama.cpp's `phi3`, as it is. In
Llama's, rows of q and k are put in the order in which llama.cpp turns them.

An adapter file holds A and B with the scaling folded into B and alpha 0, which llama.cpp (xllamacpp 2026.10) takes as a
scale of 1: it knows one alpha for the whole file. Legend: `N` out, `K` in, `R` rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phlora.adapters.convert import last_part
from phlora.adapters.portable import PlainLayer, PortableAdapter, folded, require_plain
from phlora.errors import ModelError
from phlora.export.gguf_types import TYPES, encode, encoded_shape, tensor_type
from phlora.export.gguf_vocabulary import write_vocabulary
from phlora.models.checkpoint import Checkpoint
from phlora.models.tokenizer import LoadedTokenizer

# transformers' kind of model -> llama.cpp's architecture.
ARCHITECTURES = {"phi3": "phi3", "llama": "llama", "mistral": "llama"}
_LAYER = re.compile(r"\bblk\.(\d+)\.")
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a model: their shapes, and each read when it is needed, in float32 or as it is stored."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def merged_weights(checkpoint: Checkpoint, adapter: PortableAdapter | None) -> Weights:
    """The tensors of a checkpoint with an adapter added: `W + s·BA`, in float32.

    Raises:
        ModelError: the adapter has more than A and B of linear layers, or a layer that the checkpoint has not.
    """
    layers: dict[str, PlainLayer] = {}
    if adapter is not None:
        require_plain(adapter, target="a merge tensor by tensor")
        layers = {f"{layer.name}.weight": layer for layer in adapter.layers}
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    for name, layer in layers.items():
        wanted = (layer.lora_B.shape[0], layer.lora_A.shape[1])
        if shapes.get(name) != wanted:
            raise ModelError(
                f"The adapter has {layer.name} of {wanted}, and the base "
                + (f"one of {shapes[name]}" if name in shapes else "none"),
                where=str(checkpoint.files[0].parent),
                fix="name the base that it was trained on: --model BASE",
            )

    def read(name: str) -> Tensor:
        weight = checkpoint.read(name)
        layer = layers.get(name)
        if layer is None:
            return weight
        return weight.float().addmm_(layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scaling)

    return Weights(shapes=shapes, read=read)


def write_gguf_model(
    path: Path,
    weights: Weights,
    config: Any,
    tokenizer: LoadedTokenizer,
    *,
    file_type: str,
    name: str,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a whole model.

    Args:
        file_type: a key of `TYPES`.
        name: `general.name`; see `gguf_vocabulary.model_name`.
        advance: called with 1 after each tensor.

    Raises:
        ModelError: a kind of model, tensor, rotation or tokenizer that is not known here.
    """
    import gguf

    architecture = require_architecture(config)
    names = _gguf_names(weights.shapes, config)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(TYPES[file_type][1])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    _write_hyperparameters(writer, config)
    write_vocabulary(writer, tokenizer, vocab_size=config.vocab_size)

    types = {}
    factors = _rope_factors(config)
    for own, target in names.items():
        match = _LAYER.match(target)
        types[own] = tensor_type(
            target,
            weights.shapes[own],
            file_type,
            layer=int(match[1]) if match else None,
            num_layers=config.num_hidden_layers,
            is_head=target == "output.weight"
            or (config.tie_word_embeddings and target == "token_embd.weight"),
        )
        _announce(writer, target, weights.shapes[own], types[own])
    for target, values in factors.items():
        _announce(writer, target, tuple(values.shape), "F32")

    try:
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own, target in names.items():
            tensor = _in_llama_order(weights.read(own), own, config)
            writer.write_tensor_data(encode(tensor, types[own], name=target))
            advance(1)
        for values in factors.values():
            writer.write_tensor_data(values.numpy())
    finally:
        writer.close()


def write_gguf_adapter(path: Path, adapter: PortableAdapter, config: Any, *, name: str) -> None:
    """Write an adapter alone, for a GGUF file of its base.

    Raises:
        ModelError: it has more than A and B of linear layers, or is for another kind of model.
    """
    import gguf

    require_plain(adapter, target="llama.cpp")
    writer = gguf.GGUFWriter(path=path, arch=require_architecture(config))
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    names = _gguf_names([f"{layer.name}.weight" for layer in adapter.layers], config)
    for layer in folded(adapter).layers:
        own = f"{layer.name}.weight"
        B = _in_llama_order(layer.lora_B.float(), own, config)
        writer.add_tensor(f"{names[own]}.lora_a", layer.lora_A.float().contiguous().numpy())
        writer.add_tensor(f"{names[own]}.lora_b", B.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@torch.no_grad()
def load_gguf_weights(model: Any, file: Path) -> float:
    """Put the weights of a GGUF file, as numbers, into a model of the layout that it was written from, in place.

    Returns:
        the largest `|W_file - W| / |W|` (Frobenius norms) of a tensor, with `W` as the model had it; infinite where one
        is no number.
    """
    import gguf

    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    parameters = dict(model.named_parameters())
    apart = 0.0
    for own, target in _gguf_names(parameters, model.config).items():
        tensor, parameter = held[target], parameters[own]
        rows = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        read = _in_llama_order(rows.reshape(parameter.shape), own, model.config, back=True)
        apart = max(apart, _apart(read, parameter.data))
        parameter.data.copy_(read)
    return apart


def _apart(read: Tensor, own: Tensor) -> float:
    difference, norm = (read - own).norm().item(), own.norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if math.isfinite(difference) and norm > 0 else math.inf


def require_architecture(config: Any) -> str:
    """llama.cpp's name for the kind of model.

    Raises:
        ModelError: there is none here.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"Models of the kind {config.model_type} are not written as GGUF here",
            expected=" or ".join(ARCHITECTURES),
            fix="merge it, and use llama.cpp's own converter: phlora merge",
        )
    return found


def _gguf_names(names: Iterable[str], config: Any) -> dict[str, str]:
    """Names of tensors as llama.cpp has them; those of a tied head and of rotary buffers are left out."""
    import gguf

    architecture = next(
        key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[config.model_type]
    )
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in names:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        target = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"llama.cpp's {ARCHITECTURES[config.model_type]} has no tensor for {name}")
        found[name] = target
    return found


def _announce(writer: Any, name: str, shape: tuple[int, ...], type_name: str) -> None:
    import gguf

    stored, dtype, num_bytes = encoded_shape(shape, type_name)
    writer.add_tensor_info(name, stored, dtype, num_bytes, raw_dtype=gguf.GGMLQuantizationType[type_name])


def _in_llama_order(tensor: Tensor, name: str, config: Any, *, back: bool = False) -> Tensor:
    """Rows of Llama's q and k with the halves of each head interleaved, as its rotation in llama.cpp wants them."""
    leaf = last_part(name.removesuffix(".weight").removesuffix(".bias"))
    if ARCHITECTURES[config.model_type] != "llama" or leaf not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
    half = tensor.shape[0] // heads // 2
    halves = tensor.reshape(heads, *((half, 2) if back else (2, half)), *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotated(config: Any) -> int:
    rope = config.rope_parameters
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(_head_dim(config) * share)


def _write_hyperparameters(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "longrope") or (kind == "longrope" and config.model_type != "phi3"):
        raise ModelError(
            f"Rotations of the kind {kind} are not written as GGUF here",
            where="rope_parameters",
            expected="default, or Phi-3's longrope",
            fix="merge it, and use llama.cpp's own converter: phlora merge",
        )
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
    if config.model_type == "phi3":
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)
        # 0 means none; llama.cpp tells Phi-4 from Phi-3 by it.
        writer.add_sliding_window(config.sliding_window or 0)
        if kind == "longrope":
            writer.add_rope_scaling_attn_factors(_attention_factor(config))


def _attention_factor(config: Any) -> float:
    """What longrope multiplies cosines and sines by."""
    rope = config.rope_parameters
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _rope_factors(config: Any) -> dict[str, Tensor]:
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    return {
        f"rope_factors_{side}.weight": torch.tensor(rope[f"{side}_factor"], dtype=torch.float32)
        for side in ("long", "short")
    }
