"""`phlora.SFTTrainer`: what a script gets that changed one import.

The loss is that of `phlora.train.trainer`; this class is about the way there: arguments by their old names, targets
that PEFT would miss, rows looked at as they will be trained, and the fastest exact layout for them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import set_seed
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer as TrlTrainer

from phlora.adapters.attach import attach, summarize
from phlora.config import Speed
from phlora.dropin.columns import Rows, columns_of
from phlora.dropin.config import SFTConfig, settings_of
from phlora.dropin.hub import name_base
from phlora.dropin.hub import one_message as one_hub_message
from phlora.dropin.interruption import stopped_with_checkpoint
from phlora.dropin.kept_blocks import keep_blocks
from phlora.dropin.layout import LaidOutTrainer
from phlora.dropin.loading import loaded, with_tokenizer
from phlora.dropin.masks import lacks_markers, with_answers_marked
from phlora.dropin.obstacles import has_own_loss, own_held_out_loss
from phlora.dropin.overrides import let_run, require_whole_step, tell_if_not_passed_on
from phlora.dropin.preparation import (
    look_at,
    look_at_collator,
    ready,
    template_errors,
    with_trained_columns,
)
from phlora.dropin.rows import RowProblems
from phlora.dropin.targets import config_with_blocks, holds_adapters, require_whole
from phlora.dropin.tell import tell, warn
from phlora.dropin.weights import tell_unused_weights
from phlora.errors import ConfigError, shown
from phlora.models.quantization import use_operands
from phlora.names import LORA, SETTINGS, TRAINER, by_todays_names, one_message
from phlora.others import without_known_messages, without_known_warnings

_ARGUMENTS = [name for name in inspect.signature(TrlTrainer.__init__).parameters if name != "self"]


class SFTTrainer(LaidOutTrainer):
    """A drop-in for `trl.SFTTrainer`: same arguments, of any version of it, same results to rounding, less work.

    - Arguments by their old names are taken, each with a line in the log that says the new one; what is gone for good
      is one error that lists all of it.
    - `q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj` are adapted where the model stores them fused, and saved
      as a plain adapter of PEFT.
    - The loss of an optimizer step is

          sum over its trained tokens of weight * cross-entropy / sum over its trained tokens of weight,

      whatever the number of micro-batches; the head runs on trained positions only. Where this is not exactly the
      model's own loss, and where all logits are needed, TRL's is taken, and the log says so once.

    Batches hold `input_ids`, `labels` (-100 where not trained) and optionally `attention_mask`, `position_ids` and
    `loss_weights` (float, the shape of `labels`). A forward hook on the model finds `models.lm_head.TrainedTokens`.

    Args:
        row_problems: `refuse`: rows that would be trained as something else than what they say are an error; `warn`:
            they are told and trained.
        speed: `auto`: rows share their common starts, and layers are fused, wherever that is exact, while the trainer
            computes (one line in the log says what was chosen), with other masks of `lora_dropout` than TRL draws;
            `reference`: neither, and the same masks.
        loraplus_lr_ratio: the learning rate of every `lora_B`, as a multiple of that of all else (LoRA+).
        z_loss: weight of the squared log-normaliser of each trained token; the held-out loss is without it. The other
            arguments are those of `trl.SFTTrainer`, now or earlier.

    Raises:
        ConfigError: arguments that are not known, gone for good or contradict each other; names in `target_modules`
            that an adapter made by PEFT is missing; `loraplus_lr_ratio` beside an optimizer of one's own, or for a
            model without LoRA; `z_loss` beside a loss that is not this trainer's.
        DataError: rows of which nothing trains, or that would be trained as something else than what they say.
        NonFiniteError: from `train`, at the first loss or gradient that is NaN or infinite.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        let_run(cls)

    def __init__(
        self,
        *args: Any,
        row_problems: RowProblems = "refuse",
        speed: Speed = "auto",
        loraplus_lr_ratio: float | None = None,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if row_problems not in get_args(RowProblems):
            raise ConfigError(
                f"{shown(row_problems)} is not known",
                where="row_problems",
                expected=f"one of {', '.join(get_args(RowProblems))}",
            )
        require_whole_step(type(self))
        call = with_trained_columns(with_adapter(with_tokenizer(loaded(arguments_of(args, kwargs)))))
        self.row_problems = row_problems
        self.items_for_super: Any = None
        self.told_of: set[Any] = set()
        settings: TrlConfig = call["args"]
        self._marks_answers = settings.assistant_only_loss and lacks_markers(call.get("processing_class"))
        tell_unused_weights(call, heeds_turns=self._marks_answers)
        if self._marks_answers:
            call["args"] = copy.copy(settings)
            call["args"].assistant_only_loss = False
        with without_known_warnings():
            super().__init__(speed=speed, loraplus_lr_ratio=loraplus_lr_ratio, z_loss=z_loss, **call)
        self.args.assistant_only_loss = settings.assistant_only_loss
        tell(what_trains(self.model))
        look_at_collator(self)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: TrlConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """As TRL does, with a look at the rows between its tokens and its cuts."""
        if self._is_vlm or not isinstance(dataset, Rows):
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        rows = ready(self, dataset, args, formatting_func, dataset_name)
        if self._marks_answers and "input_ids" not in columns_of(rows):
            rows = with_answers_marked(rows, self._tokenizer, name=dataset_name)
        whole = copy.copy(args)
        # Cut, packed and shuffled once, below.
        whole.max_length, whole.shuffle_dataset = None, False
        with template_errors(rows, dataset_name):
            prepared = super()._prepare_dataset(rows, processing_class, whole, False, None, dataset_name)
        look_at(self, prepared, args, packing, dataset_name)
        return super()._prepare_dataset(prepared, processing_class, args, packing, None, dataset_name)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As the trainer's; within a loss of a subclass that does not know the step, normalised by it all the same."""
        items = self.items_for_super if num_items_in_batch is None else num_items_in_batch
        if items is None and has_own_loss(self):
            tell_if_not_passed_on(self)
        return super().compute_loss(model, inputs, return_outputs, items)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; where the script computes the loss of a batch itself, their mean, as in TRL."""
        own = own_held_out_loss(self)
        if own is not None and own not in self.told_of:
            self.told_of.add(own)
            tell(f"{own} is the script's own: held-out losses are its mean over batches, as in TRL")
        return super().evaluation_loop(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the library's.

        Raises:
            NetworkError: the hub cannot be reached or refuses; what was trained is kept.
        """
        folder = self.args.output_dir
        is_trained = bool(getattr(self, "state", None) and self.state.global_step)
        with one_hub_message(self.args.hub_model_id or Path(folder).name, folder, is_trained=is_trained):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's.

        Raises:
            NetworkError: the hub cannot be reached or refuses; what was trained is kept.
        """
        folder = self.args.output_dir
        with one_hub_message(self.args.hub_model_id or Path(folder).name, folder, is_trained=True):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            base = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
            name_base(Path(self.args.output_dir) / "README.md", Path(base).name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's; an interruption ends it after the step, with a checkpoint where the script has any.

        Raises:
            KeyboardInterrupt: it was interrupted.
        """
        with without_known_messages(), stopped_with_checkpoint(self):
            return super().train(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with without_known_messages():
            super().save_model(*args, **kwargs)


def what_trains(model: nn.Module) -> str:
    """What of a model trains, in a few lines."""
    if isinstance(model, PeftModel):
        return "What will be trained:\n" + summarize(model).render()
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    trained, total = sum(trains.values()), sum(p.numel() for p in model.parameters())
    if holds_adapters(model):
        layers = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
        # What a layer held before its adapter is its base_layer.
        own = sum(
            size
            for name, size in trains.items()
            if ".base_layer." not in name and any(name.startswith(f"{layer}.") for layer in layers)
        )
        return (
            f"What will be trained: {trained:,} of {total:,} parameters, {own:,} of them in adapters of the model's "
            f"own layers (no PeftModel){'' if own == trained else '; the others are its weights'}"
        )
    if trained < total:
        return (
            f"No peft_config: {trained:,} of {total:,} parameters are trained, those that require gradients"
        )
    return f"No peft_config: all {trained:,} parameters are trained (full fine-tuning); peft_config trains an adapter"


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `trl.SFTTrainer` by today's names, with a configuration of TRL's in `args`.

    Raises:
        ConfigError: all that is wrong with them.
    """
    if len(args) > len(_ARGUMENTS):
        raise TypeError(
            f"SFTTrainer takes {len(_ARGUMENTS)} positional arguments, and {len(args)} were given"
        )
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    today = by_todays_names(TRAINER, given, known=_ARGUMENTS)
    if today.problems:
        raise ConfigError(one_message(today.problems), where="SFTTrainer")
    for note in today.notes:
        warn(note)
    call = today.values
    call["args"] = _configured(call, today.elsewhere.get(SETTINGS, {}))
    if isinstance(call.get("peft_config"), Mapping):
        call["peft_config"] = _lora_config(call["peft_config"])
    return call


def _configured(call: Mapping[str, Any], moved: Mapping[str, Any]) -> TrlConfig:
    """The configuration of a call, with the settings that were given to the trainer."""
    config = call.get("args")
    if config is None:
        name = call.get("model")
        name = name if isinstance(name, str) else getattr(getattr(name, "config", None), "_name_or_path", "")
        config = SFTConfig(f"{str(name).rstrip('/').split('/')[-1]}-SFT")
    elif isinstance(config, transformers.TrainingArguments) and not isinstance(config, TrlConfig):
        # `to_dict` hides the token.
        config = SFTConfig(**{**config.to_dict(), "hub_token": config.hub_token})
    if not moved:
        return config
    config = copy.copy(config)
    for name, value in settings_of(TrlConfig, (), dict(moved)).items():
        if name in moved:
            setattr(config, name, value)
    config.given = frozenset({*getattr(config, "given", ()), *moved})
    return config


def _lora_config(values: Mapping[str, Any]) -> LoraConfig:
    known = inspect.signature(LoraConfig).parameters
    today = by_todays_names(LORA, values, known=known, where="peft_config.")
    if today.problems:
        raise ConfigError(one_message(today.problems))
    for note in today.notes:
        warn(note)
    return LoraConfig(**today.values)


def with_adapter(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with its adapter on the model, where PEFT itself would leave out what is asked for.

    Raises:
        ConfigError: an adapter that PEFT has made lacks what its configuration names.
    """
    model, config = call.get("model"), call.get("peft_config")
    if not isinstance(model, nn.Module):
        return call
    if not isinstance(model, PeftModel):
        # bitsandbytes' own layers pack their weights anew at the first pass without gradients on a CPU.
        use_operands(model)
    if isinstance(model, PeftModel) or (config is None and holds_adapters(model)):
        require_whole(model)
        keep_blocks(model, has_optimizer=(call.get("optimizers") or (None,))[0] is not None)
        return call
    with_blocks = config_with_blocks(model, config)
    if with_blocks is None:
        return call
    # As TRL does before PEFT makes an adapter.
    set_seed(call["args"].seed)
    return {**call, "model": attach(model, with_blocks).model, "peft_config": None}
