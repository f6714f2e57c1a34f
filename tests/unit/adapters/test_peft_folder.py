"""PEFT's folder, with the row blocks beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from both_forms import (
    SIZES,
    GPT2Like,
    fill,
    stacked,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from phlora.adapters.loralib_file import read_loralib
from phlora.adapters.peft_folder import read_peft, write_peft
from phlora.errors import ConfigError, ModelError


def test_scaling_is_kept_where_ranks_differ(tmp_path: Path) -> None:
    """Total rank and alpha grow together, so a runtime that reads only `lora_alpha / r` is right too."""
    theirs = fill(GPT2Like(loralib))
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "adapter.pt")
    write_peft(read_loralib(tmp_path / "adapter.pt", lora_alpha=32, enable=["q", "v"]), tmp_path)
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha) == (8, 64)
    assert config.rank_pattern == {"c_proj": 4, "wte": 4}
    assert config.alpha_pattern == {"c_proj": 32, "wte": 32}


def test_blocks_of_a_peft_adapter_can_be_named_and_have_to_be_block_diagonal(tmp_path: Path) -> None:
    A, B = torch.randn(4, 8), torch.zeros(128, 4)
    B[:64, :2], B[96:, 2:] = torch.randn(64, 2), torch.randn(32, 2)
    folder = tmp_path / "peft"
    folder.mkdir()
    torch.save({"x.qkv_proj.lora_A": A, "x.qkv_proj.lora_B": B}, tmp_path / "plain.pt")
    write_peft(read_loralib(tmp_path / "plain.pt", lora_alpha=8), folder)
    assert read_peft(folder).layers[0].layout is None
    (layer,) = read_peft(folder, enable=["q", "v"], blocks=SIZES).layers
    assert torch.equal(layer.lora_A, A) and (layer.r, layer.lora_alpha) == (2, 4)
    assert torch.equal(layer.lora_B, torch.cat([B[:64, :2], B[96:, 2:]]))
    with pytest.raises(ModelError, match="outside the blocks q_proj, k_proj"):
        read_peft(folder, enable=["q", "k"], blocks=SIZES)
    with pytest.raises(ConfigError, match="sizes are not known"):
        read_peft(folder, enable=["q", "v"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "2 of 6 tensors .*lora_magnitude_vector"),
        ({"modules_to_save": ["c_proj"], "target_modules": ["c_attn"]}, "1 of 4 tensors .*c_proj.weight"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_loralib_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["c_attn", "c_proj"], **changes})
    get_peft_model(GPT2Like(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=message):
        read_peft(tmp_path)


@pytest.mark.parametrize(("r", "how"), [(18, {}), (6, {}), (18, {"groups": 2})])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_that_loralib_cannot_say_is_refused(tmp_path: Path, r: int, how: Any) -> None:
    base = nn.ModuleDict({"conv": nn.Conv2d(6, 4, 3, **how)})
    fill(get_peft_model(base, LoraConfig(r=r, target_modules=["conv"]))).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="no groups, a rank that 9 divides, and an A of 3 equal diagonal"):
        read_peft(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter_config.json"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(ModelError, match="of the kind LOHA"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        read_peft(tmp_path)


def test_what_is_written_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    file = stacked(tmp_path / "a.pt", 96, num_blocks=2)
    adapter = read_loralib(file, lora_alpha=4, enable=["q", "v"], blocks=SIZES)
    write_peft(adapter, tmp_path, base_model="some/base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "base_model.model.x.qkv_proj.lora_A.weight": (4, 8),
        "base_model.model.x.qkv_proj.lora_B.weight": (128, 4),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "some/base")
    facts = json.loads((tmp_path / "phlora.json").read_text())
    (tmp_path / "phlora.json").write_text(json.dumps({"blocks": {"x.qkv_proj": ["q_proj"]}}))
    with pytest.raises(ModelError, match="`blocks` is"):
        read_peft(tmp_path)
    (blocks,) = facts["blocks"].values()
    assert blocks == {
        "sizes": SIZES["qkv_proj"],
        "enabled": ["q_proj", "v_proj"],
        "r": [2, 2],
        "scaling": [2.0, 2.0],
    }
