"""Our PEFT layer against PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_lora
from peft_blocks import (
    BLOCKS,
    assert_same,
    blocks,
    fused_layers,
    logits,
    loss_and_gradients,
    randomize,
    stock,
    train,
)
from torch import Tensor, nn

from phlora.adapters.attach import attach
from phlora.adapters.peft_layer import LoraLinear, fuse_lora, unfuse_lora
from phlora.errors import ModelError
from phlora.testing import tiny_phi3


def test_speeding_up_shares_every_parameter_and_can_be_undone() -> None:
    model = stock()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    assert fuse_lora(model) is model and len(fused_layers(model)) == 8
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    unfuse_lora(model)
    assert not fused_layers(model)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_forward_and_every_gradient(device: str) -> None:
    ours, theirs = fuse_lora(stock()).to(device), stock().to(device)
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs))


def test_five_steps(device: str) -> None:
    # AdamW divides by the root of squared gradients, which lifts rounding errors of tiny ones.
    ours, theirs = fuse_lora(stock()).to(device), stock().to(device)
    assert_same(train(ours), train(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast(checkpointing: bool, device: str) -> None:
    results = []
    for model in (fuse_lora(stock()).to(device), stock().to(device)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with torch.autocast(device, torch.bfloat16):
            results.append(loss_and_gradients(model))
    assert_same(*results, rtol=0.05, atol=0.02)


def test_a_bfloat16_base_with_fp32_adapters(device: str) -> None:
    results = []
    for hasten in (fuse_lora, lambda model: model):
        torch.manual_seed(0)
        base = tiny_phi3()[0].bfloat16()
        model = hasten(
            randomize(get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        results.append(loss_and_gradients(model.to(device)))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=0.01)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_dropout_has_pefts_mean_and_spread(device: str) -> None:
    model = stock(lora_dropout=0.3).to(device)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj").train()
    x = torch.randn(3, 64, device=device)
    samples = []
    for hasten in (lambda m: m, fuse_lora):
        hasten(model)
        with torch.no_grad():
            samples.append(torch.stack([layer(x) for _ in range(4000)]))
    theirs, ours = samples
    assert type(layer) is LoraLinear
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * spread * (2 / 4000) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [stock, blocks], ids=["whole", "blocks"])
def test_dora_unmerges_to_the_bit(make: Callable[..., PeftModel], dtype: torch.dtype) -> None:
    model = fuse_lora(make(use_dora=True).to(dtype))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_other_values_for_a_merged_weight_are_refused_and_its_own_are_not() -> None:
    model = fuse_lora(stock())
    unmerged_state = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    model.load_state_dict(model.state_dict())
    adapter = {name: 2 * value for name, value in unmerged_state.items() if "lora_B" in name}
    for state in (unmerged_state, {**model.state_dict(), **adapter}):
        with pytest.raises(ModelError, match="unmerge_adapter"):
            model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(unmerged_state)
    assert all(torch.equal(value, unmerged_state[name]) for name, value in model.state_dict().items())


def test_a_weight_written_while_merged_is_not_thrown_away() -> None:
    ours, theirs = fuse_lora(stock()), stock()
    for model in (ours, theirs):
        model.merge_adapter()
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.data.mul_(1.5)
        model.unmerge_adapter()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target_modules", ["all-linear", BLOCKS], ids=["whole", "blocks"])
def test_a_16_bit_base_is_no_further_from_fp64_than_peft(target_modules: Any, dtype: torch.dtype) -> None:
    """One layer after the other, as the model's own rounding would hide theirs: output, and each gradient."""
    torch.manual_seed(0)
    fields = {"r": 8, "lora_alpha": 32, "target_modules": target_modules}
    model = fuse_lora(attach(tiny_phi3()[0], fields).model)
    errors, gradients = torch.zeros(2), torch.zeros(2)
    for layer in [module for module in model.modules() if isinstance(module, LoraLinear)]:
        for parameter in layer.parameters():
            parameter.data = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
        layer.base_layer.to(dtype)
        stocks = copy.deepcopy(layer)
        stocks.__class__ = peft_lora.Linear
        x, dy = (
            torch.randn(64, layer.in_features, dtype=dtype),
            torch.randn(64, layer.out_features, dtype=dtype),
        )
        exact, exact_gradients = run_layer(copy.deepcopy(layer).double(), x.double(), dy.double())
        for i, module in enumerate((layer, stocks)):
            y, found = run_layer(module, x, dy)
            errors[i] += float((y - exact).norm() / exact.norm())
            gradients[i] += float((found - exact_gradients).norm() / exact_gradients.norm())
    assert errors[0] <= 1.001 * errors[1], errors
    # dx is rounded once here and twice there.
    assert gradients[0] <= 0.8 * gradients[1], gradients


def run_layer(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradients of the input and the adapter in one row; both in fp64."""
    x = x.clone().requires_grad_()
    y = module(x)
    leaves = [x, *(p for name, p in module.named_parameters() if "lora_" in name)]
    found = torch.autograd.grad(y, leaves, dy)
    return y.detach().double(), torch.cat([g.flatten().double() for g in found])


@pytest.mark.parametrize("make", [stock, blocks], ids=["whole", "blocks"])
def test_print_shows_what_peft_shows(make: Callable[..., PeftModel]) -> None:
    model = fuse_lora(make())
    assert repr(model) == repr(unfuse_lora(copy.deepcopy(model)))
