"""The table of old and new names is true of the installed TRL, transformers and PEFT."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import datasets
import peft
import pytest
import transformers
import trl
from transformers.training_args import OptimizerNames
from trl.trainer import base_config, sft_config, sft_trainer

from phlora.names import (
    AGING,
    ARGUMENTS,
    BNB,
    DATASET_KWARGS,
    FROM_PRETRAINED,
    IMPORTS,
    LORA,
    SETTINGS,
    TRAINER,
    VALUES,
    by_todays_names,
    one_message,
)

INSTALLED = {
    SETTINGS: {field.name for field in dataclasses.fields(trl.SFTConfig)},
    TRAINER: set(inspect.signature(trl.SFTTrainer.__init__).parameters),
    LORA: {field.name for field in dataclasses.fields(peft.LoraConfig)},
    BNB: set(inspect.signature(transformers.BitsAndBytesConfig).parameters),
}
# Fields of transformers.TrainingArguments 4.36 to 4.57 and of trl.SFTConfig 0.9 to 0.24, and what else TRL's trainer
# took from 0.4 on.
EARLIER = {
    SETTINGS: """
        output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy eval_strategy
        prediction_loss_only per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size
        per_gpu_eval_batch_size gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps
        learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
        lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps log_level log_level_replica log_on_each_node
        logging_dir logging_strategy logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps
        save_total_limit save_safetensors save_on_each_node save_only_model restore_callback_states_from_checkpoint
        no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level
        half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores
        tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers dataloader_prefetch_factor
        past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end
        metric_for_best_model greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config
        fsdp_transformer_layer_cls_to_wrap accelerator_config deepspeed label_smoothing_factor optim optim_args
        adafactor group_by_length length_column_name report_to ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics
        use_legacy_prediction_loop push_to_hub resume_from_checkpoint hub_model_id hub_strategy hub_token
        hub_private_repo hub_always_push hub_revision gradient_checkpointing gradient_checkpointing_kwargs
        include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend push_to_hub_model_id
        push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size full_determinism torchdynamo
        ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode dispatch_batches split_batches
        include_tokens_per_second include_num_input_tokens_seen neftune_noise_alpha optim_target_modules
        batch_eval_metrics eval_on_start use_liger_kernel liger_kernel_config eval_use_gather_object
        average_tokens_across_devices parallelism_config tp_size sharded_ddp xpu_backend
        dataset_text_field packing max_seq_length dataset_num_proc dataset_batch_size model_init_kwargs
        dataset_kwargs eval_packing num_of_sequences chars_per_token use_liger max_length padding_free eos_token
        pad_token pad_to_multiple_of completion_only_loss assistant_only_loss loss_type activation_offloading
        chat_template_path packing_strategy""".split(),
    TRAINER: """
        model args data_collator train_dataset eval_dataset processing_class tokenizer model_init compute_loss_func
        compute_metrics callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics peft_config
        formatting_func dataset_text_field packing max_seq_length infinite num_of_sequences chars_per_token
        dataset_num_proc dataset_batch_size neftune_noise_alpha model_init_kwargs dataset_kwargs
        eval_packing""".split(),
}


@pytest.mark.parametrize("of", EARLIER)
def test_every_argument_of_earlier_versions_is_there_or_in_the_table(of: str) -> None:
    assert {name for name in EARLIER[of] if name not in INSTALLED[of]} <= ARGUMENTS[of].keys()


@pytest.mark.parametrize(
    ("of", "name"),
    [(of, name) for of, olds in ARGUMENTS.items() for name in olds],
    ids=lambda part: str(part),
)
def test_what_is_old_is_gone_and_what_is_new_is_there(of: str, name: str) -> None:
    old = ARGUMENTS[of][name]
    assert name not in INSTALLED.get(of, ())
    if old.fate in ("renamed", "moved"):
        assert old.new
        # `from_pretrained` takes what the model's class takes.
        if (old.to or of) != FROM_PRETRAINED:
            assert old.new in INSTALLED[old.to or of]
    else:
        assert old.says and not old.new


def test_old_values_are_refused_by_the_installed_versions_or_announced_as_old() -> None:
    words = {member.value for member in OptimizerNames}
    for old, new in VALUES["optim"].items():
        assert old not in words and new in words
    known = {
        name: set(next(f for f in dataclasses.fields(trl.SFTConfig) if f.name == name).metadata["choices"])
        for name in ("packing_strategy", "loss_type")
    }
    announced = inspect.getsource(sft_config)
    for name, words in known.items():
        for old, new in VALUES[name].items():
            assert new in words
            assert old not in words or f"`{name}='{old}'` is deprecated" in announced


def test_whatever_the_installed_versions_call_deprecated_is_in_the_table() -> None:
    text = "".join(map(inspect.getsource, (sft_config, base_config, sft_trainer, transformers.training_args)))
    text = re.sub(r'"\s*\n\s*[f]?"', "", text)
    names = INSTALLED[SETTINGS] | INSTALLED[TRAINER]
    called = set(re.findall(r"`(\w+)(?:=[^`]*)?`[^`.\n]*(?:is|are) deprecated", text))
    called |= {old for old in names if re.search(rf"^\s+{old}:? .*\n\s+Deprecated alias", text, re.MULTILINE)}
    called |= {
        field.name
        for field in dataclasses.fields(trl.SFTConfig)
        if "deprecated" in str(field.metadata.get("help", "")).lower()
    }
    # torch's launcher sets it, and nobody writes it down.
    called -= {"local_rank"}
    told = {name for names in AGING.values() for name in names} | {*VALUES, *ARGUMENTS[SETTINGS]}
    assert called & names - told == set()
    assert {"gradient_checkpointing", "pad_token", "use_liger_kernel"} <= called
    for of, aging in AGING.items():
        assert aging.keys() <= INSTALLED[of]


def test_dataset_kwargs_that_are_still_read_are_not_called_old() -> None:
    told = next(f for f in dataclasses.fields(trl.SFTConfig) if f.name == "dataset_kwargs").metadata["help"]
    assert (
        "The only supported key is `skip_prepare_dataset`" in told
        and "skip_prepare_dataset" not in DATASET_KWARGS
    )
    read = set(re.findall(r"dataset_kwargs(?:\.get\(|\[)\"(\w+)", inspect.getsource(sft_trainer)))
    assert read == {"skip_prepare_dataset"}


@pytest.mark.parametrize("path", IMPORTS)
def test_imports_are_gone_and_what_takes_their_place_is_there(path: str) -> None:
    entry = IMPORTS[path]
    assert not is_there(path)
    # evaluate is a package of its own.
    if entry.new and not entry.new.startswith("evaluate."):
        assert is_there(entry.new)
    assert entry.new or entry.says


def is_there(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


# ------------------------------------------------------------------------------------------------ a call


def today(of: str = SETTINGS, **given: Any) -> Any:
    return by_todays_names(of, given, known=INSTALLED[of])


def test_a_renamed_argument_is_said_by_its_new_name() -> None:
    found = today(evaluation_strategy="epoch", learning_rate=1e-4)
    assert found.values == {"learning_rate": 1e-4, "eval_strategy": "epoch"} and not found.problems
    assert found.notes == ["evaluation_strategy is now called eval_strategy"]


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1, "warmup_steps": 50}, {"warmup_steps": 50}),
        ({"warmup_steps": 50, "warmup_ratio": 0.1}, {"warmup_steps": 50}),
        ({"evaluation_strategy": "no", "eval_strategy": "no"}, {"eval_strategy": "no"}),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"save_safetensors": False}, {}),
        ({"dispatch_batches": None}, {}),
        ({"max_seq_length": None}, {}),
        ({"no_cuda": False, "use_cpu": True}, {"use_cpu": True}),
    ],
    ids=str,
)
def test_values_mean_what_they_meant(given: dict[str, Any], values: dict[str, Any]) -> None:
    found = today(**given)
    assert found.values == values and not found.problems


def test_all_that_cannot_be_done_is_said_at_once() -> None:
    found = today(
        evaluation_strategy="no",
        eval_strategy="epoch",
        warmup_ratio=1.0,
        fsdp_min_num_params=100,
        learning_rat=1e-4,
        push_to_hub_organization="us",
    )
    message = one_message(found.problems)
    assert message.startswith("5 arguments need a change:")
    for word in (
        "both are given",
        "a number below 1",
        'fsdp_config={"min_num_params"',
        "did you mean `learning_rate`",
        "hub_model_id",
    ):
        assert word in message


def test_what_has_moved_is_kept_for_the_call_that_takes_it() -> None:
    assert today(TRAINER, max_seq_length=None, dataset_text_field=None).elsewhere == {}
    found = today(TRAINER, max_seq_length=128, packing=True, tokenizer="x", infinite=True)
    assert found.values == {"processing_class": "x"}
    assert found.elsewhere == {SETTINGS: {"max_length": 128, "packing": True}}
    assert any("infinite has no effect" in note for note in found.notes)


def test_unknown_arguments_pass_where_anything_may_be_an_argument() -> None:
    found = by_todays_names(FROM_PRETRAINED, {"torch_dtype": "auto", "foo": 1}, known=None)
    assert found.values == {"foo": 1, "dtype": "auto"} and not found.problems


def test_the_table_speaks_of_datasets_that_are_installed() -> None:
    assert not hasattr(datasets, "load_metric")
