"""LoRA+: every B of an adapter learns at a multiple of the learning rate, everything else at the learning rate.

B starts at zero and meets large activations, A the other way round; with one rate for both, the one that suits A
leaves B behind in wide models. Source: LoRA+ (Hayou et al. 2024), section 4: a ratio of 2 to 16, larger where the task
is far from the base.

Whatever optimizer was chosen, with its weight decay, keeps its groups, and the B of each become a group of their own.
PEFT 0.21's `create_loraplus_optimizer` does otherwise: it takes biases and magnitudes of DoRA along, trains embeddings
at a rate of 1e-6, and knows nothing of the trainer's weight decay.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from phlora.errors import ConfigError, shown
from phlora.train.field_values import WHERE, word_of

# In `peft_config`, beside the adapter that it is about; PEFT keeps it out of `LoraConfig`.
LORAPLUS = "loraplus_lr_ratio"
# What the many makers of optimizers and schedules raise about their settings.
_CANNOT_MAKE = (
    *(ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, ImportError),
)
# Optimizers that project gradients, and look at the model for it.
_PROJECT_GRADIENTS = ("galore", "apollo")
_GIVEN_TO_SCHEDULES = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")


def take_loraplus(peft_config: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """`peft_config` without what is for the optimizer, and the ratio of LoRA+; None: one rate for all.

    Raises:
        ConfigError: the ratio is no number above 0.
    """
    adapter = {key: value for key, value in peft_config.items() if key != LORAPLUS}
    ratio = peft_config.get(LORAPLUS)
    if ratio is None:
        return adapter, None
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < math.inf:
        raise ConfigError(
            f"{shown(ratio)} was given",
            where=f"peft_config.{LORAPLUS}",
            expected="a number above 0: the learning rate of lora_B, as a multiple of learning_rate",
        )
    return adapter, float(ratio)


def is_lora_B(name: str) -> bool:
    """Whether a parameter is a B: of a linear layer, of a row block, of an embedding."""
    return ".lora_B." in name or ".lora_embedding_B." in name


def raise_rate_of_B(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Give the B of every group a group with `ratio` times its learning rate, in place, behind all others.

    For an optimizer that has made no step and has no scheduler yet. A scheduler scales every group from its own rate,
    and logs the first, which is that of the A.

    Raises:
        ConfigError: the model has no B.
    """
    ups = {id(parameter) for name, parameter in model.named_parameters() if is_lora_B(name)}
    if not ups:
        raise ConfigError(
            "The model has no lora_B", where="loraplus_lr_ratio", expected="a model with a LoRA adapter"
        )
    for group in list(optimizer.param_groups):
        raised = [parameter for parameter in group["params"] if id(parameter) in ups]
        if raised:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ups]
            optimizer.add_param_group({**group, "params": raised, "lr": ratio * group["lr"]})


def check_optimizer(args: TrainingArguments) -> tuple[str, ...]:
    """Make the optimizer and the schedule once for a single number, before anything heavy is loaded.

    Returns:
        What was set and changes nothing, one sentence each.

    Raises:
        ConfigError: their settings cannot be used; it names the one that is to blame.
    """
    optimizer = _named(lambda: _optimizer(args), args, kind="optim", settings="optim_args")
    _named(lambda: _schedule(args, optimizer), args, kind="lr_scheduler_type", settings="lr_scheduler_kwargs")
    unread = [name for name in ("optim_args", "optim_target_modules") if _is_unread(name, args)]
    return tuple(f"{WHERE}.{name} changes nothing with optim: {word_of(args.optim)}" for name in unread)


def _is_unread(name: str, args: TrainingArguments) -> bool:
    """Whether a setting was given that the optimizer does nothing with; transformers says nothing about it."""
    if not getattr(args, name) or word_of(args.optim).startswith(_PROJECT_GRADIENTS):
        return False
    plain = _without(args, "optim_target_modules")
    return name == "optim_target_modules" or _kind_and_keywords(plain) == _kind_and_keywords(
        _without(plain, name)
    )


def _named(make: Callable[[], Any], args: TrainingArguments, *, kind: str, settings: str) -> Any:
    """What `make` makes; where it cannot, the error names its settings, or its kind where that fails by itself."""
    try:
        return make()
    except _CANNOT_MAKE as error:
        given, word = getattr(args, settings), word_of(getattr(args, kind))
        alone = _without(args, settings)
        to_blame = bool(given) and _can(lambda: _optimizer(alone) if kind == "optim" else _schedule(alone))
        if to_blame:
            raise ConfigError(
                f"{shown(given)} was given, which {kind}: {word} cannot take: {error}",
                where=f"{WHERE}.{settings}",
                expected=_expected(args, kind),
            ) from None
        expected = "" if kind == "optim" or given else f"lr_scheduler_kwargs: {_expected(args, kind)}"
        raise ConfigError(
            f"{kind}: {word} cannot be made: {error}", where=f"{WHERE}.{kind}", expected=expected
        ) from None


def _can(make: Callable[[], Any]) -> bool:
    try:
        make()
    except _CANNOT_MAKE:
        return False
    return True


def _optimizer(args: TrainingArguments) -> Optimizer:
    projects = word_of(args.optim).startswith(_PROJECT_GRADIENTS) and args.optim_target_modules
    kind, keywords = (SGD, {}) if projects else _kind_and_keywords(args)
    made: Optimizer = kind([nn.Parameter(torch.zeros(1))], **keywords)
    return made


def _kind_and_keywords(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    found: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args)
    return found


def _schedule(args: TrainingArguments, optimizer: Optimizer | None = None) -> Any:
    settings: Any = args.lr_scheduler_kwargs
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer or SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(10),
        num_training_steps=10,
        scheduler_specific_kwargs=settings,
    )


def _without(args: TrainingArguments, name: str) -> TrainingArguments:
    """The arguments without one of them, past the checks of the class."""
    other = copy.copy(args)
    object.__setattr__(other, name, {} if name == "lr_scheduler_kwargs" else None)
    return other


def _expected(args: TrainingArguments, kind: str) -> str:
    """What the settings of an optimizer or a schedule look like."""
    if kind == "optim":
        return "text of settings that this optimizer has, such as key=value,key=value"
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(word_of(args.lr_scheduler_type))]
    own = [name for name in inspect.signature(make).parameters if name not in _GIVEN_TO_SCHEDULES]
    return f"a mapping with {', '.join(own)}" if own else "nothing: this schedule has no settings"
