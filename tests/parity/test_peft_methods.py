"""PeftModel's own methods on our layers and on row blocks."""

from __future__ import annotations

import copy
import pickle
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
    randomize,
    stock,
)

from phlora.adapters.peft_layer import fuse_lora, unfuse_lora
from phlora.testing import tiny_phi3


@pytest.fixture(params=["plain", "blocks"])
def model(request: Any, device: str) -> PeftModel:
    return (fuse_lora(stock()) if request.param == "plain" else blocks()).to(device).eval()


def test_merging_keeps_the_logits_and_unmerging_every_bit(model: PeftModel) -> None:
    expected, base = logits(model), logits(tiny_phi3()[0].to(model.device))
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, **ROUNDING)
        model.unmerge_adapter()
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters() if "base_layer" in n)
    assert not torch.allclose(expected, base)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **ROUNDING)
    assert not any(isinstance(module, peft_lora.LoraLayer) for module in merged.modules())


def test_merging_a_broken_adapter_is_refused(model: PeftModel) -> None:
    layer = fused_layers(model)[0]
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_disabling_gives_the_base_model(model: PeftModel) -> None:
    expected = logits(tiny_phi3()[0].to(model.device).eval())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_several_adapters(model: PeftModel, tmp_path: Path) -> None:
    first = logits(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["qkv_proj", "down_proj"]))
    fuse_lora(randomize(model, "other"))
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    mixed = model(input_ids=IDS.to(model.device), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), **ROUNDING)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    torch.testing.assert_close(both, logits(unfuse_lora(copy.deepcopy(model))), **ROUNDING)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, **ROUNDING)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), first, **ROUNDING)


@pytest.mark.parametrize("combination", ["svd", "cat"])
def test_weighted_adapters(model: PeftModel, combination: str) -> None:
    model.add_weighted_adapter(["default"] * 2, [0.25, 0.5], "blend", combination_type=combination)
    delta = {}
    for layer in fused_layers(model):
        delta = {name: layer.get_delta_weight(name) for name in ("default", "blend")}
        tolerance = 1e-4 if combination == "cat" else 1e-3
        torch.testing.assert_close(delta["blend"], 0.75 * delta["default"], rtol=1e-3, atol=tolerance)
    assert delta


def test_status_and_parameter_counts(model: PeftModel) -> None:
    status = model.get_model_status()
    assert (status.enabled, status.merged_adapters, status.active_adapters) == (True, [], ["default"])
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(model.get_layer_status()) == len(fused_layers(model))


def test_gradient_checkpointing_changes_nothing(model: PeftModel) -> None:
    expected = loss_and_gradients(model.train())
    model.zero_grad()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        # To the bit where kernels are deterministic.
        tolerance = ROUNDING if model.device.type == "cuda" else {"rtol": 0, "atol": 0}
        assert_same(loss_and_gradients(model), expected, **tolerance)
        model.zero_grad()


def test_scaling_an_adapter(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    with torch.no_grad():
        base, full = layer.base_layer(x), layer(x)
        layer.scale_layer(0.5)
        torch.testing.assert_close(layer(x), (base + full) / 2, **ROUNDING)
        layer.unscale_layer()
        torch.testing.assert_close(layer(x), full, **ROUNDING)


def test_hooks_on_inner_layers_are_called(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    with torch.no_grad():
        expected, called = layer(x), []
        for inner in (layer.base_layer, layer.lora_B["default"]):
            inner.register_forward_hook(lambda module, *_: called.append(module))
        torch.testing.assert_close(layer(x), expected, **ROUNDING)
    assert called == [layer.base_layer, layer.lora_B["default"]]


def test_copies_and_pickles(model: PeftModel) -> None:
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied), expected, rtol=0, atol=0)
        assert fused_layers(copied)


def test_compiles_without_a_break(model: PeftModel) -> None:
    layer, x = fused_layers(model)[0], torch.randn(2, 64, device=model.device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), **ROUNDING)
