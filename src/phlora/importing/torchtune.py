"""torchtune: the configuration of a LoRA recipe (`tune run lora_finetune_single_device --config FILE`).

Sources: its documentation on configs, LoRA and data sets, and the files under recipes/configs of its repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phlora.errors import shown
from phlora.importing import shared
from phlora.importing.settings import Settings, flattened
from phlora.importing.steps import most_steps_of_an_epoch

_COMPONENT = "_component_"
_DEFAULTS: Mapping[str, Any] = {
    "training_config.learning_rate": 2e-5,
    "training_config.num_train_epochs": 1,
    "training_config.per_device_train_batch_size": 2,
    "training_config.lr_scheduler_type": "constant",
    "training_config.warmup_steps": 0,
    "training_config.max_grad_norm": 0.0,
    "training_config.weight_decay": 0.01,
    "peft_config.r": 8,
    "peft_config.lora_alpha": 16,
}
_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# A data set of torchtune by its function: where its rows are, what they look like, and what is special about it.
_SETS: Mapping[str, tuple[str, str | None, dict[str, str], str]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", {}, ""),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", {}, ""),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "conversations", {}, ""),
    "grammar_dataset": (
        "liweili/c4_200m",
        "qa",
        {"question": "input", "answer": "output"},
        "its question, Correct this to standard English, is not added",
    ),
    "samsum_dataset": (
        "Samsung/samsum",
        "qa",
        {"question": "dialogue", "answer": "summary"},
        "its question, Summarize this dialogue, is not added",
    ),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", {"text": "article"}, ""),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", {"text": "page"}, ""),
}
_GENERIC = ("instruct_dataset", "chat_dataset", "text_completion_dataset")
_TRAINS_PROMPTS = ("alpaca_dataset", "alpaca_cleaned_dataset")
_LEFT = {
    "dtype": shared.PRECISION,
    "device": "model.device: auto takes a GPU where there is one",
    "enable_activation_checkpointing": shared.CHECKPOINTING,
    "enable_activation_offloading": shared.CHECKPOINTING,
    "ac_mode": shared.CHECKPOINTING,
    "ac_option": shared.CHECKPOINTING,
    "compile": shared.KERNELS,
    "resume_from_checkpoint": "`phlora train --resume` continues a run",
    "save_adapter_weights_only": "an adapter is saved alone; `phlora merge` folds it into its base",
    "log_peak_memory_stats": "memory is said in the plan and in events.jsonl",
    "log_level": "the log says what is done",
    "fsdp_cpu_offload": shared.ONE_PROCESS,
    "fsdp_reshard_after_forward": shared.ONE_PROCESS,
    "data_parallel_shard_dim": shared.ONE_PROCESS,
    "data_parallel_replicate_dim": shared.ONE_PROCESS,
    "tensor_parallel_dim": shared.ONE_PROCESS,
    "clip_grad_norm": "no gradient is clipped",
    "cudnn_deterministic_mode": "training_config.full_determinism says it",
    "optimizer.fused": "the trainer takes the fused one where there is one",
    "optimizer_in_bwd": "an optimizer of an adapter takes little room",
    "tokenizer.path": "the model's own tokenizer is used",
    "tokenizer.merges_file": "the model's own tokenizer is used",
    "tokenizer.special_tokens_path": "the model's own tokenizer is used",
    f"tokenizer.{_COMPONENT}": "the model's own tokenizer is used",
    "checkpointer.checkpoint_files": "all files of the folder are read",
    "checkpointer.model_type": "found out from the model's own configuration",
    "checkpointer.output_dir": "a run has one folder, `output`",
    "checkpointer.safe_serialization": "adapters are always saved as safetensors",
    "checkpointer.recipe_checkpoint": "`phlora train --resume` continues a run",
    "checkpointer.adapter_checkpoint": "`phlora train --resume` continues a run",
    f"checkpointer.{_COMPONENT}": "safetensors and older files are read",
    "lr_scheduler.num_training_steps": "counted from rows and epochs",
}
# How settings begin that only recipes have which train something else than answers.
_OTHER_TRAINING = {
    "teacher": "has a model learn from another one",
    "kd_": "has a model learn from another one",
    "quantizer.": "trains for another arithmetic",
    "reward": "trains on rewards",
    "ref_": "trains on preferences",
}
_SAYING_MODULES = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output")
_OF_LOSS = (
    "CrossEntropyLoss",
    "CEWithChunkedOutputLoss",
    "LinearCrossEntropyLoss",
    "LigerLinearCrossEntropy",
)


def resolve_references(values: dict[str, Any]) -> dict[str, Any]:
    """`${output_dir}` and the like in place; what refers to nothing stays."""
    for _ in range(4):
        values = {key: _resolved(value, values) for key, value in values.items()}
    return values


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or "${" not in value or len(value) > 1000:
        return value
    whole = re.fullmatch(r"\$\{([\w.]+)\}", value)
    if whole:
        return values.get(whole[1], value)
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(values.get(found[1], found[0])), value)


def map_settings(settings: Settings) -> None:
    """Decide about every setting.

    Raises:
        ConfigError: it would train something else.
    """
    settings.notes += [
        f"{key}: {shown(value)} refers to nothing in the file, and is written as it is"
        for key, value in settings.values.items()
        if isinstance(value, str) and "${" in value
    ]
    component = settings.text(f"model.{_COMPONENT}") or ""
    builder = component.rpartition(".")[2]
    if not builder.startswith(("lora_", "qlora_", "dora_")):
        raise settings.refuse(
            f"model.{_COMPONENT}",
            component or "nothing",
            "trains the weights of the model itself, and Phlora trains LoRA adapters",
            "a component such as torchtune.models.phi3.lora_phi3_mini, if an adapter would do",
        )
    for word in ("vision", "classifier", "multimodal", "reward"):
        if word in component:
            raise settings.refuse(
                f"model.{_COMPONENT}", component, f"is a {word} model", "train it with torchtune"
            )
    for key, value in settings.values.items():
        for sign, what in _OTHER_TRAINING.items():
            if key.startswith(sign):
                raise settings.refuse(key, value, f"is of a recipe that {what}", "train it with torchtune")
    folder = settings.text("checkpointer.checkpoint_dir")
    shared.base_model(settings, "checkpointer.checkpoint_dir", folder)
    quantized = settings.flag("model.quantize_base")
    if builder.startswith("qlora_") or quantized:
        source = "model.quantize_base" if quantized else f"model.{_COMPONENT}"
        shared.quantized_base(settings, "nf4", source, str(folder))
    if builder.startswith("dora_") or settings.flag("model.use_dora"):
        settings.put("peft_config.use_dora", True, f"model.{_COMPONENT}, model.use_dora")
    if settings.values.get("dtype") == "fp32":
        settings.put("model.dtype", "float32", "dtype")
        settings.take("dtype")
    _rows(settings)
    _adapter(settings)
    _training(settings)
    for key in settings.values_at("profiler"):
        settings.leave(key, "nothing is profiled; benchmarks are apart")
    if settings.flag("shuffle") is False:
        settings.miss("shuffle", False, "every epoch has an order of its own")
    for key in list(settings.values_at("tokenizer")):
        if key.startswith("tokenizer.prompt_template"):
            settings.look_at(key, shared.TEMPLATE)
    settings.leave_all(_LEFT)
    settings.leave_rest()
    for target, value in _DEFAULTS.items():
        settings.put_default(target, value)


def _adapter(settings: Settings) -> None:
    attention = settings.names("model.lora_attn_modules") or []
    found = [_MODULES.get(name, name) for name in attention]
    if settings.flag("model.apply_lora_to_mlp"):
        found += ["gate_proj", "up_proj", "down_proj"]
    if settings.flag("model.apply_lora_to_output"):
        found.append("lm_head")
    if not found:
        raise settings.error("model.lora_attn_modules", attention, "the modules that get an adapter")
    settings.put("peft_config.target_modules", found, ", ".join(_SAYING_MODULES))
    shared.numbers(settings, {"model.lora_rank": "peft_config.r"}, whole=True)
    shared.numbers(
        settings,
        {"model.lora_alpha": "peft_config.lora_alpha", "model.lora_dropout": "peft_config.lora_dropout"},
    )


def _training(settings: Settings) -> None:
    shared.numbers(
        settings,
        {
            "batch_size": "training_config.per_device_train_batch_size",
            "gradient_accumulation_steps": "training_config.gradient_accumulation_steps",
            "seed": "training_config.seed",
            "tokenizer.max_seq_len": "training_config.max_length",
            "log_every_n_steps": "training_config.logging_steps",
            "save_every_n_steps": "training_config.save_steps",
        },
        whole=True,
    )
    if "training_config.max_length" not in settings.mapped:
        settings.notes.append(
            "torchtune shortens no row where max_seq_len is not set; here rows end at 2048 tokens"
        )
    settings.put("training_config.num_train_epochs", settings.number("epochs"), "epochs")
    _most_steps(settings)
    clip = settings.number("clip_grad_norm")
    settings.put("training_config.max_grad_norm", clip, "clip_grad_norm")
    shared.optimizer(
        settings, f"optimizer.{_COMPONENT}", _optimizer(settings.text(f"optimizer.{_COMPONENT}"))
    )
    shared.numbers(
        settings,
        {
            "optimizer.lr": "training_config.learning_rate",
            "optimizer.weight_decay": "training_config.weight_decay",
            "optimizer.eps": "training_config.adam_epsilon",
        },
    )
    for name, beta in zip(
        ("adam_beta1", "adam_beta2"), settings.numbers_of("optimizer.betas", 2) or (), strict=False
    ):
        settings.put(f"training_config.{name}", beta, "optimizer.betas")
    component = settings.text(f"lr_scheduler.{_COMPONENT}")
    if component:
        found = re.search(r"get_(\w+?)_schedule", component)
        shared.schedule(settings, f"lr_scheduler.{_COMPONENT}", found[1] if found else component)
    _evaluation(settings)
    settings.put(
        "training_config.warmup_steps",
        settings.number("lr_scheduler.num_warmup_steps", whole=True),
        "lr_scheduler.num_warmup_steps",
    )
    _loss(settings)
    _tracker(settings)
    settings.put("output", settings.text("output_dir"), "output_dir")


def _most_steps(settings: Settings) -> None:
    """`max_steps_per_epoch`: Phlora counts the steps of all epochs together."""
    key = "max_steps_per_epoch"
    steps = settings.number(key, whole=True)
    if not steps:
        return
    epochs = settings.mapped.get("training_config.num_train_epochs")
    number = epochs.value if epochs is not None else 1
    there = most_steps_of_an_epoch(
        settings, batch_size=_DEFAULTS["training_config.per_device_train_batch_size"]
    )
    if there is not None and there <= steps:
        why = f"an epoch of these rows has {there} steps at most, so that none ends early"
        settings.leave_value(key, steps, why)
        return
    settings.put("training_config.max_steps", int(steps * number), key, "of all epochs together")
    if there is None or "training_config.packing" in settings.mapped:
        settings.notes.append(
            f"{key}: {steps} steps of every epoch are trained; here {int(steps * number)} steps in all, even where "
            f"the rows make fewer than {steps} steps an epoch: that would be more epochs than {number}. "
            "`phlora plan` counts the steps; take max_steps out where that is so"
        )


def _evaluation(settings: Settings) -> None:
    """How often, and in what batches, the loss of `dataset_val` is taken."""
    target = "training_config.per_device_eval_batch_size"
    settings.put(target, settings.number("batch_size_val", whole=True), "batch_size_val")
    steps = settings.number("run_val_every_n_steps", whole=True)
    if steps:
        settings.put("training_config.eval_strategy", "steps", "run_val_every_n_steps")
        settings.put("training_config.eval_steps", steps, "run_val_every_n_steps")


def _optimizer(component: str | None) -> str | None:
    """The name that transformers has for an optimizer of torch, torchao or bitsandbytes."""
    if component is None:
        return None
    name = component.rpartition(".")[2]
    known = {"AdamW": "adamw_torch", "Adam": "adamw_torch", "SGD": "sgd", "PagedAdamW": "paged_adamw"}
    known |= {
        "PagedAdamW8bit": "paged_adamw_8bit",
        "AdamW8bit": "adamw_8bit",
        "AdamW4bit": "adamw_torch_4bit",
    }
    return known.get(name, name)


def _loss(settings: Settings) -> None:
    component = settings.text(f"loss.{_COMPONENT}")
    if component and not component.endswith(_OF_LOSS):
        raise settings.refuse(
            f"loss.{_COMPONENT}", component, "is another loss than that of chats", "train it with torchtune"
        )
    if component:
        settings.leave_value(f"loss.{_COMPONENT}", component, "the mean cross-entropy of the trained tokens")
    for key in settings.values_at("loss"):
        settings.leave(key, "how the loss is computed is chosen for the model")


def _tracker(settings: Settings) -> None:
    component = (settings.text(f"metric_logger.{_COMPONENT}") or "").rpartition(".")[2]
    project, name = settings.text("metric_logger.project"), settings.text("metric_logger.name")
    known = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml"}
    if component in known:
        source = f"metric_logger.{_COMPONENT}"
        settings.put("training_config.report_to", known[component], source)
        settings.put("training_config.project", project, "metric_logger.project")
        settings.put("training_config.run_name", name, "metric_logger.name")
    elif component:
        settings.leave_value(f"metric_logger.{_COMPONENT}", component, "events.jsonl has every figure")
    for key in settings.values_at("metric_logger"):
        settings.leave(key, "events.jsonl has every figure")


# --------------------------------------------------------------------------------------------- data sets


def _rows(settings: Settings) -> None:
    files, packed, prompts = _sets(settings, "dataset")
    if not files:
        raise settings.error(
            "dataset", settings.taken.get("dataset"), "a data set, such as torchtune.datasets.alpaca_dataset"
        )
    settings.put("data.files", files, "dataset")
    if packed:
        settings.put("training_config.packing", True, "dataset.packed", "rows never see each other")
    if all(prompts):
        settings.put("data.train_on", "all", "dataset.train_on_input")
    elif any(prompts):
        settings.notes.append("dataset: prompts are trained in some of the sets only; here in none")
    held_out, _, scored = _sets(settings, "dataset_val")
    if held_out:
        settings.put("data.eval", held_out, "dataset_val")
        if all(scored) != all(prompts):
            settings.notes.append("dataset_val: prompts are scored where they are trained, unlike there")
    else:
        shared.held_out(settings, "eval_size", None)


def _sets(settings: Settings, section: str) -> tuple[list[dict[str, Any]], bool, list[bool]]:
    """Files of the data sets of a section, whether they are packed, and of each whether its prompts are trained."""
    sets = settings.take(section)
    if not isinstance(sets, list):
        inner = {key.partition(".")[2]: settings.take(key) for key in settings.values_at(section)}
        sets = [inner] if inner else []
    files: list[dict[str, Any]] = []
    packed, prompts = False, []
    for number, entry in enumerate(sets):
        one = Settings(
            settings.tool,
            f"{settings.file}: {section}",
            flattened(entry if isinstance(entry, Mapping) else {}),
        )
        packed = bool(one.flag("packed")) or packed
        name = str(one.take(_COMPONENT) or "").rpartition(".")[2]
        files += _data_set(settings, one, name)
        prompts.append(_trains_prompts(one, name))
        one.leave("max_seq_len", "tokenizer.max_seq_len says it")
        one.look_at("new_system_prompt", "write it into the rows, as a system message")
        one.look_at("prompt_template", shared.TEMPLATE)
        one.look_at("filter_fn", "filter the rows before")
        one.leave_unknown()
        settings.adopt(one, f"{section}[{number}]" if len(sets) > 1 else section)
    return files, packed, prompts


def _trains_prompts(one: Settings, name: str) -> bool:
    asked, strategy = one.flag("train_on_input"), one.text("masking_strategy")
    if strategy is not None:
        return strategy == "train_on_all"
    return name in _TRAINS_PROMPTS if asked is None else asked


def _data_set(settings: Settings, one: Settings, name: str) -> list[dict[str, Any]]:
    if (
        "preference" in name
        or "multimodal" in name
        or name.startswith(("the_cauldron", "vqa", "stack_exchange", "hh_"))
    ):
        raise settings.refuse(
            f"dataset.{_COMPONENT}",
            name,
            "is no set of chats, and Phlora trains chats",
            "name a set of chats",
        )
    source, data_files = one.text("source"), one.names("data_files")
    split, limit = shared.split_of(one, "split")
    column = one.text("conversation_column") or one.text("column")
    mapped = {str(key.partition(".")[2]): one.take(key) for key in one.values_at("column_map")}
    style = one.text("conversation_style")
    if name == "chat_dataset":
        for key in mapped.keys() - {"conversations", "messages"}:
            one.miss(f"column_map.{key}", mapped[key], "the column of the chats is conversation_column")
    if name in _SETS:
        path, format, columns, remark = _SETS[name]
        path = source or path
        if remark:
            settings.notes.append(f"dataset: {name}: {remark}")
        if mapped:
            columns = shared.columns_of(mapped)
    elif name in _GENERIC and source:
        path = source
        format, columns = _generic(name, column, mapped, style)
    else:
        raise settings.refuse(
            f"dataset.{_COMPONENT}",
            name or "nothing",
            "is a data set that only torchtune knows",
            "name its rows with torchtune.datasets.chat_dataset or instruct_dataset, and `source`",
        )
    if data_files and path in ("json", "csv", "parquet", "text"):
        paths = data_files
    else:
        paths = [path]
        if data_files:
            one.miss("data_files", data_files, "files of a data set on the hub: download them, and name them")
    return [
        shared.data_file(
            shared.located(settings, "dataset", file),
            format=format,
            columns=columns,
            split=split,
            limit=limit,
        )
        for file in paths
    ]


def _generic(
    name: str, column: str | None, mapped: Mapping[str, Any], style: str | None
) -> tuple[str, dict[str, str]]:
    if name == "text_completion_dataset":
        return "text", shared.columns_of({"text": column})
    if name == "chat_dataset":
        own = "messages" if style == "openai" else "conversations"
        named = column or mapped.get("conversations") or mapped.get("messages")
        return own, shared.columns_of({own: named})
    return "qa", {"question": mapped.get("input", "input"), "answer": mapped.get("output", "output")}
