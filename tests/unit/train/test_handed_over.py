"""A model object is given back as it came, however the run ends; after a success it carries the adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from phlora.display import Display
from phlora.errors import ConfigError, PhloraError
from phlora.models.stored_layers import store
from phlora.testing import chat_rows, tiny_phi3
from phlora.train.finetune import finetune

ROWS = chat_rows(8)


class Raise(TrainerCallback):
    """Ends the training after its first step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise self.error


def run_it(model: nn.Module, tokenizer: Any, output: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        data=ROWS,
        training_config={"max_steps": 2, "learning_rate": 1e-2},
        peft_config={"r": 2},
        evaluation={"enabled": False},
        display=Display(quiet=True),
    )
    return finetune(model=model, tokenizer=tokenizer, output=output, **{**arguments, **changes})


def look_of(model: nn.Module) -> dict[str, Any]:
    """All that somebody could notice of a model."""
    parts = list(model.named_modules())
    return {
        "classes": {name: type(module) for name, module in parts},
        "modes": {name: module.training for name, module in parts},
        "attributes": {name: sorted(vars(module)) for name, module in parts},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in parts
        },
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
    }


@pytest.fixture
def given() -> tuple[nn.Module, Any]:
    model, tokenizer = tiny_phi3()
    model.model.layers[0].mlp.requires_grad_(False)
    return model.eval(), tokenizer


@pytest.mark.parametrize(
    ("ending", "changes"),
    [
        (None, {"dry_run": True}),
        (KeyboardInterrupt, {"callbacks": [Raise(KeyboardInterrupt())]}),
        (RuntimeError, {"callbacks": [Raise(RuntimeError("mine"))]}),
        (ConfigError, {"peft_config": {"r": 3, "init_lora_weights": "orthogonal"}}),
        (ConfigError, {"peft_config": {"r": 2, "target_modules": ["qkv_proj", "lm_head"]}}),
        (RuntimeError, {"peft_config": {"r": 2, "bias": "all"}, "callbacks": [Raise(RuntimeError("mine"))]}),
        (
            RuntimeError,
            {"peft_config": {"r": 2, "use_dora": True}, "callbacks": [Raise(RuntimeError("mine"))]},
        ),
        (
            RuntimeError,
            {
                "peft_config": {"r": 2, "modules_to_save": ["lm_head"]},
                "callbacks": [Raise(RuntimeError("mine"))],
            },
        ),
        (
            RuntimeError,
            {
                "training_config": {"max_steps": 2, "gradient_checkpointing": True},
                "callbacks": [Raise(RuntimeError("mine"))],
            },
        ),
    ],
    ids=["dry run", "stop", "failure", "start", "head", "bias", "dora", "saved modules", "checkpointing"],
)
def test_an_object_is_as_it_was_after_a_run_that_did_not_end_well(
    given: tuple[nn.Module, Any], ending: type[BaseException] | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = given
    before, weights = look_of(model), copy.deepcopy(model.state_dict())
    if ending is None:
        assert run_it(model, tokenizer, tmp_path / "run", **changes).model is model
    else:
        with pytest.raises(ending):
            run_it(model, tokenizer, tmp_path / "run", **changes)
    after = look_of(model)
    for name, value in before.items():
        assert after[name] == value, name
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    # And so it can be given again.
    run_it(model, tokenizer, tmp_path / "again")


@pytest.mark.parametrize(
    "whole",
    [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"trainable_token_indices": [5, 9]}],
    ids=["modules", "tokens"],
)
def test_an_object_stored_in_16_bits_is_so_again(
    given: tuple[nn.Module, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer = given
    store(model, torch.bfloat16)
    before, weights = look_of(model), copy.deepcopy(model.state_dict())
    stop = {"peft_config": {"r": 2, **whole}, "callbacks": [Raise(RuntimeError("mine"))]}
    with pytest.raises(RuntimeError):
        run_it(model, tokenizer, tmp_path / "run", **stop)
    assert look_of(model) == before
    for name, value in model.state_dict().items():
        assert value.dtype == weights[name].dtype and torch.equal(value, weights[name]), name


def test_after_a_success_it_carries_the_adapter_in_layers_of_peft_and_in_its_own_mode(
    given: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = given
    before = look_of(model)
    run = run_it(model, tokenizer, tmp_path / "run")
    assert not any(module.training for module in run.model.modules())
    assert not any(type(module).__module__.startswith("phlora.models") for module in run.model.modules())
    assert run.model.unload() is model
    after = look_of(model)
    assert after["classes"] == before["classes"] and after["config"] == before["config"]


def test_a_refused_object_is_not_touched(given: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = given
    before = look_of(model)
    with pytest.raises(PhloraError):
        run_it(model, tokenizer, tmp_path / "run", training_config={"max_steps": "many"})
    assert look_of(model) == before
