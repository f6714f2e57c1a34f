"""A folder with a Phi-3-mini of random weights: its exact configuration, real safetensors shards, a Phi-3 tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from phlora.files import require_room
from phlora.models.tiny import phi3_tokenizer, tiny_phi3
from phlora.models.tokenizer import load_tokenizer

LAYERS = 32
# Written last: a folder without it was cut short, and is written anew.
_DONE = "written.json"
_VOCABULARY, _RESERVED = 32_064, 259
_SPECIAL_FROM = 32_000
_END_OF_TEXT, _ASSISTANT, _END = 32_000, 32_001, 32_007
_SHARD = "1GB"


def phi3_mini_config(layers: int = LAYERS) -> Phi3Config:
    """The configuration of microsoft/Phi-3-mini-4k-instruct, with fewer layers where that is asked for."""
    return Phi3Config(
        vocab_size=_VOCABULARY,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=2047,
        bos_token_id=1,
        eos_token_id=_END_OF_TEXT,
        pad_token_id=_END_OF_TEXT,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def model_folder(work: Path, size: str, layers: int) -> Path:
    """The folder of a size, `full` or `tiny`, under `work`; written on first use, one shard after the other.

    Raises:
        NoRoomError: the disk has no room for the weights.
    """
    folder = work / (f"phi3-mini-{layers}-layers" if size == "full" else "phi3-tiny")
    if (folder / _DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if size == "tiny":
        model, tokenizer = tiny_phi3()
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts: dict[str, Any] = {"size": "tiny"}
    else:
        facts = {"layers": layers, "bytes": _write_weights(folder, layers)}
        _write_tokenizer(folder)
    (folder / _DONE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return folder


def _write_weights(folder: Path, layers: int) -> int:
    """Normal random weights of bf16 as at initialisation; no more than one shard is ever in memory."""
    config = phi3_mini_config(layers)
    with torch.device("meta"):
        shapes = Phi3ForCausalLM(config).to(torch.bfloat16).state_dict()
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=_SHARD)
    total = sum(value.nbytes for value in shapes.values())
    require_room(folder, total, what="The random model", fix="make room, or name another folder with --work")
    generator = torch.Generator().manual_seed(0)
    for file, names in plan.filename_to_tensors.items():
        print(f"writing {folder / file}", flush=True)
        tensors = dict(_random_tensors(shapes, names, config.initializer_range, generator))
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {**plan.metadata}, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=1, eos_token_id=[_END_OF_TEXT, _ASSISTANT, _END], pad_token_id=_END_OF_TEXT
    ).save_pretrained(folder)
    return total


def _random_tensors(
    shapes: dict[str, torch.Tensor], names: list[str], deviation: float, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        shape = shapes[name].shape
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(shape, generator=generator) * deviation).to(torch.bfloat16)


def _write_tokenizer(folder: Path) -> None:
    """The embedded model's most frequent merges, and Phi-3-mini's special tokens with the ids that they have there."""
    backend = json.loads(load_tokenizer("smollm2-135m").tokenizer.backend_tokenizer.to_str())
    merges = [tuple(pair) for pair in backend["model"]["merges"][: _SPECIAL_FROM - _RESERVED]]
    tokenizer = phi3_tokenizer(merges)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|assistant|>", "<|end|>"])
    assert ids == [_END_OF_TEXT, _ASSISTANT, _END], ids
    tokenizer.save_pretrained(folder)
