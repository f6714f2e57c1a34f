"""What is asked of a causal language model of transformers, in types; a PeftModel hands on what it lacks itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class Decoder(Protocol):
    """A model without its head."""

    @property
    def config(self) -> Any: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def rotary_emb(self) -> nn.Module: ...

    def set_attn_implementation(self, name: str) -> None: ...

    def __call__(self, **inputs: Any) -> Any: ...


class CausalLM(Protocol):
    """A model with its head."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def peft_config(self) -> Mapping[str, Any]: ...

    def get_decoder(self) -> Decoder: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def __call__(self, **inputs: Any) -> Any: ...


def as_causal_lm(model: nn.Module) -> CausalLM:
    """The same model; nothing is checked."""
    return cast(CausalLM, model)


def embedding_weight(model: nn.Module) -> Tensor:
    """The input embeddings `(V, D)`."""
    weight = cast(Any, model).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
