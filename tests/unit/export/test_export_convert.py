"""Converting folders and files: to the bit, with everything that belongs to an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import phlora.lora as lora
from phlora.display import Display
from phlora.errors import ConfigError
from phlora.export.convert import convert, convert_to_model, parse_blocks
from phlora.export.merge import merge_run
from phlora.testing import LANGUAGES, tiny_phi3

TEXTS = list(LANGUAGES.values())
QUIET = Display(quiet=True)


def test_a_run_becomes_a_loralib_file_and_a_loralib_file_becomes_the_same_model(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    report = convert(run, tmp_path / "adapter.pt", to="loralib")
    assert report.num_tensors == 16 and "2 × qkv_proj: Linear(r=4, lora_alpha=8)" in report.summary()
    merged = merge_run(run, tmp_path / "a", display=QUIET)
    again = convert_to_model(
        tmp_path / "adapter.pt",
        tmp_path / "b",
        lora_alpha=8,
        model=str(model_folder),
        rows=run / "heldout.jsonl",
        display=QUIET,
    )
    assert again.num_tokens == merged.num_tokens and again.adapter == str(tmp_path / "adapter.pt")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_blocks_come_from_the_base_model(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_phi3()
    lora.replace(
        model,
        ["qkv_proj"],
        r=2,
        lora_alpha=4,
        enable_lora=[True, False, True],
        out_features_per_block=(64, 32, 32),
    )
    torch.manual_seed(0)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.qkv_proj.lora_B, std=0.1)
    torch.save(lora.lora_state_dict(model), tmp_path / "in.pt")
    report = convert(
        tmp_path / "in.pt",
        tmp_path / "peft",
        to="peft",
        lora_alpha=4,
        enable=["q", "v"],
        model=str(model_folder),
    )
    assert report.num_tensors == 4
    convert(tmp_path / "peft", tmp_path / "out.pt", to="loralib")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("in.pt", "out.pt"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    ids = tokenizer(TEXTS[3], return_tensors="pt").input_ids
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_pickled_peft_adapter_becomes_safetensors_with_everything_beside_it(
    adapter: Path, tmp_path: Path
) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (adapter / "optimizer.pt").write_bytes(b"large")
    report = convert(adapter, tmp_path / "out", to="peft")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.num_tensors == len(tensors) == 16
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "chat_template.jinja"} <= names
    assert not {"adapter_model.bin", "optimizer.pt"} & names


def test_lora_alpha_is_asked_for_where_it_is_unknown_and_nowhere_else(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "adapter.pt"
    convert(adapter, file, to="loralib")
    with pytest.raises(ConfigError, match="--lora-alpha 32"):
        convert(file, tmp_path / "x", to="peft")
    with pytest.raises(ConfigError, match="leave it out"):
        convert(adapter, tmp_path / "x", to="peft", lora_alpha=8)
    for to in (convert_to_model, lambda *paths, **options: convert(*paths, to="peft", **options)):
        with pytest.raises(ConfigError, match="knows no blocks"):
            to(adapter, tmp_path / "x", enable=["q"])
    with pytest.raises(ConfigError, match="--model BASE"):
        convert_to_model(file, tmp_path / "x", lora_alpha=8)
    assert not (tmp_path / "x").exists()


def test_blocks_on_the_command_line() -> None:
    assert parse_blocks([]) is None
    assert parse_blocks(["qkv_proj=64,32,32", "mixer=4,8"]) == {
        "qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "mixer": {"0": 4, "1": 8},
    }
    for text in ("qkv_proj", "qkv_proj=64,32", "=3,4", "mixer=3,-4", "mixer=3,x"):
        with pytest.raises(ConfigError, match="--blocks"):
            parse_blocks([text])
