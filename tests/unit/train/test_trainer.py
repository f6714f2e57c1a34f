"""What SFTTrainer adds to TRL's: no garbage is trained on or saved, and finished is finished."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from phlora import SFTTrainer
from phlora.data.collate import Collator, SharedPrefixCollator
from phlora.errors import ConfigError, NonFiniteError
from phlora.testing import quiet_config, tiny_gemma2, tiny_phi3

LORA = LoraConfig(r=4, target_modules="all-linear")
ROWS = [{"input_ids": list(range(5, 25)), "labels": [-100] * 10 + list(range(15, 25))} for _ in range(8)]


def trainer_for(
    folder: Path,
    *,
    model: Any = None,
    peft_config: Any = LORA,
    z_loss: float = 0.0,
    collator: Any = None,
    **settings: Any,
) -> SFTTrainer:
    tiny, tokenizer = tiny_phi3()
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    args = quiet_config(folder, remove_unused_columns=False, **{**steps, "max_length": None, **settings})
    torch.manual_seed(0)
    return SFTTrainer(
        model=model or tiny,
        args=args,
        z_loss=z_loss,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:2]),
        peft_config=copy.deepcopy(peft_config),
        processing_class=tokenizer,
        data_collator=collator or Collator(tokenizer.pad_token_id),
    )


@pytest.mark.parametrize("how", ["config", "model", "bf16"])
def test_an_adapter_on_a_base_that_transformers_quantised_keeps_its_dtype(
    tmp_path: Path, model_folder: Path, how: str
) -> None:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=nf4, device_map="cpu")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    given = base if how == "config" else get_peft_model(base, config)
    if how == "bf16":
        for parameter in given.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter.data
    before = {name: p.data.clone() for name, p in given.named_parameters() if p.requires_grad}
    trainer = trainer_for(tmp_path, model=given, peft_config=config if how == "config" else None, max_steps=3)

    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16 if how == "bf16" else torch.float32}
    if how != "config":
        assert all(torch.equal(before[name], p) for name, p in trained.items())
    start = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert all(not torch.equal(start[name], p) for name, p in trained.items() if "lora_B" in name)
    first, last = (entry["loss"] for entry in trainer.state.log_history[:3:2])
    assert last < first


class _Poison(trl.trainer.sft_trainer.TrainerCallback):
    """Makes a weight, and with it the loss or only a gradient, no number at one step."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step != self.step:
            return
        if self.where == "loss":
            next(p for p in model.parameters() if not p.requires_grad).data[:] = float("nan")
        else:
            next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_training_stops_at_the_first_value_that_is_no_number(tmp_path: Path, where: str) -> None:
    trainer = trainer_for(tmp_path, logging_nan_inf_filter=False)
    trainer.add_callback(_Poison(3, where))
    with pytest.raises(NonFiniteError, match=f"The {where} is .* at optimizer step 4"):
        trainer.train()
    for weight in get_peft_model_state_dict(trainer.model).values():
        assert torch.isfinite(weight).all()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2"]
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())


def test_checkpoints_hold_the_adapter_only_and_are_the_same_after_an_evaluation(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in saved.items())


def test_resuming_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    trainer_for(tmp_path, max_steps=3, save_steps=3).train()
    finished = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    again = trainer_for(tmp_path, max_steps=3, save_steps=3)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 3
    for name, weight in get_peft_model_state_dict(again.model).items():
        assert torch.equal(weight, finished[name]), name


@pytest.mark.parametrize("how", [True, "checkpoint-3"])
def test_a_finished_run_is_finished_however_it_is_resumed(tmp_path: Path, how: Any) -> None:
    trainer_for(tmp_path, max_steps=3).train()
    trainer = trainer_for(tmp_path, max_steps=3)
    output = trainer.train(resume_from_checkpoint=how if how is True else str(tmp_path / how))
    assert output.global_step == trainer.state.global_step == 3
    finished = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    for name, weight in get_peft_model_state_dict(trainer.model).items():
        assert torch.equal(weight, finished[name]), name


def test_resuming_where_nothing_is_to_be_resumed_is_said_by_the_library(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    whole = trainer_for(tmp_path / "whole", max_steps=4, save_steps=2)
    whole.train()
    half = trainer_for(tmp_path / "half", max_steps=4, save_steps=2)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = get_peft_model_state_dict(whole.model)
    for name, weight in get_peft_model_state_dict(half.model).items():
        assert torch.equal(weight, expected[name]), name


def test_weights_are_never_dropped_without_a_word(tmp_path: Path) -> None:
    rows = [{**row, "weights": [2.0] * 20} for row in ROWS]
    trainer = trainer_for(tmp_path, loss_type="dft")
    trainer.train_dataset = Dataset.from_list(rows)
    with pytest.raises(ConfigError, match="loss weights"):
        trainer.train()


def test_logs_count_tokens_and_accuracy(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["num_tokens"] for entry in logs] == [40.0, 80.0]
    assert all(0 <= entry["mean_token_accuracy"] <= 1 for entry in logs)
    json.dumps(trainer.state.log_history)


def test_z_loss_is_trained_on_but_not_part_of_the_held_out_loss(tmp_path: Path) -> None:
    plain, pulled = (trainer_for(tmp_path, z_loss=weight) for weight in (0.0, 0.5))
    assert plain.evaluate()["eval_loss"] == pulled.evaluate()["eval_loss"]
    for trainer in (plain, pulled):
        trainer.train()
    first = [trainer.state.log_history[1]["loss"] for trainer in (plain, pulled)]
    assert first[1] > first[0] + 1
    with pytest.raises(ConfigError, match="z_loss"):
        trainer_for(tmp_path, z_loss=0.5, loss_type="dft")


@pytest.mark.parametrize("on", ["base", "adapter"])
def test_a_hook_on_the_model_finds_an_output_with_its_loss(tmp_path: Path, on: str) -> None:
    model = get_peft_model(tiny_phi3()[0], LORA)
    seen: list[Any] = []
    hooked = model if on == "adapter" else model.get_base_model()
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(copy.copy(output)))
    trainer = trainer_for(tmp_path, model=model, peft_config=None, max_steps=1)
    trainer.train()
    assert [output.logits for output in seen] == [None]
    assert float(seen[0].loss.detach()) == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)
    assert all(value.is_floating_point() for value in seen[0].to_tuple())


def test_what_looks_at_every_output_of_the_model_can(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=1, debug="underflow_overflow")
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_that_changes_its_logits_takes_the_loss_of_trl_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, model=tiny_gemma2())
    said = "Gemma2ForCausalLM changes its logits after the head (final_logit_softcapping = 0.5)"
    assert [r.getMessage() for r in caplog.records if r.name == "phlora.train.trainer"] == [
        f"{said}: TRL's own loss is used."
    ]
    trainer.train()
    trainer.evaluate()
    assert sum(r.name == "phlora.train.trainer" for r in caplog.records) == 1
    assert [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry] == [
        40,
        80,
        120,
        160,
    ]
    with pytest.raises(ConfigError, match="final_logit_softcapping.*leave z_loss out"):
        trainer_for(tmp_path, model=tiny_gemma2(), z_loss=0.5)


def test_the_guard_against_garbage_holds_for_the_loss_of_trl_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, model=tiny_gemma2(), logging_nan_inf_filter=False)
    trainer.add_callback(_Poison(1, "loss"))
    with pytest.raises(NonFiniteError, match="The loss is nan at optimizer step 2"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["dft", "nll"])
def test_shared_rows_are_never_given_to_a_loss_that_cannot_read_them(tmp_path: Path, loss_type: str) -> None:
    trainer = trainer_for(
        tmp_path,
        model=tiny_gemma2() if loss_type == "nll" else None,
        loss_type=loss_type,
        collator=SharedPrefixCollator(),
    )
    with pytest.raises(ConfigError, match="share their first tokens"):
        trainer.train()


# TRL's word on the logits for metrics.
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_tokens_are_counted_where_all_logits_are_evaluated(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.compute_metrics = lambda prediction: {"zero": 0.0}
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_zero" in entry]
    assert [entry["eval_num_tokens"] for entry in evaluated] == [40, 80]
