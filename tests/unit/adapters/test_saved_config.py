"""adapter_config.json and phlora.json from anywhere: each bad value is one message that names file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phlora.adapters.load import load_adapter
from phlora.adapters.peft_folder import read_peft
from phlora.adapters.saved_config import read_adapter_config
from phlora.adapters.saved_facts import read_adapter_facts
from phlora.errors import ModelError
from phlora.testing import tiny_adapter, tiny_phi3


@pytest.fixture(scope="module")
def saved(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(
        model_folder, tmp_path_factory.mktemp("adapters") / "plain", target_modules=["qkv_proj"]
    )


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(adapter: Path, name: str = "adapter_config.json", **values: Any) -> None:
    file = adapter / name
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**facts, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 10**9),
        ("r", None),
        ("r", 5),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", True),
        ("rank_pattern", {"(": 3}),
        ("rank_pattern", {"qkv_proj": 5}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"(.*a?)*(.*)*x": 3}),
        ("target_modules", "(.*a?)*(.*)*x"),
        ("target_modules", "("),
        ("target_modules", {"a": 1}),
        ("exclude_modules", "(.*a?)*(.*)*x"),
        ("layers_pattern", "("),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("bias", "some"),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("fan_in_fan_out", []),
        ("eva_config", 3),
        ("target_parameters", "x"),
    ],
)
def test_a_bad_value_is_named_with_its_file(
    adapter: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(adapter, **{key: value})
    # Seconds that a hang is waited for.
    monkeypatch.setattr("phlora.patterns.matches.__kwdefaults__", {"method": "fullmatch", "seconds": 0.5})
    with pytest.raises(ModelError) as refusal:
        load_adapter(tiny_phi3()[0], adapter)
    assert "adapter_config.json" in str(refusal.value) or "adapter_model" in str(refusal.value)
    assert key in str(refusal.value) or "rank" in str(refusal.value)


def test_what_peft_writes_is_taken(adapter: Path) -> None:
    assert read_adapter_config(adapter / "adapter_config.json")["r"] == 4
    assert load_adapter(tiny_phi3()[0], adapter).report.num_tensors
    edit(adapter, from_a_newer_peft={"x": 1}, corda_config={"a": 1}, lora_alpha=8.5)
    assert read_adapter_config(adapter / "adapter_config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_fingerprint", [1]),
        ("stop_token_ids", [10**30, -5, "x"]),
        ("stop_token_ids", 7),
        ("blocks", {"x": ["q_proj"]}),
        ("blocks", {"x": {"sizes": {"q_proj": 4}, "enabled": ["k_proj"]}}),
        ("blocks", {"x": {"sizes": {"q_proj": 4}, "enabled": ["q_proj"], "r": [0]}}),
        ("blocks", {"x": {"sizes": {"q_proj": -4}, "enabled": ["q_proj"]}}),
        ("step", "x"),
        ("held_out_loss", 10**400),
    ],
)
def test_a_bad_fact_is_named_with_its_file(tmp_path: Path, key: str, value: Any) -> None:
    edit(tmp_path, "phlora.json", **{key: value})
    with pytest.raises(ModelError, match=f"phlora.json.*`{key}`"):
        read_adapter_facts(tmp_path)


def test_what_is_left_out_or_null_is_no_mistake(tmp_path: Path) -> None:
    assert read_adapter_facts(tmp_path) == {}
    edit(tmp_path, "phlora.json", base_model=None, stop_token_ids=[0, 32000])
    assert read_adapter_facts(tmp_path)["stop_token_ids"] == [0, 32000]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_converting_names_a_tensor_that_is_not_finite(adapter: Path, value: float) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="lora_A.* no finite numbers"):
        read_peft(adapter)


def test_row_blocks_of_unequal_rank_say_what_loralib_lacks(adapter: Path) -> None:
    blocks = {
        "sizes": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "enabled": ["q_proj", "v_proj"],
        "r": [1, 3],
    }
    edit(adapter, "phlora.json", blocks={"model.layers.0.self_attn.qkv_proj": blocks})
    with pytest.raises(ModelError, match=r"ranks 1 \(q_proj\), 3 \(v_proj\)") as refusal:
        read_peft(adapter)
    assert "--enable" not in str(refusal.value)
