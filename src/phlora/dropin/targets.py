"""What an adapter of a script sits on: every name of `target_modules` counted, row blocks of fused weights among them.

PEFT raises only where nothing at all matches. On a Phi-3, whose q|k|v and gate|up are one weight each, the usual seven
names adapt o_proj and down_proj alone, without a word. Here such names are the row blocks that they are, as in a run;
where none is among them, PEFT makes the adapter as it always does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from phlora.adapters.attach import attach
from phlora.adapters.targets import (
    ALL_LINEAR,
    adaptable_modules,
    block_name,
    matching,
    resolve_targets,
    row_block_names,
)
from phlora.dropin.tell import warn
from phlora.errors import ConfigError, nearest, shown
from phlora.models.families import fused_row_blocks
from phlora.patterns import matches
from phlora.train.optimizer import is_lora_B

_WHERE = "peft_config.target_modules"


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> Any:
    """`peft.get_peft_model`, which also adapts the parts of a fused weight by their names: `q_proj` of `qkv_proj`.

    Such an adapter is saved and loaded as a plain one of PEFT. The other arguments are those of `peft.get_peft_model`.

    Raises:
        ConfigError: no name matches, or settings that row blocks cannot have.
    """
    with_blocks = config_with_blocks(model, peft_config)
    if with_blocks is None:
        return peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
    # Both values of it come to the same for a float32 model, and the other loses AdamW's updates.
    autocast = kwargs.pop("autocast_adapter_dtype", True)
    refused = [name for name, value in kwargs.items() if value not in (None, False)]
    refused += ["autocast_adapter_dtype=False"] * (not autocast) + [f"adapter_name={adapter_name}"] * (
        adapter_name != "default"
    )
    if refused:
        raise ConfigError(
            f"Parts of fused weights are adapted without {_joined(refused)}",
            where=_WHERE,
            fix="leave that out, or name the fused modules, qkv_proj and gate_up_proj",
        )
    return attach(model, with_blocks).model


def holds_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of PEFT's: as a PeftModel, or in its layers, as transformers' `load_adapter` and
    `peft.inject_adapter_in_model` put them there."""
    return isinstance(model, PeftModel) or any(isinstance(part, BaseTunerLayer) for part in model.modules())


def base_of(model: nn.Module) -> nn.Module:
    """The model of transformers that holds the adapted layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def lora_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The settings of the LoRA adapters of a model, by their names."""
    configs = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, LoraConfig)}


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are computed with."""
    if isinstance(model, PeftModel):
        return list(model.active_adapters)
    layers = (part for part in model.modules() if isinstance(part, BaseTunerLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def require_whole(model: nn.Module) -> None:
    """Each adapter of a model, the one that is trained among them, has all that its configuration names.

    Raises:
        ConfigError: names of parts of fused weights matched nothing.
    """
    configs, active = lora_configs(model), active_adapters(model)
    for name, config in configs.items():
        missing = _left_by_peft(base_of(model), name, config) if config.target_modules else {}
        which = "this adapter" if len(configs) == 1 else f"the adapter {shown(name)}"
        if missing and (_is_trained(model, name) or name not in active):
            warn(
                f"T{which[1:]} has no {_joined(list(missing))}: PEFT made it without these parts of fused weights"
            )
        elif missing:
            they_are = "it is a part" if len(missing) == 1 else "they are parts"
            raise ConfigError(
                f"{_joined(list(missing))} matched nothing when PEFT made {which}: {they_are} of "
                f"{_joined(list(dict.fromkeys(missing.values())))}",
                where=_WHERE,
                fix="make it with phlora.get_peft_model on the base model, which has one adapter then, "
                "or pass the base model with peft_config to phlora.SFTTrainer",
            )


def _left_by_peft(base: nn.Module, adapter: str, config: LoraConfig) -> dict[str, str]:
    """The names of row blocks that a configuration asks for, and the fused weights on which its adapter has nothing."""
    sizes, targets = fused_row_blocks(getattr(base, "config", None)), config.target_modules
    if targets == ALL_LINEAR:
        return {}
    without = {
        block_name(module, part): _leaf(module)
        for module, layer in base.named_modules()
        if module and adapter not in getattr(layer, "lora_A", ())
        for part in sizes.get(_leaf(module), ())
    }
    parts = list(without)
    if isinstance(targets, str):
        found = [part for part, named in zip(parts, matches(targets, parts), strict=True) if named]
    else:
        names = targets or ()
        found = [part for part in parts if any(part == name or part.endswith(f".{name}") for name in names)]
    return {_leaf(part): without[part] for part in found}


def _is_trained(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter has been trained already: a fresh one has a B of zeros."""
    ups = [
        parameter
        for name, parameter in model.named_parameters()
        if is_lora_B(name) and f".{adapter}." in f"{name}."
    ]
    return any(bool(parameter.any()) for parameter in ups)


def config_with_blocks(model: nn.Module, config: PeftConfig | None) -> LoraConfig | None:
    """The configuration with the targets that the model has, where row blocks are among them; else None.

    What PEFT would have passed over is told in one line for row blocks, and in one for each name that matches nothing.
    """
    if not isinstance(config, LoraConfig) or not config.target_modules:
        return None
    targets: Any = config.target_modules
    if not isinstance(targets, str):
        targets = _in_the_model(model, sorted(targets))
    config = dataclasses.replace(config, target_modules=targets)
    missed = _missed_by_peft(model, config)
    if not missed:
        return None
    matched = _matched_by_peft(model, targets)
    stock = [name for name in dict.fromkeys(map(_leaf, adaptable_modules(model))) if name in matched]
    alone = (
        f"stock PEFT would have adapted {_joined(stock)} only" if stock else "stock PEFT knows none of them"
    )
    are = "is a part of" if len(missed) == 1 else "are parts of"
    warn(f"{', '.join(missed)} {are} {_joined(_fused(model, missed))}: adapted as such; {alone}")
    return config


def _in_the_model(model: nn.Module, names: list[str]) -> list[str]:
    pool = [*adaptable_modules(model), *row_block_names(model)]
    there = [name for name in names if any(full == name or full.endswith(f".{name}") for full in pool)]
    for name in sorted(set(names) - set(there)) if there else ():
        match = nearest(name, {_leaf(full) for full in pool})
        hint = f"; did you mean {match}?" if match else ""
        warn(f"{_WHERE}: this model has no module {name}, so none is adapted{hint}")
    return there or names


def _missed_by_peft(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of row blocks that are asked for, and that PEFT does not find."""
    if not row_block_names(model) or config.target_modules == ALL_LINEAR:
        return []
    try:
        blocks = resolve_targets(model, _names(config.target_modules)).blocks
    except ConfigError:
        return []
    return list(dict.fromkeys(part for parts in blocks.values() for part in parts))


def _matched_by_peft(model: nn.Module, targets: Any) -> set[str]:
    try:
        found = matching(targets, adaptable_modules(model), row_block_names(model))
    except ConfigError:
        return set()
    return {_leaf(name) for name in found - row_block_names(model).keys()}


def _fused(model: nn.Module, parts: Collection[str]) -> list[str]:
    return list(
        dict.fromkeys(
            _leaf(module) for name, module in row_block_names(model).items() if _leaf(name) in parts
        )
    )


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _names(targets: Any) -> Any:
    return targets if isinstance(targets, str) else sorted(targets)


def _joined(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
