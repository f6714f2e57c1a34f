"""Axolotl: the configuration of `axolotl train`.

Sources: its reference of configuration options, its page on data set formats, and the files under examples/ of its
repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phlora.errors import ConfigError
from phlora.importing import shared
from phlora.importing.axolotl_rows import map_rows
from phlora.importing.settings import Settings
from phlora.importing.steps import most_steps_of_an_epoch

_DEFAULTS: Mapping[str, Any] = {
    "training_config.num_train_epochs": 1,
    "training_config.per_device_train_batch_size": 1,
    "training_config.lr_scheduler_type": "cosine",
    "training_config.max_length": 512,
    "data.too_long": "drop",
}
_WHOLE = {
    "eval_batch_size": "training_config.per_device_eval_batch_size",
    "sequence_len": "training_config.max_length",
    "seed": "training_config.seed",
    "lora_r": "peft_config.r",
    "save_total_limit": "training_config.save_total_limit",
    "dataloader_num_workers": "training_config.dataloader_num_workers",
}
_NUMBERS = {
    "learning_rate": "training_config.learning_rate",
    "num_epochs": "training_config.num_train_epochs",
    "weight_decay": "training_config.weight_decay",
    "max_grad_norm": "training_config.max_grad_norm",
    "adam_beta1": "training_config.adam_beta1",
    "adam_beta2": "training_config.adam_beta2",
    "adam_epsilon": "training_config.adam_epsilon",
    "noisy_embedding_alpha": "training_config.neftune_noise_alpha",
    "neftune_noise_alpha": "training_config.neftune_noise_alpha",
    "logging_steps": "training_config.logging_steps",
    "label_smoothing_factor": "training_config.label_smoothing_factor",
    "lora_alpha": "peft_config.lora_alpha",
    "lora_dropout": "peft_config.lora_dropout",
    "loraplus_lr_ratio": "peft_config.loraplus_lr_ratio",
}
_NOT_CHATS = "pre-training on plain texts; Phlora trains rows of `data.files`"
_OTHER_TRAINING = {
    "rl": "trains on preferences or rewards, and Phlora trains chats",
    "reward_model": "trains a reward model, and Phlora trains chats",
    "process_reward_model": "trains a reward model, and Phlora trains chats",
    "pretraining_dataset": f"is {_NOT_CHATS}",
    "relora": "trains the base's own weights",
    "relora_steps": "trains the base's own weights",
    "lisa_n_layers": "trains the base's own weights",
    "unfrozen_parameters": "trains the base's own weights",
    "is_multimodal": "is for images and sounds, and Phlora trains text",
    "processor_type": "is for images and sounds, and Phlora trains text",
    "lora_model_dir": "is an adapter to go on from, and a Phlora run begins its own",
    "qat": "trains for another arithmetic",
    "diffusion": "is another kind of model",
}
_LEFT = {
    **dict.fromkeys(("model_type", "tokenizer_type"), "found out from the model's own configuration"),
    **dict.fromkeys(
        ("base_model_config", "tokenizer_config", "processor_config"), "the model's own configuration is used"
    ),
    **dict.fromkeys(("chat_template",), shared.TEMPLATE),
    **dict.fromkeys(("bf16", "fp16", "bfloat16", "float16", "tf32", "bf16_full_eval"), shared.PRECISION),
    **dict.fromkeys(
        ("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading"),
        shared.CHECKPOINTING,
    ),
    **dict.fromkeys(
        ("flash_attention", "xformers_attention", "flex_attention", "s2_attention"), shared.FLASH
    ),
    **dict.fromkeys(
        (
            *(
                "lora_mlp_kernel",
                "lora_qkv_kernel",
                "lora_o_kernel",
                "plugins",
                "cut_cross_entropy",
                "liger_rope",
            ),
            *("liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_layer_norm", "torch_compile"),
            *("liger_fused_linear_cross_entropy", "liger_cross_entropy", "flash_optimum", "unsloth_lora_mlp"),
            *("unsloth_lora_qkv", "unsloth_lora_o", "unsloth_cross_entropy_loss", "chunked_cross_entropy"),
        ),
        shared.KERNELS,
    ),
    **dict.fromkeys(
        (
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "fsdp_version",
            "local_rank",
            "ddp_timeout",
            "ddp_bucket_cap_mb",
        ),
        shared.ONE_PROCESS,
    ),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "push_dataset_to_hub", "hf_use_auth_token"), shared.NOT_SENT
    ),
    **dict.fromkeys(
        (
            "wandb_entity",
            "wandb_watch",
            "wandb_log_model",
            "wandb_mode",
            "mlflow_tracking_uri",
            "comet_api_key",
        ),
        "the tracker's own environment variables say it",
    ),
    **dict.fromkeys(
        (
            "dataset_prepared_path",
            "dataset_processes",
            "dataset_exact_deduplication",
            "shuffle_merged_datasets",
        ),
        "rows are checked, shuffled and kept as tokens by themselves",
    ),
    **dict.fromkeys(
        ("pad_to_sequence_len", "eval_sample_packing", "sample_packing_eff_est", "multipack_real_batches"),
        "how the rows of a batch are laid out is chosen for the data, with the same loss",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints"), "`phlora train --resume` continues a run"
    ),
    **dict.fromkeys(
        ("eval_table_size", "eval_max_new_tokens", "eval_causal_lm_metrics", "do_causal_lm_eval"),
        "the base and the tuned model answer held-out rows after every run; see the section `evaluation`",
    ),
    "strict": "every setting is looked at",
    "debug": "`phlora data preview` shows the tokens of a row",
    "load_best_model_at_end": "the adapter with the lowest held-out loss is kept, as adapter/best",
    "save_safetensors": "adapters are always saved as safetensors",
    "save_only_model": "a run is continued from its optimizer's state too",
    "lora_fan_in_fan_out": "found out from the model",
    "gptq": "a base that is quantised already is known by its files",
    "min_sample_len": "rows without trained tokens are left out and counted",
    "gpu_memory_limit": "`phlora plan` says what a run takes",
    "lora_on_cpu": "an adapter is saved from where it is",
}


_CHANGES_TRAINING = {
    **dict.fromkeys(("chat_template_jinja", "default_system_message"), shared.TEMPLATE),
    **dict.fromkeys(
        ("special_tokens", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x"),
        "a run adds no tokens",
    ),
    "early_stopping_patience": "a run goes to its end; the adapter with the lowest held-out loss is adapter/best",
    "loraplus_lr_embedding": "embeddings of an adapter learn at the learning rate of all else",
    "train_on_split": "say split beside the file in data.files",
}
_WARMUP, _MOST_WARMUP = 0.03, 100


def map_settings(settings: Settings) -> None:
    """Decide about every setting.

    Raises:
        ConfigError: it would train something else.
    """
    for key, what in _OTHER_TRAINING.items():
        value = settings.take(key)
        if value not in (None, False):
            raise settings.refuse(key, value, what, "train it with Axolotl, or leave it out")
    name = shared.base_model(settings, "base_model", settings.text("base_model"))
    settings.put("model.revision", settings.text("revision_of_model"), "revision_of_model")
    settings.put("model.trust_remote_code", settings.flag("trust_remote_code"), "trust_remote_code")
    _adapter_kind(settings, name)
    map_rows(settings)
    _adapter(settings)
    shared.numbers(settings, _WHOLE, whole=True)
    shared.numbers(settings, _NUMBERS)
    _batches(settings)
    _training(settings)
    # A token for padding is trained nowhere; others are.
    tokens = settings.values.get("special_tokens")
    if isinstance(tokens, Mapping) and tokens.keys() == {"pad_token"}:
        settings.leave("special_tokens", "padding is never trained")
    settings.look_at_all(_CHANGES_TRAINING)
    settings.leave_all(_LEFT)
    for key in settings.values_at("fsdp_config"):
        settings.leave(key, shared.ONE_PROCESS)
    shared.arguments_of_transformers(settings)
    settings.leave_rest()
    for target, value in _DEFAULTS.items():
        settings.put_default(target, value)


def _adapter_kind(settings: Settings, model: str) -> None:
    kind = settings.text("adapter")
    if kind not in ("lora", "qlora"):
        raise settings.refuse(
            "adapter",
            kind,
            "trains the weights of the model itself, and Phlora trains LoRA adapters"
            if kind is None
            else "is no adapter that Phlora trains",
            "adapter: lora, if an adapter would do",
        )
    four, eight = settings.flag("load_in_4bit"), settings.flag("load_in_8bit")
    if four and eight:
        raise ConfigError(
            "load_in_4bit and load_in_8bit contradict each other", where=settings.file, fix="leave one out"
        )
    source = "load_in_4bit" if four else "load_in_8bit" if eight else "adapter"
    if four or eight or kind == "qlora":
        shared.quantized_base(settings, "int8" if eight else "nf4", source, model)


def _adapter(settings: Settings) -> None:
    modules = settings.take("lora_target_modules")
    if settings.flag("lora_target_linear"):
        settings.put("peft_config.target_modules", "all-linear", "lora_target_linear")
        if modules:
            settings.leave_value("lora_target_modules", modules, "all linear layers are adapted")
    elif isinstance(modules, str):
        settings.put("peft_config.target_modules", modules, "lora_target_modules", "a regular expression")
    elif modules is not None:
        settings.values["lora_target_modules"] = modules
        shared.targets(settings, "lora_target_modules", settings.names("lora_target_modules"))
    settings.put(
        "peft_config.modules_to_save", settings.names("lora_modules_to_save"), "lora_modules_to_save"
    )
    for key, own in (("peft_use_rslora", "use_rslora"), ("peft_use_dora", "use_dora")):
        settings.put(f"peft_config.{own}", settings.flag(key), key)
    settings.put(
        "peft_config.layers_to_transform",
        settings.take("peft_layers_to_transform"),
        "peft_layers_to_transform",
    )
    settings.put(
        "peft_config.init_lora_weights", settings.take("peft_init_lora_weights"), "peft_init_lora_weights"
    )


def _batches(settings: Settings) -> None:
    """Rows of a pass and passes of a step; `batch_size` is their product, and says the one that is not given."""
    rows, passes, together = (
        settings.number(key, whole=True)
        for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size")
    )
    sources = ["micro_batch_size", "gradient_accumulation_steps"]
    if together and rows and passes and together != rows * passes:
        raise ConfigError(
            f"batch_size is {together}, and micro_batch_size times gradient_accumulation_steps {rows * passes}",
            where=f"{settings.file}: batch_size",
            fix="leave one of the three out",
        )
    if together and not passes:
        rows = rows or 1
        if together < rows:
            raise settings.error("batch_size", together, f"micro_batch_size, which is {rows}, or more")
        passes, sources[1] = together // rows, "batch_size, micro_batch_size"
        if together % rows:
            settings.notes.append(
                f"batch_size: {together} is no multiple of micro_batch_size {rows}; as in Axolotl a step has "
                f"{passes} passes, which are {passes * rows} rows"
            )
    elif together and passes and not rows:
        if together % passes:
            raise settings.error(
                "batch_size", together, f"a multiple of gradient_accumulation_steps, {passes}"
            )
        rows, sources[0] = together // passes, "batch_size, gradient_accumulation_steps"
    settings.put("training_config.per_device_train_batch_size", rows, sources[0])
    settings.put("training_config.gradient_accumulation_steps", passes, sources[1])


def _training(settings: Settings) -> None:
    # 0 is no bound, as -1 is.
    steps = settings.number("max_steps", whole=True)
    settings.put("training_config.max_steps", steps or None, "max_steps")
    shared.optimizer(settings, "optimizer", settings.text("optimizer"))
    shared.schedule(settings, "lr_scheduler", settings.text("lr_scheduler"))
    settings.put(
        "training_config.lr_scheduler_kwargs", settings.take("lr_scheduler_kwargs"), "lr_scheduler_kwargs"
    )
    shared.warmup(settings, "warmup_ratio", "warmup_steps")
    if settings.flag("sample_packing"):
        settings.put("training_config.packing", True, "sample_packing", "rows never see each other")
    if "training_config.warmup_steps" not in settings.mapped:
        _default_warmup(settings)
    if settings.flag("train_on_inputs"):
        settings.put("data.train_on", "all", "train_on_inputs")
    if settings.flag("group_by_length"):
        settings.put("training_config.train_sampling_strategy", "group_by_length", "group_by_length")
    if settings.flag("eager_attention"):
        settings.put("model.attn_implementation", "eager", "eager_attention")
    elif settings.flag("sdp_attention"):
        settings.put("model.attn_implementation", "sdpa", "sdp_attention")
    shared.attention(settings, "attn_implementation", settings.text("attn_implementation"))
    _too_long(settings)
    _when(settings, "evals_per_epoch", "eval")
    _when(settings, "saves_per_epoch", "save")
    _tracker(settings)
    settings.put("output", settings.text("output_dir"), "output_dir")


def _default_warmup(settings: Settings) -> None:
    """Where nothing is said Axolotl warms up for a share of the steps, but for so many at most."""
    target = "training_config.warmup_steps"
    least, most = _steps(settings)
    if least * _WARMUP > _MOST_WARMUP:
        remark = f"Axolotl's default: {_WARMUP:.0%} of the steps, at most {_MOST_WARMUP}"
        settings.put(target, _MOST_WARMUP, remark=remark)
        return
    remark = f"Axolotl's default: a share of all steps, there of at most {_MOST_WARMUP} steps"
    settings.put(target, _WARMUP, remark=remark)
    if most * _WARMUP > _MOST_WARMUP:
        settings.notes.append(
            f"warmup_steps: not said, so that Axolotl warms up for {_WARMUP:.0%} of the steps, but for "
            f"{_MOST_WARMUP} at most; where `phlora plan` counts more than {_MOST_WARMUP / _WARMUP:,.0f} steps, "
            f"say warmup_steps: {_MOST_WARMUP}"
        )


def _steps(settings: Settings) -> tuple[float, float]:
    """Steps of the run, at least and at most; packs of rows are fewer than rows."""
    steps = settings.mapped.get("training_config.max_steps")
    if steps is not None and steps.value > 0:
        return steps.value, steps.value
    there = most_steps_of_an_epoch(settings, batch_size=1)
    if there is None:
        return 0, math.inf
    epochs = settings.mapped.get("training_config.num_train_epochs")
    steps_of_all = there * (epochs.value if epochs is not None else 1)
    return 0 if "training_config.packing" in settings.mapped else steps_of_all, steps_of_all


def _too_long(settings: Settings) -> None:
    word = settings.text("excess_length_strategy")
    known = {"drop": "drop", "truncate": "truncate_history", "raise": "error"}
    if word is not None and word not in known:
        raise settings.error("excess_length_strategy", word, "drop, truncate or raise")
    if word:
        settings.put("data.too_long", known[word], "excess_length_strategy")


def _when(settings: Settings, per_epoch: str, what: str) -> None:
    """How often the held-out loss is taken, or a checkpoint written."""
    times = settings.number(per_epoch)
    steps = settings.number(f"{what}_steps")
    strategy = settings.text(f"{what}_strategy")
    epochs = settings.mapped.get("training_config.num_train_epochs")
    if times:
        share = round(1 / (times * (epochs.value if epochs else 1)), 6)
        if share < 1:
            settings.put(f"training_config.{what}_strategy", "steps", per_epoch)
            settings.put(f"training_config.{what}_steps", share, per_epoch, "a share of all steps")
        else:
            settings.put(f"training_config.{what}_strategy", "epoch", per_epoch)
        return
    settings.put(f"training_config.{what}_strategy", strategy, f"{what}_strategy")
    if steps is not None:
        settings.put(f"training_config.{what}_steps", steps, f"{what}_steps")
        settings.put_default(f"training_config.{what}_strategy", "steps")


def _tracker(settings: Settings) -> None:
    project, name = settings.text("wandb_project"), settings.text("wandb_name")
    run = settings.text("wandb_run_id")
    board = settings.flag("use_tensorboard")
    found = {"wandb_project": "wandb"} if project else {}
    found |= {"use_tensorboard": "tensorboard"} if board else {}
    if found:
        trackers = list(found.values())
        settings.put(
            "training_config.report_to", trackers if len(trackers) > 1 else trackers[0], ", ".join(found)
        )
    if project:
        settings.put("training_config.project", project, "wandb_project")
        settings.put("training_config.run_name", name or run, "wandb_name" if name else "wandb_run_id")
