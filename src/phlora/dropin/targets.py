"""What an adapter of a script sits on: every name of `target_modules` counted, row blocks of fused weights among them.

PEFT raises only where nothing at all matches. On a Phi-3, whose q|k|v and gate|up are one weight each, the usual seven
names adapt o_proj and down_proj alone, without a word. Here such names are the row blocks that they are, as in a run;
where none is among them, PEFT makes the adapter as it always does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from phlora.adapters.attach import attach
from phlora.adapters.targets import adaptable_modules, matching, resolve_targets, row_block_names
from phlora.errors import ConfigError, nearest

_log = logging.getLogger(__name__)
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


def require_whole(model: PeftModel) -> None:
    """An adapter that was made by PEFT has all that its configuration names.

    Raises:
        ConfigError: names of parts of fused weights matched nothing.
    """
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig) or not config.target_modules:
            continue
        base = model.get_base_model()
        missing = _missed_by_peft(base, config)
        if missing:
            raise ConfigError(
                f"{_joined(missing)} matched nothing when PEFT made this adapter: they are parts of "
                f"{_joined(_fused(base, missing))}",
                where=_WHERE,
                fix="make it with phlora.get_peft_model, or pass the base model with peft_config to phlora.SFTTrainer",
            )


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
    stock = sorted(_matched_by_peft(model, targets))
    alone = (
        f"stock PEFT would have adapted {_joined(stock)} only" if stock else "stock PEFT knows none of them"
    )
    _log.warning(
        "%s are parts of %s: adapted as such; %s", ", ".join(missed), _joined(_fused(model, missed)), alone
    )
    return config


def _in_the_model(model: nn.Module, names: list[str]) -> list[str]:
    pool = [*adaptable_modules(model), *row_block_names(model)]
    there = [name for name in names if any(full == name or full.endswith(f".{name}") for full in pool)]
    for name in sorted(set(names) - set(there)) if there else ():
        match = nearest(name, {full.rpartition(".")[2] for full in pool})
        hint = f"; did you mean {match}?" if match else ""
        _log.warning("%s: this model has no module %s, so none is adapted%s", _WHERE, name, hint)
    return there or names


def _missed_by_peft(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of row blocks that are asked for, and that PEFT does not find."""
    if not row_block_names(model) or config.target_modules == "all-linear":
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
    return {name.rpartition(".")[2] for name in found - row_block_names(model).keys()}


def _fused(model: nn.Module, parts: Collection[str]) -> list[str]:
    return list(
        dict.fromkeys(
            module.rpartition(".")[2]
            for name, module in row_block_names(model).items()
            if name.rpartition(".")[2] in parts
        )
    )


def _names(targets: Any) -> Any:
    return targets if isinstance(targets, str) else sorted(targets)


def _joined(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
