"""What an adapter's configuration says of each module: its row blocks, their ranks and scalings, and the plain form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from phlora.adapters.block_start import BLOCK_INITS, changes_base
from phlora.adapters.blockform import plain_alpha, plain_rank
from phlora.adapters.targets import (
    ALL_LINEAR,
    Targets,
    adaptable_modules,
    block_name,
    matching,
    row_block_names,
)
from phlora.errors import ConfigError, ModelError, did_you_mean, shown
from phlora.files import ADAPTER_FACTS, read_json, write_json
from phlora.lora.blocks import RowBlock, row_blocks
from phlora.models.families import fused_row_blocks
from phlora.patterns import PatternProblem, compiled, matches, may_be_slow

WHERE = "peft_config"

_Value = TypeVar("_Value", int, float)


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


def with_plain_names(model: nn.Module, targets: Targets, lora: LoraConfig) -> LoraConfig:
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


def narrowed(targets: Targets, lora: LoraConfig) -> Targets:
    """The targets without those that `layers_to_transform` and `exclude_modules` take away."""
    if lora.target_modules == ALL_LINEAR:
        every: Any = set(targets.modules)
        lora = dataclasses.replace(lora, target_modules=every)
    modules = tuple(module for module in targets.modules if check_target_module_exists(lora, module))
    blocks = {module: names for module, names in targets.blocks.items() if module in modules}
    return Targets(modules, targets.notes, blocks)


def lay_out(model: nn.Module, targets: Targets, lora: LoraConfig) -> dict[str, tuple[RowBlock, ...]]:
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


def require_known_patterns(lora: LoraConfig, targets: Targets) -> None:
    """Every key of the patterns is about something that is adapted."""
    parts = {block_name(module, part): module for module, names in targets.blocks.items() for part in names}
    adapted = [*(module for module in targets.modules if module not in targets.blocks), *parts]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key) or {}:
            _require_quick(pattern, adapted, where=f"{WHERE}.{key}")
            if any(get_pattern_key([pattern], name) == pattern for name in adapted):
                continue
            raise ConfigError(
                f"`{pattern}` matches nothing that is adapted",
                where=f"{WHERE}.{key}",
                fix=did_you_mean(pattern, {name.rpartition(".")[2] for name in adapted}),
            )


def _require_quick(pattern: str, names: Sequence[str], *, where: str) -> None:
    """Refuse an expression that PEFT, which puts it behind any beginning of a name, could not match in time."""
    whole = rf"(.*\.)?({pattern})$"
    try:
        matches(whole, names) if may_be_slow(pattern) else compiled(whole)
    except PatternProblem as problem:
        raise ConfigError(f"{shown(pattern)} {problem}", where=where) from None


def plain_config(
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
        rank_pattern=by_leaf(ranks, default=r),
        alpha_pattern=by_leaf(alphas, default=alpha),
        init_lora_weights=changes_base(lora.init_lora_weights) or lora.init_lora_weights,
    )
    return with_blocks(
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


def with_blocks(lora: LoraConfig, recorded: Mapping[str, Any]) -> BlockLoraConfig:
    """A copy with what phlora.json says of its row blocks."""
    fields = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    config = BlockLoraConfig(**{name: getattr(lora, name) for name in fields})
    config.blocks = recorded  # type: ignore[misc]
    return config


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
            where=f"{WHERE}.init_lora_weights",
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
            where=f"{WHERE}.lora_dropout",
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
                where=f"{WHERE}.{key}",
                fix=f"{whole}, or leave `{key}` out",
            )


def _require_block_init(lora: LoraConfig, asked: str, *, fix: str) -> None:
    if not changes_base(lora.init_lora_weights) and lora.init_lora_weights not in BLOCK_INITS:
        raise ConfigError(
            f"`{lora.init_lora_weights}` changes the base weight, which cannot be done for {asked} alone",
            where=f"{WHERE}.init_lora_weights",
            expected=", ".join(str(choice).lower() for choice in BLOCK_INITS),
            fix=fix,
        )


def by_leaf(values: Mapping[str, _Value], *, default: _Value | None = None) -> dict[str, _Value]:
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
