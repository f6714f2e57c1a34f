"""A model with its adapter as its configuration describes it, without one weight: what a plan is made from.

On torch's meta device a tensor has a shape and a dtype and no numbers, so that a model of any size is there at once.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from phlora.adapters.attach import AdapterSummary, Attached, attach
from phlora.errors import PhloraError
from phlora.models.storage import Sizes
from phlora.models.streaming import sizes_of

# Settings of an adapter that single layers out: what is known of one of them holds for no other.
_BY_LAYER = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "layer_replication")


class NotForecastError(Exception):
    """A run cannot be forecast, for a reason that is no defect of Phlora; the reason is the message."""


@contextlib.contextmanager
def models_own_code() -> Iterator[None]:
    """Around whatever runs the code of a model without its weights: what it raises is no reason not to train it.

    Raises:
        NotForecastError: with what the code raised. Errors that are for a person to read stay as they are.
    """
    try:
        yield
    except PhloraError:
        raise
    # Code that comes with a model may raise anything.
    except Exception as error:
        raise NotForecastError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


@dataclass(frozen=True)
class Blueprint:
    """What a model is made of, from its configuration.

    Attributes:
        config: of transformers.
        lora: the adapter's settings.
        dtype: of the weights while they compute.
        attention: the attention implementation.
        runs_code: whether code that comes with the model may run.
        model: the whole model with its adapter, on the meta device.
        summary: what of it trains.
        sizes: how many numbers its frozen weights have.
    """

    config: PreTrainedConfig
    lora: LoraConfig
    dtype: torch.dtype
    attention: str
    runs_code: bool
    model: PeftModel
    summary: AdapterSummary
    sizes: Sizes

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        count: int = self.config.num_hidden_layers
        return count

    @property
    def layers_differ(self) -> bool:
        """Whether the adapter singles layers out, or the model has layers of several kinds."""
        named = any(getattr(self.lora, name, None) for name in _BY_LAYER)
        kinds = getattr(self.config, "layer_types", None) or [None]
        return named or len(set(kinds)) > 1 or len(set(self._trained_by_layer())) > 1

    def _trained_by_layer(self) -> list[int]:
        counts: Counter[str] = Counter()
        for name, parameter in self.model.named_parameters():
            before, layers, rest = name.partition(".layers.")
            if layers:
                counts[rest.partition(".")[0]] += parameter.numel() * parameter.requires_grad
        return list(counts.values())

    def base_with_layers(self, count: int) -> Any:
        """The base model on the meta device with fewer layers."""
        return _base(shortened(self.config, count), self.dtype, self.attention, self.runs_code)

    def with_layers(self, count: int) -> PeftModel:
        """The same with its adapter."""
        return _attached(self.base_with_layers(count), self.lora).model

    def trained(self) -> list[Tensor]:
        """The parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]


def draw_up(
    config: PreTrainedConfig,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    runs_code: bool = False,
    stored: torch.dtype = torch.float32,
) -> Blueprint:
    """The blueprint of a model with this configuration and this adapter.

    Args:
        stored: the dtype of the model's files.

    Raises:
        ConfigError: as `attach`.
        NotForecastError: its code, or its configuration, does not make such a model without weights.
    """
    with models_own_code():
        base = _base(shortened(config, config.num_hidden_layers), dtype, attention, runs_code)
        sizes = sizes_of(base, stored)
        attached = _attached(base, lora)
    return Blueprint(config, lora, dtype, attention, runs_code, attached.model, attached.summary, sizes)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of a configuration for the first so many layers."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(short, "layer_types", None):
        short.layer_types = list(short.layer_types)[:layers]
    # What was quantised is read as what it stands for.
    if hasattr(short, "quantization_config"):
        del short.quantization_config
    return short


def _attached(base: Any, lora: LoraConfig) -> Attached:
    with warnings.catch_warnings():
        # Whatever is to be said of the adapter is said when the run attaches it.
        warnings.simplefilter("ignore")
        return attach(base, copy.deepcopy(lora))


def _base(config: PreTrainedConfig, dtype: torch.dtype, attention: str, runs_code: bool) -> Any:
    # flash_attention_2 asks for a GPU when a model is made; what is kept is the same.
    implementation = attention if attention in ("sdpa", "eager") else "sdpa"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation, trust_remote_code=runs_code
        )
