"""Axolotl: the configuration of `axolotl train`.

Sources: its reference of configuration options, its page on data set formats, and the files under examples/ of its
repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phlora.errors import ConfigError
from phlora.importing import shared
from phlora.importing.settings import Settings, flattened, said

_DEFAULTS: Mapping[str, Any] = {
    "training_config.num_train_epochs": 1,
    "training_config.per_device_train_batch_size": 1,
    "training_config.lr_scheduler_type": "cosine",
    "training_config.warmup_steps": 0,
    "training_config.max_length": 512,
    "data.too_long": "drop",
}
_WHOLE = {
    "micro_batch_size": "training_config.per_device_train_batch_size",
    "eval_batch_size": "training_config.per_device_eval_batch_size",
    "gradient_accumulation_steps": "training_config.gradient_accumulation_steps",
    "sequence_len": "training_config.max_length",
    "seed": "training_config.seed",
    "lora_r": "peft_config.r",
    "max_steps": "training_config.max_steps",
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
    **dict.fromkeys(("chat_template", "chat_template_jinja", "default_system_message"), shared.TEMPLATE),
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
    **dict.fromkeys(("special_tokens", "tokens", "added_tokens_overrides"), "a run adds no tokens"),
    "resize_token_embeddings_to_32x": "a run adds no tokens",
    "strict": "every setting is looked at",
    "debug": "`phlora data preview` shows the tokens of a row",
    "early_stopping_patience": "the adapter with the lowest held-out loss is kept, as adapter/best",
    "load_best_model_at_end": "the adapter with the lowest held-out loss is kept, as adapter/best",
    "save_safetensors": "adapters are always saved as safetensors",
    "save_only_model": "a run is continued from its optimizer's state too",
    "lora_fan_in_fan_out": "found out from the model",
    "loraplus_lr_embedding": "embeddings of an adapter learn at the learning rate of all else",
    "gptq": "a base that is quantised already is known by its files",
    "train_on_split": "say split beside the file in data.files",
    "min_sample_len": "rows without trained tokens are left out and counted",
    "gpu_memory_limit": "`phlora plan` says what a run takes",
}
_TRAINS_END = "the end of every answer is trained, with the answer"


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
    _rows(settings)
    _adapter(settings)
    shared.numbers(settings, _WHOLE, whole=True)
    shared.numbers(settings, _NUMBERS)
    _training(settings)
    settings.leave_all(_LEFT)
    for key in settings.values_at("fsdp_config"):
        settings.leave(key, shared.ONE_PROCESS)
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


def _training(settings: Settings) -> None:
    shared.optimizer(settings, "optimizer", settings.text("optimizer"))
    shared.schedule(settings, "lr_scheduler", settings.text("lr_scheduler"))
    settings.put(
        "training_config.lr_scheduler_kwargs", settings.take("lr_scheduler_kwargs"), "lr_scheduler_kwargs"
    )
    shared.warmup(settings, "warmup_ratio", "warmup_steps")
    if settings.flag("sample_packing"):
        settings.put("training_config.packing", True, "sample_packing", "rows never see each other")
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
    if project:
        settings.put("training_config.report_to", "wandb", "wandb_project")
        settings.put("training_config.project", project, "wandb_project")
        settings.put("training_config.run_name", name or run, "wandb_name" if name else "wandb_run_id")
    elif settings.flag("use_tensorboard"):
        settings.put("training_config.report_to", "tensorboard", "use_tensorboard")


# --------------------------------------------------------------------------------------------- data sets


def _rows(settings: Settings) -> None:
    sets, held_out = settings.take("datasets"), settings.take("test_datasets")
    if not isinstance(sets, list) or not sets:
        raise settings.error("datasets", sets, "a list of data sets, each with a path and a type")
    files = [
        file
        for number, entry in enumerate(sets)
        for file in _data_set(settings, f"datasets[{number}]", entry)
    ]
    settings.put("data.files", files, "datasets")
    size = settings.number("val_set_size")
    if isinstance(held_out, list) and held_out:
        found = [
            file
            for number, entry in enumerate(held_out)
            for file in _data_set(settings, f"test_datasets[{number}]", entry)
        ]
        settings.put("data.eval", found, "test_datasets")
        if size:
            settings.leave_value("val_set_size", size, "test_datasets names the held-out rows")
    else:
        shared.held_out(settings, "val_set_size", size)


def _data_set(settings: Settings, key: str, entry: Any) -> list[dict[str, Any]]:
    """One data set as the files that it consists of."""
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise settings.error(key, entry, "a mapping with a path and a type")
    one = Settings(settings.tool, f"{settings.file}: {key}", {**said(entry)})
    kind = one.take("type")
    if isinstance(kind, Mapping):
        format, columns = _own_type(one, kind)
    else:
        format, columns = _known_type(one, kind)
    path, data_files = one.text("path"), one.names("data_files")
    split = one.text("split")
    if split and not split.isidentifier():
        one.miss("split", split, "a slice of a split: say `limit` beside the file")
        split = None
    loaded = path in ("json", "csv", "parquet", "text", "arrow")
    if data_files and not loaded:
        one.miss("data_files", data_files, "files of a data set on the hub: download them, and name them")
    paths = data_files if loaded and data_files else [str(path)]
    one.leave_all(
        {
            **dict.fromkeys(("ds_type", "trust_remote_code", "preprocess_shards"), "found out"),
            **dict.fromkeys(("chat_template", "chat_template_jinja", "conversation"), shared.TEMPLATE),
            "train_on_eos": _TRAINS_END,
            "train_on_eot": _TRAINS_END,
            "message_field_training": "`train` in a message is followed",
            "message_field_training_detail": "`train` in a message is followed for whole turns",
            "drop_system_message": "leave it out of the rows",
        }
    )
    for part in ("name", "shards", "revision"):
        if (value := one.take(part)) is not None:
            one.miss(part, value, "a part of a data set cannot be named: download it, and name its files")
    roles = one.take("roles_to_train")
    if roles is not None and roles != ["assistant"] and roles != ["gpt"]:
        one.miss("roles_to_train", roles, "data.train_on: assistant trains the answers")
    one.leave_unknown()
    settings.adopt(one, key)
    return [
        shared.data_file(
            shared.located(settings, key, file),
            format=format,
            columns=columns,
            split=None if split == "train" else split,
        )
        for file in paths
    ]


def _known_type(one: Settings, kind: Any) -> tuple[str | None, dict[str, str]]:
    """Format and columns for a type by its name, such as `alpaca_chat.load_qa`."""
    if kind is None:
        raise one.refuse(
            "type", "none", "means rows that are tokens already, and Phlora reads texts", "name the texts"
        )
    word = str(kind).partition(":")[0]
    base = word.partition(".")[0]
    if base in ("chat_template", "sharegpt", "sharegpt_simple"):
        return _messages(one, base)
    if base == "completion":
        return "text", shared.columns_of({"text": one.text("field")})
    if word in ("alpaca_chat.load_qa", "alpaca_chat.load_camel_ai"):
        return "qa", {}
    if base in ("alpaca", "alpaca_chat", "alpaca_w_system", "gpteacher", "explainchoice", "concisechoice"):
        one.leave_value("type", kind, shared.TEMPLATE)
        return "alpaca", {}
    one.leave_value("type", kind, "rows are read as what they look like: look at `phlora data check`")
    return None, {}


def _messages(one: Settings, base: str) -> tuple[str, dict[str, str]]:
    column = one.text("field_messages") or ("messages" if base == "chat_template" else "conversations")
    names = one.take("message_property_mappings") or {}
    role = one.text("message_field_role") or names.get("role", "role")
    content = one.text("message_field_content") or names.get("content", "content")
    for key, name, known in (("role", role, ("role", "from")), ("content", content, ("content", "value"))):
        if name not in known:
            raise one.refuse(
                f"message_property_mappings.{key}",
                name,
                "is a name that Phlora does not know in a message",
                f"rename it in the file to {known[0]}",
            )
    roles = one.take("roles")
    if isinstance(roles, Mapping):
        others = sorted(
            str(name)
            for role, given in roles.items()
            for name in (given if isinstance(given, list) else [given])
            if name not in _ROLES.get(str(role), ())
        )
        if others:
            one.leave_value(
                "roles", roles, f"{', '.join(others)}: `phlora data check` says whether it is known"
            )
    field_system = one.text("field_system")
    field_tools = one.text("field_tools")
    named = "messages" if column == "messages" else "conversations"
    return named, shared.columns_of({named: column, "system": field_system, "tools": field_tools})


_ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model"),
    "system": ("system",),
    "tool": ("tool", "observation", "ipython"),
}


def _own_type(one: Settings, kind: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Format and columns of a type that the file describes itself."""
    fields = {str(name): value for name, value in flattened(kind).items()}
    pairs = {
        "instruction": fields.pop("field_instruction", None),
        "input": fields.pop("field_input", None),
        "output": fields.pop("field_output", None),
        "system": fields.pop("field_system", None),
    }
    for name, value in fields.items():
        one.miss(f"type.{name}", value, shared.TEMPLATE)
    return "alpaca", shared.columns_of(pairs)
