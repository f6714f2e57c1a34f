"""Phlora's trainer against TRL's, step by step: same rows, seed, order and hyper-parameters, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from trl.chat_template_utils import phi3_chat_template

import phlora
from phlora.models.embedded import tiny_phi3

# Both compute in fp32 and sum in another order; 20 AdamW steps carry the rounding of the first ones along.
LOSS_TOLERANCE = dict(rtol=2e-5, atol=2e-6)
# Relative to the length of a weight: AdamW turns the rounding of a gradient near zero into a step of full size.
ADAPTER_TOLERANCE = 2e-3

QUESTIONS = [
    "hello there",
    "what is the weather",
    "درود بر تو",
    "namaste नमस्ते",
    "xin chào bạn",
    "merhaba dünya",
]


def chats(num_rows: int) -> Dataset:
    rows = [
        {
            "messages": [
                {"role": "user", "content": QUESTIONS[i % 6] + " " + "word " * (i % 7)},
                {"role": "assistant", "content": f"answer {i} " * (1 + i % 3)},
            ]
        }
        for i in range(num_rows)
    ]
    return Dataset.from_list(rows)


def prompts(num_rows: int) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"add {i} and {i}", "completion": f" gives {2 * i}"} for i in range(num_rows)]
    )


def train(
    trainer_class: type, folder: Path, data: Dataset, **changes: Any
) -> tuple[list[float], dict[str, Any]]:
    model, tokenizer = tiny_phi3()
    tokenizer.chat_template = phi3_chat_template  # the text by which TRL knows Phi-3
    settings = dict(
        gradient_checkpointing=False,
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=4,
        max_length=64,
    )
    args = trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**settings, **changes},
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(3)), peft_config=lora,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    return losses, get_peft_model_state_dict(trainer.model)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (chats(40), {"assistant_only_loss": True}),
        (chats(40), {}),
        (prompts(40), {}),
        (chats(40), {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
        (chats(60), {"packing": True, "per_device_train_batch_size": 2}),
        (chats(40), {"gradient_checkpointing": True}),
    ],
    ids=["answers", "all-tokens", "completions", "accumulated", "packed", "checkpointed"],
)
def test_twenty_steps_equal_trl(tmp_path: Path, data: Dataset, changes: dict[str, Any]) -> None:
    theirs, their_adapter = train(trl.SFTTrainer, tmp_path / "trl", data, **changes)
    ours, our_adapter = train(phlora.SFTTrainer, tmp_path / "phlora", data, **changes)
    assert len(ours) == 21 and ours[19] < ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), **LOSS_TOLERANCE)
    assert our_adapter.keys() == their_adapter.keys()
    for name, weight in our_adapter.items():
        error = (weight - their_adapter[name]).norm() / their_adapter[name].norm()
        assert error < ADAPTER_TOLERANCE, (name, error)


def test_label_smoothing_is_that_of_the_library(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        theirs, _ = train(trl.SFTTrainer, tmp_path / "trl", chats(8), max_steps=3, label_smoothing_factor=0.1)
    ours, _ = train(phlora.SFTTrainer, tmp_path / "ours", chats(8), max_steps=3, label_smoothing_factor=0.1)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), **LOSS_TOLERANCE)
