"""`phlora.SFTTrainer` for scripts of which one import was changed: names, and what scripts bring along."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from script_rows import SEVEN, chats, new_model
from torch import nn
from transformers import TrainerCallback

import phlora
from phlora.errors import ConfigError, NetworkError


def test_a_call_of_2024_trains(make: Any, tokenizer: Any, told: Any, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": f"a plain text of number {i}"} for i in range(6)])
    trainer = phlora.SFTTrainer(
        new_model(),
        phlora.TrainingArguments(str(tmp_path), evaluation_strategy="no", max_steps=2, report_to="none"),
        train_dataset=rows,
        tokenizer=tokenizer,
        max_seq_length=32,
        dataset_text_field="text",
        packing=False,
        dataset_num_proc=1,
        dataset_kwargs={"append_concat_token": False},
        peft_config={"r": 4, "target_modules": ["o_proj"]},
    )
    assert isinstance(trainer, trl.SFTTrainer) and isinstance(trainer.args, trl.SFTConfig)
    assert (trainer.args.max_length, trainer.args.packing, trainer.args.max_steps) == (32, False, 2)
    assert trainer.train().global_step == 2
    for line in (
        "tokenizer is now called processing_class",
        "SFTConfig(max_length=...)",
        "append_concat_token",
    ):
        assert told().count(line) == 1


def test_all_problems_of_a_call_are_one_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError) as error:
        phlora.SFTTrainer(model, model_init=lambda: model, train_datset=chats(), tokeniser=None)
    for word in (
        "3 arguments",
        "model_init is gone",
        "did you mean `train_dataset`",
        "did you mean `tokenizer`",
    ):
        assert word in str(error.value)


def test_the_configuration_of_the_script_stays_as_it_was(make: Any, tmp_path: Path) -> None:
    args = phlora.SFTConfig(str(tmp_path), max_steps=1, report_to="none")
    assert make(args=args).args is args
    moved = make(args=args, max_seq_length=48)
    assert (args.max_length, moved.args.max_length) == (1024, 48)
    plain = trl.SFTConfig(
        str(tmp_path), max_steps=1, report_to="none", bf16=False, activation_checkpointing=False
    )
    assert make(args=plain).args is plain


def test_without_a_configuration_there_is_trls_own(
    model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = phlora.SFTTrainer(model, train_dataset=chats(), processing_class=tokenizer)
    assert trainer.args.output_dir.endswith("-SFT") and trainer.args.learning_rate == 2e-5


class Own(phlora.SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(model, inputs, *args, **kwargs)


class Counting(TrainerCallback):
    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Counting.steps += 1


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_subclasses_callbacks_optimizers_and_metrics_keep_working(
    model: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    args = phlora.SFTConfig(str(tmp_path), max_steps=2, report_to="none", eval_strategy="steps", eval_steps=2)
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"one": 1.0}

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Own(
        model,
        args,
        train_dataset=chats(),
        eval_dataset=chats(2),
        processing_class=tokenizer,
        callbacks=[Counting],
        compute_metrics=metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.calls >= 2 and Counting.steps == 2 and seen
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert pickle.loads(pickle.dumps(trainer.args)).max_steps == 2


def test_a_hub_that_is_not_to_be_had_is_one_message(make: Any, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="train without push_to_hub"):
        make(settings={"push_to_hub": True, "hub_model_id": "us/shop"})
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = make(model=base, peft_config=LoraConfig(r=2, target_modules=["o_proj"]))
    trainer.train()
    with pytest.raises(NetworkError, match="hf upload out "):
        trainer.push_to_hub()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "[None]" not in card and model_folder.name in card


def test_nothing_global_is_left_changed(make: Any) -> None:
    before = (
        trl.SFTTrainer._prepare_dataset,
        peft.get_peft_model,
        torch.get_default_dtype(),
        nn.Linear.forward,
    )
    make(peft_config=LoraConfig(r=4, target_modules=SEVEN)).train()
    after = (
        trl.SFTTrainer._prepare_dataset,
        peft.get_peft_model,
        torch.get_default_dtype(),
        nn.Linear.forward,
    )
    assert before == after
