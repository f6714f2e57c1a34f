"""LoRA+: every B of an adapter learns at a multiple of the learning rate, everything else at the learning rate.

B starts at zero and meets large activations, A the other way round; with one rate for both, the one that suits A
leaves B behind in wide models. Source: LoRA+ (Hayou et al. 2024), section 4: a ratio of 2 to 16, larger where the task
is far from the base.

Whatever optimizer was chosen, with its weight decay, keeps its groups, and the B of each become a group of their own.
PEFT 0.21's `create_loraplus_optimizer` does otherwise: it takes biases and magnitudes of DoRA along, trains embeddings
at a rate of 1e-6, and knows nothing of the trainer's weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler

from phlora.errors import ConfigError, shown

# In `peft_config`, beside the adapter that it is about; PEFT keeps it out of `LoraConfig`.
LORAPLUS = "loraplus_lr_ratio"


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


def check_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule once for a single number, before anything heavy is loaded.

    Raises:
        ConfigError: their settings cannot be used.
    """
    weight = nn.Parameter(torch.zeros(1))
    try:
        kind: Any = SGD
        keywords: dict[str, Any] = {}
        # Those that project gradients look at a model.
        if not args.optim_target_modules:
            kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([weight], **keywords)
        schedule: Any = args.lr_scheduler_kwargs
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(10),
            num_training_steps=10,
            scheduler_specific_kwargs=schedule,
        )
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        ImportError,
    ) as error:
        raise ConfigError(
            f"The optimizer {args.optim} with the schedule {args.lr_scheduler_type} cannot be made: {error}",
            where="training_config.optim, lr_scheduler_type",
        ) from None
