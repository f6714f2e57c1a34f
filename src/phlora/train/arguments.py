"""From `training_config`, a dictionary of TRL's `SFTConfig` fields, to the arguments of the trainer.

Dictionaries from existing scripts work unchanged, those for older library versions too: names that were renamed or
removed are accepted with a note. Where the user is silent, Phlora's own defaults stand (`DEFAULTS`, each with its
reason), else TRL's.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from phlora.errors import ConfigError, did_you_mean
from phlora.extras import require

_WHERE = "training_config"

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

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",
}

# Accepted and left out, with what to say about it.
REMOVED = {
    "overwrite_output_dir": "a run folder is replaced only by overwrite=True or --overwrite",
    "use_mps_device": "the device is chosen by model.device",
    "logging_dir": "logs go into the run folder",
    "save_safetensors": "adapters are always saved as safetensors",
    "tokenizer": "the tokenizer is the model's own",
    "processing_class": "the tokenizer is the model's own",
    "torch_dtype": "the precision is set by model.dtype",
    "dtype": "the precision is set by model.dtype",
    "ray_scope": "transformers no longer has it",
    "half_precision_backend": "transformers no longer has it",
    "fp16_opt_level": "transformers no longer has it",
    "fp16_backend": "transformers no longer has it",
    "tpu_num_cores": "transformers no longer has it",
    "past_index": "transformers no longer has it",
    "mp_parameters": "transformers no longer has it",
    "push_to_hub_token": "use hub_token",
    "dataset_batch_size": "rows are read in one pass",
    "num_of_sequences": "TRL no longer has it",
    "chars_per_token": "TRL no longer has it",
    "use_liger": "use use_liger_kernel",
    "group_by_length": 'use train_sampling_strategy: "group_by_length"',
}

# Fields that belong elsewhere, most because they would change model or tokenizer after the rows were made with them.
ELSEWHERE = {
    "loraplus_lr_ratio": "say it in `peft_config`, beside the adapter that it is about",
    "model_init_kwargs": "say it in the `model` section: name, revision, dtype, attn_implementation",
    "chat_template_path": "set the template on the model's tokenizer and save it with the model",
    "eos_token": "stop tokens are known for each model family; set another one on the model's tokenizer",
    "pad_token": "a pad token that ends no reply is chosen for each model",
}

# Phlora's own, beside the fields of TRL's configuration.
_Z_LOSS = "z_loss"

# What `report_to` names, and the package that it needs.
_TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
}

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
_ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_steps", "label_smoothing_factor", "eval_delay")


@dataclass(frozen=True)
class Arguments:
    """The trainer's arguments and where they came from.

    Attributes:
        args: TRL's configuration object, with every field set.
        notes: what was renamed, converted or left out, one sentence each.
        origins: field name -> `user` or `phlora`; fields that are not listed have TRL's default.
        loraplus_lr_ratio: learning rate of every lora_B, as a multiple of that of all else; None: the same.
        z_loss: weight of the squared log-normaliser of each trained token, see `models.head.LossTerms`.
    """

    args: SFTConfig
    notes: tuple[str, ...]
    origins: Mapping[str, str]
    loraplus_lr_ratio: float | None = None
    z_loss: float = 0.0


def training_arguments(
    training_config: Mapping[str, Any],
    *,
    output_dir: str | Path,
    device: str = "cpu",
    peft_config: Mapping[str, Any] | None = None,
) -> Arguments:
    """Check `training_config` and build the trainer's arguments from it.

    Args:
        training_config: fields of `trl.SFTConfig`, current or older names; a TRL script's dictionary as it is; and
            `z_loss`.
        output_dir: where checkpoints go; an `output_dir` in the dictionary is replaced by it.
        device: type of the device that trains: cpu, cuda or mps.
        peft_config: its `loraplus_lr_ratio` is the optimizer's; everything else is the adapter's.

    Raises:
        ConfigError: an unknown key (with the nearest name), a value of the wrong type, or one out of range.
    """
    notes: list[str] = []
    z_loss = _z_loss(training_config.get(_Z_LOSS), notes)
    values = _current_names({k: v for k, v in training_config.items() if k != _Z_LOSS}, notes)
    values = {key: _typed(key, value, notes) for key, value in values.items()}
    _check_ranges(values)
    _check_trackers(values.get("report_to"))
    _fit_device(values, device, notes)
    origins = dict.fromkeys(values, "user")
    for key, (default, _) in DEFAULTS.items():
        if key not in values:
            values[key], origins[key] = default, "phlora"
    if "per_device_eval_batch_size" not in values:
        values["per_device_eval_batch_size"] = values.get("per_device_train_batch_size", 8)
        origins["per_device_eval_batch_size"] = "phlora"
    values |= {"output_dir": str(output_dir), "dataloader_pin_memory": device == "cuda"}
    try:
        args = SFTConfig(**values)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"The settings contradict each other: {error}", where=_WHERE) from None
    return Arguments(args, tuple(notes), origins, _loraplus_lr_ratio(peft_config or {}), z_loss)


def _current_names(training_config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    known = set(_field_types())
    values: dict[str, Any] = {}
    for key, value in training_config.items():
        if key in REMOVED and key not in known:
            notes.append(f"{_WHERE}.{key} has no effect: {REMOVED[key]}")
            if key == "group_by_length" and value is True:
                values["train_sampling_strategy"] = "group_by_length"
        elif key in RENAMED and key not in known:
            notes.append(f"{_WHERE}.{key} is now called {RENAMED[key]}")
            values.setdefault(RENAMED[key], value)
        elif key in ELSEWHERE and value is not None:
            raise ConfigError(f"`{key}` cannot be set here", where=_WHERE, fix=ELSEWHERE[key])
        elif key in known:
            values[key] = value
        else:
            raise ConfigError(
                f"Unknown key `{key}`",
                where=_WHERE,
                fix=did_you_mean(str(key), known | RENAMED.keys() | {_Z_LOSS}),
            )
    return values


def _field_types() -> dict[str, Any]:
    hints = typing.get_type_hints(SFTConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(SFTConfig) if field.init}


def _typed(key: str, value: Any, notes: list[str]) -> Any:
    """The value as a number or a truth value where the field wants one; YAML reads 2e-4 as text."""
    hint = _field_types()[key]
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    kinds |= {kind for inner in list(kinds) for kind in typing.get_args(inner)}
    if value is None and type(None) in kinds:
        return None
    if bool in kinds and not kinds & {int, float, str}:
        if not isinstance(value, bool):
            raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected="true or false")
        return value
    if not kinds & {int, float} or isinstance(value, bool | dict | list):
        if kinds & {int, float} and not (isinstance(value, bool) and bool in kinds):
            raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected="a number")
        return value
    return _number(key, value, whole=float not in kinds, text=str in kinds, notes=notes)


def _number(key: str, value: Any, *, whole: bool, text: bool, notes: list[str]) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        if text and isinstance(value, str):
            return value
        expected = "a whole number" if whole else "a number"
        raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected=expected) from None
    if not math.isfinite(number) or (whole and number != int(number)):
        expected = "a whole number" if whole else "a finite number"
        raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected=expected)
    if isinstance(value, str):
        notes.append(f"{_WHERE}.{key}: the text {value!r} was read as the number {number:g}")
    return int(number) if whole or isinstance(value, int) else number


def _check_ranges(values: Mapping[str, Any]) -> None:
    rules: list[tuple[tuple[str, ...], Callable[[float], bool], str]] = [
        (_AT_LEAST_ONE, lambda number: number >= 1, "1 or more"),
        (_ABOVE_ZERO, lambda number: number > 0, "a number above 0"),
        (_NOT_NEGATIVE, lambda number: number >= 0, "0 or more"),
        (
            ("max_steps",),
            lambda number: number >= 1 or number == -1,
            "1 or more, or -1 to count epochs instead",
        ),
    ]
    for keys, holds, expected in rules:
        for key in keys:
            value = values.get(key)
            if isinstance(value, int | float) and not holds(value):
                raise ConfigError(f"`{value}` was given", where=f"{_WHERE}.{key}", expected=expected)


def _loraplus_lr_ratio(peft_config: Mapping[str, Any]) -> float | None:
    ratio = peft_config.get("loraplus_lr_ratio")
    if ratio is None:
        return None
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < math.inf:
        raise ConfigError(
            f"`{ratio}` was given",
            where="peft_config.loraplus_lr_ratio",
            expected="a number above 0: the learning rate of lora_B, as a multiple of learning_rate",
        )
    return float(ratio)


def _z_loss(value: Any, notes: list[str]) -> float:
    if value is None:
        return 0.0
    # YAML reads 1e-4 as text.
    weight = (
        math.nan if isinstance(value, bool) else _number(_Z_LOSS, value, whole=False, text=False, notes=notes)
    )
    if not weight >= 0:
        raise ConfigError(
            f"`{value}` was given", where=f"{_WHERE}.{_Z_LOSS}", expected="0 (off) or more, such as 1e-4"
        )
    return float(weight)


def _check_trackers(report_to: Any) -> None:
    require(needed_by_trackers(report_to), where=f"{_WHERE}.report_to")


def needed_by_trackers(report_to: Any) -> dict[str, str]:
    """The packages of `training_config.report_to`; see `extras.require`."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return {_TRACKERS[name]: f"report_to: {name}" for name in names if name in _TRACKERS}


def _fit_device(values: dict[str, Any], device: str, notes: list[str]) -> None:
    """Arguments of GPU scripts must not stop a run on a laptop."""
    values["use_cpu"] = device == "cpu"
    for key in ("bf16", "fp16"):
        unsupported = device == "cpu" or (key == "bf16" and not _has_bf16(device))
        if values.get(key) and unsupported:
            values[key] = False
            notes.append(
                f"{_WHERE}.{key} has no effect on this {device} device: model.dtype decides the precision"
            )
    if values.get("tf32") and device != "cuda":
        values["tf32"] = None
        notes.append(f"{_WHERE}.tf32 has no effect on this {device} device")


def _has_bf16(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_bf16_supported()
