"""Training on a base that is stored in 16 bits, against TRL's trainer and PEFT on the same weights in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from phlora import SFTTrainer
from phlora.adapters.load import load_adapter
from phlora.data.collate import Collator
from phlora.models.load import load_model
from phlora.testing import quiet_config, tiny_folder, tiny_phi3, tiny_tokenizer

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ROWS = [{"input_ids": list(range(5 + i, 25 + i)), "labels": list(range(5 + i, 25 + i))} for i in range(8)]
TRAINED_WHOLE = {"modules_to_save": ["lm_head", "embed_tokens"]}
TRAINED_TOKENS = {"trainable_token_indices": [5, 9, 12]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16."""
    place = tiny_folder(tmp_path_factory.mktemp("half"))
    tiny_phi3()[0].bfloat16().save_pretrained(place)
    return place


def stored(folder: Path) -> Any:
    return load_model(folder, device="cpu", dtype="float32", storage_dtype="bfloat16").model


def full(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(settings: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def adapted(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, lora(settings))  # type: ignore[arg-type]


def train(
    kind: Any, model: nn.Module, output: Path, peft_config: Any = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of three steps, and what was trained."""
    tokenizer = tiny_tokenizer()
    args = quiet_config(
        output,
        remove_unused_columns=False,
        max_steps=3,
        per_device_train_batch_size=4,
        max_length=None,
        learning_rate=5e-3,
    )
    torch.manual_seed(1)
    trainer = kind(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        peft_config=copy.deepcopy(peft_config),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {
        n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad and "norm" not in n
    }


def require_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=2e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, parameter in ours[1].items():
        assert parameter.dtype == torch.float32, name
        torch.testing.assert_close(parameter, theirs[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("settings", [TRAINED_WHOLE, TRAINED_TOKENS], ids=["modules", "tokens"])
@pytest.mark.parametrize("by", ["config", "peft"])
def test_what_trains_as_a_whole_trains_as_in_float32(
    folder: Path, tmp_path: Path, by: str, settings: dict[str, Any]
) -> None:
    models, config = [stored(folder), full(folder)], lora(settings)
    if by == "peft":
        models, config = [adapted(model, settings) for model in models], None  # type: ignore[assignment]
    found, expected = (
        train(kind, model, tmp_path, config)
        for kind, model in zip((SFTTrainer, trl.SFTTrainer), models, strict=True)
    )
    require_same(found, expected)


def test_a_base_that_trains_itself_trains_as_in_float32(folder: Path, tmp_path: Path) -> None:
    require_same(train(SFTTrainer, stored(folder), tmp_path), train(trl.SFTTrainer, full(folder), tmp_path))


@pytest.mark.parametrize("settings", [TRAINED_WHOLE, None], ids=["modules", "base"])
def test_whatever_trainer_trains_a_stored_weight_it_is_widened(
    folder: Path, tmp_path: Path, settings: Any
) -> None:
    models = [stored(folder), full(folder)]
    if settings:
        models = [adapted(model, settings) for model in models]
    else:
        for model in models:
            # TRL reads the head's weight past the layer.
            model.lm_head.requires_grad_(False)
    require_same(*(train(trl.SFTTrainer, model, tmp_path) for model in models))


def test_a_weight_that_does_not_train_stays_as_it_is_stored(folder: Path) -> None:
    model = stored(folder)
    ids = torch.arange(3, 20).view(1, -1)
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    adapted(model, {}).train()(ids)
    assert {p.dtype for n, p in model.named_parameters() if "base_layer" in n} == {torch.bfloat16}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["named", "all"])
def test_the_start_is_taken_out_of_weights_that_are_not_rounded(
    folder: Path, tmp_path: Path, init: str, targets: Any
) -> None:
    config = lora({"init_lora_weights": init, "target_modules": targets})
    require_same(
        train(SFTTrainer, stored(folder), tmp_path, config),
        train(trl.SFTTrainer, full(folder), tmp_path, config),
    )


def test_a_start_that_was_rounded_already_is_said(folder: Path, tmp_path: Path, caplog: Any) -> None:
    train(SFTTrainer, adapted(stored(folder), {"init_lora_weights": "pissa"}), tmp_path)
    assert "was taken out of weights stored in 16 bits, which rounded them" in caplog.text


def test_a_received_adapter_that_starts_so_is_put_on_as_in_float32(folder: Path, tmp_path: Path) -> None:
    """PEFT takes the start out of the base again when it loads such an adapter."""
    made = adapted(full(folder), {"init_lora_weights": "pissa"})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    made.save_pretrained(str(tmp_path / "adapter"))  # type: ignore[operator]
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        ours, theirs = (
            load_adapter(base, tmp_path / "adapter").model.eval()(ids).logits
            for base in (stored(folder), full(folder))
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
