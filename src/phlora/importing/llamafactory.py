"""LLaMA-Factory: the arguments of `llamafactory-cli train`, and the data sets of its dataset_info.json.

Sources: its documentation on arguments and data preparation, and the files under examples/train_lora and
examples/train_qlora of its repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phlora.config_values import kind_of, read_mapping
from phlora.errors import ConfigError, did_you_mean, shown
from phlora.importing import shared
from phlora.importing.settings import Settings, said

INFO_FILE = "dataset_info.json"
_STAGES = {
    "pt": "continued pretraining",
    "rm": "a reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "kto": "KTO",
}
_MEDIA = ("images", "videos", "audios")
# Roles and keys of messages under which Phlora reads chats anyway.
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}
_DEFAULTS: Mapping[str, Any] = {
    "training_config.learning_rate": 5e-5,
    "training_config.num_train_epochs": 3.0,
    "training_config.per_device_train_batch_size": 8,
    "training_config.lr_scheduler_type": "linear",
    "training_config.warmup_steps": 0,
    "training_config.max_length": 2048,
    "peft_config.r": 8,
    "peft_config.lora_alpha": 16,
    "peft_config.target_modules": "all-linear",
}
_WHOLE = {
    "per_device_train_batch_size": "training_config.per_device_train_batch_size",
    "per_device_eval_batch_size": "training_config.per_device_eval_batch_size",
    "gradient_accumulation_steps": "training_config.gradient_accumulation_steps",
    "cutoff_len": "training_config.max_length",
    "seed": "training_config.seed",
    "data_seed": "training_config.data_seed",
    "lora_rank": "peft_config.r",
    "save_total_limit": "training_config.save_total_limit",
    "dataloader_num_workers": "training_config.dataloader_num_workers",
}
_NUMBERS = {
    "learning_rate": "training_config.learning_rate",
    "num_train_epochs": "training_config.num_train_epochs",
    "weight_decay": "training_config.weight_decay",
    "max_grad_norm": "training_config.max_grad_norm",
    "adam_beta1": "training_config.adam_beta1",
    "adam_beta2": "training_config.adam_beta2",
    "adam_epsilon": "training_config.adam_epsilon",
    "neftune_noise_alpha": "training_config.neftune_noise_alpha",
    "logging_steps": "training_config.logging_steps",
    "lora_dropout": "peft_config.lora_dropout",
    "loraplus_lr_ratio": "peft_config.loraplus_lr_ratio",
}
_LEFT = {
    "template": shared.TEMPLATE,
    "enable_thinking": "data.reasoning says what becomes of what was thought",
    "tool_format": "tools are written by the model's own template; see the page on data",
    "bf16": shared.PRECISION,
    "fp16": shared.PRECISION,
    "pure_bf16": shared.PRECISION,
    "tf32": shared.PRECISION,
    "upcast_layernorm": shared.PRECISION,
    "upcast_lmhead_output": shared.PRECISION,
    "infer_dtype": shared.PRECISION,
    "gradient_checkpointing": shared.CHECKPOINTING,
    "disable_gradient_checkpointing": shared.CHECKPOINTING,
    "use_unsloth_gc": shared.CHECKPOINTING,
    "use_reentrant_gc": shared.CHECKPOINTING,
    "use_unsloth": shared.KERNELS,
    "enable_liger_kernel": shared.KERNELS,
    "use_kt": shared.KERNELS,
    "do_train": "phlora train trains",
    "do_eval": "the base and the tuned model are compared after every run",
    "do_predict": "`phlora evaluate` answers rows with a trained adapter",
    "predict_with_generate": "evaluation.max_answers rows are answered by generation",
    "compute_accuracy": "token accuracy is always measured",
    "plot_loss": "the report has the curve",
    "overwrite_cache": "tokenised rows are known again by what they are made from",
    "overwrite_output_dir": "`phlora train --overwrite` replaces a run",
    "preprocessing_num_workers": "rows are tokenised in one process",
    "preprocessing_batch_size": "rows are read in one pass",
    "tokenized_path": "tokenised rows are kept by themselves (data.cache)",
    "streaming": "rows are indexed and read again, so they need no streaming",
    "buffer_size": "rows are indexed and read again, so they need no streaming",
    "save_only_model": "a run is continued from its optimizer's state too",
    "ddp_timeout": shared.ONE_PROCESS,
    "ddp_find_unused_parameters": shared.ONE_PROCESS,
    "deepspeed": shared.ONE_PROCESS,
    "fsdp": shared.ONE_PROCESS,
    "fsdp_config": shared.ONE_PROCESS,
    "local_rank": shared.ONE_PROCESS,
    "resume_from_checkpoint": "`phlora train --resume` continues a run",
    "include_num_input_tokens_seen": "events.jsonl counts the tokens",
    "push_to_hub": shared.NOT_SENT,
    "export_hub_model_id": shared.NOT_SENT,
    "hf_hub_token": "log in with `hf auth login`, or set HF_TOKEN",
    "hub_model_id": shared.NOT_SENT,
    "cache_dir": "set HF_HOME",
    "use_fast_tokenizer": "the fast tokenizer is taken where there is one",
    "low_cpu_mem_usage": "weights are read one tensor at a time",
    "media_dir": "only text is trained",
    "quantization_device_map": "model.device says where the model is",
    "quantization_method": "NF4 and int8 are those of bitsandbytes",
    "ignore_pad_token_for_loss": "padding is never trained",
    "eval_on_each_dataset": "all held-out rows are scored together",
    "pissa_convert": "the adapter is saved for the base as it was by PEFT's own means; see peft_config",
}
_MIXED = "the rows of all files are mixed; a file's `limit` and `weight` say how much it counts"
_CHANGES_TRAINING = {
    "default_system": "write it into the rows: a system message stands in each chat that has it",
    "resize_vocab": "a run adds no tokens",
    "interleave_probs": _MIXED,
    "mix_strategy": _MIXED,
}
_OTHER_TRAINING = {
    "use_galore": "GaLore trains the base's own weights",
    "use_apollo": "APOLLO trains the base's own weights",
    "use_badam": "BAdam trains the base's own weights",
    "use_llama_pro": "LLaMA Pro trains blocks of the base",
    "mixture_of_depths": "it changes the model",
    "shift_attn": "it changes what the model attends to",
    "use_eaft_loss": "it is another loss",
    "use_asft_loss": "it is another loss",
}


def map_settings(settings: Settings, *, dataset_info: Path | None = None) -> None:
    """Decide about every setting.

    Raises:
        ConfigError: it would train something else, or a data set is not known.
    """
    _require_lora_sft(settings)
    shared.base_model(settings, "model_name_or_path", settings.text("model_name_or_path"))
    settings.put("model.revision", settings.text("model_revision"), "model_revision")
    settings.put("model.trust_remote_code", settings.flag("trust_remote_code"), "trust_remote_code")
    _quantization(settings)
    shared.attention(settings, "flash_attn", _attention_word(settings))
    _rows(settings, dataset_info)
    _adapter(settings)
    shared.numbers(settings, _WHOLE, whole=True)
    shared.numbers(settings, _NUMBERS)
    _training(settings)
    if settings.flag("use_dft_loss"):
        settings.put("training_config.loss_type", "dft", "use_dft_loss")
    if settings.values.get("mix_strategy") == "concat":
        settings.leave("mix_strategy", _MIXED)
    settings.look_at_all(_CHANGES_TRAINING)
    settings.leave_all(_LEFT)
    shared.arguments_of_transformers(settings)
    settings.leave_rest()
    rank = settings.mapped.get("peft_config.r")
    if rank is not None and "peft_config.lora_alpha" not in settings.mapped:
        settings.put(
            "peft_config.lora_alpha", 2 * rank.value, remark=f"{settings.tool}'s default: twice the rank"
        )
    for target, value in _DEFAULTS.items():
        settings.put_default(target, value)


def is_dataset_info(values: Mapping[Any, Any]) -> bool:
    """Whether this is a table of data sets rather than a configuration."""
    names = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
    entries = [entry for entry in values.values() if isinstance(entry, Mapping)]
    return bool(entries) and len(entries) == len(values) and all(names & entry.keys() for entry in entries)


def _require_lora_sft(settings: Settings) -> None:
    stage = settings.text("stage") or "sft"
    if stage != "sft":
        what = _STAGES.get(stage, "another kind of training")
        raise settings.refuse(
            "stage", stage, f"is {what}, and Phlora trains chats (stage: sft)", "train it with LLaMA-Factory"
        )
    kind = settings.text("finetuning_type") or "lora"
    if kind not in ("lora", "qlora"):
        raise settings.refuse(
            "finetuning_type",
            kind,
            "trains the weights of the model itself, and Phlora trains LoRA adapters",
            "finetuning_type: lora, if an adapter would do",
        )
    for key, what in _OTHER_TRAINING.items():
        if settings.flag(key):
            raise settings.refuse(key, True, f"would train something else: {what}", "leave it out")
    if adapter := settings.take("adapter_name_or_path"):
        raise settings.refuse(
            "adapter_name_or_path",
            adapter,
            "is an adapter to go on from, and a Phlora run begins its own",
            "merge it first: phlora merge ADAPTER -o MODEL --rows chats.jsonl, and name that model",
        )


def _attention_word(settings: Settings) -> str | None:
    value = settings.take("flash_attn")
    if value is None or isinstance(value, bool):
        return None if value is None else ("fa2" if value else "disabled")
    return str(value)


def _quantization(settings: Settings) -> None:
    bits = settings.number("quantization_bit", whole=True)
    method = settings.take("quantization_method") or "bnb"
    kind = settings.text("quantization_type") or "nf4"
    double = settings.flag("double_quantization")
    if bits is None:
        return
    if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        raise settings.refuse(
            "quantization_bit",
            f"{bits} ({method})",
            "is no way in which Phlora stores a base",
            "quantization_bit: 4 or 8, with quantization_method: bnb",
        )
    if bits == 4 and kind != "nf4":
        raise settings.refuse("quantization_type", kind, "is not there", "quantization_type: nf4")
    if bits == 4 and double is False:
        source = "quantization_bit, double_quantization"
        settings.put("model.quantization", {"type": "nf4", "double_quant": False}, source)
    else:
        settings.put("model.quantization", "nf4" if bits == 4 else "int8", "quantization_bit")


def _adapter(settings: Settings) -> None:
    settings.put("peft_config.lora_alpha", settings.number("lora_alpha"), "lora_alpha")
    shared.targets(settings, "lora_target", settings.names("lora_target"))
    settings.put("peft_config.modules_to_save", settings.names("additional_target"), "additional_target")
    for key in ("use_rslora", "use_dora"):
        settings.put(f"peft_config.{key}", settings.flag(key), key)
    steps = settings.number("pissa_iter", whole=True)
    if settings.flag("pissa_init"):
        start = "pissa" if steps == -1 else f"pissa_niter_{16 if steps is None else steps}"
        settings.put("peft_config.init_lora_weights", start, "pissa_init, pissa_iter")
    settings.leave("create_new_adapter", "a run begins its own adapter")


def _training(settings: Settings) -> None:
    max_steps = settings.number("max_steps", whole=True)
    if max_steps is not None and max_steps > 0:
        settings.put("training_config.max_steps", max_steps, "max_steps")
    shared.optimizer(settings, "optim", settings.text("optim"))
    shared.schedule(settings, "lr_scheduler_type", settings.text("lr_scheduler_type"))
    settings.put(
        "training_config.lr_scheduler_kwargs", settings.take("lr_scheduler_kwargs"), "lr_scheduler_kwargs"
    )
    shared.warmup(settings, "warmup_ratio", "warmup_steps")
    neat, packing = settings.flag("neat_packing"), settings.flag("packing")
    if neat or packing:
        settings.put(
            "training_config.packing",
            True,
            "neat_packing" if neat else "packing",
            "rows never see each other",
        )
    everything, last = settings.flag("train_on_prompt"), settings.flag("mask_history")
    if everything:
        settings.put("data.train_on", "all", "train_on_prompt")
    elif last:
        settings.put("data.train_on", "last", "mask_history")
    for key in ("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy", "run_name"):
        settings.put(f"training_config.{key.replace('evaluation', 'eval')}", settings.text(key), key)
    for key in ("eval_steps", "save_steps"):
        settings.put(f"training_config.{key}", settings.number(key), key)
    if settings.flag("group_by_length"):
        settings.put("training_config.train_sampling_strategy", "group_by_length", "group_by_length")
    settings.put("training_config.report_to", settings.take("report_to"), "report_to")
    settings.put("output", settings.text("output_dir"), "output_dir")


# --------------------------------------------------------------------------------------------- data sets


def _rows(settings: Settings, dataset_info: Path | None) -> None:
    names, held_out = settings.names("dataset"), settings.names("eval_dataset")
    folder = settings.text("dataset_dir") or "data"
    limit = settings.number("max_samples", whole=True)
    if limit is not None and limit < 1:
        raise settings.error("max_samples", limit, "1 or more")
    if not names:
        raise settings.error("dataset", names, "the names of data sets in dataset_info.json")
    if folder.upper().startswith("REMOTE:"):
        raise settings.refuse(
            "dataset_dir", folder, "is on a hub", "download it, and say --dataset-info FILE"
        )
    online = folder.upper() == "ONLINE"
    info = {} if online else _dataset_info(settings, folder, dataset_info)
    place = None if online else info.pop("", None)

    def files(key: str, wanted: list[str]) -> list[dict[str, Any]]:
        return [_data_set(settings, key, name, info, place, limit) for name in wanted]

    source = "dataset" + ", dataset_dir" * ("dataset_dir" in settings.taken)
    settings.put("data.files", files("dataset", names), source + ", max_samples" * bool(limit))
    size = settings.number("val_size")
    if held_out:
        settings.put("data.eval", files("eval_dataset", held_out), "eval_dataset")
        if size:
            settings.leave_value("val_size", size, "eval_dataset names the held-out rows")
    else:
        shared.held_out(settings, "val_size", size)


def _dataset_info(settings: Settings, folder: str, given: Path | None) -> dict[str, Any]:
    """The table of data sets, and under the empty name the file that it is."""
    looked = (
        [given]
        if given
        else [parent / folder / INFO_FILE for parent in (Path(), *Path(settings.file).resolve().parents)]
    )
    for path in looked:
        if path.is_file():
            return {**read_mapping(path), "": path}
    raise ConfigError(
        f"There is no {INFO_FILE} that says where the data sets are",
        where=f"{settings.file}: dataset",
        expected=f"{looked[0]}, from here or beside the file",
        fix=f"name it: --dataset-info path/to/{INFO_FILE}",
    )


def _data_set(
    settings: Settings, key: str, name: str, info: Mapping[str, Any], place: Any, limit: int | float | None
) -> dict[str, Any]:
    """One entry of dataset_info.json as one of `data.files`."""
    if place is None:
        return shared.data_file(name, limit=limit)
    where = f"{place}: {name}"
    if name not in info:
        raise ConfigError(
            f"There is no data set {shown(name)}", where=str(place), fix=did_you_mean(name, info)
        )
    if not isinstance(info[name], Mapping):
        raise ConfigError(
            f"The data set {shown(name)} is {kind_of(info[name])}",
            where=str(place),
            expected="a mapping with file_name or hf_hub_url",
        )
    entry = Settings(settings.tool, where, said(info[name]))
    columns = _columns(entry)
    file = _path(settings, entry, key, place.parent)
    split, first = shared.split_of(entry, "split")
    samples = entry.number("num_samples", whole=True)
    if samples is not None and samples < 0:
        raise entry.error("num_samples", samples, "0 or more")
    number = min((count for count in (samples, limit, first) if count), default=None)
    for left in ("subset", "folder"):
        if (part := entry.take(left)) is not None:
            entry.miss(left, part, "a part of a data set cannot be named: download it, and name its file")
    entry.leave("file_sha1", "rows are known again by their content")
    entry.leave("load_from", "found out")
    entry.leave_unknown()
    settings.adopt(entry, name)
    return shared.data_file(
        file,
        format=columns.pop("format"),
        columns=columns,
        split=split,
        limit=number,
    )


def _path(settings: Settings, entry: Settings, key: str, place: Path) -> str:
    for key_of_place in ("file_name", "hf_hub_url"):
        if not isinstance(entry.values.get(key_of_place, ""), str):
            raise entry.error(key_of_place, entry.values[key_of_place], "a name, as text")
    file = entry.text("file_name")
    hub = [entry.text(name) for name in ("hf_hub_url", "ms_hub_url", "om_hub_url")]
    if file:
        path = place / file
        if not path.exists():
            settings.notes.append(f"{key}: {path} is not there")
        return str(path)
    if hub[0]:
        return hub[0]
    raise ConfigError(
        "The data set has neither a file nor a name on the hub",
        where=entry.file,
        expected="file_name or hf_hub_url",
        fix="download it, and give its entry a file_name",
    )


def _columns(entry: Settings) -> dict[str, str]:
    """`format`, and Phlora's columns where the file's are called otherwise."""
    given, tags = entry.pairs("columns"), entry.pairs("tags")
    formatting = entry.text("formatting") or "alpaca"
    if entry.flag("ranking") or {"chosen", "rejected", "kto_tag"} & given.keys():
        raise entry.refuse(
            "ranking", True, "are preferences, and stage: sft trains answers", "name a data set of chats"
        )
    media = [name for name in _MEDIA if given.get(name)]
    if media:
        raise entry.refuse(
            "columns", media[0], "are no text, and Phlora trains text", "name a data set of texts"
        )
    for tag, name in tags.items():
        if name not in _TAGS.get(tag, (name,)):
            raise entry.refuse(
                f"tags.{tag}",
                name,
                "is a name that Phlora does not know in a message",
                f"rename it in the file to {_TAGS[tag][0]}",
            )
    shared_columns = {"system": given.pop("system", None), "tools": given.pop("tools", None)}
    if formatting in ("sharegpt", "openai"):
        column = given.pop("messages", "conversations" if formatting == "sharegpt" else "messages")
        named = "messages" if column == "messages" else "conversations"
        found = shared.columns_of({named: column, **shared_columns})
        return {"format": named, **found, **_left_columns(entry, given)}
    if formatting != "alpaca":
        raise entry.error("formatting", formatting, "alpaca, sharegpt or openai")
    pairs = {
        "instruction": given.pop("prompt", None),
        "input": given.pop("query", None),
        "output": given.pop("response", None),
        "history": given.pop("history", None),
    }
    return {
        "format": "alpaca",
        **shared.columns_of({**pairs, **shared_columns}),
        **_left_columns(entry, given),
    }


def _left_columns(entry: Settings, given: Mapping[str, Any]) -> dict[str, str]:
    for name, column in given.items():
        entry.leave_value(f"columns.{name}", column, "Phlora has no such column")
    return {}
