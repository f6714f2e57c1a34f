"""What `finetune` does with every field of TRL's `SFTConfig`: each is honoured, mapped or refused, none is ignored.

A test walks the fields of the installed TRL and fails on one that nobody has decided about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Have their TRL meaning.
HONOURED = frozenset(
    (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "max_grad_norm"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "loss_type"),
        *(
            "average_tokens_across_devices",
            "bf16",
            "fp16",
            "tf32",
            "neftune_noise_alpha",
            "max_length",
            "packing",
        ),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
        *(
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "use_liger_kernel",
            "liger_kernel_config",
        ),
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
        *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
        *(
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
        ),
        *("include_for_metrics", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
        *("seed", "data_seed", "full_determinism", "ignore_data_skip", "train_sampling_strategy"),
        *("restore_callback_states_from_checkpoint", "accelerator_config"),
        *(
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "dataloader_in_order",
        ),
        *("dataloader_multiprocessing_context", "dataloader_pin_memory"),
    )
)

# Done in another way, or for a purpose that a run does not have: what is said to whoever sets them.
MAPPED: Mapping[str, str] = {
    "output_dir": "it names the run folder, as `output` does",
    "assistant_only_loss": "true is data.train_on: assistant, false is data.train_on: all",
    "completion_only_loss": "true is data.train_on: assistant, false is data.train_on: all",
    "load_best_model_at_end": "the adapter with the lowest held-out loss is always kept, as adapter/best, and used",
    "padding_free": "how the rows of a batch are laid out is chosen for the data, with the same loss; see `speed`",
    "shuffle_dataset": "every epoch has an order of its own already",
    "truncation_mode": "what is over max_length is cut by whole turns, the oldest first; see data.too_long",
    "dataset_num_proc": "rows are tokenised in one process",
    "remove_unused_columns": "batches hold what the model needs and the weights of tokens",
    "dataloader_persistent_workers": "workers that outlive an epoch would keep its packs",
    "do_train": "phlora train trains; --dry-run does not",
    "do_eval": "eval_strategy decides about the held-out loss, evaluation.enabled about the proof",
    "do_predict": "`phlora evaluate` answers rows with a trained adapter",
    "push_to_hub": "the best adapter is sent once, when the run is complete",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "nothing is sent to a hub without push_to_hub",
    ),
    "local_rank": "a run is one process",
    "ddp_find_unused_parameters": "a run is one process",
    "ddp_bucket_cap_mb": "a run is one process",
    "ddp_broadcast_buffers": "a run is one process",
    "ddp_static_graph": "a run is one process",
    "ddp_backend": "a run is one process",
    "ddp_timeout": "a run is one process",
}


@dataclass(frozen=True)
class Refused:
    """What to do in the place of setting a field, and which values are accepted because they ask for nothing."""

    fix: str
    harmless: tuple[Any, ...] = (None, False)


_SEVERAL = Refused(
    "a Phlora run is one process; use phlora.SFTTrainer in a script of your own, which accelerate can launch",
    harmless=(None, False, "", [], {}),
)
_AT_LOADING = "say it in the `model` section: name, revision, dtype, attn_implementation"

REFUSED: Mapping[str, Refused] = {
    "model_init_kwargs": Refused(_AT_LOADING, harmless=(None, {})),
    "trust_remote_code": Refused("say it in the `model` section: trust_remote_code"),
    "use_cache": Refused("say it in the `model` section: use_cache"),
    "router_aux_loss_coef": Refused(
        "Phi-3 is no mixture of experts, so there is no such loss", harmless=(None, 0)
    ),
    "chat_template_path": Refused("set the template on the model's tokenizer and save it with the model"),
    "eos_token": Refused(
        "stop tokens are known for each model family; set another one on the model's tokenizer"
    ),
    "pad_token": Refused("a pad token that ends no reply is chosen for each model"),
    "dataset_text_field": Refused("call the column `text`", harmless=("text", None)),
    "dataset_kwargs": Refused(
        "rows are prepared by Phlora; rows that are tokenised already are for phlora.SFTTrainer",
        harmless=(None, {}, {"skip_prepare_dataset": False}),
    ),
    "packing_strategy": Refused(
        "rows are packed whole, the best fitting first: that is `bfd`", harmless=("bfd", None)
    ),
    "eval_packing": Refused("held-out rows are scored one by one, with the same loss as in packs"),
    "pad_to_multiple_of": Refused(
        "rows are padded to the longest of their batch, or not at all", harmless=(None, "auto", 1)
    ),
    "metric_for_best_model": Refused(
        "the best adapter is that of the lowest held-out loss", harmless=(None, "loss", "eval_loss")
    ),
    "greater_is_better": Refused("the best adapter is that of the lowest held-out loss"),
    "save_only_model": Refused(
        "a run is continued from its optimizer's state too; set save_total_limit: 1 for room"
    ),
    "enable_jit_checkpoint": Refused(
        "a run that is told to stop (SIGTERM, Ctrl-C) writes a checkpoint by itself"
    ),
    "auto_find_batch_size": Refused("the plan counts the steps ahead; set per_device_train_batch_size"),
    "resume_from_checkpoint": Refused(
        "--resume, or finetune(resume=True), continues from the last whole checkpoint"
    ),
    "debug": Refused(
        "a loss or gradient that is no number stops the run by itself; phlora.SFTTrainer takes it in a script",
        harmless=(None, "", []),
    ),
    "use_cpu": Refused("say it in the `model` section: device: cpu"),
    "bf16_full_eval": Refused("the held-out loss is taken in the precision of the training; see model.dtype"),
    "fp16_full_eval": Refused("the held-out loss is taken in the precision of the training; see model.dtype"),
    "label_names": Refused("which tokens train is decided by data.train_on"),
    "length_column_name": Refused("the lengths of the rows are known", harmless=("length", None)),
    "include_num_input_tokens_seen": Refused(
        "events.jsonl counts the tokens of the rows as num_tokens", harmless=("no", False, None)
    ),
    "fsdp": _SEVERAL,
    "fsdp_config": _SEVERAL,
    "deepspeed": _SEVERAL,
    "parallelism_config": _SEVERAL,
}
