"""An adapter as a folder: plain PEFT files, with the tokenizer, a model card and what its base was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from phlora.adapters.attach import recorded_blocks
from phlora.adapters.model_card import model_card
from phlora.files import ADAPTER_FACTS, replaced_folder, write_json, write_text
from phlora.models.load import LoadedModel


def save_adapter(model: PeftModel, loaded: LoadedModel, path: Path, *, facts: dict[str, Any]) -> None:
    """Write a plain PEFT adapter with its tokenizer, model card and base fingerprint, whole or not at all."""
    with replaced_folder(path) as part:
        model.save_pretrained(str(part), save_embedding_layers=False)
        loaded.tokenizer.tokenizer.save_pretrained(part)
        base: dict[str, Any] = {
            "base_model": loaded.source.name,
            "base_fingerprint": loaded.fingerprint,
            "stop_token_ids": list(loaded.tokenizer.stop_token_ids),
        }
        if blocks := recorded_blocks(model):
            base["blocks"] = blocks
        write_json(part / ADAPTER_FACTS, {**base, **facts})
        lora = model.peft_config["default"]
        assert isinstance(lora, LoraConfig)
        card = model_card(lora, {**base, **facts}, kind=loaded.source.kind)
        write_text(part / "README.md", card)


def load_weights(model: PeftModel, path: Path) -> None:
    """Put the weights of a saved adapter into the model's active one."""
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
