"""Adapters apart from files: what they add to each weight, in every form, against PEFT's own sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from phlora import load_adapter
from phlora.adapters.attach import attach
from phlora.adapters.convert import last_part
from phlora.adapters.peft_folder import read_portable, write_portable
from phlora.adapters.portable import (
    PlainLayer,
    PortableAdapter,
    fitted,
    folded,
    fused,
    require_plain,
    split,
    uniform,
)
from phlora.errors import ModelError
from phlora.models.families import projection_rows
from phlora.testing import invoke, tiny_adapter, tiny_folder, tiny_phi3

IDS = torch.arange(3, 40)[None]
MIXED = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "rank_pattern": {"q_proj": 6, "down_proj": 3},
    "alpha_pattern": {"v_proj": 5},
}


def llama_twin(model: Any) -> Any:
    """The same function in Llama layout."""
    given = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(given, name) for name in (*names, "num_key_value_heads", "rms_norm_eps")}
    twin = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=given.rope_parameters)).eval()
    state = {}
    for name, value in model.state_dict().items():
        parts = projection_rows(given).get(last_part(name.removesuffix(".weight")))
        if parts is None:
            state[name] = value
            continue
        fused_name = last_part(name.removesuffix(".weight"))
        for part, rows in zip(parts, value.split(list(parts.values())), strict=True):
            state[name.replace(fused_name, part)] = rows.clone()
    twin.load_state_dict(state)
    return twin


def randomized(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "phi3")


@pytest.fixture(scope="module")
def twin(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "llama"
    llama_twin(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blocks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phlora adapter on row blocks with unequal ranks and scalings."""
    folder = tmp_path_factory.mktemp("blocks") / "adapter"
    randomized(attach(tiny_phi3()[0], MIXED).model).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def split_adapter(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of stock PEFT on the twin in Llama layout."""
    folder = tmp_path_factory.mktemp("split") / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(twin), LoraConfig(**MIXED))
    randomized(model).save_pretrained(str(folder))
    return folder


def logits(base: Path, adapter: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        return model(IDS).logits


def deltas(adapter: PortableAdapter) -> dict[str, Tensor]:
    """What is added to each weight, in fp64."""
    return {
        layer.name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double() for layer in adapter.layers
    }


def test_the_deltas_are_those_that_peft_computes(base: Path, blocks: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(blocks))
    for name, delta in deltas(read_portable(blocks)).items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=1e-5, atol=1e-7)


def test_ranks_alphas_blocks_and_dtypes_are_read(blocks: Path) -> None:
    layers = {last_part(layer.name): layer for layer in read_portable(blocks).layers}
    qkv = layers["qkv_proj"]
    assert [(block.name, block.r, block.scaling) for block in qkv.blocks] == [
        ("q_proj", 6, 1.0),
        ("v_proj", 4, 1.25),
    ]
    assert (qkv.r, qkv.sizes) == (10, {"q_proj": 64, "k_proj": 32, "v_proj": 32})
    assert (layers["down_proj"].r, layers["down_proj"].scaling) == (3, 2.0)
    assert layers["o_proj"].lora_A.dtype == torch.float32 and layers["o_proj"].blocks == ()


def test_folding_and_padding_keep_every_delta(blocks: Path) -> None:
    adapter = read_portable(blocks)
    for form in (folded(adapter), uniform(adapter)):
        assert all(layer.scaling == 1 for layer in form.layers)
        for name, delta in deltas(form).items():
            torch.testing.assert_close(delta, deltas(adapter)[name], rtol=1e-6, atol=1e-8)
    assert {layer.r for layer in uniform(adapter).layers} == {adapter.largest_rank} == {10}


def test_a_scaling_that_is_a_power_of_two_is_folded_exactly() -> None:
    layer = PlainLayer(name="x", lora_A=torch.randn(2, 3), lora_B=torch.randn(4, 2).bfloat16(), lora_alpha=8)
    (exact,) = folded(PortableAdapter(layers=(layer,))).layers
    assert exact.lora_B.dtype == torch.bfloat16 and torch.equal(exact.lora_B, layer.lora_B * 4)
    (rounded,) = folded(PortableAdapter(layers=(PlainLayer(**{**vars(layer), "lora_alpha": 3}),))).layers
    assert rounded.lora_B.dtype == torch.float32 and torch.equal(rounded.lora_B, layer.lora_B.float() * 1.5)


def test_the_uniform_form_is_right_for_programs_that_read_one_rank_and_alpha(
    base: Path, blocks: Path, tmp_path: Path
) -> None:
    write_portable(uniform(read_portable(blocks)), tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (10, 10, {}, {})
    torch.testing.assert_close(logits(base, tmp_path), logits(base, blocks), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_twin_goes_onto_fused_weights_and_back_to_the_bit(
    base: Path, twin: Path, split_adapter: Path, tmp_path: Path
) -> None:
    there = read_portable(split_adapter)
    sizes = projection_rows(AutoModelForCausalLM.from_pretrained(base).config)
    on_fused = fused(there, sizes)
    assert {last_part(layer.name) for layer in on_fused.layers} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    write_portable(on_fused, tmp_path)
    torch.testing.assert_close(logits(base, tmp_path), logits(twin, split_adapter), rtol=1e-4, atol=1e-4)
    back = {layer.name: layer for layer in split(read_portable(tmp_path), sizes).layers}
    assert back.keys() == {layer.name for layer in there.layers}
    for layer in there.layers:
        own = back[layer.name]
        assert torch.equal(own.lora_A, layer.lora_A) and torch.equal(own.lora_B, layer.lora_B)
        assert own.scaling == pytest.approx(layer.scaling, rel=1e-15)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"]])
def test_an_adapter_on_whole_fused_weights_goes_to_the_twin_and_back_to_the_bit(
    base: Path, twin: Path, tmp_path: Path, targets: Any
) -> None:
    adapter = read_portable(tiny_adapter(base, tmp_path / "whole", target_modules=targets, lora_alpha=6))
    sizes = projection_rows(AutoModelForCausalLM.from_pretrained(base).config)
    write_portable(split(adapter, sizes), tmp_path / "split")
    torch.testing.assert_close(
        logits(twin, tmp_path / "split"), logits(base, tmp_path / "whole"), rtol=1e-4, atol=1e-4
    )
    back = fused(read_portable(tmp_path / "split"), sizes)
    assert {layer.name for layer in back.layers} == {layer.name for layer in adapter.layers}
    for before, after in zip(*(sorted(a.layers, key=lambda x: x.name) for a in (adapter, back)), strict=True):
        assert before.scaling == after.scaling
        assert torch.equal(before.lora_A, after.lora_A) and torch.equal(before.lora_B, after.lora_B)


def test_a_block_diagonal_B_without_a_note_of_its_blocks_is_split_by_its_zeros(
    base: Path, blocks: Path
) -> None:
    adapter = read_portable(blocks)
    plain = [
        PlainLayer(name=x.name, lora_A=x.lora_A, lora_B=x.lora_B, lora_alpha=x.lora_alpha)
        for x in adapter.layers
    ]
    sizes = projection_rows(AutoModelForCausalLM.from_pretrained(base).config)
    noted, found = split(adapter, sizes), split(PortableAdapter(layers=tuple(plain)), sizes)
    assert [layer.r for layer in noted.layers] == [layer.r for layer in found.layers]
    for name, delta in deltas(noted).items():
        torch.testing.assert_close(deltas(found)[name], delta)


def test_it_loads_on_the_fused_base_and_on_the_twin(
    base: Path, twin: Path, blocks: Path, split_adapter: Path
) -> None:
    for own, other, adapter in ((twin, base, split_adapter), (base, twin, blocks)):
        loaded = load_adapter(AutoModelForCausalLM.from_pretrained(other), adapter)
        with torch.no_grad():
            here = loaded.model.eval()(IDS).logits
        torch.testing.assert_close(here, logits(own, adapter), rtol=1e-4, atol=1e-4)
        assert any("carried over exactly" in note for note in loaded.report.notes)


def test_the_command_converts_between_the_layouts(
    base: Path, twin: Path, split_adapter: Path, tmp_path: Path
) -> None:
    done = invoke("convert", split_adapter, "--to", "peft", "-o", tmp_path / "fused", "--model", base)
    assert done.code == 0, done.err
    config = LoraConfig.from_pretrained(str(tmp_path / "fused"))
    assert config.base_model_name_or_path == str(base)
    torch.testing.assert_close(
        logits(base, tmp_path / "fused"), logits(twin, split_adapter), rtol=1e-4, atol=1e-4
    )
    done = invoke("convert", tmp_path / "fused", "--to", "peft", "-o", tmp_path / "back", "--model", twin)
    assert done.code == 0, done.err
    assert torch.equal(logits(twin, tmp_path / "back"), logits(twin, split_adapter))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, None),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
    ],
)
def test_what_is_more_than_A_and_B_is_named(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str | None
) -> None:
    adapter = read_portable(tiny_adapter(base, tmp_path / "a", target_modules=["qkv_proj"], **options))
    if message is None:
        assert adapter.biases == {}, "Phi-3 has none"
        return require_plain(adapter, target="vLLM")
    with pytest.raises(ModelError, match=f"{message}.* which vLLM does not take") as caught:
        require_plain(adapter, target="vLLM")
    assert "phlora merge" in str(caught.value)


def test_a_base_of_other_sizes_is_refused(split_adapter: Path) -> None:
    config = tiny_phi3()[0].config
    config.num_key_value_heads = 1
    with pytest.raises(ModelError, match="lora_B has 32 rows"):
        fitted(read_portable(split_adapter), config)
