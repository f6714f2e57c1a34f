"""Unsloth Studio: the configuration of `unsloth train --config FILE`, and what its studio saves for a model.

Sources: its documentation on Studio and the command line, and the example configurations in its repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phlora.importing import shared
from phlora.importing.settings import Settings

_DEFAULTS: Mapping[str, Any] = {
    "training_config.max_length": 2048,
    "training_config.num_train_epochs": 3,
    "training_config.learning_rate": 2e-4,
    "training_config.per_device_train_batch_size": 2,
    "training_config.gradient_accumulation_steps": 4,
    "training_config.warmup_steps": 5,
    "training_config.weight_decay": 0.01,
    "training_config.lr_scheduler_type": "linear",
    "training_config.seed": 3407,
    "peft_config.r": 64,
    "peft_config.lora_alpha": 16,
    "peft_config.target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ],
}
_WHOLE = {
    "training.max_seq_length": "training_config.max_length",
    "training.batch_size": "training_config.per_device_train_batch_size",
    "training.gradient_accumulation_steps": "training_config.gradient_accumulation_steps",
    "training.warmup_steps": "training_config.warmup_steps",
    "training.random_seed": "training_config.seed",
    "lora.lora_r": "peft_config.r",
    "logging.log_frequency": "training_config.logging_steps",
}
_NUMBERS = {
    "training.learning_rate": "training_config.learning_rate",
    "training.weight_decay": "training_config.weight_decay",
    "lora.lora_alpha": "peft_config.lora_alpha",
    "lora.lora_dropout": "peft_config.lora_dropout",
}
_FORMATS = {"alpaca": "alpaca", "chatml": "messages", "sharegpt": "conversations", "raw": "text"}
_VISION = "it is for models that see"
_LEFT = {
    "training.gradient_checkpointing": shared.CHECKPOINTING,
    "lora.vision_all_linear": _VISION,
    "lora.finetune_vision_layers": _VISION,
    "lora.finetune_language_layers": "the modules of target_modules are adapted",
    "lora.finetune_attention_modules": "the modules of target_modules are adapted",
    "lora.finetune_mlp_modules": "the modules of target_modules are adapted",
    "logging.wandb_token": "set WANDB_API_KEY",
    "logging.hf_token": "log in with `hf auth login`, or set HF_TOKEN",
    "logging.tensorboard_dir": "logs go into the run folder",
    "inference.trust_remote_code": "model.trust_remote_code says it",
}


def map_settings(settings: Settings) -> None:
    """Decide about every setting.

    Raises:
        ConfigError: it would train something else, or it names no model or no data.
    """
    kind = (settings.text("training.training_type") or "lora").lower()
    if kind not in ("lora", "qlora", "lora/qlora"):
        raise settings.refuse(
            "training.training_type",
            kind,
            "trains the weights of the model itself, and Phlora trains LoRA adapters",
            "training_type: lora, if an adapter would do",
        )
    for key in ("training.is_dataset_image", "training.is_dataset_audio", "lora.vision_all_linear"):
        if settings.flag(key):
            raise settings.refuse(
                key, True, "is for images and sounds, and Phlora trains text", "train it with Unsloth"
            )
    name = shared.base_model(settings, "model", settings.text("model"))
    settings.put(
        "model.trust_remote_code", settings.flag("training.trust_remote_code"), "training.trust_remote_code"
    )
    four = settings.flag("training.load_in_4bit")
    if four is None or four:
        shared.quantized_base(settings, "nf4", "training.load_in_4bit" if four else "", name)
    if settings.flag("lora.use_loftq"):
        raise settings.refuse(
            "lora.use_loftq",
            True,
            "replaces the base's weights by others",
            "leave it out: NF4 is what the base is",
        )
    _rows(settings)
    shared.targets(settings, "lora.target_modules", settings.names("lora.target_modules"))
    for key in ("use_rslora", "use_dora"):
        settings.put(f"peft_config.{key}", settings.flag(f"lora.{key}"), f"lora.{key}")
    shared.numbers(settings, _WHOLE, whole=True)
    shared.numbers(settings, _NUMBERS)
    _training(settings)
    settings.leave_all(_LEFT)
    for key in settings.values_at("inference"):
        settings.leave(key, "it is said when the model is asked: `phlora chat`")
    settings.leave_rest()
    for target, value in _DEFAULTS.items():
        settings.put_default(target, value)


def _training(settings: Settings) -> None:
    steps = settings.number("training.max_steps", whole=True)
    epochs = settings.number("training.num_epochs")
    if steps:
        settings.put("training_config.max_steps", steps, "training.max_steps")
    if epochs:
        settings.put("training_config.num_train_epochs", epochs, "training.num_epochs")
    save = settings.number("training.save_steps")
    if save:
        settings.put("training_config.save_steps", save, "training.save_steps")
    elif save is not None:
        settings.leave_value(
            "training.save_steps", save, "a checkpoint a fifth of the run loses less to a crash"
        )
    evals = settings.number("training.eval_steps")
    if evals:
        settings.put("training_config.eval_strategy", "steps", "training.eval_steps")
        settings.put("training_config.eval_steps", evals, "training.eval_steps")
    if settings.flag("training.packing"):
        settings.put("training_config.packing", True, "training.packing", "rows never see each other")
    completions = settings.flag("training.train_on_completions")
    if not completions:
        remark = "every token is trained, prompts too, as Unsloth does" if completions is None else ""
        settings.put("data.train_on", "all", "training.train_on_completions", remark)
    shared.optimizer(settings, "training.optim", settings.text("training.optim"))
    shared.schedule(settings, "training.lr_scheduler_type", settings.text("training.lr_scheduler_type"))
    settings.put("output", settings.text("training.output_dir"), "training.output_dir")
    wandb, board = settings.flag("logging.enable_wandb"), settings.flag("logging.enable_tensorboard")
    project = settings.text("logging.wandb_project")
    found = [name for name, on in (("wandb", wandb), ("tensorboard", board)) if on]
    if found:
        settings.put("training_config.report_to", found, f"logging.enable_{found[0]}")
    if wandb:
        settings.put("training_config.project", project, "logging.wandb_project")
    elif project:
        settings.leave_value("logging.wandb_project", project, "enable_wandb is not set")


def _rows(settings: Settings) -> None:
    names, hub = settings.names("data.local_dataset"), settings.text("data.dataset")
    word = (settings.text("data.format_type") or "auto").lower()
    format = _FORMATS.get(word)
    subset = settings.text("data.subset")
    split, limit = shared.split_of(settings, "data.train_split")
    held_out = settings.names("data.local_eval_dataset")
    if not names and not hub:
        raise settings.error("data.dataset", None, "a data set on the hub, or files as local_dataset")
    if names and hub:
        settings.leave_value("data.dataset", hub, "local_dataset is taken where both are given")
    if subset:
        settings.miss("data.subset", subset, "a part of a data set cannot be named: download it")

    def files(paths: list[str], **part: Any) -> list[dict[str, Any]]:
        return [
            shared.data_file(shared.located(settings, "data", path), format=format, **part) for path in paths
        ]

    source = ("data.local_dataset" if names else "data.dataset") + ", data.format_type" * bool(format)
    settings.put("data.files", files(names or [str(hub)], split=split, limit=limit), source)
    if held_out:
        settings.put("data.eval", files(held_out), "data.local_eval_dataset")
    else:
        shared.held_out(settings, "data.eval_size", None)
