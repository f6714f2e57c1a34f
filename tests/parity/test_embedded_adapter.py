"""An adapter for q and v only, trained on the embedded model, elsewhere: in stock PEFT, and in loralib's format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import phlora.lora as lora
from phlora import convert
from phlora.adapters.attach import attach

TEXTS = [
    "The capital of France is Paris.",
    "سلام دنیا، امروز 23 درجه است",
    "नमस्ते दुनिया",
    "Ћао свете, Türkçe ığş, Tiếng Việt",
]
# Of logits up to 35. 0.0 was seen for stock PEFT, as the scaling is a power of two; a BLAS may add in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def batch(smollm2: Any) -> dict[str, Tensor]:
    tokenizer = smollm2[1]
    return dict(tokenizer(TEXTS, return_tensors="pt", padding=True))


@pytest.fixture(scope="module")
def trained(
    smollm2: Any, batch: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor]:
    """The folder of an adapter after three steps, and its logits."""
    torch.manual_seed(0)
    model = attach(copy.deepcopy(smollm2[0]), {"r": 8, "target_modules": ["q_proj", "v_proj"]}).model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    folder = tmp_path_factory.mktemp("adapter")
    model.eval().save_pretrained(folder)
    return folder, logits(model, batch)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the tokens that are no padding."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"] == 1]


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_stock_peft_on_the_stock_model_has_equal_logits(
    trained: tuple[Path, Tensor], smollm2: Any, smollm2_folder: Path, batch: dict[str, Tensor]
) -> None:
    folder, expected = trained
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    assert_alike(logits(PeftModel.from_pretrained(base, folder), batch), expected)
    assert (expected - logits(smollm2[0], batch)).abs().max() > 0.1


def test_to_loralib_and_back_is_bit_equal(
    trained: tuple[Path, Tensor],
    smollm2: Any,
    smollm2_folder: Path,
    batch: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    folder, expected = trained
    file, back = tmp_path / "adapter.pt", tmp_path / "back"
    convert(folder, to="loralib", output=file)
    convert(file, to="peft", output=back, lora_alpha=16, enable=["q", "v"], model=str(smollm2_folder))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, back))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    model = copy.deepcopy(smollm2[0])
    lora.replace(
        model,
        ["qkv_proj"],
        r=8,
        lora_alpha=16,
        enable_lora=[True, False, True],
        out_features_per_block=(576, 192, 192),
    )
    lora.load_lora_state_dict(model, torch.load(file, weights_only=True))
    assert_alike(logits(model.eval(), batch), expected)
