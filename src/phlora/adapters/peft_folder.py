"""Reading and writing PEFT's adapter folder, with the row blocks that Phlora writes down beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from phlora.adapters.base_view import BASE_CHANGING_INITS
from phlora.adapters.convert import (
    BLOCK_NAMES,
    Adapter,
    BlockSizes,
    Layout,
    full_names,
    last_part,
    layer_of,
)
from phlora.adapters.layout import by_leaf
from phlora.adapters.portable import (
    PlainLayer,
    PortableAdapter,
    as_whole,
    fitted,
    portable,
    require_plain,
)
from phlora.adapters.saved_config import read_adapter_config, require_quick
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.adapters.tensor_files import load_tensors, sort_tensors
from phlora.errors import ConfigError, ModelError
from phlora.files import ADAPTER_FACTS, write_json
from phlora.lora.blocks import RowBlock, row_blocks
from phlora.models.locate import first_line

CONFIG_FILE = "adapter_config.json"
_TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_OF_LAYOUT = ("blocks", "base_fingerprint", "base_model")
# What changes the meaning of A and B without leaving a tensor of its own.
_FOREIGN = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "arrow_config")


def read_peft(folder: str | Path, *, enable: Sequence[str] = (), blocks: BlockSizes | None = None) -> Adapter:
    """Read a PEFT adapter folder, row blocks as Phlora wrote them down beside it.

    Args:
        enable, blocks: the row blocks of an adapter that has none written down, as for `read_loralib`; a layer
            without any is a plain linear layer.

    Raises:
        ModelError: no LoRA adapter there, tensors that have no place in loralib, or a B that is not zero outside of
            the blocks.
        ConfigError: blocks are named wrongly.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    _refuse_foreign(config, folder)
    pairs, biases, embeddings = _pairs(read_peft_tensors(folder), folder)
    where = folder / CONFIG_FILE
    require_quick(read_adapter_config(where), pairs, where=str(where))
    layouts = _recorded_layouts(folder)
    enable = full_names(enable, pairs, blocks or {})
    layers = []
    for name, (A, B) in pairs.items():
        layout = layouts.get(name) or _named_layout(name, enable, blocks or {})
        layer = layer_of(name, A, B, _alpha(config, name, A.shape[0]), layout)
        layers.append(replace(layer, is_embedding=name in embeddings))
    return Adapter(layers=tuple(layers), biases=biases)


def write_peft(adapter: Adapter, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write a plain PEFT adapter, and beside it what PEFT does not know about its row blocks."""
    write_portable(portable(adapter), folder, base_model=base_model, facts={"converted_from": "loralib"})


def read_portable(folder: str | Path) -> PortableAdapter:
    """Read a PEFT adapter folder as plain layers, with row blocks as Phlora wrote them down beside it.

    What it has besides (DoRA, whole modules, a changed base) is named in `others`, and left out.

    Raises:
        ModelError: no LoRA adapter there, or its files contradict each other.
    """
    folder = Path(folder)
    config, where = read_peft_config(folder), folder / CONFIG_FILE
    raw = read_peft_tensors(folder)
    others = _others(config)
    if others:
        raw = {name: value for name, value in raw.items() if _is_plain(name)}
    pairs, biases, embeddings = _pairs(raw, folder)
    require_quick(read_adapter_config(where), pairs, where=str(where))
    recorded = read_adapter_facts(folder).get("blocks") or {}
    layers = []
    for name, (A, B) in pairs.items():
        alpha = _alpha(config, name, A.shape[0])
        sizes, blocks = _recorded_blocks(recorded.get(name), A.shape[0], alpha)
        layers.append(
            PlainLayer(
                name=name,
                lora_A=A,
                lora_B=B,
                lora_alpha=alpha,
                sizes=sizes,
                blocks=blocks,
                is_embedding=name in embeddings,
            )
        )
    return PortableAdapter(layers=tuple(layers), biases=biases, others=others)


def write_portable(
    adapter: PortableAdapter,
    folder: str | Path,
    *,
    base_model: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain PEFT adapter, and phlora.json with its row blocks and further `facts` beside it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers:
        kind = ("lora_embedding_{}" if layer.is_embedding else "lora_{}.weight").format
        for part, value in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"{_PREFIX}{layer.name}.{kind(part)}"] = value
    adapted = {layer.name for layer in adapter.layers}
    for name, value in adapter.biases.items():
        owner = name.removesuffix(".bias")
        tensors[f"{_PREFIX}{owner}.base_layer.bias" if owner in adapted else f"{_PREFIX}{name}"] = value
    write_peft_tensors(tensors, folder)
    _peft_config(adapter, base_model).save_pretrained(str(folder))
    blocks = {
        layer.name: {
            "sizes": dict(layer.sizes),
            "enabled": [block.name for block in layer.blocks],
            "r": [block.r for block in layer.blocks],
            "scaling": [block.scaling for block in layer.blocks],
        }
        for layer in adapter.layers
        if layer.blocks
    }
    write_json(folder / ADAPTER_FACTS, {"base_model": base_model, **(facts or {}), "blocks": blocks})


def write_fitted(folder: Path, output: Path, config: Any, *, base_model: str | None = None) -> None:
    """Write an adapter of the other layout as one for a base of this configuration; see `portable.fitted`.

    Raises:
        ModelError: it has more than A and B of linear layers, or does not fit such a base.
    """
    adapter = read_portable(folder)
    fix = "merge it into the base that it was trained on: phlora merge"
    require_plain(adapter, target="a change of layout", where=str(folder), fix=fix)
    facts = {name: value for name, value in read_adapter_facts(folder).items() if name not in _OF_LAYOUT}
    # The fingerprint is that of weights in the other layout.
    write_portable(
        fitted(adapter, config),
        output,
        base_model=base_model or read_peft_config(folder).base_model_name_or_path,
        facts=facts,
    )


def read_peft_config(folder: Path) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        ModelError: there is none, or it is no LoRA adapter's.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ModelError(f"The folder holds no adapter: it lacks {CONFIG_FILE}", where=str(folder))
    read_adapter_config(file)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"PEFT does not take the configuration ({first_line(error)})", where=str(file)
        ) from None
    assert isinstance(config, LoraConfig)
    return config


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder; a pickle is read only if it holds nothing but tensors.

    Raises:
        ModelError: there are none, or they cannot be read.
    """
    for name in _TENSOR_FILES:
        if (folder / name).is_file():
            return load_tensors(folder / name)
    raise ModelError(f"The folder holds no adapter: it lacks {_TENSOR_FILES[0]}", where=str(folder))


def write_peft_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors of an adapter folder as PEFT does."""
    # safetensors takes no two tensors of one storage.
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(own, folder / _TENSOR_FILES[0], metadata={"format": "pt"})


def _peft_config(adapter: PortableAdapter, base_model: str | None) -> LoraConfig:
    ranks = {layer.name: layer.r for layer in adapter.layers}
    alphas = {layer.name: as_whole(layer.lora_alpha) for layer in adapter.layers}
    # Runtimes that read `r` alone size their buffers by it.
    largest = max(ranks, key=lambda name: ranks[name])
    r, alpha = ranks[largest], alphas[largest]
    owners = {name.removesuffix(".bias") for name in adapter.biases}
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern=by_leaf(ranks, default=r),
        alpha_pattern=by_leaf(alphas, default=alpha),
        target_modules=sorted(ranks),
        bias="none" if not owners else "lora_only" if owners <= set(ranks) else "all",
        base_model_name_or_path=base_model,
        # Whether the layers belong to a chat model is known with the model only.
        task_type="CAUSAL_LM" if base_model else None,
        inference_mode=True,
    )


def _others(config: LoraConfig) -> tuple[str, ...]:
    """What an adapter has that is no A and B."""
    names = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", *_FOREIGN)
    found = [name for name in names if getattr(config, name, None)]
    init = str(config.init_lora_weights).lower()
    if init.startswith(BASE_CHANGING_INITS):
        found.append(f"init_lora_weights={init}, which changes the base's weights")
    return tuple(found)


def _is_plain(key: str) -> bool:
    return key.rpartition(".lora_")[2] in ("A.weight", "B.weight", "embedding_A", "embedding_B")


def _recorded_blocks(
    entry: Mapping[str, Any] | None, rank: int, alpha: float
) -> tuple[dict[str, int], tuple[RowBlock, ...]]:
    """The rows and the adapted blocks of one layer as phlora.json has them."""
    if not entry:
        return {}, ()
    names = entry["enabled"]
    ranks = entry.get("r") or [rank // len(names)] * len(names)
    scalings = entry.get("scaling") or [alpha / rank] * len(names)
    blocks = row_blocks(
        entry["sizes"],
        names,
        r=dict(zip(names, ranks, strict=True)),
        scaling=dict(zip(names, scalings, strict=True)),
    )
    return dict(entry["sizes"]), blocks


def _pairs(
    tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], set[str]]:
    """The (A, B) of each layer, the biases, and which layers are embeddings."""
    state = {_plain_key(key): value for key, value in tensors.items()}
    embeddings = {
        _plain_key(key).removesuffix(".lora_A.weight") for key in tensors if "lora_embedding_A" in key
    }
    names = ("{}.lora_A.weight", "{}.lora_B.weight")
    pairs, biases = sort_tensors(state, *names, where=str(folder), fix="use it with PEFT")
    return pairs, biases, embeddings


def _plain_key(key: str) -> str:
    """A key of a PEFT file with the name that the layer has in the base model, and linear layers' endings."""
    key = key.removeprefix(_PREFIX).replace(".base_layer.bias", ".bias")
    for part in ("A", "B"):
        key = key.replace(f".lora_embedding_{part}", f".lora_{part}.weight")
    return key


def _alpha(config: LoraConfig, name: str, rank: int) -> float:
    """`lora_alpha` of a layer such that `lora_alpha / rank` is PEFT's scaling."""
    patterns = config.alpha_pattern or {}
    alpha: float = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _refuse_foreign(config: LoraConfig, folder: Path) -> None:
    used = [key for key in _FOREIGN if getattr(config, key, None)]
    init = str(config.init_lora_weights).lower()
    if init.startswith(BASE_CHANGING_INITS):
        used.append(f"init_lora_weights={init}, which changes the base's weights")
    if used:
        raise ModelError(
            f"loralib has no counterpart of {used[0]}",
            where=str(folder / CONFIG_FILE),
            fix="use it with PEFT",
        )


def _recorded_layouts(folder: Path) -> dict[str, Layout]:
    recorded = read_adapter_facts(folder).get("blocks") or {}
    for name, entry in recorded.items():
        ranks = dict(zip(entry["enabled"], entry.get("r") or (), strict=False))
        if len(set(ranks.values())) > 1:
            raise ModelError(
                f"The row blocks of {name} have the ranks "
                + ", ".join(f"{r} ({b})" for b, r in ranks.items()),
                where=str(folder / ADAPTER_FACTS),
                expected="one rank for all blocks of a layer, which is all that loralib has",
                fix="use it with PEFT, or train it without a rank_pattern",
            )
    return {
        name: Layout(sizes=dict(entry["sizes"]), enabled=tuple(entry["enabled"]))
        for name, entry in recorded.items()
    }


def _named_layout(name: str, enable: Sequence[str], blocks: BlockSizes) -> Layout | None:
    """The layout that the options name for a layer of a PEFT adapter."""
    leaf = last_part(name)
    if leaf not in blocks:
        if any(part in enable for part in BLOCK_NAMES.get(leaf, ())):
            raise ConfigError(
                f"Blocks of {leaf} are named, and their sizes are not known",
                where=name,
                fix=f"name the base model (--model), or the rows of each block (--blocks {leaf}=…)",
            )
        return None
    enabled = tuple(part for part in blocks[leaf] if part in enable)
    return Layout(sizes=dict(blocks[leaf]), enabled=enabled) if enabled else None
