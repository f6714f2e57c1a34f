"""From `training_config`, a dictionary of TRL's `SFTConfig` fields, to the arguments of the trainer.

Dictionaries from existing scripts work unchanged, those for older library versions too: names that were renamed or
removed are accepted with a note. Where the user is silent, Phlora's own defaults stand (`DEFAULTS`, each with its
reason), else TRL's.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from phlora.config import TrainOn
from phlora.errors import ConfigError, did_you_mean, masked, shown
from phlora.extras import require
from phlora.models.activation_memory import LEVELS
from phlora.names import SETTINGS, by_todays_names, one_message
from phlora.train.backends import check_checkpointing, check_compiler, check_trackers
from phlora.train.field_values import (
    WHERE,
    check_ranges,
    field_of,
    field_types,
    kinds_of,
    number_of,
    typed_value,
)
from phlora.train.fields import HONOURED, MAPPED, REFUSED
from phlora.train.optimizer import LORAPLUS, check_optimizer
from phlora.train.upload import Upload, take_upload

# Phlora's default, and why it is not TRL's.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "learning_rate": (2e-4, "TRL's 2e-5 suits full fine-tuning; LoRA barely moves with it"),
    "num_train_epochs": (2, "a third epoch overfits small chat files more often than it helps"),
    "max_length": (2048, "TRL's 1024 cuts into ordinary conversations"),
    "gradient_checkpointing": (False, "costs a third of the step, and is only needed when memory is short"),
    "bf16": (False, "the model's own dtype decides; autocast on top of it only costs time"),
    "fp16": (False, "as bf16"),
    "lr_scheduler_type": ("cosine", "ends at zero, so that the last adapter is a settled one"),
    "warmup_steps": (0.03, "a share of all steps; AdamW's first steps are noisy"),
    "eval_strategy": ("epoch", "the best adapter is kept by its held-out loss"),
    "save_strategy": ("steps", "a crash loses a fifth of the run at most"),
    "save_steps": (0.2, "a share of all steps"),
    "save_total_limit": (2, "resuming needs one; the other is there should that one be damaged"),
    "logging_first_step": (True, "a loss of the wrong size shows at once"),
    "logging_nan_inf_filter": (
        False,
        "it hides a loss that is no number, and waits for the device each step",
    ),
    "disable_tqdm": (True, "Phlora shows its own progress"),
    "report_to": ("none", "nothing is sent anywhere unless asked for"),
    "remove_unused_columns": (False, "rows carry weights that the model's signature does not name"),
}

# Phlora's own, beside the fields of TRL's configuration.
_Z_LOSS = "z_loss"
ACTIVATION_MEMORY = "activation_memory"
_OWN = (_Z_LOSS, ACTIVATION_MEMORY)
# What transformers says of `activation_memory`, under the name that it has now and the one before.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


# Each of the many checks in TRL's and transformers' configuration has its own kind.
_MISTAKES = (
    *(ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, ImportError, OSError),
)


@dataclass(frozen=True)
class Arguments:
    """The trainer's arguments and where they came from.

    Attributes:
        args: TRL's configuration object, with every field set.
        notes: what was renamed, converted or left out, one sentence each.
        origins: field name -> `user` or `phlora`; fields that are not listed have TRL's default.
        loraplus_lr_ratio: learning rate of every lora_B, as a multiple of that of all else; None: the same.
        z_loss: weight of the squared log-normaliser of each trained token, see `models.lm_head.LossTerms`.
        activation_memory: `auto`, until the forecast has decided, or a level of `models.activation_memory`.
        upload: where the best adapter is sent; None: nowhere.
    """

    args: SFTConfig
    notes: tuple[str, ...]
    origins: Mapping[str, str]
    loraplus_lr_ratio: float | None = None
    z_loss: float = 0.0
    activation_memory: str = "auto"
    upload: Upload | None = None

    def with_activation_memory(self, level: str) -> Arguments:
        """The same with `activation_memory` decided."""
        args = copy.copy(self.args)
        args.activation_checkpointing = args.gradient_checkpointing = level == "recompute"
        return dataclasses.replace(self, args=args, activation_memory=level)


def training_arguments(
    training_config: Mapping[str, Any],
    *,
    output_dir: str | Path,
    device: str = "cpu",
    loraplus_lr_ratio: float | None = None,
) -> Arguments:
    """Check `training_config` and build the trainer's arguments from it.

    Args:
        training_config: fields of `trl.SFTConfig`, current or older names; a TRL script's dictionary as it is; and
            `z_loss` and `activation_memory`.
        output_dir: where checkpoints go; an `output_dir` in the dictionary is replaced by it.
        device: type of the device that trains: cpu, cuda or mps.
        loraplus_lr_ratio: of `peft_config`, see `optimizer.take_loraplus`.

    Raises:
        ConfigError: an unknown key (with the nearest name), a value of the wrong type, or one out of range.
    """
    notes: list[str] = []
    z_loss = _z_loss(training_config.get(_Z_LOSS), notes)
    values = _current_names({k: v for k, v in training_config.items() if k not in _OWN}, notes)
    values, upload = take_upload(values, notes)
    values = _for_the_trainer(values, notes, device)
    activation_memory = _activation_memory(training_config.get(ACTIVATION_MEMORY), values)
    if activation_memory == "recompute":
        values.setdefault("gradient_checkpointing", True)
    check_ranges(values)
    check_trackers(values.get("report_to"))
    check_compiler(values)
    check_checkpointing(values)
    if values.get("use_liger_kernel"):
        _require_liger(device)
    elif values.get("liger_kernel_config"):
        notes.append(f"{WHERE}.liger_kernel_config changes nothing without use_liger_kernel")
    _fit_device(values, device, notes)
    origins = dict.fromkeys(values, "user")
    for key, (default, _) in DEFAULTS.items():
        # Who wants losses of epochs, or none, wants none of the first step.
        is_meant = key != "logging_first_step" or values.get("logging_strategy", "steps") == "steps"
        if key not in values and is_meant:
            values[key], origins[key] = default, "phlora"
    if "per_device_eval_batch_size" not in values:
        values["per_device_eval_batch_size"] = values.get("per_device_train_batch_size", 8)
        origins["per_device_eval_batch_size"] = "phlora"
    values |= {"output_dir": str(output_dir), "dataloader_pin_memory": device == "cuda"}
    args = _sft_config(values, [name for name, origin in origins.items() if origin == "user"])
    notes += check_optimizer(args)
    return Arguments(args, tuple(notes), origins, loraplus_lr_ratio, z_loss, activation_memory, upload)


def _sft_config(values: Mapping[str, Any], given: Sequence[str]) -> SFTConfig:
    """TRL's configuration; an error names the settings without which there would be none."""
    values = _by_the_new_name(values)
    try:
        return SFTConfig(**values)
    except _MISTAKES as error:
        to_blame = [name for name in given if _is_fine(values, without=name)]
        where = f"{WHERE}.{', '.join(to_blame)}" if to_blame else WHERE
        if len(to_blame) == 1:
            raise ConfigError(
                f"{shown(masked(values[to_blame[0]], to_blame[0]))} was given: {error}", where=where
            ) from None
        raise ConfigError(f"The settings contradict each other: {error}", where=where) from None


def _by_the_new_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Recomputation by the name that transformers has now; at the one before it warns, also of TRL's own default."""
    new, old = CHECKPOINTING
    renamed = {old: new, f"{old}_kwargs": f"{new}_kwargs"} if new in field_types() else {}
    earlier = {renamed[key]: value for key, value in values.items() if key in renamed}
    return {**earlier, **{key: value for key, value in values.items() if key not in renamed}}


def _is_fine(values: Mapping[str, Any], *, without: str) -> bool:
    try:
        SFTConfig(**{name: value for name, value in values.items() if name != without})
    except _MISTAKES:
        return False
    return True


def train_on_of(training_config: Mapping[str, Any]) -> TrainOn | None:
    """What TRL's two switches say about the tokens that train; None where they are not set.

    As in TRL, an answers-only mask that is asked for holds whatever the other switch says.
    """
    named = [training_config.get(name) for name in ("assistant_only_loss", "completion_only_loss")]
    if True in named:
        return "assistant"
    return "all" if False in named else None


def _for_the_trainer(values: Mapping[str, Any], notes: list[str], device: str) -> dict[str, Any]:
    """The fields that the trainer gets, each as its type; what is done otherwise is said, what is not done raises."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in REFUSED:
            _refuse(key, value, device)
            continue
        value = typed_value(key, value, notes)
        if key in MAPPED:
            if value is not None and value != field_of(key).default:
                notes.append(f"{WHERE}.{key}: {MAPPED[key]}")
        elif key not in HONOURED:
            raise ConfigError(
                f"`{key}` is new in this version of TRL or transformers, and Phlora does nothing with it yet",
                where=WHERE,
                fix="leave it out, or use phlora.SFTTrainer in a script of your own",
            )
        # Nothing means the default, where it is not a value of its own.
        elif value is not None or None in kinds_of(key):
            kept[key] = value
    return kept


def _refuse(key: str, value: Any, device: str) -> None:
    refused = REFUSED[key]
    asks_for_nothing = any(
        type(value) is type(harmless) and value == harmless for harmless in refused.harmless
    )
    if not asks_for_nothing and not (key == "use_cpu" and value is True and device == "cpu"):
        raise ConfigError(
            f"`{key}` cannot be set here ({shown(value)} was given)", where=WHERE, fix=refused.fix
        )


def _current_names(training_config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if LORAPLUS in training_config:
        raise ConfigError(
            f"`{LORAPLUS}` cannot be set here", where=WHERE, fix="say it in `peft_config`, beside the adapter"
        )
    today = by_todays_names(
        SETTINGS, training_config, known={*field_types(), *_OWN}, where=f"{WHERE}.", in_a_run=True
    )
    if today.problems:
        raise ConfigError(one_message(today.problems))
    notes += today.notes
    return today.values


def _activation_memory(value: Any, values: Mapping[str, Any]) -> str:
    """What is asked for, by its own name or by transformers'.

    Raises:
        ConfigError: an unknown word, or two that contradict each other.
    """
    where, words = f"{WHERE}.{ACTIVATION_MEMORY}", ("auto", *LEVELS)
    if value is not None and value not in words:
        raise ConfigError(
            f"{shown(value)} is not known",
            where=where,
            expected=f"one of {', '.join(words)}",
            fix=did_you_mean(str(value), words),
        )
    name, asked = next(((name, values[name]) for name in CHECKPOINTING if name in values), ("", None))
    if asked is None:
        return str(value or "auto")
    if value in (None, "auto"):
        return "recompute" if asked else "keep"
    if (value == "recompute") is not asked:
        raise ConfigError(
            f"`{ACTIVATION_MEMORY}: {value}` and `{name}: {str(asked).lower()}` contradict each other",
            where=where,
            fix=f"leave out `{name}`, which says less",
        )
    return str(value)


def _z_loss(value: Any, notes: list[str]) -> float:
    if value is None:
        return 0.0
    # YAML reads 1e-4 as text.
    weight = (
        math.nan
        if isinstance(value, bool)
        else number_of(_Z_LOSS, value, whole=False, text=False, notes=notes)
    )
    if not weight >= 0:
        raise ConfigError(
            f"{shown(value)} was given", where=f"{WHERE}.{_Z_LOSS}", expected="0 (off) or more, such as 1e-4"
        )
    return float(weight)


def _require_liger(device: str) -> None:
    where = f"{WHERE}.use_liger_kernel"
    if device != "cuda":
        raise ConfigError(
            f"Liger's kernels need CUDA, and this run is on the {device}", where=where, fix="leave it out"
        )
    require({"liger_kernel": "its kernels"}, where=where, instead="leave it out")


def _fit_device(values: dict[str, Any], device: str, notes: list[str]) -> None:
    """Arguments of GPU scripts must not stop a run on a laptop."""
    values["use_cpu"] = device == "cpu"
    for key in ("bf16", "fp16"):
        unsupported = device == "cpu" or (key == "bf16" and not _has_bf16(device))
        if values.get(key) and unsupported:
            values[key] = False
            notes.append(
                f"{WHERE}.{key} has no effect on this {device} device: model.dtype decides the precision"
            )
    if values.get("activation_offloading") and device == "cpu":
        values["activation_offloading"] = False
        notes.append(f"{WHERE}.activation_offloading has no effect on this {device} device")
    if values.get("tf32") and device != "cuda":
        values["tf32"] = None
        notes.append(f"{WHERE}.tf32 has no effect on this {device} device")


def _has_bf16(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_bf16_supported()
