"""From `peft_config`, a dictionary of PEFT's `LoraConfig` fields, to a model whose adapter trains and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from phlora.adapters.targets import ALL_LINEAR, resolve_targets
from phlora.errors import ConfigError, did_you_mean

_WHERE = "peft_config"

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


def lora_settings(peft_config: Mapping[str, Any]) -> LoraConfig:
    """Check `peft_config` and build PEFT's configuration from it.

    Args:
        peft_config: fields of `peft.LoraConfig`; `lora_alpha` is twice the rank where it is not given.

    Raises:
        ConfigError: an unknown key (with the nearest name), a value of the wrong type, or one out of range.
    """
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in peft_config:
        if key not in known:
            raise ConfigError(f"Unknown key `{key}`", where=_WHERE, fix=did_you_mean(str(key), known))
    values = {**{key: default for key, (default, _) in DEFAULTS.items()}, **peft_config}
    values["r"] = _whole(values["r"], "r")
    values["lora_alpha"] = _positive(values.get("lora_alpha", 2 * values["r"]), "lora_alpha")
    values["lora_dropout"] = _share(values.get("lora_dropout", 0.0), "lora_dropout")
    for key in ("rank_pattern", "alpha_pattern"):
        for name, value in (values.get(key) or {}).items():
            (_whole if key == "rank_pattern" else _positive)(value, f"{key}.{name}")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ConfigError(
            f"`{values['bias']}` is not known",
            where=f"{_WHERE}.bias",
            fix=did_you_mean(str(values["bias"]), ["none", "all", "lora_only"]),
        )
    try:
        return LoraConfig(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=_WHERE) from None


def attach(model: nn.Module, lora: LoraConfig | Mapping[str, Any]) -> Attached:
    """Add a fresh LoRA adapter; afterwards its parameters train and nothing else.

    The model's weights are shared, not copied. Adapter parameters of a 16-bit model are kept in fp32 (PEFT's
    `autocast_adapter_dtype`): AdamW's updates are smaller than bf16 can add.

    Raises:
        ConfigError: a target that the model does not have, or settings that PEFT refuses.
    """
    if not isinstance(lora, LoraConfig):
        lora = lora_settings(lora)
    targets = resolve_targets(model, _as_names(lora.target_modules))
    lora = dataclasses.replace(lora)
    if not isinstance(lora.target_modules, str):
        lora.target_modules = set(targets.names)
    try:
        adapted = get_peft_model(model, lora)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=_WHERE) from None
    _require_same(adapted, targets.modules, lora)
    return Attached(adapted, summarize(adapted), targets.notes)


def summarize(model: PeftModel) -> AdapterSummary:
    """Count what trains, by kind of module."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kind = name.rpartition(".")[2]
            counts[kind] += 1
            sizes[kind] += sum(p.numel() for p in module.parameters() if p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return AdapterSummary(
        modules={kind: (count, sizes[kind]) for kind, count in counts.items()},
        num_trainable=sum(p.numel() for p in trainable),
        # PEFT knows how many parameters a packed 4-bit tensor stands for.
        num_total=model.get_nb_trainable_parameters()[1],
        adapter_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def _require_same(model: PeftModel, wanted: tuple[str, ...], lora: LoraConfig) -> None:
    """Every target got an adapter, except where the request itself narrows the targets further."""
    narrowed = lora.layers_to_transform is not None or lora.exclude_modules or lora.target_parameters
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    missing = [name for name in wanted if name not in adapted]
    if missing and not narrowed:
        raise ConfigError(
            f"{len(missing)} of {len(wanted)} requested modules got no adapter, {missing[0]} among them",
            where=f"{_WHERE}.target_modules",
        )


def _as_names(target_modules: Any) -> str | list[str] | None:
    return sorted(target_modules) if isinstance(target_modules, set) else target_modules


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"`{value}` was given", where=f"{_WHERE}.{key}", expected="a whole number, 1 or more"
        )
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected="a number above 0")
    return value


def _share(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected="0 or more and below 1")
    return float(value)
