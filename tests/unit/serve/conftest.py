"""Chats for the tests: one that answers at once, and one with a random adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chats import FakeModel
from peft import LoraConfig, get_peft_model

from phlora.models.tokenizer import prepare_tokenizer
from phlora.serve import chat as module
from phlora.serve.chat import ChatSession


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> ChatSession:
    """A chat whose model answers at once and in three pieces."""

    def stream(model: FakeModel, ids: list[int], tokenizer: Any, **options: Any) -> Iterator[str]:
        model.asked.append(tokenizer.decode(ids))
        yield from (f"{model.speaker} says", " سلام", f" {len(model.asked)}")

    monkeypatch.setattr(module, "stream", stream)
    model, tokenizer = tiny
    return ChatSession(
        model=FakeModel(), tokenizer=prepare_tokenizer(tokenizer, config=model.config), has_adapter=True
    )


@pytest.fixture
def adapted(tiny: Any) -> ChatSession:
    """A chat with a random model and a random adapter on it, loud enough to change what it says."""
    model, tokenizer = tiny
    loaded = prepare_tokenizer(tokenizer, config=model.config, generation_config=model.generation_config)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)
    return ChatSession(
        model=get_peft_model(model, config), tokenizer=loaded, has_adapter=True, max_new_tokens=8
    )
