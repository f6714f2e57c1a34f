"""loralib's files and PEFT's folders: every bit kept, nothing guessed, nothing unsafe opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from both_forms import (
    SIZES,
    GPT2Like,
    base_state,
    fill,
    loralib_state,
    there_and_back,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import phlora.lora as lora
from phlora.adapters.loralib_file import write_loralib
from phlora.adapters.peft_folder import read_peft
from phlora.testing import tiny_phi3


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_loralib_checkpoint_answers_alike_in_stock_peft_and_comes_back_bit_equal(
    tmp_path: Path, bias: str
) -> None:
    theirs = fill(GPT2Like(loralib))
    torch.save(loralib.lora_state_dict(theirs, bias=bias), tmp_path / "adapter.pt")
    back = there_and_back(tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=32, enable=["q", "v"])

    base = GPT2Like()
    base.load_state_dict({name: value for name, value in theirs.state_dict().items() if "lora_" not in name})
    if bias != "none":
        base.c_attn.bias.data.zero_()
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    ids = torch.arange(11)
    torch.testing.assert_close(tuned(ids), theirs(ids), rtol=1e-4, atol=1e-5)
    assert back.describe() == [
        "1 × c_attn: MergedLinear(r=4, lora_alpha=32, enable_lora=[True, False, True])",
        "1 × c_proj: Linear(r=4, lora_alpha=32)",
        "1 × wte: Embedding(r=4, lora_alpha=32)",
    ]


@pytest.mark.parametrize("enabled", [("q",), ("k",), ("q", "v"), ("k", "v"), ("q", "k", "v")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_of_unequal_blocks_comes_back_bit_equal_and_answers_alike(
    tmp_path: Path, enabled: tuple[str, ...], dtype: torch.dtype
) -> None:
    model, tokenizer = tiny_phi3()
    flags = [name in enabled for name in "qkv"]
    lora.replace(
        model, ["qkv_proj"], r=3, lora_alpha=5, enable_lora=flags, out_features_per_block=(64, 32, 32)
    )
    fill(model)
    state = {name: value.to(dtype) for name, value in lora.lora_state_dict(model).items()}
    torch.save(state, tmp_path / "adapter.pt")
    back = there_and_back(
        tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=5, enable=enabled, blocks=SIZES
    )
    assert (
        f"r=3, lora_alpha=5, enable_lora={flags}, out_features_per_block=[64, 32, 32]" in back.describe()[0]
    )

    lora.load_lora_state_dict(model, {name: value.float() for name, value in state.items()})
    tuned = PeftModel.from_pretrained(tiny_phi3()[0], str(tmp_path / "peft"))
    ids = tokenizer("merhaba dünya", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_peft_adapter_becomes_loralib_layers_with_the_same_output(tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(0)
    base = GPT2Like()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn", "c_proj"],
        rank_pattern={"c_proj": 2},
        alpha_pattern={"c_proj": 3},
        use_rslora=use_rslora,
    )
    tuned = fill(get_peft_model(base, config))
    tuned.save_pretrained(str(tmp_path))
    adapter = read_peft(tmp_path)
    ours = GPT2Like()
    plain = {k.replace(".base_layer", ""): v for k, v in tuned.base_model.model.state_dict().items()}
    ours.load_state_dict({name: value for name, value in plain.items() if "lora_" not in name})
    for layer in adapter.layers:
        lora.replace(ours, [layer.name], r=layer.r, lora_alpha=layer.lora_alpha)
    write_loralib(adapter, tmp_path / "adapter.pt")
    lora.load_lora_state_dict(ours, loralib_state(tmp_path / "adapter.pt"))
    ids = torch.arange(11)
    torch.testing.assert_close(ours(ids), tuned(ids), rtol=1e-5, atol=1e-5)
    assert {layer.name: layer.r for layer in adapter.layers} == {"c_attn": 4, "c_proj": 2}


def test_an_embedding_of_any_name_stays_one_on_the_way_from_peft(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4))
    tuned = fill(get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"])))
    tuned.save_pretrained(str(tmp_path))
    adapter = read_peft(tmp_path)
    assert adapter.describe() == ["1 × 0: Embedding(r=3, lora_alpha=6)", "1 × 1: Linear(r=3, lora_alpha=6)"]
    write_loralib(adapter, tmp_path / "adapter.pt")
    theirs = nn.Sequential(
        loralib.Embedding(11, 8, r=3, lora_alpha=6), loralib.Linear(8, 4, r=3, lora_alpha=6)
    )
    theirs.load_state_dict({**base_state(tuned), **loralib_state(tmp_path / "adapter.pt")})
    torch.testing.assert_close(theirs(torch.arange(11)), tuned(torch.arange(11)))


CONVOLUTIONS = [
    (loralib.Conv2d, (3, 3), 3),
    (loralib.Conv2d, (1, 1), 1),
    (lora.Conv1d, (3,), 3),
    (lora.Conv2d, (2, 3), (2, 3)),
    (lora.Conv3d, (2, 2, 2), 2),
]


@pytest.mark.parametrize(("kind", "kernel", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_convolution_answers_alike_in_stock_peft_and_comes_back_bit_equal(
    tmp_path: Path, kind: Any, kernel: tuple[int, ...], size: Any, bias: str
) -> None:
    how = {"stride": 2, "padding": 1}
    theirs = fill(nn.ModuleDict({"features": kind(6, 4, size, r=2, lora_alpha=5, **how)}))
    torch.save(lora.lora_state_dict(theirs, bias=bias), tmp_path / "adapter.pt")
    adapter = there_and_back(
        tmp_path / "adapter.pt", tmp_path / "peft", lora_alpha=5, kernels={"features": kernel}
    )
    plain = getattr(nn, f"Conv{len(kernel)}d")(6, 4, size, **how)
    plain.load_state_dict(theirs["features"].conv.state_dict())
    if bias != "none":
        plain.bias.data.zero_()
    tuned = PeftModel.from_pretrained(nn.ModuleDict({"features": plain}), str(tmp_path / "peft"))
    x = torch.randn(3, 6, *[7] * len(kernel))
    torch.testing.assert_close(
        tuned.base_model.model["features"](x), theirs["features"](x), rtol=1e-4, atol=1e-5
    )
    named = f"kernel_size={kernel[0] if len(set(kernel)) == 1 else kernel}, r=2, lora_alpha=5"
    assert adapter.describe() == [f"1 × features: Conv{len(kernel)}d({named})"]


def test_a_convolution_of_one_dimension_comes_from_peft_with_the_same_output(tmp_path: Path) -> None:
    base = nn.ModuleDict({"conv": nn.Conv1d(6, 4, 3)})
    tuned = fill(get_peft_model(base, LoraConfig(r=6, lora_alpha=9, target_modules=["conv"])))
    tuned.save_pretrained(str(tmp_path))
    write_loralib(read_peft(tmp_path), tmp_path / "adapter.pt")
    ours = nn.ModuleDict({"conv": lora.Conv1d(6, 4, 3, r=2, lora_alpha=3)})
    ours.load_state_dict({**base_state(tuned), **loralib_state(tmp_path / "adapter.pt")})
    x = torch.randn(2, 6, 7)
    torch.testing.assert_close(ours["conv"](x), tuned.base_model.model["conv"](x), rtol=1e-4, atol=1e-5)
