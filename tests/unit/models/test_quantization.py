"""Quantising a base model: what is rounded, what stays, what is said, and by what an adapter knows it again."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from phlora.adapters.load import load_adapter
from phlora.config import ModelConfig, QuantizationConfig, build_config, resolved
from phlora.config_values import apply_overrides
from phlora.errors import ConfigError, MissingExtraError, ModelError
from phlora.models.fingerprint import fingerprint
from phlora.models.load import load_model
from phlora.models.operands import is_quantized
from phlora.models.quantization import dequantize, quantize, stored_bytes
from phlora.testing import tiny_phi3

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_phi3()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(folder: Path, quantization: Any = None, dtype: str = "float32") -> Any:
    return load_model(folder, device="cpu", dtype=dtype, quantization=quantization)


def adapter_on(base: nn.Module, path: Path, base_fingerprint: str) -> Path:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(path)
    (path / "phlora.json").write_text(json.dumps({"base_fingerprint": base_fingerprint}))
    return path


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(folder: Path, storage: str) -> None:
    dense, model = load(folder).model, load(folder, storage).model
    rounded = {name for name, module in model.named_modules() if is_quantized(module)}
    leaves = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert {name.rpartition(".")[2] for name in rounded} == set(leaves) and len(rounded) == 2 * 4
    left = {n: p for n, p in dense.named_parameters() if n.removesuffix(".weight") not in rounded}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= left.keys()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in left.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("storage", "most"), [("nf4", 0.17), ("int8", 0.28)])
def test_the_note_states_the_bytes_that_are_held(folder: Path, storage: str, most: float, dtype: str) -> None:
    dense = load(folder, dtype=dtype).model
    before = stored_bytes(dense)
    report = quantize(dense, QuantizationConfig(type=storage), device=CPU)
    assert report.model_bytes == (before, stored_bytes(dense))
    assert report.num_layers == 8 and f"embeddings stay {dtype}" in str(report)
    share = report.layer_bytes[1] / report.layer_bytes[0]
    assert share < most * (1 if dtype == "float32" else 2)
    saved = report.layer_bytes[0] - report.layer_bytes[1]
    assert report.model_bytes[0] - report.model_bytes[1] == saved
    assert any(note.startswith(f"{storage}: 8 linear layers") for note in load(folder, storage).notes)


def test_the_compute_dtype_reaches_the_layers(folder: Path) -> None:
    for storage in ("nf4", "int8"):
        model = load(folder, {"type": storage, "compute_dtype": "bfloat16"}).model
        assert model.model.layers[0].mlp.down_proj.compute_dtype == torch.bfloat16
        assert load(folder, storage).model.model.layers[0].mlp.down_proj.compute_dtype is None


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_copy_computes_the_same(folder: Path, storage: str) -> None:
    model = load(folder, storage).model
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_the_embedded_model_still_knows_its_capitals(smollm2_folder: Path) -> None:
    from phlora.models.generate import generate

    loaded = load_model("smollm2-135m", dtype="float32", device="cpu", quantization="nf4")
    tokenizer = loaded.tokenizer.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    stops = loaded.tokenizer.stop_token_ids
    answer = generate(
        loaded.model, [prompt], max_new_tokens=7, stop_token_ids=stops, pad_token_id=tokenizer.pad_token_id
    )
    assert "Paris" in tokenizer.decode(answer[0])
    assert 4.5 * stored_bytes(nn.ModuleList(loaded.model.model.layers)) < 424.7e6
    assert stored_bytes(loaded.model) < 0.33 * 538.1e6


# --------------------------------------------------------------------------------------------------- refusals


def test_without_the_package_the_install_command_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(MissingExtraError, match=r"phlora\[qlora\]"):
        load(folder, "nf4")
    assert load(folder).model is not None


def test_a_model_is_quantised_once(folder: Path) -> None:
    model = load(folder, "int8").model
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(model, QuantizationConfig(type="nf4"), device=CPU)


def test_an_unknown_storage_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `nf4`"):
        load(folder, "nf5")
    with pytest.raises(ConfigError, match="double_quant"):
        load(folder, {"type": "nf4", "double_quan": True})


# ---------------------------------------------------------------------------------------------- configuration


def model_section(model: Any, *overrides: str) -> ModelConfig:
    return build_config(*apply_overrides({"model": model, "data": "d"}, overrides)).model


def test_a_type_alone_is_the_whole_section() -> None:
    assert model_section({"name": "m"}).quantization is None
    assert model_section({"name": "m", "quantization": "nf4"}).quantization == QuantizationConfig(type="nf4")
    section = {"type": "nf4", "double_quant": False, "compute_dtype": "bfloat16"}
    assert model_section({"name": "m", "quantization": section}).quantization == QuantizationConfig(**section)


def test_overrides_set_the_type_a_part_or_nothing() -> None:
    model = {"name": "m", "quantization": "nf4"}
    assert model_section("m", "model.quantization=int8").quantization.type == "int8"
    changed = model_section(model, "model.quantization.double_quant=false").quantization
    assert changed == QuantizationConfig(type="nf4", double_quant=False)
    assert model_section(model, "model.quantization=null").quantization is None


def test_the_origin_of_a_type_alone_is_known_and_resolved_values_read_back() -> None:
    config = build_config(*apply_overrides({"model": "m", "data": "d"}, ["model.quantization=nf4"]))
    assert config.origins["model.quantization.type"] == "--set"
    assert build_config(resolved(config), config.origins) == config


@pytest.mark.parametrize("value", [4, True, ["nf4"], {"double_quant": True}])
def test_a_quantisation_of_the_wrong_form_is_told(value: Any) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        model_section({"name": "m", "quantization": value})


# ------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_that_of_the_weights_before_with_the_storage_behind_it(folder: Path) -> None:
    base = load(folder)
    rounded = load(folder, "nf4", dtype="bfloat16")
    assert rounded.fingerprint == f"{base.fingerprint}+nf4" == fingerprint(rounded.model)
    assert load(folder, "int8").fingerprint == f"{base.fingerprint}+int8"
    assert load(folder, {"type": "nf4", "double_quant": False}).fingerprint not in (
        base.fingerprint,
        rounded.fingerprint,
    )
    adapted = get_peft_model(load(folder, "nf4").model, LoraConfig(target_modules="all-linear"))
    assert fingerprint(adapted) == fingerprint(dequantize(adapted)) == rounded.fingerprint


def test_an_adapter_moves_between_the_forms_of_its_base_with_a_note(folder: Path, tmp_path: Path) -> None:
    forms = {name: load(folder, name).fingerprint for name in (None, "nf4")}
    on_nf4 = adapter_on(load(folder, "nf4").model, tmp_path / "nf4", forms["nf4"])
    on_dense = adapter_on(load(folder).model, tmp_path / "dense", forms[None])
    assert load_adapter(load(folder, "nf4").model, on_nf4).report.notes == ()
    assert load_adapter(dequantize(load(folder, "nf4").model), on_nf4).report.notes == ()
    (note,) = load_adapter(load(folder).model, on_nf4).report.notes
    assert "trained on the nf4 form of these weights and sits on the unquantised form" in note
    (note,) = load_adapter(load(folder, "int8").model, on_dense).report.notes
    assert "trained on the unquantised form of these weights and sits on the int8 form" in note


def test_other_weights_are_refused_in_every_form(folder: Path, tmp_path: Path) -> None:
    path = adapter_on(load(folder, "nf4").model, tmp_path, load(folder, "nf4").fingerprint)
    other = tiny_phi3(seed=1)[0]
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(other, path)
    quantize(other, QuantizationConfig(type="nf4"), device=CPU)
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(other, path)


# ----------------------------------------------------------------------------------------------- dequantising


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_dequantised_layers_are_plain_and_compute_the_same(
    folder: Path, storage: str, dtype: torch.dtype
) -> None:
    model = load(folder, storage, dtype=str(dtype).removeprefix("torch.")).model
    with torch.no_grad():
        before = model(IDS).logits
        dense = dequantize(model)
        assert dense is model and not any(is_quantized(module) for module in dense.modules())
        assert torch.equal(dense(IDS).logits, before)
    assert type(dense.model.layers[0].mlp.down_proj) is nn.Linear
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}


def test_a_dequantised_model_is_saved_and_loaded_like_any_other(folder: Path, tmp_path: Path) -> None:
    model = dequantize(load(folder, "nf4").model)
    model.save_pretrained(tmp_path)
    load(folder).tokenizer.tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


def test_a_dense_model_is_left_as_it_is(folder: Path) -> None:
    model = load(folder).model
    layer = model.model.layers[0].mlp.down_proj
    assert dequantize(model).model.layers[0].mlp.down_proj is layer
