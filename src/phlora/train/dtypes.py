"""The dtype of an adapter on a quantised base: TRL casts it to bf16, to which most of AdamW's updates are too small."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The values of what trains, by the names of the parameters."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def keep_dtypes(model: nn.Module, before: dict[str, torch.Tensor] | None) -> None:
    """Undo TRL's cast: the values of an adapter that was given come back, a fresh one has PEFT's dtype."""
    quantized = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if not (quantized and isinstance(model, PeftModel)):
        return
    if before is None:
        for name in model.active_adapters:
            cast_adapter_dtype(model, name)
        return
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name]
