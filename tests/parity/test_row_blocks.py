"""Row blocks against LoRA on the unfused layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as peft_lora
from peft_blocks import (
    IDS,
    ROUNDING,
    assert_same,
    blocks,
    fused_layers,
    logits,
    loss_and_gradients,
    train,
)
from torch import Tensor, nn

from phlora.adapters.block_modules import BlockUp
from phlora.adapters.peft_layer import LoraLinear, unfuse_lora
from phlora.testing import tiny_phi3


class Unfused(nn.Module):
    """A fused linear layer as three linear layers side by side, each with PEFT's LoRA where it is adapted."""

    def __init__(self, layer: LoraLinear, sizes: dict[str, int]) -> None:
        super().__init__()
        up = layer.lora_B["default"]
        ranks = [block.r for block in up.blocks]
        downs = dict(
            zip((b.name for b in up.blocks), layer.lora_A["default"].weight.split(ranks), strict=True)
        )
        ups = dict(zip((b.name for b in up.blocks), zip(up.parts, up.blocks, strict=True), strict=True))
        rows = dict(zip(sizes, layer.base_layer.weight.split(list(sizes.values())), strict=True))
        self.parts = nn.ModuleDict()
        for name, size in sizes.items():
            linear = nn.Linear(64, size, bias=False, device=rows[name].device).requires_grad_(False)
            linear.weight.data = rows[name].detach().clone()
            self.parts[name] = linear
            if name in ups:
                B, block = ups[name]
                config = LoraConfig(r=block.r)
                part = peft_lora.Linear(
                    linear, "default", config=config, r=block.r, lora_alpha=block.scaling * block.r
                )
                part.lora_A["default"].weight.data = downs[name].detach().clone()
                part.lora_B["default"].weight.data = B.detach().clone()
                self.parts[name] = part

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts.values()], -1)


def unfused(model: PeftModel) -> PeftModel:
    """A copy in which every layer with row blocks is unfused."""
    sizes = {
        "qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
        "gate_up_proj": {"gate_proj": 112, "up_proj": 112},
    }
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear) and isinstance(layer.lora_B["default"], BlockUp):
            model.set_submodule(name, Unfused(layer, sizes[name.rpartition(".")[2]]))
    return unfuse_lora(model)


def by_block(model: PeftModel, *, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """A value of every trainable parameter, row blocks apart, under the names of the unfused model."""
    values = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value, layer = of(parameter), model.get_submodule(name.rpartition(".lora_")[0])
        up = layer.lora_B["default"]
        if not isinstance(up, BlockUp):
            values[name] = value
        elif "lora_A" in name:
            for block, part in zip(up.blocks, value.split([b.r for b in up.blocks]), strict=True):
                values[name.replace(".lora_A", f".parts.{block.name}.lora_A")] = part
        else:
            head, _, block_name = name.rpartition(".weight_")
            values[head.replace(".lora_B", f".parts.{block_name}.lora_B") + ".weight"] = value
    return values


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "use_rslora": True},
    ],
)
def test_blocks_train_like_unfused_layers(fields: dict[str, Any], device: str) -> None:
    ours = blocks(**fields).to(device)
    theirs = unfused(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), **ROUNDING)
    loss_and_gradients(ours), loss_and_gradients(theirs)
    gradients = by_block(ours, of=lambda p: p.grad)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **ROUNDING)
    train(ours), train(theirs)
    trained = by_block(ours, of=lambda p: p.detach())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 3}}])
def test_the_saved_adapter_has_equal_logits_in_stock_peft(
    tmp_path: Path, fields: dict[str, Any], device: str
) -> None:
    model = blocks(**fields).to(device)
    train(model)
    model.eval().save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_phi3()[0], tmp_path).to(device)
    assert not fused_layers(theirs)
    torch.testing.assert_close(logits(theirs), logits(model), **ROUNDING)


def test_slowed_down_blocks_are_computed_by_peft(device: str) -> None:
    model = blocks().to(device)
    fast = loss_and_gradients(model)
    slow = unfuse_lora(copy.deepcopy(model))
    slow.zero_grad()
    assert not fused_layers(slow)
    assert_same(loss_and_gradients(slow), fast)


def test_a_resumed_block_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def steps(model: PeftModel, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    def start() -> tuple[PeftModel, Any]:
        model = blocks(rank_pattern={"q_proj": 6}, alpha_pattern={"up_proj": 3})
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = start()
    steps(whole, optimizer, 2)
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(whole, optimizer, 2)

    resumed, optimizer = start()
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(resumed, optimizer, 2)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
