"""A tiny random Phi-3, in memory or as a folder, and adapters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from phlora.models.tiny import tiny_phi3, tiny_tokenizer

__all__ = ["tiny_adapter", "tiny_folder", "tiny_gemma2", "tiny_llama", "tiny_phi3", "tiny_tokenizer"]

# What every configuration of a small model takes.
TINY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_folder(path: str | Path, **options: Any) -> Path:
    """Save `tiny_phi3(**options)` and its tokenizer as a model folder, which `--model` takes; returns the path."""
    path = Path(path)
    for part in tiny_phi3(**options):
        part.save_pretrained(path)
    return path


def tiny_gemma2(*, vocab_size: int = 300, seed: int = 1, **config: Any) -> Gemma2ForCausalLM:
    """A random Gemma-2 of 2 layers, which caps its logits after the head as no Phi-3 does; no file is read.

    Args:
        vocab_size: rows of its embedding.
        seed: of the weights; the caller's random state is left as it was.
        **config: other fields of `Gemma2Config` than the tiny ones.
    """
    fields = {**TINY_SIZES, "head_dim": 8, "final_logit_softcapping": 0.5, "vocab_size": vocab_size, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Gemma2ForCausalLM = Gemma2ForCausalLM(Gemma2Config(**fields)).eval()
    return model


def tiny_llama(*, vocab_size: int = 300, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama of 2 layers, where q, k, v, gate and up are linear layers of their own; no file is read.

    Args:
        vocab_size: rows of its embedding.
        seed: of the weights; the caller's random state is left as it was.
        **config: other fields of `LlamaConfig` than the tiny ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields = {**TINY_SIZES, "vocab_size": vocab_size, **config}
        model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    return model


def tiny_adapter(base: str | Path, path: str | Path, *, seed: int = 0, **lora_config: Any) -> Path:
    """Save a PEFT adapter that changes what its base says, as another tool would have written it; returns the path.

    Args:
        base: a model folder.
        path: of the adapter.
        seed: of its tensors; those that PEFT starts at zero are random too.
        **lora_config: fields of PEFT's `LoraConfig`; by default rank 4 on all linear layers.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora_config}))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(str(path), save_embedding_layers=False)
    return Path(path)
