"""Folding: one rounding, whatever the adapter; and the measure of what a merge changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from phlora.adapters.merge import BOUNDS, Bound, LogitDifferences, fold_adapter
from phlora.errors import ModelError
from phlora.testing import tiny_phi3

IDS = torch.arange(40).view(2, 20)


def adapted(dtype: torch.dtype = torch.float32, *, tied: bool = False, **config: Any) -> PeftModel:
    model, _ = tiny_phi3()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    tuned = get_peft_model(model.to(dtype), LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "lora_embedding" in name or ("modules_to_save" in name and "norm" not in name):
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({}, 8),
        ({"use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}, 8),
        ({"use_dora": True}, 8),
        ({"target_modules": ["o_proj", "embed_tokens", "lm_head"]}, 4),
        ({"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]}, 3),
    ],
    ids=["plain", "patterns", "dora", "embeddings", "modules_to_save"],
)
def test_a_folded_model_is_a_plain_one_with_the_same_logits(config: dict[str, Any], changed: int) -> None:
    tuned = adapted(**config)
    before = logits(tuned)
    with tuned.disable_adapter():
        assert (logits(tuned) - before).abs().max() > 1e-2
    merged, num_modules = fold_adapter(tuned)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in tiny_phi3()[0].named_parameters()
    ]
    assert num_modules == changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_once(dtype: torch.dtype) -> None:
    tuned = adapted(dtype)
    layer = tuned.base_model.model.model.layers[0].self_attn.qkv_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + 2.0 * (B.double() @ A.double())
    merged, _ = fold_adapter(tuned)
    weight = merged.model.layers[0].self_attn.qkv_proj.weight
    assert weight.dtype == dtype
    # Half a unit in the last place, and the fp32 sum's own error.
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert ((weight.double() - exact).abs() <= 0.5 * spacing + 1e-6).all()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["o_proj", "lm_head"]},
        {"target_modules": ["o_proj", "embed_tokens"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie.*", "ignore:.*tied.*")
def test_an_adapter_on_tied_embeddings_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="model.embed_tokens"):
        fold_adapter(adapted(tied=True, **config))


def test_tied_embeddings_that_the_adapter_leaves_alone_stay_tied() -> None:
    tuned = adapted(tied=True)
    before = logits(tuned)
    merged, _ = fold_adapter(tuned)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


def test_a_full_memory_is_not_called_an_adapter_that_cannot_be_merged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(layer: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("phlora.adapters.merge._fold_layer", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        fold_adapter(adapted())


def test_differences_are_counted_over_all_pieces() -> None:
    differences = LogitDifferences()
    differences.add(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([[1.0, 2.5], [2.0, 3.0]]))
    differences.add(torch.tensor([[-8.0, 0.0]]), torch.tensor([[-8.0, 0.0]]))
    assert (differences.largest, differences.scale) == (2.0, 8.0)
    assert differences.mean == pytest.approx(2.5 / 6)
    assert (differences.changed_tokens, differences.num_tokens) == (1, 3)


def differing(largest: float, changed: int) -> LogitDifferences:
    return LogitDifferences(largest=largest, scale=10.0, num_tokens=1000, changed_tokens=changed)


@pytest.mark.parametrize(
    ("largest", "changed", "kept"),
    [(0.9, 10, True), (1.1, 0, False), (0.1, 11, False), (math.nan, 0, False), (math.inf, 0, False)],
)
def test_a_bound_holds_for_logits_and_for_tokens(largest: float, changed: int, kept: bool) -> None:
    assert differing(largest, changed).keeps(Bound(largest=0.1, changed=0.01)) is kept


def test_a_nan_anywhere_is_never_within_a_bound_and_one_token_always_is() -> None:
    differences = LogitDifferences()
    differences.add(torch.ones(1, 2), torch.tensor([[1.0, math.nan]]))
    differences.add(torch.ones(1, 2), torch.ones(1, 2))
    assert not any(differences.keeps(bound) for bound in BOUNDS.values())
    one = LogitDifferences(largest=1e-6, scale=1.0, num_tokens=20, changed_tokens=1)
    assert all(one.keeps(bound) for bound in BOUNDS.values())
