"""The two dictionaries of a script written for an earlier TRL, as they are, given to `finetune`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import phlora
from phlora.display import Display
from phlora.testing import chat_rows

TRAINING = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "warning",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


@pytest.mark.parametrize("kind", ["dictionaries", "objects", "packed"])
def test_they_train(kind: str, model_folder: Path, tmp_path: Path) -> None:
    training: Any = {**TRAINING, "output_dir": str(tmp_path / "run"), "packing": kind == "packed"}
    lora: Any = LORA
    if kind == "objects":
        training, lora = phlora.SFTConfig(**training), LoraConfig(**LORA)
    said = io.StringIO()
    run = phlora.finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=chat_rows(12),
        training_config=training,
        peft_config=lora,
        evaluation={"enabled": False},
        display=Display(said),
    )
    assert (
        run.folder == tmp_path / "run" and (run.folder / "adapter" / "best" / "adapter_config.json").is_file()
    )
    if kind == "dictionaries":
        for name in ("warmup_ratio", "overwrite_output_dir", "bf16"):
            assert f"training_config.{name}" in said.getvalue()
