"""An adapter on parts of fused weights, opened by stock PEFT and trained on, stays on these parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from script_rows import SEVEN, new_model
from torch import nn

from phlora.adapters.attach import recorded_blocks

QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def saved(make: Any, tmp_path: Path) -> Any:
    """An adapter on these names after two steps, saved in its plain form."""

    def train(targets: Any, **settings: Any) -> Path:
        trainer = make(peft_config=LoraConfig(r=4, target_modules=targets, **settings))
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        return tmp_path / "adapter"

    return train


def opened(weights: Any, folder: Path) -> PeftModel:
    base = new_model()
    base.load_state_dict(weights)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def b_of(model: PeftModel) -> torch.Tensor:
    return model.get_base_model().get_submodule(QKV).lora_B["default"].weight.detach().clone()


def rows_of(model: PeftModel) -> tuple[int, int]:
    config = model.get_base_model().config
    d = config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * d, config.num_key_value_heads * d


def test_k_stays_as_it_is_where_q_and_v_were_saved(
    make: Any, saved: Any, weights: Any, told: Any, tokenizer: Any, tmp_path: Path
) -> None:
    folder = saved(["q_proj", "v_proj"])
    model = opened(weights, folder)
    before, (q, k) = b_of(model), rows_of(model)
    ids = tokenizer("how many", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**ids).logits
    trainer = make(model=model)
    assert "parts of fused weights, which train on as such: q_proj, v_proj of qkv_proj" in told()
    assert torch.equal(b_of(trainer.model), before)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(**ids).logits, logits, rtol=1e-5, atol=1e-6)
    trainer.train()
    after = b_of(trainer.model)
    assert not torch.equal(after[:q], before[:q]) and not after[q : q + k].any()
    # Nor do the ranks of q serve v.
    assert not after[:q, 4:].any() and not after[q + k :, :4].any()
    trainer.save_model(str(tmp_path / "again"))
    stored = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{QKV}.lora_B.weight"], after)
    assert recorded_blocks(trainer.model)[QKV]["enabled"] == ["q_proj", "v_proj"]
    assert (tmp_path / "again" / "phlora.json").is_file()


@pytest.mark.parametrize("targets", [SEVEN, ["k_proj", "down_proj"]])
def test_all_parts_and_one_part_keep_their_ranks(make: Any, saved: Any, weights: Any, targets: Any) -> None:
    folder = saved(targets, rank_pattern={"k_proj": 3})
    model = opened(weights, folder)
    before = b_of(model)
    trainer = make(model=model)
    trainer.train()
    after = b_of(trainer.model)
    assert not torch.equal(after, before) and bool((after[before == 0] == 0).all())


def test_an_adapter_of_the_whole_weight_stays_one(make: Any, weights: Any, told: Any, tmp_path: Path) -> None:
    whole = make(peft_config=LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"]))
    assert type(whole.model.get_base_model().get_submodule(QKV).lora_B["default"]) is nn.Linear
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    fresh = peft.get_peft_model(new_model(), LoraConfig(r=4, target_modules=["qkv_proj"]))
    for model in (opened(weights, tmp_path / "whole"), fresh):
        made = make(model=model).model.get_base_model().get_submodule(QKV)
        assert type(made.lora_B["default"]) is nn.Linear
    assert "parts of fused weights" not in told()


def test_an_optimizer_of_the_script_is_told(make: Any, saved: Any, weights: Any, told: Any) -> None:
    model = opened(weights, saved(["q_proj", "v_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = make(model=model, optimizers=(torch.optim.SGD(trained, lr=1e-3), None))
    assert type(trainer.model.get_base_model().get_submodule(QKV).lora_B["default"]) is nn.Linear
    assert "training adapts k_proj too in qkv_proj: an optimizer was given" in told()


def test_zeros_of_which_no_blocks_can_be_told(make: Any, weights: Any, told: Any) -> None:
    model = peft.get_peft_model(new_model(), LoraConfig(r=4, target_modules=["qkv_proj"]))
    q, k = rows_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
                parameter[q : q + k] = 0
    make(model=model)
    assert "training adapts k_proj too in qkv_proj: its ranks serve several parts" in told()
