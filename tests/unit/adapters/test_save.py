"""A saved adapter is one that stock PEFT reads, whole or not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoTokenizer

from phlora.adapters import save as module
from phlora.adapters.attach import attach
from phlora.adapters.save import load_weights, save_adapter
from phlora.models.load import LoadedModel, load_model
from phlora.testing import tiny_phi3

IDS = torch.arange(3, 51).view(2, 24)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return load_model(model_folder, dtype="float32", device="cpu")


def tuned(seed: int = 0) -> PeftModel:
    """Row blocks with a B that is not zero."""
    model = attach(tiny_phi3()[0], {"r": 3, "target_modules": ["q_proj", "v_proj", "o_proj"]}).model
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_stock_peft_answers_alike_and_the_folder_says_what_it_stands_on(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    model, folder = tuned(), tmp_path / "adapter"
    save_adapter(model, loaded, folder, facts={"step": 7, "held_out_loss": 1.25})
    theirs = PeftModel.from_pretrained(tiny_phi3()[0], str(folder)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    facts = json.loads((folder / "phlora.json").read_text("utf-8"))
    assert facts["base_fingerprint"] == loaded.fingerprint
    assert facts["stop_token_ids"] == list(loaded.tokenizer.stop_token_ids)
    assert (facts["step"], facts["held_out_loss"]) == (7, 1.25)
    assert {tuple(entry["enabled"]) for entry in facts["blocks"].values()} == {("q_proj", "v_proj")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == loaded.tokenizer.tokenizer.chat_template
    assert tokenizer.get_vocab() == loaded.tokenizer.tokenizer.get_vocab()
    assert "step 7, loss 1.2500 on held-out rows" in (folder / "README.md").read_text("utf-8")


def test_a_save_that_fails_leaves_the_one_before(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(tuned(), loaded, folder, facts={"step": 1})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    # The card is the last file but for nothing: all others are written by then.
    monkeypatch.setattr(module, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tuned(seed=1), loaded, folder, facts={"step": 2})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_loaded_weights_are_the_saved_ones_to_the_bit(loaded: LoadedModel, tmp_path: Path) -> None:
    model, other = tuned(), tuned(seed=1)
    save_adapter(model, loaded, tmp_path / "adapter", facts={"step": 1})
    assert not torch.equal(logits(other), logits(model))
    load_weights(other, tmp_path / "adapter")
    found, expected = get_peft_model_state_dict(other), get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
