"""Acceleration is one decision: `speed_up` is all of it, `slow_down` takes all of it back, attaching takes none."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import phlora
from phlora.adapters.attach import attach, split_adapter
from phlora.adapters.speed import at_speed, slow_down, speed_up
from phlora.testing import tiny_phi3


def adapted(**peft_config: Any) -> Any:
    torch.manual_seed(0)
    return attach(tiny_phi3()[0], {"r": 4, "init_lora_weights": False, **peft_config}).model


def classes_of(model: nn.Module) -> Counter[str]:
    """How many modules of each class there are."""
    return Counter(type(module).__name__ for module in model.modules())


LEAN = {"LeanRMSNorm": 5, "LeanMLP": 2, "LeanAttention": 2, "LastLayer": 1}


def test_one_call_is_all_of_it_and_one_takes_it_back() -> None:
    model = adapted(target_modules="all-linear")
    before = {name: type(module) for name, module in model.named_modules()}
    assert phlora.speed_up(model) is model
    assert classes_of(model)["LoraLinear"] == 8
    assert {name: classes_of(model)[name] for name in LEAN} == LEAN
    assert slow_down(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_attaching_leaves_the_layers_of_peft_and_transformers(targets: Any) -> None:
    found = {type(module) for module in adapted(target_modules=targets).modules()}
    assert not found & accelerated()


def test_splitting_an_adapter_into_blocks_leaves_them_too(tmp_path: Any) -> None:
    adapted(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    split = split_adapter(PeftModel.from_pretrained(tiny_phi3()[0], tmp_path), tmp_path)
    assert not {type(module) for module in split.modules()} & accelerated()


def accelerated() -> set[type]:
    model = speed_up(adapted(target_modules="all-linear"))
    return {type(m) for m in model.modules()} - {type(m) for m in slow_down(copy.deepcopy(model)).modules()}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_both_settings_compute_the_same(targets: Any) -> None:
    model, ids = adapted(target_modules=targets), torch.arange(3, 43).view(2, 20)
    results = []
    for speed in ("reference", "auto", "reference"):
        with at_speed(model, speed), torch.no_grad():
            results.append(model(input_ids=ids).logits)
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
