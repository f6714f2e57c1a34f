"""A run's model before its weights, from its configuration or from the object that was handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from phlora.adapters.attach import AdapterSummary
from phlora.config import RunConfig, quantization_config
from phlora.forecast.blueprint import Blueprint, draw_up
from phlora.models.device import choose_attention, choose_dtype
from phlora.models.families import widest_product
from phlora.models.load import stored_dtype
from phlora.models.storage import Storage, choose_storage, storage_settings
from phlora.models.stored_layers import compute_dtype
from phlora.models.tokenizer import LoadedTokenizer
from phlora.train.request import Objects


@dataclass(frozen=True)
class Drawn:
    """A run's model before its weights: what of it trains, where and how it computes."""

    blueprint: Blueprint
    storage: Storage
    device: torch.device

    @property
    def summary(self) -> AdapterSummary:
        """What will be trained."""
        return self.blueprint.summary


def draw(
    config: RunConfig, objects: Objects, words: LoadedTokenizer, lora: LoraConfig, *, device: torch.device
) -> Drawn:
    """The model that a run is about, from its configuration or from the object that was handed over.

    Raises:
        ConfigError: targets that the model does not have.
        NotForecastError: the model cannot be made from its configuration alone.
    """
    if objects.model is not None:
        return draw_given(objects.model, lora, device=device)
    files = words.files
    assert files is not None
    model = storage_settings(config.model)
    dtype = choose_dtype(model.dtype, device=device, product=widest_product(files.config)).value
    attention = choose_attention(model.attn_implementation, device=device, dtype=dtype).value
    blueprint = draw_up(
        files.config,
        lora,
        dtype=dtype,
        attention=attention,
        runs_code=files.runs_code,
        stored=stored_dtype(files),
    )
    storage = choose_storage(model, blueprint.sizes, dtype=dtype, device=device).value
    return Drawn(blueprint, storage, device)


def draw_given(model: Any, lora: LoraConfig, *, device: torch.device) -> Drawn:
    """The same of a model that is there.

    Raises:
        ConfigError: targets that the model does not have.
        NotForecastError: such a model cannot be made from its configuration alone.
    """
    blueprint = draw_up(
        model.config,
        lora,
        dtype=compute_dtype(model),
        attention=model.config._attn_implementation,
        stored=model.dtype,
    )
    return Drawn(blueprint, _storage_of(model), device)


def _storage_of(model: Any) -> Storage:
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear4bit" in kinds:
        return Storage(dtype=model.dtype, quantization=quantization_config("nf4"))
    int8 = kinds & {"Linear8bitLt", "Linear8bit"}
    return Storage(dtype=model.dtype, quantization=quantization_config("int8") if int8 else None)
