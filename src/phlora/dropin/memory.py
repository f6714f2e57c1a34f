"""Gradient checkpointing where a script says nothing of it: decided by memory, as `activation_memory: auto` in a run.

TRL's `SFTConfig` has it on by default, so that whoever writes nothing pays for computing the layers again, a quarter to
a third of each step, with memory to spare too. The values and the gradients are the same to the bit either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from phlora.data.table import TableBuilder, TokenizedRow
from phlora.dropin.obstacles import has_own_loss, own_loss_of, unreadable_rows
from phlora.errors import PhloraError
from phlora.forecast.blueprint import NotForecastError
from phlora.forecast.forecast import Circumstances, Evaluation, forecast_run
from phlora.forecast.memory import weight_bytes
from phlora.forecast.passes import Layout
from phlora.measure import free_memory, resident_bytes
from phlora.train.drawn import draw_given
from phlora.train.field_values import word_of

_NAMES = tuple(
    f"{kind}_checkpointing{rest}" for kind in ("gradient", "activation") for rest in ("", "_kwargs")
)
_WORDS = {
    "keep": "gradient checkpointing off, which SFTConfig has on where nothing is said",
    "recompute_mlp": "MLPs alone computed again, in the place of gradient checkpointing",
    "recompute": "gradient checkpointing on",
}


@dataclass(frozen=True)
class Activations:
    """What layers keep for backward.

    Attributes:
        level: of `models.activation_memory`.
        reason: why, as a sentence.
    """

    level: str
    reason: str

    def __str__(self) -> str:
        return f"{_WORDS[self.level]} ({self.reason})"


def is_said(args: Any, model: nn.Module) -> bool:
    """Whether the script decides about gradient checkpointing, as far as can be told.

    It is on by nobody's words where the script wrote settings down, none of them about it. TRL's own `SFTConfig`, and
    one that a parser has filled, do not tell what was written.
    """
    given: frozenset[str] = getattr(args, "given", frozenset())
    is_default = bool(given) and given.isdisjoint(_NAMES) and bool(args.gradient_checkpointing)
    # Not the model's own property, which has another name in each version of transformers.
    return not is_default or any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def decide(
    trainer: Any, sequences: Callable[[], Sequence[Sequence[TokenizedRow]]], *, shared: bool
) -> Activations:
    """What costs least time of what fits into the memory that is free.

    Args:
        sequences: returns some of the training rows, the longest among them.
        shared: whether rows share their common starts.
    """
    why_not = unknown_step(trainer)
    if why_not is not None:
        return Activations("recompute", f"as in SFTConfig: {why_not}")
    try:
        forecast = forecast_run(_circumstances(trainer, sequences(), shared=shared))
    except (NotForecastError, PhloraError) as reason:
        return Activations("recompute", f"as in SFTConfig: memory is not forecast, {reason}")
    return Activations(forecast.level, forecast.reason)


def unknown_step(trainer: Any) -> str | None:
    """Why the memory of a trainer's step is not forecast, as a sentence; None: it is."""
    args, model = trainer.args, trainer.model
    if not isinstance(model, PeftModel):
        return "only LoRA of a PeftModel is forecast"
    if len(model.peft_config) != 1 or not isinstance(model.active_peft_config, LoraConfig):
        return "only a single adapter of LoRA is forecast"
    if has_own_loss(trainer):
        return "the loss is the script's own"
    if args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "several processes are not forecast"
    if args.torch_compile:
        return "torch_compile plans memory itself"
    return own_loss_of(trainer) or unreadable_rows(trainer.train_dataset)


def _circumstances(
    trainer: Any, sequences: Sequence[Sequence[TokenizedRow]], *, shared: bool
) -> Circumstances:
    args = trainer.args
    drawn = draw_given(trainer.model.get_base_model(), _plain(trainer.model), device=args.device)
    held = weight_bytes(drawn.blueprint, drawn.storage)
    return Circumstances(
        blueprint=drawn.blueprint,
        storage=drawn.storage,
        device=args.device,
        sequences=sequences,
        held_out=TableBuilder().table(),
        layout=Layout(
            batch_size=args.per_device_train_batch_size,
            accumulated=args.gradient_accumulation_steps,
            shared=shared,
            packed=bool(args.packing or trainer.padding_free),
            pad_token_id=trainer._tokenizer.pad_token_id or 0,
            seed=args.seed,
        ),
        steps=1,
        free=free_memory(args.device).plus(held),
        resident=max(0, resident_bytes() - held),
        speed=trainer.speed,
        optimizer=word_of(args.optim),
        evaluation=Evaluation(enabled=False),
    )


def _plain(model: PeftModel) -> LoraConfig:
    """The settings of an adapter as for a fresh one, whatever it was started or loaded with."""
    given = model.active_peft_config
    fields = {
        field.name: getattr(given, field.name) for field in dataclasses.fields(LoraConfig) if field.init
    }
    return LoraConfig(**{**fields, "init_lora_weights": True, "inference_mode": False})


@contextmanager
def checkpointed(args: Any, level: str) -> Iterator[None]:
    """Within it the trainer makes layers be computed again as a whole, or not, as `level` says."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    before = {name: getattr(args, name) for name in names}
    # Not as a script sets them, which would be its word about them.
    vars(args).update(dict.fromkeys(names, level == "recompute"))
    try:
        yield
    finally:
        vars(args).update(before)
