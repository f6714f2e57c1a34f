"""What other libraries' arguments and names were called, and what they are called now: one table for everybody.

`finetune`, the drop-in (`phlora.SFTTrainer` and the configurations beside it) and `phlora migrate` read it, and the
page docs/scripts.md is made of it. It holds words alone, and needs no library to be read; tests walk the installed TRL,
transformers and PEFT, and hold every entry against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phlora.errors import did_you_mean, shown

Fate = Literal["renamed", "moved", "idle", "gone"]

# The callables that have old arguments; SETTINGS are the fields of SFTConfig, with those of TrainingArguments.
SETTINGS, TRAINER, LORA = "SFTConfig", "SFTTrainer", "LoraConfig"
FROM_PRETRAINED, BNB = "from_pretrained", "BitsAndBytesConfig"


@dataclass(frozen=True)
class Old:
    """An argument as older versions called it.

    Attributes:
        name: the old name.
        fate: `renamed`: `new` is its name in the same call; `moved`: it is an argument of `to`, called `new`;
            `idle`: leaving it out changes nothing that is trained; `gone`: it cannot be done as it was meant.
        new: today's name, where there is one.
        to: the callable that takes it now, where that is another one.
        values: old value -> what is said under the new name, where it is not the same; None: leave it out. Of what is
            `gone`: the values that ask for nothing.
        weaker: where both names are given, the new one counts unless it is 0.
        is_share: values from 1 on meant a share, and would be a count under the new name.
        says: what to know, or what to do instead, as a sentence's rest.
        in_a_run: the same for `finetune` and the command line, where something else is to be said there.
    """

    name: str
    fate: Fate
    new: str = ""
    to: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    says: str = ""
    in_a_run: str = ""
    weaker: bool = False
    is_share: bool = False

    def value(self, given: Any) -> Any:
        """What is said under the new name; None where nothing is to be said."""
        try:
            return self.values.get(given, given)
        except TypeError:  # a list or a mapping
            return given

    @property
    def spelled(self) -> str:
        """The new name with the callable that takes it, for a message."""
        return f"{self.to}({self.new}=...)" if self.to else self.new


@dataclass(frozen=True)
class OldImport:
    """A name that is imported from elsewhere now, or not at all.

    Attributes:
        path: the full name, `datasets.load_metric`.
        new: the full name of what takes its place; empty where nothing is called like it.
        same: whether the same arguments do the same.
        says: what to know, or what to do instead.
    """

    path: str
    new: str = ""
    same: bool = True
    says: str = ""


def _renamed(name: str, new: str, **more: Any) -> Old:
    return Old(name, "renamed", new, **more)


def _idle(name: str, says: str, in_a_run: str = "") -> Old:
    return Old(name, "idle", says=says, in_a_run=in_a_run)


def _gone(name: str, says: str, harmless: Iterable[Any] = (None, False), **more: Any) -> Old:
    return Old(name, "gone", says=says, values=dict.fromkeys(harmless), **more)


_NOT_THERE = "transformers no longer has it"
_ON_OFF = {False: None, None: None}
# Meant the default.
_UNSAID = {None: None}
_OWN_TOKENIZER = "the tokenizer is the model's own"

_SETTINGS = (
    _renamed("evaluation_strategy", "eval_strategy"),
    _renamed("max_seq_length", "max_length", values=_UNSAID),
    _renamed("no_cuda", "use_cpu", values=_ON_OFF),
    _renamed("per_gpu_train_batch_size", "per_device_train_batch_size"),
    _renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    # Below 1 `warmup_steps` is a share of all steps.
    _renamed("warmup_ratio", "warmup_steps", weaker=True, is_share=True),
    _renamed("use_liger", "use_liger_kernel"),
    _renamed("push_to_hub_token", "hub_token"),
    _renamed("push_to_hub_model_id", "hub_model_id"),
    _renamed(
        "group_by_length",
        "train_sampling_strategy",
        values={True: "group_by_length", **_ON_OFF},
    ),
    _renamed("adafactor", "optim", values={True: "adafactor", **_ON_OFF}),
    _renamed("include_inputs_for_metrics", "include_for_metrics", values={True: ["inputs"], **_ON_OFF}),
    _renamed("torchdynamo", "torch_compile_backend"),
    Old(
        "processing_class",
        "moved",
        "processing_class",
        TRAINER,
        in_a_run=_OWN_TOKENIZER,
    ),
    Old("tokenizer", "moved", "processing_class", TRAINER, in_a_run=_OWN_TOKENIZER),
    Old("peft_config", "moved", "peft_config", TRAINER, in_a_run="say it in `peft_config`"),
    Old("formatting_func", "moved", "formatting_func", TRAINER, in_a_run="write the rows as they should be"),
    Old(
        "torch_dtype",
        "moved",
        "dtype",
        FROM_PRETRAINED,
        in_a_run="the precision is set by model.dtype",
    ),
    Old("dtype", "moved", "dtype", FROM_PRETRAINED, in_a_run="the precision is set by model.dtype"),
    _idle(
        "overwrite_output_dir",
        "checkpoints of the same steps are replaced, and nothing else is",
        "a run folder is replaced only by overwrite=True or --overwrite",
    ),
    _idle(
        "use_mps_device", "an Apple GPU is used where there is one", "the device is chosen by model.device"
    ),
    _idle(
        "logging_dir",
        "TensorBoard writes into output_dir; the variable TENSORBOARD_LOGGING_DIR names another folder",
        "logs go into the run folder",
    ),
    _idle(
        "save_safetensors",
        "weights are always saved as safetensors",
        "adapters are always saved as safetensors",
    ),
    _idle("dataset_batch_size", "rows are tokenised one by one", "rows are read in one pass"),
    _idle("num_of_sequences", "TRL no longer has it: packs are made of all rows"),
    _idle("chars_per_token", "TRL no longer has it: packs are made of tokens"),
    _idle("infinite", "TRL no longer has it: max_steps says for how long rows are repeated"),
    _idle("include_tokens_per_second", "include_num_input_tokens_seen counts the tokens that were seen"),
    _idle("ray_scope", _NOT_THERE),
    _idle("half_precision_backend", _NOT_THERE),
    _idle("fp16_opt_level", _NOT_THERE),
    _idle("fp16_backend", _NOT_THERE),
    _idle("xpu_backend", "ddp_backend names the backend of every device"),
    _idle("tpu_num_cores", _NOT_THERE),
    _idle("tpu_metrics_debug", _NOT_THERE),
    _idle("past_index", _NOT_THERE),
    _idle("mp_parameters", _NOT_THERE),
    _idle("use_ipex", "torch itself has what it brought"),
    _idle("use_legacy_prediction_loop", _NOT_THERE),
    _idle("jit_mode_eval", f"{_NOT_THERE}; torch_compile=True is what it became"),
    _gone("push_to_hub_organization", "name it in hub_model_id: ORGANIZATION/NAME", (None, "")),
    _gone("dispatch_batches", 'say accelerator_config={"dispatch_batches": ...}', (None,)),
    _gone("split_batches", 'say accelerator_config={"split_batches": ...}'),
    _gone("tp_size", "say it in parallelism_config", (None, 0, 1)),
    _gone("sharded_ddp", "FSDP is what it became: set fsdp and fsdp_config", (None, False, "", ())),
    _gone("fsdp_min_num_params", 'say fsdp_config={"min_num_params": ...}', (None, 0)),
    _gone(
        "fsdp_transformer_layer_cls_to_wrap",
        'say fsdp_config={"transformer_layer_cls_to_wrap": [...]}',
        (None, "", ()),
    ),
)

_TRAINER = (
    _renamed("tokenizer", "processing_class"),
    Old("max_seq_length", "moved", "max_length", SETTINGS, values=_UNSAID),
    Old("dataset_text_field", "moved", "dataset_text_field", SETTINGS, values=_UNSAID),
    Old("packing", "moved", "packing", SETTINGS),
    Old("eval_packing", "moved", "eval_packing", SETTINGS),
    Old("dataset_num_proc", "moved", "dataset_num_proc", SETTINGS),
    Old("dataset_kwargs", "moved", "dataset_kwargs", SETTINGS),
    Old("neftune_noise_alpha", "moved", "neftune_noise_alpha", SETTINGS),
    Old("model_init_kwargs", "moved", "model_init_kwargs", SETTINGS),
    _idle("dataset_batch_size", "rows are tokenised one by one"),
    _idle("num_of_sequences", "TRL no longer has it: packs are made of all rows"),
    _idle("chars_per_token", "TRL no longer has it: packs are made of tokens"),
    _idle("infinite", "TRL no longer has it: max_steps says for how long rows are repeated"),
    _gone(
        "model_init",
        "TRL takes a model, or its name: call the function and pass what it returns",
    ),
)

_LORA = (
    _gone(
        "enable_lora",
        "name the parts in target_modules: q_proj, v_proj are parts of qkv_proj",
        (None,),
    ),
    _idle("merge_weights", "PEFT merges where merge_and_unload is called"),
)

_FROM_PRETRAINED = (
    _renamed("torch_dtype", "dtype"),
    _renamed("use_auth_token", "token"),
    _renamed("use_flash_attention_2", "attn_implementation", values={True: "flash_attention_2", **_ON_OFF}),
    Old("load_in_4bit", "moved", "load_in_4bit", BNB, says="pass it as quantization_config"),
    Old("load_in_8bit", "moved", "load_in_8bit", BNB, says="pass it as quantization_config"),
    _idle("resume_download", "downloads are always continued"),
    _idle("low_cpu_mem_usage", "models are always loaded so"),
)

# The callable -> its old arguments by their names.
ARGUMENTS: Mapping[str, Mapping[str, Old]] = {
    of: {entry.name: entry for entry in entries}
    for of, entries in {
        SETTINGS: _SETTINGS,
        TRAINER: _TRAINER,
        LORA: _LORA,
        FROM_PRETRAINED: _FROM_PRETRAINED,
    }.items()
}

# Setting -> its old values, as they are called now.
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "optim": {"adamw_hf": "adamw_torch"},
    "packing_strategy": {"bfd-requeue": "bfd_split", "ffd": "bfd"},
    "loss_type": {"chunked_nll": "nll"},
}

# Still taken by the installed libraries, which will drop it; what to say instead.
AGING: Mapping[str, Mapping[str, str]] = {
    SETTINGS: {
        "gradient_checkpointing": "activation_checkpointing",
        "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
        "fsdp": "say true, and what the words said in fsdp_config",
        "pad_token": "set tokenizer.pad_token, and pass the tokenizer as processing_class",
        "truncation_mode": "keep_end is dropped: make rows that fit",
        "use_liger_kernel": 'model_init_kwargs={"use_kernels": True}',
        "label_smoothing_factor": "phlora.SFTTrainer keeps it, at no cost",
    },
    TRAINER: {
        "compute_loss_func": "override compute_loss in a subclass",
        "compute_metrics": "override evaluate in a subclass, or measure answers with `phlora evaluate`",
        "preprocess_logits_for_metrics": "as compute_metrics",
    },
}

# Keys of SFTConfig's `dataset_kwargs` that TRL no longer reads, and what it does now.
DATASET_KWARGS: Mapping[str, str] = {
    "add_special_tokens": "the tokenizer adds what it adds to any text",
    "append_concat_token": "rows of a pack are told apart by their positions",
}

IMPORTS: Mapping[str, OldImport] = {
    entry.path: entry
    for entry in (
        OldImport("datasets.load_metric", "evaluate.load"),
        OldImport(
            "transformers.AdamW",
            "torch.optim.AdamW",
            says="its eps and its weight decay have other defaults",
        ),
        OldImport("transformers.optimization.AdamW", "torch.optim.AdamW", says="as transformers.AdamW"),
        OldImport("peft.prepare_model_for_int8_training", "peft.prepare_model_for_kbit_training"),
        OldImport("peft.prepare_model_for_training", "peft.prepare_model_for_kbit_training"),
        OldImport(
            "trl.DataCollatorForCompletionOnlyLM",
            same=False,
            says="give rows `prompt` and `completion`, or `messages` with SFTConfig(assistant_only_loss=True): answers "
            "alone train then, without looking for words",
        ),
        OldImport(
            "trl.trainer.ConstantLengthDataset",
            same=False,
            says="SFTConfig(packing=True) makes packs of rows",
        ),
        OldImport(
            "trl.setup_chat_format",
            "trl.clone_chat_template",
            same=False,
            says="it takes a model to copy from",
        ),
        OldImport(
            "trl.trainer.utils.PeftSavingCallback",
            same=False,
            says="leave it out: checkpoints hold the adapter anyway",
        ),
        OldImport(
            "trl.get_kbit_device_map",
            same=False,
            says="leave device_map out: the trainer takes the model to its device",
        ),
        OldImport("trl.SFTScriptArguments", "trl.ScriptArguments"),
        OldImport("trl.is_xpu_available", "transformers.utils.is_torch_xpu_available"),
        OldImport("trl.is_npu_available", "transformers.utils.is_torch_npu_available"),
        OldImport("trl.is_peft_available", "transformers.utils.is_peft_available"),
        OldImport(
            "transformers.utils.is_flash_attn_available", "transformers.utils.is_flash_attn_2_available"
        ),
        OldImport(
            "transformers.LineByLineTextDataset",
            "datasets.load_dataset",
            same=False,
            says='load_dataset("text", data_files=...)',
        ),
        OldImport(
            "transformers.TextDataset",
            "datasets.load_dataset",
            same=False,
            says='load_dataset("text", data_files=...)',
        ),
        OldImport("transformers.AutoModelWithLMHead", "transformers.AutoModelForCausalLM"),
    )
}


@dataclass(frozen=True)
class Today:
    """The arguments of a call by today's names.

    Attributes:
        values: the arguments of this call.
        elsewhere: the callable that takes them now -> arguments that have moved there.
        notes: what was understood, one sentence for each old name.
        problems: what cannot be done as it was meant, or is not known; with what to do instead.
    """

    values: dict[str, Any]
    elsewhere: dict[str, dict[str, Any]]
    notes: list[str]
    problems: list[str]


def by_todays_names(
    of: str, given: Mapping[str, Any], *, known: Iterable[str] | None, where: str = "", in_a_run: bool = False
) -> Today:
    """The arguments of a call, old names and values among them, by the names that the installed versions have.

    Args:
        of: the callable, a key of `ARGUMENTS`.
        known: the names that it takes now; they are never translated. None: whatever is not in the table.
        where: stands before every name in a message.
        in_a_run: for `finetune`, where what has moved to another call says nothing.
    """
    olds = ARGUMENTS.get(of, {})
    known = {name for name in given if name not in olds} if known is None else set(known)
    today = Today({}, {}, [], [])
    for name, value in given.items():
        if name in known:
            today.values[name] = _todays_value(name, value, where, today.notes)
    for name, value in given.items():
        if name in known:
            continue
        old = olds.get(name)
        if old is None:
            nearest = did_you_mean(str(name), {*known, *olds})
            today.problems.append(f"{where}{shown(name)} is not known: {nearest}")
        elif old.fate == "renamed":
            _rename(old, value, where, today)
        elif old.fate == "moved" and not in_a_run:
            # What meant the default is said by saying nothing.
            if not (value is None and None in old.values):
                moved = today.elsewhere.setdefault(old.to, {})
                moved[old.new] = _todays_value(old.new, value, where, today.notes)
            today.notes.append(f"{where}{name} is now an argument of {old.to}: {old.spelled}{_and(old.says)}")
        elif old.fate == "gone" and not _asks_for_nothing(old, value):
            today.problems.append(f"{where}{name} is gone: {old.says}")
        else:
            says = (old.in_a_run if in_a_run else "") or old.says
            today.notes.append(f"{where}{name} has no effect: {says}")
    return today


def one_message(problems: Iterable[str]) -> str:
    """All problems of a call as one sentence, or as a list of them."""
    problems = list(problems)
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} arguments need a change:" + "".join(f"\n  - {problem}" for problem in problems)


def _rename(old: Old, value: Any, where: str, today: Today) -> None:
    if old.is_share and isinstance(value, int | float) and value >= 1:
        today.problems.append(
            f"{where}{old.name}: {value} cannot be said as {old.new}, where numbers from 1 on count steps: "
            f"give {old.new} a number below 1, or of steps"
        )
        return
    new = old.value(value)
    if old.new in today.values:
        other = today.values[old.new]
        if old.weaker and other:
            today.notes.append(f"{where}{old.name} gives way to {old.new}, its name now")
            return
        if not old.weaker and new is not None and other != new:
            today.problems.append(
                f"{where}{old.name} is now called {old.new}, and both are given: leave out {old.name}"
            )
            return
    spelled = f": {new}" if old.values and new is not None else ""
    today.notes.append(f"{where}{old.name} is now called {old.new}{spelled}{_and(old.says)}")
    if new is not None:
        today.values[old.new] = _todays_value(old.new, new, where, today.notes)


def _todays_value(name: str, value: Any, where: str, notes: list[str]) -> Any:
    old = VALUES.get(name, {})
    if not isinstance(value, str) or value not in old:
        return value
    notes.append(f"{where}{name}: {value} is now called {old[value]}")
    return old[value]


def _asks_for_nothing(old: Old, value: Any) -> bool:
    value = tuple(value) if isinstance(value, list) else value
    return any(type(value) is type(harmless) and value == harmless for harmless in old.values)


def _and(words: str) -> str:
    return f"; {words}" if words else ""
