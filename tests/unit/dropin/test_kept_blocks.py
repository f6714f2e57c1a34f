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
from phlora.errors import ConfigError

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


def by_transformers(base: Any, folder: Path) -> None:
    base.load_adapter(str(folder), adapter_name="mine")
    base.set_adapter("mine")


def injected(base: Any, folder: Path) -> None:
    config = LoraConfig.from_pretrained(str(folder))
    peft.inject_adapter_in_model(config, base, adapter_name="mine")
    peft.set_peft_model_state_dict(base, load_file(folder / "adapter_model.safetensors"), adapter_name="mine")


def unwrapped(base: Any, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder), adapter_name="mine", is_trainable=True)


@pytest.mark.parametrize("put_into", [by_transformers, injected, unwrapped])
@pytest.mark.parametrize("is_all_trained", [False, True])
def test_an_adapter_in_the_model_itself_keeps_its_blocks(
    make: Any, saved: Any, weights: Any, told: Any, tmp_path: Path, put_into: Any, is_all_trained: bool
) -> None:
    folder, model = saved(["q_proj", "v_proj"]), new_model()
    model.load_state_dict(weights)
    put_into(model, folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_all_trained or "lora_" in name)

    def b() -> Any:
        return model.get_submodule(QKV).lora_B["mine"].weight.detach().clone()

    before, (q, k) = b(), rows_of(opened(weights, folder))
    trainer = make(model=model)
    assert "which train on as such: q_proj, v_proj of qkv_proj" in told()
    assert "full fine-tuning" not in told() and "in adapters of the model's own layers" in told()
    assert ("the others are its weights" in told()) is is_all_trained
    trainer.train()
    after = b()
    assert not torch.equal(after, before) and bool((after[before == 0] == 0).all())
    assert not after[q : q + k].any()
    trainer.save_model(str(tmp_path / "again"))
    files = list((tmp_path / "again").glob("*.safetensors"))
    stored = {name: value for file in files for name, value in load_file(file).items() if QKV in name}
    assert any("lora_B" in name and torch.equal(value, after) for name, value in stored.items())


def test_parts_that_peft_left_out_of_the_model_itself_are_refused(make: Any, weights: Any) -> None:
    model = new_model()
    peft.inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "o_proj"]), model)
    with pytest.raises(ConfigError, match="q_proj matched nothing when PEFT made this adapter"):
        make(model=model)


def test_what_is_frozen_is_not_called_trained(make: Any, model: Any, told: Any) -> None:
    model.get_input_embeddings().requires_grad_(False)
    make()
    assert "full fine-tuning" not in told() and "those that require gradients" in told()
