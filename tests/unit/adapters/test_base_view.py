"""The base side of every comparison is the base, whatever the adapter does to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from phlora.adapters.attach import attach
from phlora.adapters.base_view import as_base
from phlora.adapters.load import load_adapter
from phlora.testing import tiny_phi3

IDS = torch.arange(3, 30).view(1, -1)
WHOLE = ["qkv_proj", "o_proj"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
        return result


def base() -> Any:
    """The tiny model with biases, as Phi-3's own weights have none."""
    model = tiny_phi3()[0]
    for name, layer in model.named_modules():
        if name.endswith("o_proj"):
            layer.bias = torch.nn.Parameter(torch.randn(layer.out_features, generator=torch.manual_seed(1)))
    return model


def train(model: Any) -> None:
    """Move everything that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(2)))


def require_base(model: PeftModel) -> None:
    expected, tuned = logits(base()), logits(model)
    assert not torch.allclose(tuned, expected)
    with as_base(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(ZeroDivisionError), as_base(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), tuned)


SETTINGS = [
    *({"init_lora_weights": init} for init in (True, "gaussian", "pissa", "pissa_niter_2", "olora")),
    {"bias": "all"},
    {"bias": "lora_only"},
    {"modules_to_save": ["lm_head"]},
    {"use_dora": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_trained_model_shows_its_base(settings: dict[str, Any]) -> None:
    model = attach(base(), {"r": 4, "target_modules": WHOLE, **settings}).model
    train(model)
    require_base(model)
    require_base(copy.deepcopy(model))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_adapter_of_peft_shows_its_base(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=WHOLE, task_type="CAUSAL_LM", **settings)
    made = get_peft_model(base(), config)
    train(made)
    made.save_pretrained(tmp_path)
    require_base(load_adapter(base(), tmp_path).model)


def test_nothing_is_kept_where_turning_the_adapter_off_is_enough() -> None:
    model = attach(base(), {"r": 4, "target_modules": WHOLE}).model
    assert not [name for name in vars(model) if "base_before" in name]
