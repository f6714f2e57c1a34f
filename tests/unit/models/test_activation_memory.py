"""Recomputing gated MLPs: less is kept, and every bit of losses and gradients stays."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from phlora.adapters.attach import attach
from phlora.adapters.speed import slow_down, speed_up
from phlora.models.activation_memory import can_recompute_mlps, computed_again, recomputing_mlps
from phlora.models.lm_head import token_losses
from phlora.models.tiny import tiny_phi3

LAYERS, POSITIONS, INTERMEDIATE = 2, 3 * 24, 112


def lean_model(**settings: Any) -> nn.Module:
    torch.manual_seed(3)
    model = attach(tiny_phi3()[0], {"r": 4, **settings}).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    speed_up(model)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(POSITIONS).reshape(3, -1) + 5
    return {"input_ids": ids, "labels": ids.clone()}


def step(model: nn.Module, *, recomputes: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Losses, gradients and the bytes that autograd keeps of everything but parameters."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(4)
    with recomputing_mlps(model) if recomputes else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = token_losses(model, batch())[0]
        losses.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["q_proj"]}],
    ids=["plain", "dropout", "dora", "mlp not adapted"],
)
def test_every_bit_stays(settings: dict[str, Any]) -> None:
    model = lean_model(**settings)
    losses, gradients, _ = step(model, recomputes=False)
    again_losses, again_gradients, _ = step(model, recomputes=True)
    assert torch.equal(losses, again_losses)
    assert gradients.keys() == again_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name


def test_autocast_holds_when_it_is_computed_again() -> None:
    model = lean_model()
    found = []
    for recomputes in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            losses, gradients, _ = step(model, recomputes=recomputes)
        found.append((losses, gradients))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_what_is_kept_shrinks_by_gate_up() -> None:
    """Outside of the hooks of this test: what is packed by the MLP's own is not seen here, and so not counted."""
    model = lean_model()
    kept, less = (step(model, recomputes=recomputes)[2] for recomputes in (False, True))
    assert kept - less >= LAYERS * (POSITIONS - 3) * 2 * INTERMEDIATE * 4


def test_backward_computes_once_for_all_that_would_have_kept_it_and_lets_go() -> None:
    calls = []
    x = torch.randn(4, 6, requires_grad=True)

    def compute() -> torch.Tensor:
        value = x.detach() * 2
        calls.append(weakref.ref(value))
        return value

    doubled = x * 2
    with computed_again(doubled, compute):
        y = doubled.square() + doubled.sin()
    del doubled
    y.sum().backward()
    gc.collect()
    assert len(calls) == 1 and calls[0]() is None
    torch.testing.assert_close(x.grad, 8 * x.detach() + 2 * (2 * x.detach()).cos())


def test_a_second_derivative_goes_through() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    doubled = x * 2
    with computed_again(doubled, lambda: x.detach() * 2):
        y = doubled.pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 48 * x.detach())


def test_only_lean_mlps_can_and_the_setting_ends_with_the_context() -> None:
    model = lean_model()
    with recomputing_mlps(model) as count:
        assert count == LAYERS and all(layer.mlp.recomputes for layer in model.get_decoder().layers)
    assert not any(layer.mlp.recomputes for layer in model.get_decoder().layers)
    assert can_recompute_mlps(model)
    assert not can_recompute_mlps(slow_down(model))
