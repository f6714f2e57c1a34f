"""Phlora's trainer against TRL's, step by step: same rows, seed, order and hyper-parameters, fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MptConfig,
)
from trl.chat_template_utils import phi3_chat_template

import phlora
from phlora.testing import quiet_config, tiny_phi3
from phlora.testing.models import TINY_SIZES

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
    settings = dict(max_steps=20, learning_rate=1e-2, per_device_train_batch_size=4, max_length=64)
    args = quiet_config(folder, **{**settings, **changes})
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


SMALL = dict(TINY_SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    # Trunks that keep their layers under other names than Phi-3.
    "gpt2": lambda v: GPT2Config(
        vocab_size=v, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "falcon": lambda v: FalconConfig(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mpt": lambda v: MptConfig(vocab_size=v, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "bloom": lambda v: BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4),
    # Logits that are changed after the head.
    "gemma2": lambda v: Gemma2Config(vocab_size=v, head_dim=8, final_logit_softcapping=0.5, **SMALL),
    "granite": lambda v: GraniteConfig(vocab_size=v, logits_scaling=8.0, **SMALL),
    "cohere": lambda v: CohereConfig(vocab_size=v, logit_scale=0.25, **SMALL),
}


def short_run(
    trainer_class: type, folder: Path, *, model: Any = None, lora: Any = None, **given: Any
) -> list[Any]:
    """The log of two steps with an evaluation of one batch after each, without its times."""
    tiny, tokenizer = tiny_phi3()
    if isinstance(model, str):
        torch.manual_seed(1)
        tiny = AutoModelForCausalLM.from_config(FAMILIES[model](len(tokenizer)))
    args = quiet_config(
        folder, max_steps=2, learning_rate=1e-2, eval_strategy="steps", eval_steps=1,
        per_device_train_batch_size=4, max_length=64,
    )  # fmt: skip
    data = chats(12).map(lambda row: {"text": row["messages"][0]["content"]}, remove_columns="messages")
    torch.manual_seed(0)
    trainer = trainer_class(
        model=tiny, args=args, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tokenizer,
        peft_config=lora or LoraConfig(r=4, target_modules="all-linear"), **given,
    )  # fmt: skip
    trainer.train()
    times = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(times)}
        for entry in trainer.state.log_history
    ]


def assert_equal_logs(tmp_path: Path, **given: Any) -> None:
    theirs = short_run(trl.SFTTrainer, tmp_path / "trl", **given)
    ours = short_run(phlora.SFTTrainer, tmp_path / "phlora", **given)
    assert len(ours) == len(theirs) == 5 and "entropy" in ours[0] and "eval_entropy" in ours[1]
    for mine, other in zip(ours[:4], theirs[:4], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


# PEFT's word on the Conv1D of GPT-2, which it acts on itself.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_trl_trains_is_trained_alike(tmp_path: Path, family: str) -> None:
    assert_equal_logs(tmp_path, model=family)


def test_the_logs_are_those_of_trl(tmp_path: Path) -> None:
    assert_equal_logs(tmp_path)


def test_prompt_tuning_is_trained_alike(tmp_path: Path) -> None:
    assert_equal_logs(tmp_path, lora=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def embedded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    shape = (len(rows), 6)
    ones = torch.ones(shape, dtype=torch.long)
    drawn = torch.Generator().manual_seed(0)
    return {
        "inputs_embeds": torch.randn(*shape, 64, generator=drawn),
        "labels": 7 * ones,
        "attention_mask": ones,
    }


def test_batches_of_embeddings_are_trained_alike(tmp_path: Path) -> None:
    assert_equal_logs(tmp_path, data_collator=embedded)
