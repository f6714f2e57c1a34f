"""From `peft_config`, a dictionary of PEFT's `LoraConfig` fields, to a model whose adapter trains and nothing else.

Row blocks of a fused weight are known to Phlora alone. The configuration on the model, and so in adapter_config.json,
is a plain one: it names the fused module with the rank and alpha of the block-diagonal form. Which blocks there are is
written beside it, into phlora.json:

    {"blocks": {"model.layers.0.self_attn.qkv_proj": {
        "sizes": {"q_proj": 3072, "k_proj": 1024, "v_proj": 1024},
        "enabled": ["q_proj", "v_proj"], "r": [16, 16], "scaling": [2.0, 2.0]}}}
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn

from phlora.adapters.base_view import keep_trained, widen_what_trains
from phlora.adapters.block_start import put_blocks, start_blocks
from phlora.adapters.blockform import from_block_diagonal
from phlora.adapters.layout import (
    WHERE,
    lay_out,
    narrowed,
    plain_config,
    require_known_patterns,
    with_blocks,
    with_plain_names,
)
from phlora.adapters.lora_fields import require_known_names, require_supported
from phlora.adapters.lora_values import LARGEST_RANK, check_types
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.adapters.targets import ALL_LINEAR, resolve_targets
from phlora.errors import ConfigError, ModelError, did_you_mean, shown
from phlora.files import ADAPTER_FACTS
from phlora.lora.blocks import RowBlock, row_blocks
from phlora.measure import is_out_of_memory
from phlora.models.quantization import adapted_as_linear
from phlora.others import without_known_warnings

_PREFIX = "base_model.model."

# Phlora's default where it is not PEFT's, and why.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "r": (16, "PEFT's 8 is small for a task with structure; 16 costs 3 % of a step"),
    "target_modules": (ALL_LINEAR, "PEFT has no default for Phi-3"),
    "task_type": ("CAUSAL_LM", "chat models"),
}


@dataclass(frozen=True)
class AdapterSummary:
    """What will be trained.

    Attributes:
        modules: kind of module -> (how many, trainable parameters in them).
        num_trainable: trainable parameters.
        num_total: all parameters of the model with its adapter.
        adapter_bytes: size of the trainable parameters.
    """

    modules: dict[str, tuple[int, int]]
    num_trainable: int
    num_total: int
    adapter_bytes: int

    def render(self) -> str:
        """A table of a few lines."""
        width = max((len(name) for name in self.modules), default=0)
        lines = [
            f"  {name:<{width}}  {count:>4} ×  {size:>12,}" for name, (count, size) in self.modules.items()
        ]
        share = self.num_trainable / max(1, self.num_total)
        total = f"  {self.num_trainable:,} of {self.num_total:,} parameters will be trained ({share:.2%})"
        return "\n".join([*lines, total])


@dataclass(frozen=True)
class Attached:
    """A model with a fresh adapter, what of it trains, and what was understood from the request."""

    model: PeftModel
    summary: AdapterSummary
    notes: tuple[str, ...]


def lora_settings(peft_config: Mapping[str, Any], *, also_known: Collection[str] = ()) -> LoraConfig:
    """Check `peft_config` and build PEFT's configuration from it.

    Args:
        peft_config: fields of `peft.LoraConfig`; `lora_alpha` is twice the rank where it is not given.
        also_known: keys that whoever calls has taken out, for the nearest name of a wrong one.

    Raises:
        ConfigError: an unknown key (with the nearest name), a value of the wrong type, or one out of range.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in peft_config:
        if key not in known:
            raise ConfigError(
                f"Unknown key {shown(key)}", where=WHERE, fix=did_you_mean(str(key), {*known, *also_known})
            )
    values = {**{key: default for key, (default, _) in DEFAULTS.items()}, **peft_config}
    values["r"] = _whole(values["r"], "r")
    check_types(values)
    require_supported(values)
    values["lora_alpha"] = _positive(values.get("lora_alpha", 2 * values["r"]), "lora_alpha")
    values["lora_dropout"] = _share(values.get("lora_dropout", 0.0), "lora_dropout")
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in (values.get(key) or {}).items():
            (_whole if key == "rank_pattern" else _positive)(value, f"{key}.{name}")
    try:
        return LoraConfig(**values)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise ConfigError(str(error), where=WHERE) from None


def attach(model: nn.Module, lora: LoraConfig | Mapping[str, Any]) -> Attached:
    """Add a fresh LoRA adapter; afterwards its parameters train and nothing else.

    The model's weights are shared, not copied, and PEFT computes with them; `speed_up` makes that fast. Adapter
    parameters of a 16-bit model are kept in fp32 (PEFT's
    `autocast_adapter_dtype`): AdamW's updates are smaller than bf16 can add.

    Raises:
        ConfigError: a target that the model does not have, settings that PEFT refuses, or settings that row blocks
            cannot have.
    """
    if not isinstance(lora, LoraConfig):
        lora = lora_settings(lora)
    require_known_names(model, lora)
    targets = resolve_targets(
        model, _as_names(lora.target_modules), exclude_modules=_as_names(lora.exclude_modules)
    )
    lora = with_plain_names(model, targets, lora)
    targets = narrowed(targets, lora)
    require_known_patterns(lora, targets)
    blocks, start = lay_out(model, targets, lora), lora
    if blocks:
        lora = plain_config(model, lora, targets, blocks)
    widen_what_trains(model, lora)
    base = dict(model.named_parameters())
    try:
        with without_known_warnings(), adapted_as_linear(model) if blocks else nullcontext():
            adapted = get_peft_model(model, lora)
    # Each of PEFT's many ways to start an adapter looks at its settings in its own way.
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"PEFT cannot make this adapter: {error}", where=WHERE) from None
    _require_same(adapted, targets.modules)
    for module, rows in blocks.items():
        layer = _plain_layer(adapted, module)
        start_blocks(layer, "default", rows, config=start)
    keep_trained(adapted, base)
    return Attached(adapted, summarize(adapted), (*targets.notes, *_trained_narrow(adapted)))


def _trained_narrow(model: PeftModel) -> list[str]:
    """What trains in 16 bits: whole modules of a model that computes in them, as PEFT copies them."""
    narrow = {
        name.removeprefix(_PREFIX).split(".modules_to_save")[0]: str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
    }
    return [
        f"{name} trains in {dtype}, to which each step is rounded, small ones to none: dtype: float32 (with "
        f"storage_dtype: {dtype} it takes little more memory) trains it exactly"
        for name, dtype in narrow.items()
    ]


def split_adapter(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> PeftModel:
    """Turn an adapter that was loaded in its plain form into row blocks again, in place.

    Values come from the file, so they are those that were saved, bit for bit.

    Args:
        model: with the adapter of `folder` on it.
        folder: with the adapter, and phlora.json that names its row blocks.

    Raises:
        ModelError: no row blocks are named there, or a `lora_B` is not zero outside of them.
    """
    recorded = _recorded(Path(folder))
    tensors = load_peft_weights(str(folder), device="cpu")
    split = {}
    for module, entry in recorded.items():
        layer = _plain_layer(model, module)
        rows = _recorded_rows(entry, rank=layer.r[adapter_name], scaling=layer.scaling[adapter_name])
        key = f"{_PREFIX}{module}.lora_B.weight"
        if key not in tensors:
            raise ModelError(f"The adapter has no {key}", where=str(folder))
        like: Any = layer.lora_B[adapter_name].weight
        split[module] = from_block_diagonal(tensors[key], rows, dtype=like.dtype), rows
    for module, (lora_B, rows) in split.items():
        put_blocks(_plain_layer(model, module), adapter_name, lora_B, rows)
    model.peft_config[adapter_name] = with_blocks(_lora_config(model, adapter_name), recorded)
    return model


def _lora_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    config: Any = model.peft_config[adapter_name]
    assert isinstance(config, LoraConfig)
    return config


def recorded_blocks(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    """What phlora.json says of an adapter's row blocks; empty for one without any."""
    return dict(getattr(model.peft_config[adapter_name], "blocks", {}))


def summarize(model: PeftModel) -> AdapterSummary:
    """Count what trains, by kind of module."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kind, own = name.rpartition(".")[2], model.get_submodule(name)
            counts[kind] += 1
            sizes[kind] += sum(p.numel() for p in own.parameters() if p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return AdapterSummary(
        modules={kind: (count, sizes[kind]) for kind, count in counts.items()},
        num_trainable=sum(p.numel() for p in trainable),
        # PEFT knows how many parameters a packed 4-bit tensor stands for.
        num_total=model.get_nb_trainable_parameters()[1],
        adapter_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def _require_same(model: PeftModel, wanted: tuple[str, ...]) -> None:
    """Every target got an adapter."""
    adapted = {
        name.removeprefix(_PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    missing = [name for name in wanted if name not in adapted]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(wanted)} requested modules got no adapter, {missing[0]} among them",
            where=f"{WHERE}.target_modules",
        )


def _recorded(folder: Path) -> dict[str, Any]:
    """The `blocks` of a folder's phlora.json."""
    recorded: dict[str, Any] | None = read_adapter_facts(folder).get("blocks")
    if not recorded:
        raise ModelError(
            "The adapter names no row blocks",
            where=str(folder / ADAPTER_FACTS),
            expected='"blocks": {module: {"sizes": {block: rows}, "enabled": [block]}}',
            fix="use it in its plain form",
        )
    return recorded


def _recorded_rows(entry: Mapping[str, Any], *, rank: int, scaling: float) -> tuple[RowBlock, ...]:
    """The row blocks of one module; of equal rank and scaling where no others are written down."""
    enabled = entry["enabled"]
    ranks = entry.get("r") or [rank // len(enabled)] * len(enabled)
    scalings = entry.get("scaling") or [scaling] * len(enabled)
    return row_blocks(
        entry["sizes"],
        enabled,
        r=dict(zip(enabled, ranks, strict=True)),
        scaling=dict(zip(enabled, scalings, strict=True)),
    )


def _plain_layer(model: PeftModel, module: str) -> Any:
    """PEFT's LoRA layer for a linear weight, dense or of bitsandbytes."""
    try:
        layer = model.get_submodule(_PREFIX + module)
    except AttributeError:
        raise ModelError(f"The model has no module {module}", where="blocks") from None
    # Importing that module imports bitsandbytes.
    if isinstance(layer, peft_lora.Linear) or type(layer).__module__ == "peft.tuners.lora.bnb":
        return layer
    raise ConfigError(
        f"PEFT's layer for {module} is `{type(layer).__name__}`, which cannot have row blocks",
        where=f"{WHERE}.target_modules",
        fix=f"name {module.rpartition('.')[2]} as a whole",
    )


def _as_names(target_modules: Any) -> str | list[str] | None:
    return sorted(target_modules) if isinstance(target_modules, set) else target_modules


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_RANK:
        raise ConfigError(
            f"{shown(value)} was given",
            where=f"{WHERE}.{key}",
            expected=f"a whole number, 1 or more, and {LARGEST_RANK:,} at most",
        )
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{shown(value)} was given", where=f"{WHERE}.{key}", expected="a number above 0")
    return value


def _share(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(
            f"{shown(value)} was given", where=f"{WHERE}.{key}", expected="0 or more and below 1"
        )
    return float(value)
