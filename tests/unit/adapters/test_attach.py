"""Row blocks by name: what trains, what is refused, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from phlora.adapters.attach import attach, recorded_blocks, split_adapter
from phlora.adapters.block_modules import BlockUp
from phlora.adapters.load import load_adapter
from phlora.adapters.peft_layer import LoraLinear, fuse_lora, unfuse_lora
from phlora.errors import ConfigError, ModelError
from phlora.models.quantization import use_operands
from phlora.testing import tiny_phi3

QKV, SECOND_QKV = (f"model.layers.{i}.self_attn.qkv_proj" for i in (0, 1))


def attached(**peft_config: Any) -> Any:
    torch.manual_seed(0)
    result = attach(tiny_phi3()[0], {"r": 4, **peft_config})
    fuse_lora(result.model)
    return result


def layer_of(model: Any, name: str = QKV) -> Any:
    return model.get_submodule(f"base_model.model.{name}")


def randomize(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_only_the_named_rows_change() -> None:
    model = randomize(attached(target_modules=["q_proj", "v_proj"]).model)
    delta = layer_of(model).get_delta_weight("default")
    assert delta[:64].any(1).all() and delta[96:].any(1).all()
    assert not delta[64:96].any()


def test_a_block_has_the_parameters_of_an_unfused_layer() -> None:
    result = attached(target_modules=["q_proj", "v_proj", "gate_proj", "o_proj"])
    assert result.summary.modules == {
        "o_proj": (2, 2 * 4 * (64 + 64)),
        "qkv_proj": (2, 2 * 4 * (2 * 64 + 64 + 32)),
        "gate_up_proj": (2, 2 * 4 * (64 + 112)),
    }
    trainable = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert all("lora_A.default.weight" in name or "lora_B.default.weight" in name for name in trainable)
    adapted = [module for module in result.model.modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 6 and all(type(module) is LoraLinear for module in adapted)


def test_ranks_and_alphas_follow_the_names_of_the_blocks() -> None:
    result = attached(
        target_modules=["q_proj", "v_proj", "o_proj"],
        lora_alpha=8,
        rank_pattern={"q_proj": 6, "layers.1.self_attn.v_proj": 2},
        alpha_pattern={"v_proj": 4},
    )
    first, second = (layer_of(result.model, f"model.layers.{i}.self_attn.qkv_proj") for i in (0, 1))
    found = [[(b.name, b.r, b.scaling) for b in layer.lora_B["default"].blocks] for layer in (first, second)]
    assert found == [
        [("q_proj", 6, 8 / 6), ("v_proj", 4, 1.0)],
        [("q_proj", 6, 8 / 6), ("v_proj", 2, 2.0)],
    ]
    config = result.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (10, 10)
    assert config.rank_pattern == {"o_proj": 4, SECOND_QKV: 8}


def test_rslora_scales_each_block_by_the_root_of_its_rank() -> None:
    model = attached(
        target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 9}, lora_alpha=6, use_rslora=True
    ).model
    assert [b.scaling for b in layer_of(model).lora_B["default"].blocks] == [3.0, 2.0]
    assert layer_of(model).scaling["default"] == pytest.approx(2.0)


def test_layers_to_transform_and_exclusions_narrow_row_blocks() -> None:
    result = attached(
        target_modules=["q_proj", "k_proj", "o_proj"],
        exclude_modules=["k_proj", "o_proj"],
        layers_to_transform=[1],
    )
    assert result.summary.modules == {"qkv_proj": (1, 4 * (64 + 64))}
    assert list(recorded_blocks(result.model)) == [SECOND_QKV]
    assert result.model.peft_config["default"].exclude_modules == {"o_proj"}


def test_excluded_parts_are_not_adapted_with_the_whole() -> None:
    result = attached(
        target_modules="all-linear", exclude_modules=["k_proj", "down_proj", "gate_proj", "up_proj"]
    )
    assert result.summary.modules == {
        "o_proj": (2, 2 * 4 * (64 + 64)),
        "qkv_proj": (2, 2 * 4 * (2 * 64 + 64 + 32)),
    }


def test_a_target_in_one_layer_stays_in_one_layer() -> None:
    for name in ("layers.1.mlp.down_proj", "layers.1.mlp.up_proj"):
        assert [count for count, _ in attached(target_modules=[name]).summary.modules.values()] == [1]


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_each_block_starts_as_peft_starts_a_layer_of_its_size(init: Any) -> None:
    model = attached(
        target_modules=["q_proj", "v_proj"], r=16, rank_pattern={"v_proj": 8}, init_lora_weights=init
    ).model
    layer = layer_of(model)
    A_q, A_v = layer.lora_A["default"].weight.split([16, 8])
    B_q, B_v = layer.lora_B["default"].parts
    if init is True:
        assert A_q.abs().max() <= 64**-0.5 and A_q.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    if init == "gaussian":
        assert [A_q.std().item(), A_v.std().item()] == pytest.approx([1 / 16, 1 / 8], rel=0.1)
    if init == "orthogonal":
        assert B_q.any() and B_v.any()
    assert bool(B_q.any()) == (init in (False, "orthogonal"))
    moves = bool((layer.get_delta_weight("default").abs() > 1e-6).any())
    assert moves == (init is False)


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        ({"init_lora_weights": "mica"}, "`mica` changes the base weight"),
        ({"init_lora_weights": "mica"}, "name qkv_proj as a whole"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "would be dropped out too"),
        ({"init_lora_weights": "pissa", "r": 40}, "v_proj: rank 40 is more than a weight (32, 64) has"),
        ({"init_lora_weights": "pissa_niter_x"}, "q_proj: "),
        (
            {"init_lora_weights": "olora", "target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens is a `Embedding`, and PiSSA and OLoRA are for linear layers",
        ),
        ({"lora_bias": True}, "peft_config.lora_bias"),
        ({"rank_pattern": {"qkv_proj": 8}}, "`qkv_proj` matches nothing that is adapted"),
        ({"alpha_pattern": {"k_proj": 8}}, "`k_proj` matches nothing that is adapted"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "q_proj: Orthogonal initialization requires"),
    ],
)
def test_what_row_blocks_cannot_have_is_refused(peft_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        attached(**{"target_modules": ["q_proj", "v_proj"], **peft_config})
    assert message in str(error.value)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_whole_weights_start_as_peft_has_it(init: str) -> None:
    model = attached(target_modules=["qkv_proj"], init_lora_weights=init).model
    assert type(layer_of(model)) is LoraLinear
    ids = torch.arange(3, 20).view(1, -1)
    expected = tiny_phi3()[0](input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_whole_weights_beside_row_blocks_leave_their_base_too() -> None:
    targets = ["layers.0.self_attn.qkv_proj", "layers.1.self_attn.q_proj", "lm_head"]
    result = attached(target_modules=targets, init_lora_weights="pissa")
    assert result.summary.modules == {
        "qkv_proj": (2, 4 * (64 + 128) + 4 * (64 + 64)),
        "lm_head": (1, 4 * (64 + result.model.config.vocab_size)),
    }
    assert recorded_blocks(result.model)[QKV] == {
        "sizes": {"qkv_proj": 128},
        "enabled": ["qkv_proj"],
        "r": [8],
        "scaling": [2.0],
    }
    base = tiny_phi3()[0]
    for name in (QKV, SECOND_QKV, "lm_head"):
        assert torch.equal(layer_of(result.model, name).base_layer.weight, base.get_submodule(name).weight)
    assert result.model.peft_config["default"].init_lora_weights is True


def test_dora_on_a_whole_weight_is_computed_by_peft() -> None:
    model = attached(target_modules=["qkv_proj", "o_proj"], use_dora=True).model
    x = torch.randn(2, 3, layer_of(model).in_features)
    ours = layer_of(model)(x)
    assert torch.equal(ours, layer_of(unfuse_lora(model))(x))
    assert "lora_magnitude_vector" in str(list(model.state_dict()))


def test_modules_to_save_and_bias_are_pefts() -> None:
    model = attached(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all").model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {"base_model.model.lm_head.modules_to_save.default.weight"}


def test_the_folder_is_a_plain_adapter_with_its_row_blocks_beside_it(tmp_path: Path) -> None:
    model = randomize(attached(target_modules=["q_proj", "v_proj"]).model)
    (tmp_path / "phlora.json").write_text('{"base_model": "Türkçe"}', encoding="utf-8")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("qkv_proj.")[2]: tuple(t.shape) for name, t in tensors.items()} == {
        "lora_A.weight": (8, 64),
        "lora_B.weight": (128, 8),
    }
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.target_modules, config.r, config.lora_alpha) == ({"qkv_proj"}, 8, 16)
    facts = json.loads((tmp_path / "phlora.json").read_text(encoding="utf-8"))
    assert facts["base_model"] == "Türkçe"
    assert facts["blocks"][QKV] == {
        "sizes": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "enabled": ["q_proj", "v_proj"],
        "r": [4, 4],
        "scaling": [2.0, 2.0],
    }


UNEQUAL = {
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"q_proj": 6},
    "alpha_pattern": {"up_proj": 5},
}


@pytest.mark.parametrize("peft_config", [{"target_modules": ["q_proj", "v_proj", "o_proj"]}, UNEQUAL])
def test_a_saved_adapter_comes_back_into_blocks_bit_for_bit(tmp_path: Path, peft_config: Any) -> None:
    model = randomize(attached(**peft_config).model)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_phi3()[0], tmp_path, trainable=True).model
    assert not any(isinstance(module, BlockUp) for module in loaded.modules())
    back = fuse_lora(split_adapter(loaded, tmp_path))
    ours = {n: p for n, p in model.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in back.named_parameters() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and theirs[n].requires_grad for n in ours)
    assert recorded_blocks(back) == recorded_blocks(model)
    again = tmp_path / "again"
    back.save_pretrained(again)
    assert (again / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


def test_a_state_dict_goes_into_fresh_blocks_bit_for_bit(tmp_path: Path) -> None:
    model, fresh = randomize(attached(**UNEQUAL).model), attached(**UNEQUAL).model
    model.save_pretrained(tmp_path)
    result = set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora_" in k]
    for (name, ours), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_blocks_are_not_taken_from_an_adapter_that_has_none(tmp_path: Path) -> None:
    model = randomize(attached(target_modules=["q_proj", "v_proj"]).model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name][70] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    plain = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path)
    with pytest.raises(ModelError, match="lie outside the blocks q_proj, v_proj"):
        split_adapter(plain, tmp_path)
    with pytest.raises(ModelError, match="lie outside the blocks q_proj, v_proj"):
        set_peft_model_state_dict(model, tensors)
    (tmp_path / "phlora.json").unlink()
    with pytest.raises(ModelError, match="names no row blocks"):
        split_adapter(plain, tmp_path)


def test_a_full_memory_is_not_called_a_setting_that_peft_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("phlora.adapters.attach.get_peft_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        attached(target_modules=["qkv_proj"])


def test_whole_modules_that_train_in_16_bits_are_named() -> None:
    peft_config = {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}
    narrow, wide = (attach(model, peft_config) for model in (tiny_phi3()[0].bfloat16(), tiny_phi3()[0]))
    assert [note for note in narrow.notes if "lm_head trains in bfloat16" in note]
    assert not wide.notes


@pytest.mark.parametrize(
    "bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}]
)
def test_row_blocks_on_a_model_that_transformers_quantised(
    model_folder: Path, tmp_path: Path, bits: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")

    def quantised() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model_folder, quantization_config=BitsAndBytesConfig(**bits), dtype=torch.float32
        )

    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = attach(quantised(), settings).model
    assert getattr(model, "is_loaded_in_4bit", False) or model.is_loaded_in_8bit
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = model.eval()(ids).logits
    model.save_pretrained(str(tmp_path))
    # In 8 bits bitsandbytes rounds what is multiplied too, which Phlora does not: its layer is taken on both sides.
    base = quantised()
    use_operands(base)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, stock(ids).logits, rtol=1e-4, atol=1e-4)
