"""Configuration objects of TRL, transformers and PEFT, as the dictionaries that `finetune` works with.

A dataclass does not know which of its fields somebody wrote down. So an object counts whole: what it holds is what is
done, whether or not it equals a default of its library. Phlora's own defaults are for what nobody said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments
from trl.trainer.sft_config import SFTConfig

from phlora.adapters.attach import DEFAULTS as LORA_DEFAULTS
from phlora.errors import ConfigError
from phlora.train.arguments import DEFAULTS
from phlora.train.fields import HONOURED

# Of a LoraConfig object: kept by PEFT for itself, or about a file.
_NOT_ASKED = (
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    "runtime_config",
)
# Have a default in Phlora, and say nothing about the training: how it is shown, and what the trainer's loop is given.
NOT_FOLLOWED = (
    *("logging_first_step", "logging_nan_inf_filter", "disable_tqdm", "report_to", "remove_unused_columns"),
    "dataloader_pin_memory",
)
# The fields of a LoraConfig that Phlora would fill otherwise.
_LORA_FOLLOWED = (*LORA_DEFAULTS, "lora_alpha")


def training_values(given: Any, notes: list[str]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """`training_config` as a dictionary, and where its values came from; of an object, all that it holds.

    Fields that Phlora refuses or does in another way count where they differ from the object's defaults.

    Raises:
        ConfigError: neither a mapping nor an object of these kinds.
    """
    if given is None or isinstance(given, Mapping):
        return (None if given is None else dict(given)), {}
    if not isinstance(given, TrainingArguments):
        raise ConfigError(
            f"`training_config` is a `{type(given).__name__}`",
            expected="a dictionary, a trl.SFTConfig or a transformers.TrainingArguments",
        )
    kind = type(given).__name__
    fresh = type(given)(output_dir=given.output_dir, use_cpu=given.use_cpu, fp16=given.fp16)
    names = [f.name for f in dataclasses.fields(given) if f.init]
    changed = {name for name in names if getattr(given, name) != getattr(fresh, name, None)}
    values = {name: plain_setting(getattr(given, name)) for name in names if name in changed | _followed()}
    unset = next(f.default for f in dataclasses.fields(given) if f.name == "output_dir")
    if given.output_dir in (unset, "trainer_output"):
        values.pop("output_dir", None)
    else:
        values["output_dir"] = given.output_dir
    # One field under two names.
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in values:
            values.pop(name.replace("gradient", "activation"), None)
    differing = [
        f"{name} {values[name]} (here {default})"
        for name, (default, _) in DEFAULTS.items()
        if name in values and name not in changed and values[name] != default
    ]
    notes.append(
        f"{kind}: it counts whole"
        + (f"; Phlora's defaults differ: {', '.join(differing)}" if differing else "")
    )
    return values, {f"training_config.{name}": kind for name in values}


def _followed() -> set[str]:
    """The fields that count even where they equal the object's default: those that Phlora would fill otherwise."""
    own = {f.name for f in dataclasses.fields(TrainingArguments)}
    fresh, base = (kind(output_dir="x", use_cpu=True) for kind in (SFTConfig, TrainingArguments))
    between = {name for name in own if getattr(fresh, name, None) != getattr(base, name)}
    mine = {*DEFAULTS, "per_device_eval_batch_size"} | between
    return (mine & HONOURED) - {*NOT_FOLLOWED, "activation_checkpointing"}


def lora_values(given: Any, notes: list[str]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """`peft_config` as a dictionary, and where its values came from; of a `LoraConfig` object, all that it holds.

    None is no value: Phlora's `target_modules` and `task_type` fill it.

    Raises:
        ConfigError: neither a mapping nor a `LoraConfig`.
    """
    if given is None or isinstance(given, Mapping):
        return (None if given is None else dict(given)), {}
    if not isinstance(given, LoraConfig):
        kind = type(given).__name__
        raise ConfigError(
            f"`peft_config` is a `{kind}`",
            expected="a dictionary or a peft.LoraConfig"
            + ("; Phlora trains LoRA adapters" if isinstance(given, PeftConfig) else ""),
        )
    fresh = LoraConfig()
    values = {
        name: getattr(given, name)
        for name in lora_fields()
        if name in _LORA_FOLLOWED or getattr(given, name) != getattr(fresh, name)
    }
    values = {name: plain_setting(value) for name, value in values.items() if value is not None}
    notes.append(f"LoraConfig: it counts whole: {', '.join(f'{n} {v}' for n, v in sorted(values.items()))}")
    return values, {f"peft_config.{name}": "LoraConfig" for name in values}


def lora_fields() -> list[str]:
    """The fields of a `LoraConfig` that say what an adapter is."""
    return [f.name for f in dataclasses.fields(LoraConfig) if f.name not in _NOT_ASKED]


def plain_setting(value: Any) -> Any:
    """A value of a `LoraConfig` as a configuration file holds it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )
