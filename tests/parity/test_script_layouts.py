"""A script with its import changed against TRL, step by step: losses, rates, gradient norms and the adapter, in fp32.

Nothing but the import differs: the configuration, the rows and the seed are the script's, and every faster way that is
exact for them is taken (`speed`); each case says whether rows shared their starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from trl.chat_template_utils import phi3_chat_template

import phlora
from phlora.testing import tiny_phi3

# Both compute in fp32 and sum in another order.
LOSS_TOLERANCE = 1e-5
# Relative to the length of a weight: AdamW turns the rounding of a gradient near zero into a step of full size.
ADAPTER_TOLERANCE = 1e-3

SYSTEM = "You answer in one short line, and never with a question. "
QUESTIONS = [
    "hello there",
    "what is the weather",
    "درود بر تو",
    "namaste नमस्ते",
    "xin chào bạn",
    "merhaba dünya",
]


def chats(num_rows: int = 40) -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": QUESTIONS[i % 6] + " " + "word " * (i % 7)},
                    {"role": "assistant", "content": f"answer {i} " * (1 + i % 3)},
                    {"role": "user", "content": "and then?"},
                    {"role": "assistant", "content": f"{i % 5} more"},
                ]
            }
            for i in range(num_rows)
        ]
    )


def completions() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{SYSTEM}add {i} and {i}", "completion": f" gives {2 * i}"} for i in range(40)]
    )


def chat_completions() -> Dataset:
    return Dataset.from_list(
        [{"prompt": row["messages"][:2], "completion": row["messages"][2:3]} for row in chats()]
    )


def texts() -> Dataset:
    return Dataset.from_list([{"text": f"{SYSTEM}{QUESTIONS[i % 6]} {'word ' * (i % 7)}"} for i in range(40)])


def tokens() -> Dataset:
    _, tokenizer = tiny_phi3()
    rows = [tokenizer(row["text"])["input_ids"] for row in texts()]
    labels = [[-100] * 8 + ids[8:] for ids in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def unlabelled() -> Dataset:
    return tokens().remove_columns("labels")


def with_lengths() -> Dataset:
    rows = tokens()
    return rows.add_column("length", [len(ids) for ids in rows["input_ids"]])


def train(
    trainer_class: type, folder: Path, data: Dataset, *, lora: dict[str, Any] | None = None, **changes: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trainer after 20 steps, with an evaluation of one batch every ten, and its adapter."""
    model, tokenizer = tiny_phi3()
    tokenizer.chat_template = phi3_chat_template  # the text by which TRL knows Phi-3
    settings = dict(
        gradient_checkpointing=False,
        max_steps=20,
        learning_rate=2e-3,
        logging_steps=1,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=10,
        max_length=96,
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
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **(lora or {})),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer, get_peft_model_state_dict(trainer.model)


SHARED, PLAIN = True, False
CASES: dict[str, tuple[Callable[[], Dataset], bool, dict[str, Any]]] = {
    "messages": (chats, SHARED, {}),
    "answers": (chats, SHARED, {"assistant_only_loss": True}),
    "completions": (completions, SHARED, {}),
    "chat-completions": (chat_completions, SHARED, {}),
    "whole-completions": (completions, SHARED, {"completion_only_loss": False}),
    "text": (texts, SHARED, {}),
    "tokens": (tokens, SHARED, {}),
    "unlabelled": (unlabelled, SHARED, {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    "accumulated": (chats, SHARED, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}),
    "packed": (chats, SHARED, {"packing": True, "per_device_train_batch_size": 2, "max_length": 256}),
    "packed-and-split": (chats, SHARED, {"packing": True, "packing_strategy": "bfd_split", "max_length": 64}),
    "wrapped": (chats, SHARED, {"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
    "packed-held-out": (chats, SHARED, {"eval_packing": True, "padding_free": True, "packing": True}),
    "padding-free": (chats, SHARED, {"padding_free": True, "max_length": None}),
    "cut": (chats, SHARED, {"max_length": 40}),
    "cut-in-front": (chats, PLAIN, {"max_length": 24, "truncation_mode": "keep_end"}),
    "smoothed": (chats, SHARED, {"label_smoothing_factor": 0.1}),
    "by-length": (with_lengths, SHARED, {"train_sampling_strategy": "group_by_length"}),
    "in-order": (chats, SHARED, {"train_sampling_strategy": "sequential", "dataloader_drop_last": True}),
    "shuffled": (chats, SHARED, {"shuffle_dataset": True}),
    "checkpointed": (chats, SHARED, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    "two-workers": (chats, SHARED, {"dataloader_num_workers": 2, "max_steps": 4}),
    "multiple-of": (chats, SHARED, {"pad_to_multiple_of": 16}),
    "noise": (chats, PLAIN, {"neftune_noise_alpha": 5.0}),
    "dft": (chats, PLAIN, {"loss_type": "dft"}),
    "reference": (chats, PLAIN, {}),
}
# What differs from another case in a detail, left to `make test-all`.
SIBLINGS = (
    *("chat-completions", "whole-completions", "unlabelled", "packed-and-split", "cut-in-front", "in-order"),
    *("shuffled", "two-workers", "multiple-of", "text"),
)


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SIBLINGS else ()) for case in CASES]
)
def test_a_script_trains_as_with_trl(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    rows, shared, changes = CASES[case]
    caplog.set_level("INFO", "phlora.dropin")
    data = rows()
    theirs, their_adapter = train(trl.SFTTrainer, tmp_path / "trl", data, **changes)
    our_class = ReferenceTrainer if case == "reference" else phlora.SFTTrainer
    ours, our_adapter = train(our_class, tmp_path / "phlora", data, **changes)
    compared = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "eval_entropy")
    logs = [
        [
            {name: entry[name] for name in compared if name in entry}
            for entry in trainer.state.log_history[:-1]
        ]
        for trainer in (ours, theirs)
    ]
    assert len(logs[0]) == len(logs[1]) > theirs.state.global_step == ours.state.global_step
    for mine, other in zip(*logs, strict=True):
        assert mine == pytest.approx(other, abs=LOSS_TOLERANCE, rel=LOSS_TOLERANCE)
    assert ("shared prefixes on" in caplog.text) == shared
    assert our_adapter.keys() == their_adapter.keys()
    for name, weight in our_adapter.items():
        error = (weight - their_adapter[name]).norm() / their_adapter[name].norm()
        assert error < ADAPTER_TOLERANCE, (name, error)


class ReferenceTrainer(phlora.SFTTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(speed="reference", **kwargs)
