"""A run that was interrupted in its second epoch sees the rest of it as an uninterrupted one does, in every order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phlora import finetune
from phlora.display import Display
from phlora.train import loop
from phlora.train.callbacks import GentleStop

ROWS = [{"question": f"say {i} " + "and again " * (i % 7), "answer": f"yes {i}"} for i in range(40)]


class StopInTheSecondEpoch(GentleStop):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if 1 < state.epoch < 2:
            self.signal = 2
        super().on_step_end(args, state, control)


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "group_by_length", "data_seed": 5},
        {"train_sampling_strategy": "batch_rebalance"},
        {"packing": True, "max_length": 128, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_the_order_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: dict[str, Any]
) -> None:
    def run_it(output: str, *, resume: bool = False) -> None:
        finetune(
            model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
            data={"files": [str(chats)], "eval_size": 0},
            training_config={
                "learning_rate": 2e-2,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "save_steps": 100,
                **order,
            },
            peft_config={"r": 4, "lora_dropout": 0},
            evaluation={"enabled": False},
            output=tmp_path / output,
            resume=resume,
            display=Display(quiet=True),
        )

    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(f"{row}\n".replace("'", '"') for row in ROWS), encoding="utf-8")
    run_it("whole")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "GentleStop", StopInTheSecondEpoch)
        with pytest.raises(KeyboardInterrupt):
            run_it("halted")
    run_it("halted", resume=True)
    file = "adapter/last/adapter_model.safetensors"
    whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "halted"))
    assert any(weight.any() for name, weight in whole.items() if "lora_B" in name)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
