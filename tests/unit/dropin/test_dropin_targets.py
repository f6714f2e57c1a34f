"""What an adapter of a script sits on: parts of fused weights by their names, and what PEFT left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from script_rows import SEVEN, new_model
from torch import nn

import phlora
from phlora.errors import ConfigError


def test_the_usual_seven_names_are_all_adapted_and_saved_as_a_plain_adapter(
    make: Any, model: nn.Module, weights: Any, tokenizer: Any, told: Any, tmp_path: Path
) -> None:
    trainer = make(peft_config=LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"))
    assert (
        "q_proj, k_proj, v_proj, gate_proj, up_proj are parts of qkv_proj and gate_up_proj: adapted as such; "
        "stock PEFT would have adapted o_proj and down_proj only" in told()
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = tokenizer("how many are two", return_tensors="pt")
    with torch.no_grad():
        ours = trainer.model.eval()(**ids).logits
    base = new_model()
    base.load_state_dict(weights)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"} == set(
        stock.peft_config["default"].target_modules
    )
    with torch.no_grad():
        torch.testing.assert_close(stock(**ids).logits, ours, rtol=1e-5, atol=1e-5)


def test_the_parts_learn_what_separate_layers_would(make: Any) -> None:
    """Each row block has an A and a B of its own, of the rank that was asked for."""
    trainer = make(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(trained) and all("qkv_proj" in name for name in trained)
    shown = phlora.dropin.trainer.what_trains(trainer.model)  # type: ignore[attr-defined]
    assert "qkv_proj" in shown and "parameters will be trained" in shown


def test_names_that_peft_finds_are_left_to_peft(make: Any, told: Any) -> None:
    config = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj", "w1"])
    trainer = make(peft_config=config)
    assert trainer.model.peft_config["default"] is config
    assert "this model has no module w1" in told() and "parts of" not in told()


def test_an_expression_that_peft_would_half_match(make: Any, told: Any) -> None:
    trainer = make(peft_config=LoraConfig(r=4, target_modules=r".*\.(q_proj|o_proj)"))
    assert "q_proj is a part of qkv_proj" in told()
    assert any("qkv_proj" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_an_adapter_that_peft_has_made_without_the_parts_is_refused(make: Any, model: nn.Module) -> None:
    half = peft.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    with pytest.raises(ConfigError, match="phlora.get_peft_model"):
        make(model=half)


@pytest.mark.parametrize("targets", [SEVEN, ".*(q_proj|o_proj)"])
def test_a_second_adapter_that_peft_has_made_without_the_parts_is_refused(
    make: Any, model: nn.Module, told: Any, targets: Any
) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    adapted.add_adapter("two", LoraConfig(r=4, target_modules=targets))
    adapted.set_adapter("two")
    with pytest.raises(ConfigError, match=r"q_proj.* the adapter `two`.*qkv_proj"):
        make(model=adapted)
    # The one that is whole trains, and the other is told.
    adapted.set_adapter("default")
    assert make(model=adapted) and "The adapter `two` has no q_proj" in told()


def test_a_second_adapter_with_all_that_it_names_trains(make: Any, model: nn.Module, told: Any) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    adapted.add_adapter("two", LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"]))
    adapted.set_adapter("two")
    assert make(model=adapted) and "has no" not in told()


def test_get_peft_model_adapts_the_parts(make: Any, model: nn.Module, told: Any) -> None:
    adapted = phlora.get_peft_model(model, LoraConfig(r=4, target_modules=SEVEN))
    assert isinstance(adapted, PeftModel) and "adapted as such" in told()
    assert make(model=adapted).train().global_step == 2


def test_get_peft_model_is_pefts_where_nothing_is_missing(model: nn.Module) -> None:
    config = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[])
    assert "ia3" in str(type(phlora.get_peft_model(model, config, "mine").base_model)).lower()


def test_what_row_blocks_cannot_have_is_one_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        phlora.get_peft_model(model, LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)


def test_a_model_by_its_name_is_adapted_in_its_parts_too(
    make: Any, tmp_path: Path, weights: Any, tokenizer: Any
) -> None:
    made = new_model()
    made.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make(
        model=str(tmp_path / "base"), processing_class=None, peft_config=LoraConfig(r=4, target_modules=SEVEN)
    )
    assert any("qkv_proj" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert trainer.train().global_step == 2


def test_the_parts_of_a_base_in_4_bits_are_adapted_too(model_folder: Path, make: Any, tmp_path: Path) -> None:
    """As PEFT's own layers compute a plain adapter of the same values."""
    pytest.importorskip("bitsandbytes")
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=quantised)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    trainer = make(
        model=base,
        peft_config=LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"),
        settings={"optim": "paged_adamw_8bit", "learning_rate": 1e-2, "activation_checkpointing": False},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    fused = trainer.model.base_model.model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(3, fused.in_features)
    with torch.no_grad():
        ours = fused.train()(x)
        A, B = fused.lora_A["default"].weight, fused.lora_B["default"].weight
        plain = fused.base_layer(x) + x @ A.T @ B.T * fused.scaling["default"]
    assert bool(B.any()) and {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {
        torch.float32
    }
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    stock = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    loaded = stock.base_model.model.model.layers[0].self_attn.qkv_proj
    torch.testing.assert_close(loaded.lora_B["default"].weight.detach(), B.detach(), rtol=0, atol=0)
    assert type(stock.merge_and_unload()) is type(stock.get_base_model())


def test_full_fine_tuning_is_said(make: Any, told: Any) -> None:
    make()
    assert "No peft_config: all" in told() and "full fine-tuning" in told()
