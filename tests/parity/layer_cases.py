"""Every kind of LoRA layer, for the tests of what PyTorch users do to one, against loralib and PEFT where they can.

A case is a module, an oracle that computes the same by the other library's code, and an input. A test that takes
`case` is parametrized by one of the `each_…` below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loralib
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import phlora.lora as lora
from phlora.adapters.attach import attach
from phlora.adapters.peft_layer import fuse_lora
from phlora.models.lean_layers import speed_pass
from phlora.models.tiny import tiny_phi3

# fp32 products of at most 112 terms in another order.
ROUNDING = dict(rtol=2e-4, atol=2e-5)
BLOCKS = ["q_proj", "v_proj", "up_proj", "o_proj"]


@dataclass
class Case:
    module: nn.Module
    oracle: nn.Module
    x: Tensor

    def __call__(self, module: Callable[..., Any] | None = None, x: Tensor | None = None) -> Tensor:
        return output(self.module if module is None else module, self.x if x is None else x)


def output(module: Callable[..., Any], x: Tensor) -> Tensor:
    """Models get the input behind their embedding, and return logits."""
    if isinstance(module, nn.Module) and hasattr(module, "peft_config"):
        return module(inputs_embeds=x, use_cache=False).logits
    return module(x)


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def of_loralib(make: Callable[[Any], nn.Module], x: Tensor) -> Case:
    torch.manual_seed(0)
    ours, theirs = randomized(make(lora)), make(loralib)
    theirs.load_state_dict(ours.state_dict())
    return Case(ours, theirs, x)


def tiny() -> nn.Module:
    model = tiny_phi3()[0]
    # Torch's fused attention has no second derivative.
    model.set_attn_implementation("eager")
    return model


def of_peft(lean: bool = False) -> Case:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = randomized(get_peft_model(tiny(), config))
    ours = fuse_lora(copy.deepcopy(theirs))
    if lean:
        speed_pass(ours)
    return Case(ours, theirs, torch.randn(2, 5, 64))


def of_blocks(lean: bool = False, **fields: Any) -> Case:
    """The oracle is stock PEFT with the plain form of the adapter."""
    torch.manual_seed(0)
    ours = randomized(fuse_lora(attach(tiny(), {"r": 4, "target_modules": BLOCKS, **fields}).model))
    plain = copy.copy(ours.peft_config["default"])
    plain.__class__ = LoraConfig
    theirs = get_peft_model(tiny(), plain)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    if lean:
        speed_pass(ours)
    return Case(ours, theirs, torch.randn(2, 5, 64))


def conv(module: Any) -> nn.Module:
    return module.Conv2d(4, 6, 3, r=2, lora_alpha=3)


CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: of_loralib(lambda m: m.Linear(12, 8, r=3, lora_alpha=5), torch.randn(4, 12)),
    "Linear fan_in_fan_out": lambda: of_loralib(
        lambda m: m.Linear(12, 8, r=3, fan_in_fan_out=True), torch.randn(4, 12)
    ),
    "MergedLinear": lambda: of_loralib(
        lambda m: m.MergedLinear(12, 9, r=2, enable_lora=[True, False, True]), torch.randn(4, 12)
    ),
    "Embedding": lambda: of_loralib(lambda m: m.Embedding(20, 8, r=3), torch.randint(20, (4, 5))),
    "Conv2d": lambda: of_loralib(conv, torch.randn(2, 4, 7, 6)),
    "PEFT": of_peft,
    "PEFT, lean": lambda: of_peft(lean=True),
    "row blocks": of_blocks,
    "row blocks, lean": lambda: of_blocks(lean=True),
    "row blocks, DoRA": lambda: of_blocks(use_dora=True),
}
each_case = pytest.mark.parametrize("name", CASES)
each_float_case = pytest.mark.parametrize("name", [name for name in CASES if name != "Embedding"])
each_layer = pytest.mark.parametrize(
    "name", [name for name in CASES if "PEFT" not in name and "row" not in name]
)
each_model = pytest.mark.parametrize("name", [name for name in CASES if "PEFT" in name or "row" in name])


def near(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **ROUNDING)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def functional_output(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    if hasattr(module, "peft_config"):
        inputs = {"inputs_embeds": x, "use_cache": False}
        return torch.func.functional_call(module, parameters, (), inputs).logits
    return torch.func.functional_call(module, parameters, (x,))


def same_as_oracle(case: Case) -> None:
    """Output, and where there is one the gradient of the input."""
    near(case(), case(case.oracle))
    if case.x.is_floating_point():
        x = case.x.clone().requires_grad_()
        near(
            torch.autograd.grad(case(x=x).square().sum(), x),
            torch.autograd.grad(case(case.oracle, x).square().sum(), x),
        )
