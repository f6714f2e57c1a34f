"""The model card: what it says, and that its snippet runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, PeftModel

from phlora.adapters.model_card import model_card
from phlora.testing import tiny_adapter

FACTS: dict[str, Any] = {"base_model": "base", "stop_token_ids": [7, 9], "step": 12}
LORA = LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "q_proj"])


def test_the_head_is_what_the_hub_reads() -> None:
    head = yaml.safe_load(model_card(LORA, FACTS).split("---")[1])
    assert head["base_model"] == "base" and head["library_name"] == "peft" and "lora" in head["tags"]


def test_it_says_what_was_trained_and_how_well() -> None:
    card = model_card(LORA, {**FACTS, "held_out_loss": 0.12345})
    assert "Rank 8, alpha 16, on q_proj, v_proj." in card
    assert "step 12, loss 0.1235 on held-out rows" in card and "reply: 7, 9" in card
    assert "held-out" not in model_card(LORA, FACTS)
    assert "on all-linear." in model_card(LoraConfig(target_modules="all-linear"), FACTS)


@pytest.mark.parametrize("kind", ["folder", "hub", "gguf"])
def test_its_snippet_runs(
    kind: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "base")
    folder = tiny_adapter("base", tmp_path / "path/to/this/folder")
    for file in model_folder.glob("*token*"):
        shutil.copy(file, folder)
    (snippet,) = re.findall(r"```python\n(.*?)```", model_card(LORA, FACTS, kind=kind), re.DOTALL)
    space: dict[str, Any] = {}
    exec(snippet, space)
    assert isinstance(space["model"], PeftModel) and len(space["tokenizer"]) > 100


def test_an_embedded_base_is_loaded_by_its_name() -> None:
    card = model_card(LORA, {**FACTS, "base_model": "smollm2-135m"}, kind="embedded")
    assert 'from_pretrained(embedded_folder("smollm2-135m"))' in card
    assert "from phlora import embedded_folder" in card
