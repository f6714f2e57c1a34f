"""`phlora.SFTTrainer`: what a script gets that changed one import.

The loss is that of `phlora.train.trainer`; this class is about the way there: arguments by their old names, targets
that PEFT would miss, rows looked at as they will be trained, and the fastest exact layout for them.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import set_seed
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer as TrlTrainer

from phlora.adapters.attach import attach
from phlora.config import Speed
from phlora.dropin import layout
from phlora.dropin.config import SFTConfig, settings_of
from phlora.dropin.targets import config_with_blocks, require_whole
from phlora.errors import ConfigError
from phlora.names import LORA, SETTINGS, TRAINER, by_todays_names, one_message
from phlora.train import trainer as exact

_log = logging.getLogger(__name__)
_ARGUMENTS = [name for name in inspect.signature(TrlTrainer.__init__).parameters if name != "self"]


class SFTTrainer(exact.SFTTrainer):
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
        speed: `auto`: the fastest exact way for the data; `reference`: batches as TRL makes them.
        loraplus_lr_ratio: the learning rate of every `lora_B`, as a multiple of that of all else (LoRA+).
        z_loss: weight of the squared log-normaliser of each trained token; the held-out loss is without it. The other
            arguments are those of `trl.SFTTrainer`, now or earlier.

    Raises:
        ConfigError: arguments that are not known, gone for good or contradict each other; names in `target_modules`
            that an adapter made by PEFT is missing; `loraplus_lr_ratio` beside an optimizer of one's own, or for a
            model without LoRA; `z_loss` beside a loss that is not this trainer's.
        NonFiniteError: from `train`, at the first loss or gradient that is NaN or infinite.
    """

    def __init__(
        self,
        *args: Any,
        speed: Speed = "auto",
        loraplus_lr_ratio: float | None = None,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        call = arguments_of(args, kwargs)
        call = with_adapter(call)
        self.speed = speed
        super().__init__(loraplus_lr_ratio=loraplus_lr_ratio, z_loss=z_loss, **call)
        layout.choose(self)


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
        _log.warning("%s", note)
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
        _log.warning("%s", note)
    return LoraConfig(**today.values)


def with_adapter(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with its adapter on the model, where PEFT itself would leave out what is asked for.

    Raises:
        ConfigError: an adapter that PEFT has made lacks what its configuration names.
    """
    model, config = call.get("model"), call.get("peft_config")
    if isinstance(model, PeftModel):
        require_whole(model)
        return call
    if not isinstance(model, nn.Module):
        return call
    with_blocks = config_with_blocks(model, config)
    if with_blocks is None:
        return call
    # As TRL does before PEFT makes an adapter.
    set_seed(call["args"].seed)
    return {**call, "model": attach(model, with_blocks).model, "peft_config": None}
