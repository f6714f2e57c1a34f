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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn

from phlora.adapters.base_view import keep_trained
from phlora.adapters.block_modules import BLOCK_INITS, changes_base, put_blocks, start_blocks
from phlora.adapters.blockform import from_block_diagonal, plain_alpha, plain_rank
from phlora.adapters.lora_fields import require_known_names, require_supported
from phlora.adapters.lora_values import LARGEST_RANK, check_types
from phlora.adapters.peft_layer import speed_up
from phlora.adapters.targets import (
    ALL_LINEAR,
    Targets,
    adaptable_modules,
    block_name,
    matching,
    resolve_targets,
    row_block_names,
)
from phlora.errors import ConfigError, ModelError, did_you_mean, shown
from phlora.files import ADAPTER_FACTS, read_json, write_json
from phlora.lora.blocks import RowBlock, row_blocks
from phlora.models.families import fused_row_blocks

_WHERE = "peft_config"
_PREFIX = "base_model.model."

_Value = TypeVar("_Value", int, float)

# Phlora's default where it is not PEFT's, and why.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "r": (16, "PEFT's 8 is small for a task with structure; 16 costs 3 % of a step"),
    "target_modules": (ALL_LINEAR, "PEFT has no default for Phi-3"),
    "task_type": ("CAUSAL_LM", "chat models"),
}


# Keys of `peft_config` that are for the optimizer, which PEFT keeps out of `LoraConfig`.
_OPTIMIZER_KEYS = ("loraplus_lr_ratio",)


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


class BlockLoraConfig(LoraConfig):
    """A plain `LoraConfig` that writes the adapter's row blocks beside itself.

    Attributes:
        blocks: what phlora.json says of them; PEFT's own copies of a configuration have none.
    """

    blocks: ClassVar[Mapping[str, Any]] = {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / ADAPTER_FACTS
        facts = read_json(file, ModelError) if file.is_file() else {}
        write_json(file, {**facts, "blocks": self.blocks})


def lora_settings(peft_config: Mapping[str, Any]) -> LoraConfig:
    """Check `peft_config` and build PEFT's configuration from it.

    Args:
        peft_config: fields of `peft.LoraConfig`; `lora_alpha` is twice the rank where it is not given.
            `loraplus_lr_ratio` is for the optimizer, and not looked at here.

    Raises:
        ConfigError: an unknown key (with the nearest name), a value of the wrong type, or one out of range.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)} | set(_OPTIMIZER_KEYS)
    for key in peft_config:
        if key not in known:
            raise ConfigError(f"Unknown key `{key}`", where=_WHERE, fix=did_you_mean(str(key), known))
    values = {**{key: default for key, (default, _) in DEFAULTS.items()}, **peft_config}
    values = {key: value for key, value in values.items() if key not in _OPTIMIZER_KEYS}
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
        raise ConfigError(str(error), where=_WHERE) from None


def attach(model: nn.Module, lora: LoraConfig | Mapping[str, Any]) -> Attached:
    """Add a fresh LoRA adapter; afterwards its parameters train and nothing else.

    The model's weights are shared, not copied. Adapter parameters of a 16-bit model are kept in fp32 (PEFT's
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
    lora = _with_plain_names(model, targets, lora)
    targets = _narrowed(targets, lora)
    _require_known_patterns(lora, targets)
    blocks, start = _lay_out(model, targets, lora), lora
    if blocks:
        lora = _plain_config(model, lora, targets, blocks)
    base = dict(model.named_parameters())
    try:
        adapted = get_peft_model(model, lora)
    # Each of PEFT's many ways to start an adapter looks at its settings in its own way.
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"PEFT cannot make this adapter: {error}", where=_WHERE) from None
    _require_same(adapted, targets.modules)
    for module, rows in blocks.items():
        layer = _plain_layer(adapted, module)
        start_blocks(layer, "default", rows, config=start)
    keep_trained(adapted, base)
    speed_up(adapted)
    return Attached(adapted, summarize(adapted), targets.notes)


def split_adapter(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> PeftModel:
    """Turn an adapter that was loaded in its plain form into row blocks again, in place, and speed it up.

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
    model.peft_config[adapter_name] = _with_blocks(_lora_config(model, adapter_name), recorded)
    speed_up(model)
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
            where=f"{_WHERE}.target_modules",
        )


def _with_plain_names(model: nn.Module, targets: Targets, lora: LoraConfig) -> LoraConfig:
    """A copy whose `target_modules` and `exclude_modules` name modules only."""
    lora, candidates = dataclasses.replace(lora), adaptable_modules(model)
    parts = row_block_names(model)
    if targets.blocks or lora.exclude_modules or not isinstance(lora.target_modules, str):
        names: Any = set(_short_names(targets.modules, candidates))
        lora.target_modules = names
    if isinstance(lora.exclude_modules, str):
        by_peft = matching(lora.exclude_modules, candidates, parts) - parts.keys()
        lora.exclude_modules = lora.exclude_modules if by_peft else None
    elif lora.exclude_modules:
        names = [n for n in lora.exclude_modules if matching([n], candidates, parts) - parts.keys()]
        lora.exclude_modules = names or None
    return lora


def _narrowed(targets: Targets, lora: LoraConfig) -> Targets:
    """The targets without those that `layers_to_transform` and `exclude_modules` take away."""
    if lora.target_modules == ALL_LINEAR:
        every: Any = set(targets.modules)
        lora = dataclasses.replace(lora, target_modules=every)
    modules = tuple(module for module in targets.modules if check_target_module_exists(lora, module))
    blocks = {module: names for module, names in targets.blocks.items() if module in modules}
    return Targets(modules, targets.notes, blocks)


def _lay_out(model: nn.Module, targets: Targets, lora: LoraConfig) -> dict[str, tuple[RowBlock, ...]]:
    """The row blocks of each module, with the rank and scaling that the patterns give them by name."""
    _require_block_settings(lora, targets)
    named, started = dict(targets.blocks), changes_base(lora.init_lora_weights)
    if started:
        # PEFT would take the start out of a whole weight: what is compared with the base would not be the base.
        named |= {m: (m.rpartition(".")[2],) for m in targets.modules if m not in named}
    laid_out = {}
    for module, names in named.items():
        r = {name: _rank(lora, block_name(module, name)) for name in names}
        alpha = {name: _alpha(lora, block_name(module, name)) for name in names}
        scaling = {name: alpha[name] / (math.sqrt(r[name]) if lora.use_rslora else r[name]) for name in names}
        ranks = {name: (2 if started else 1) * r[name] for name in names}
        laid_out[module] = row_blocks(_sizes(model, module, names), names, r=ranks, scaling=scaling)
    return laid_out


def _sizes(model: nn.Module, module: str, names: Iterable[str]) -> dict[str, int]:
    """Rows of every block of a fused weight, or of a whole one, which is a block of its own name."""
    leaf = module.rpartition(".")[2]
    sizes = fused_row_blocks(getattr(model, "config", None)).get(leaf, {})
    if sizes.keys() >= set(names):
        return sizes
    layer: Any = model.get_submodule(module)
    if not hasattr(layer, "out_features"):
        raise ConfigError(
            f"{module} is a `{type(layer).__name__}`, and PiSSA and OLoRA are for linear layers",
            where=f"{_WHERE}.init_lora_weights",
            fix=f"leave {leaf} out of target_modules",
        )
    return {leaf: layer.out_features}


def _rank(lora: LoraConfig, name: str) -> int:
    rank: int = _by_pattern(lora.rank_pattern or {}, name, default=lora.r)
    return rank


def _alpha(lora: LoraConfig, name: str) -> float:
    alpha: float = _by_pattern(lora.alpha_pattern or {}, name, default=lora.lora_alpha)
    return alpha


def _by_pattern(patterns: Mapping[str, _Value], name: str, *, default: _Value) -> _Value:
    """The value of the first pattern that the name of a module ends with, as PEFT reads them."""
    value: _Value = patterns.get(get_pattern_key(list(patterns), name), default)
    return value


def _require_block_settings(lora: LoraConfig, targets: Targets) -> None:
    """Refuse what has no meaning on row blocks, or none that a plain adapter could carry."""
    if changes_base(lora.init_lora_weights) and lora.lora_dropout:
        raise ConfigError(
            f"`{lora.lora_dropout}` was given with `init_lora_weights: {lora.init_lora_weights}`, whose start is "
            "taken out of the base weight and would be dropped out too",
            where=f"{_WHERE}.lora_dropout",
            expected="0",
        )
    if not targets.blocks:
        return
    asked = ", ".join(dict.fromkeys(name for names in targets.blocks.values() for name in names))
    fused = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in targets.blocks))
    whole = f"name {fused} as a whole"
    _require_block_init(lora, asked, fix=whole)
    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    for key in (*fields, "lora_bias", "layer_replication"):
        if key != "use_dora" and getattr(lora, key, None):
            raise ConfigError(
                f"It cannot be had for {asked}, which are rows of one weight",
                where=f"{_WHERE}.{key}",
                fix=f"{whole}, or leave `{key}` out",
            )


def _require_block_init(lora: LoraConfig, asked: str, *, fix: str) -> None:
    if not changes_base(lora.init_lora_weights) and lora.init_lora_weights not in BLOCK_INITS:
        raise ConfigError(
            f"`{lora.init_lora_weights}` changes the base weight, which cannot be done for {asked} alone",
            where=f"{_WHERE}.init_lora_weights",
            expected=", ".join(str(choice).lower() for choice in BLOCK_INITS),
            fix=fix,
        )


def _require_known_patterns(lora: LoraConfig, targets: Targets) -> None:
    """Every key of the patterns is about something that is adapted."""
    parts = {block_name(module, part): module for module, names in targets.blocks.items() for part in names}
    adapted = [*(module for module in targets.modules if module not in targets.blocks), *parts]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key) or {}:
            if any(get_pattern_key([pattern], name) == pattern for name in adapted):
                continue
            raise ConfigError(
                f"`{pattern}` matches nothing that is adapted",
                where=f"{_WHERE}.{key}",
                fix=did_you_mean(pattern, {name.rpartition(".")[2] for name in adapted}),
            )


def _plain_config(
    model: nn.Module, lora: LoraConfig, targets: Targets, blocks: Mapping[str, tuple[RowBlock, ...]]
) -> LoraConfig:
    """The configuration that stock PEFT needs for the same adapter, with the row blocks on it; a copy."""
    ranks, alphas = {}, {}
    for name in targets.modules:
        rows = blocks.get(name)
        ranks[name] = plain_rank(rows) if rows else _rank(lora, name)
        alphas[name] = plain_alpha(rows, use_rslora=lora.use_rslora) if rows else _alpha(lora, name)
    # Runtimes that read `r` alone size their buffers by it.
    largest = max(ranks, key=lambda name: ranks[name])
    r, alpha = ranks[largest], alphas[largest]
    plain = dataclasses.replace(
        lora,
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern=_by_leaf(ranks, default=r),
        alpha_pattern=_by_leaf(alphas, default=alpha),
        init_lora_weights=changes_base(lora.init_lora_weights) or lora.init_lora_weights,
    )
    return _with_blocks(
        plain,
        {
            module: {
                "sizes": _sizes(model, module, [row.name for row in rows]),
                "enabled": [row.name for row in rows],
                "r": [row.r for row in rows],
                "scaling": [row.scaling for row in rows],
            }
            for module, rows in blocks.items()
        },
    )


def _with_blocks(lora: LoraConfig, recorded: Mapping[str, Any]) -> BlockLoraConfig:
    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    config = BlockLoraConfig(**{name: getattr(lora, name) for name in fields})
    config.blocks = recorded  # type: ignore[misc]
    return config


def _recorded(folder: Path) -> dict[str, Any]:
    """The `blocks` of a folder's phlora.json."""
    file = folder / ADAPTER_FACTS
    recorded: dict[str, Any] | None = read_json(file, ModelError).get("blocks") if file.is_file() else None
    if not recorded:
        raise ModelError(
            "The adapter names no row blocks",
            where=str(file),
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


def _by_leaf(values: Mapping[str, _Value], *, default: _Value | None = None) -> dict[str, _Value]:
    """The values by the last parts of the names where these agree, else by full names; without the default."""
    kinds: dict[str, set[_Value]] = {}
    for name, value in values.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(value)
    short = {
        name.rpartition(".")[2] if len(kinds[name.rpartition(".")[2]]) == 1 else name: value
        for name, value in values.items()
    }
    return {name: value for name, value in short.items() if value != default}


def _short_names(modules: Iterable[str], candidates: Iterable[str]) -> list[str]:
    """Last parts of names where they mean these modules and no others, else nearly full names."""
    modules = list(modules)
    others = {name.rpartition(".")[2] for name in set(candidates).difference(modules)}
    names = []
    for module in modules:
        leaf = module.rpartition(".")[2]
        # PEFT applies `layers_to_transform` to the ends of names only, not to a full one.
        names.append((module.partition(".")[2] or module) if leaf in others else leaf)
    return list(dict.fromkeys(names))


def _plain_layer(model: PeftModel, module: str) -> peft_lora.Linear:
    try:
        layer = model.get_submodule(_PREFIX + module)
    except AttributeError:
        raise ModelError(f"The model has no module {module}", where="blocks") from None
    if isinstance(layer, peft_lora.Linear):
        return layer
    raise ConfigError(
        f"PEFT's layer for {module} is `{type(layer).__name__}`, which cannot have row blocks",
        where=f"{_WHERE}.target_modules",
        fix=f"name {module.rpartition('.')[2]} as a whole",
    )


def _as_names(target_modules: Any) -> str | list[str] | None:
    return sorted(target_modules) if isinstance(target_modules, set) else target_modules


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_RANK:
        raise ConfigError(
            f"{shown(value)} was given",
            where=f"{_WHERE}.{key}",
            expected=f"a whole number, 1 or more, and {LARGEST_RANK:,} at most",
        )
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{shown(value)} was given", where=f"{_WHERE}.{key}", expected="a number above 0")
    return value


def _share(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(
            f"{shown(value)} was given", where=f"{_WHERE}.{key}", expected="0 or more and below 1"
        )
    return float(value)
