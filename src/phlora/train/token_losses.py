"""The losses of trained tokens as something that a model's own forward returns, and for which models they are exact."""

from __future__ import annotations

import inspect
import types
from typing import Any

from peft import PeftModel
from torch import nn

from phlora.errors import ConfigError
from phlora.models.lm_head import LossTerms, trained_tokens, why_not_by_token


def why_trls_loss(model: nn.Module) -> str | None:
    """Why the loss of this trainer is not exactly that of the model, as a sentence; None where it is."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type.value} puts virtual tokens before each row"
    reason = why_not_by_token(model)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return None if reason is None else f"{type(inner).__name__} {reason}"


def refuse_z_loss(why: str | None) -> None:
    if why is not None:
        raise ConfigError(
            f"{why}, which would leave z_loss out",
            where="z_loss",
            fix="leave out z_loss, or loss_type and compute_loss_func where they are given",
        )


def offer_token_losses(model: nn.Module) -> None:
    """Let `model(**batch, token_losses=LossTerms())` return `TrainedTokens`.

    They go through the model's own forward, so that whatever wraps it (DDP, FSDP, activation offloading) sees one.
    """
    original = model.forward

    def forward(self: nn.Module, *args: Any, token_losses: LossTerms | None = None, **kwargs: Any) -> Any:
        if token_losses:
            return trained_tokens(self, kwargs, terms=token_losses, entropy=True)
        # A copy that was made while training (a moving average of the weights) is no part of this trainer.
        return original(*args, **kwargs) if self is model else type(self).forward(self, *args, **kwargs)

    # Not functools.wraps: accelerate looks through `__wrapped__` when it takes its own wrapper off, and this one too.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    forward.__name__, forward.__doc__ = "forward", type(model).forward.__doc__
    model.forward = types.MethodType(forward, model)
