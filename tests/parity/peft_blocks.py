"""What the tests of adapters beside PEFT share: row blocks, stock PEFT, and the unfused twin."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from phlora.adapters.attach import attach
from phlora.adapters.peft_layer import LoraLinear, fuse_lora
from phlora.testing import tiny_phi3

# fp32 products of at most 112 terms in another order.
ROUNDING = dict(rtol=1e-4, atol=1e-5)
IDS = torch.arange(3, 51).view(2, 24)
BLOCKS = ["q_proj", "v_proj", "up_proj", "o_proj"]


def randomize(model: Any, adapter: str = "default") -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and adapter in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def stock(*, r: int = 4, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    return randomize(get_peft_model(tiny_phi3()[0], config))


def blocks(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return randomize(fuse_lora(attach(tiny_phi3()[0], {"r": 4, "target_modules": BLOCKS, **fields}).model))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device_of(model))).logits


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    ids = IDS.to(device_of(model))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    return [loss.detach(), *gradients]


def train(model: nn.Module, steps: int = 5) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    ids = IDS.to(device_of(model))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def assert_same(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or ROUNDING))


def fused_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]
