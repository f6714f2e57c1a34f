"""Gradient checkpointing that nobody asked for: decided by memory, said in the one line, the same to the bit."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import TrainerCallback

import phlora
from phlora.dropin import layout, memory
from phlora.dropin.memory import Activations
from phlora.measure import FreeMemory


class Seen(TrainerCallback):
    """What layers do in the first step."""

    def __init__(self) -> None:
        self.checkpointed = self.recomputed = -1

    def on_step_end(self, args: Any, *_: Any, model: Any = None, **__: Any) -> None:
        modules = list(model.modules())
        self.checkpointed = sum(bool(getattr(module, "gradient_checkpointing", False)) for module in modules)
        self.recomputed = sum(bool(getattr(module, "recomputes", False)) for module in modules)
        assert args.gradient_checkpointing == args.activation_checkpointing == bool(self.checkpointed)


def trained(make: Any, **given: Any) -> tuple[Any, Seen]:
    seen = Seen()
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = make(callbacks=[seen], **{"peft_config": lora, **given})
    trainer.train()
    return trainer, seen


def test_with_memory_to_spare_nothing_is_computed_again(make: Any, told: Any) -> None:
    trainer, seen = trained(make)
    assert (seen.checkpointed, seen.recomputed) == (0, 0)
    assert "; gradient checkpointing off, which SFTConfig has on where nothing is said (it fits: " in told()
    # The script's own configuration is as it was.
    assert trainer.args.gradient_checkpointing and trainer.args.activation_checkpointing


def test_without_memory_all_is_computed_again(make: Any, told: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: FreeMemory(1, "this machine"))
    _, seen = trained(make)
    assert seen.checkpointed > 0
    assert "; gradient checkpointing on (keeping everything takes " in told()


def test_a_step_that_just_fits_keeps_less(make: Any, told: Any, monkeypatch: Any) -> None:
    """A long row, of which layers keep more than the forecast's margins."""
    needed: dict[str, int] = {}
    whole = memory.forecast_run

    def noted(about: Any) -> Any:
        for level in ("keep", "recompute_mlp", "recompute"):
            needed[level] = whole(dataclasses.replace(about, level=level)).needed
        free = FreeMemory(int(1.1 * needed["recompute_mlp"]) + 1, "this machine")
        return whole(dataclasses.replace(about, free=free))

    monkeypatch.setattr(memory, "forecast_run", noted)
    rows = [{"input_ids": [5 + i % 50 for i in range(4000)], "labels": [5 + i % 50 for i in range(4000)]}] * 2
    _, seen = trained(make, rows=Dataset.from_list(rows), settings={"max_length": None, "max_steps": 1})
    assert needed["keep"] > needed["recompute_mlp"] > needed["recompute"]
    assert seen.recomputed == 2 and not seen.checkpointed
    assert "; MLPs alone computed again, in the place of gradient checkpointing (keeping" in told()


def test_every_level_trains_the_same_to_the_bit(
    make: Any, model: nn.Module, weights: Any, monkeypatch: Any
) -> None:
    found = []
    for level in ("keep", "recompute_mlp", "recompute"):
        model.load_state_dict(weights)
        monkeypatch.setattr(layout, "decide", lambda *_, level=level, **__: Activations(level, "a test"))
        torch.manual_seed(0)
        trainer, _ = trained(make)
        found.append(get_peft_model_state_dict(trainer.model))
        model = trainer.model.unload()
    assert any(bool(value.any()) for name, value in found[0].items() if "lora_B" in name)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, True),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_what_a_script_says_holds(make: Any, told: Any, settings: dict[str, Any], is_on: bool) -> None:
    _, seen = trained(make, settings=settings)
    assert bool(seen.checkpointed) is is_on and "gradient checkpointing" not in told()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_what_cannot_be_told_is_left_to_trl(make: Any, told: Any, tmp_path: Path, model: Any) -> None:
    plain = trl.SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    every = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain) if field.init}
    for args in (plain, phlora.SFTConfig(**every)):
        trainer, seen = trained(make, args=args, model=model)
        assert seen.checkpointed > 0
        model = trainer.model.unload()
    assert "gradient checkpointing" not in told()


def test_a_model_on_which_the_script_turned_it_on_keeps_it(make: Any, told: Any, model: Any) -> None:
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(make)[1].checkpointed > 0 and "gradient checkpointing" not in told()


class Own(phlora.SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_what_is_not_forecast_is_as_in_trl_and_said(
    make: Any, told: Any, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    assert trained(make, peft_config=None)[1].checkpointed > 0
    assert "gradient checkpointing on (as in SFTConfig: only LoRA of a PeftModel is forecast)" in told()
    args = phlora.SFTConfig(str(tmp_path), max_steps=1, report_to="none")
    own = Own(
        model, args, train_dataset=make().train_dataset, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    )  # fmt: skip
    own.train()
    assert "on (as in SFTConfig: the loss is the script's own)" in told()


@pytest.mark.parametrize("is_on", [True, False])
def test_what_a_script_sets_afterwards_holds(
    make: Any, told: Any, model: Any, tmp_path: Path, is_on: bool
) -> None:
    args = phlora.SFTConfig(str(tmp_path), max_steps=1, report_to="none")
    args.gradient_checkpointing = is_on
    trainer, seen = trained(make, args=args, model=model)
    assert bool(seen.checkpointed) is is_on and "gradient checkpointing" not in told()
    assert args.gradient_checkpointing is args.activation_checkpointing is is_on


def test_what_the_trainer_has_decided_is_no_word_of_the_scripts(make: Any) -> None:
    trainer, _ = trained(make)
    assert not {"gradient_checkpointing", "activation_checkpointing"} & trainer.args.given
    assert trainer.args.gradient_checkpointing is True
