"""A script's training that is interrupted, by Ctrl-C or in a notebook: a checkpoint first, from which it goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from script_rows import new_model
from torch import nn
from transformers import TrainerCallback


class Interrupting(TrainerCallback):
    def __init__(self, times: int = 1) -> None:
        self.times, self.ended = times, 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)
        self.times = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended += 1


def said_within(capsys: pytest.CaptureFixture[str], *, seconds: float) -> str:
    """What another thread has written by then."""
    said, until = "", time.monotonic() + seconds
    while "Stopping" not in said and time.monotonic() < until:
        said += capsys.readouterr().err
        time.sleep(0.01)
    return said


@pytest.fixture
def start(make: Any, weights: Any) -> Any:
    def made(*callbacks: TrainerCallback, **settings: Any) -> Any:
        model: nn.Module = new_model()
        model.load_state_dict(weights)
        lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
        return make(
            model=model, peft_config=lora, callbacks=list(callbacks), settings={"max_steps": 3, **settings}
        )

    return made


@pytest.fixture(autouse=True)
def as_in_a_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_writes_a_checkpoint_from_which_training_goes_on(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start(Interrupting())
    with pytest.raises(KeyboardInterrupt, match=r"after step 1, .*checkpoint-1; trainer.train\(resume"):
        trainer.train()
    assert "Stopping after this step, with a checkpoint" in said_within(capsys, seconds=5)
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = start()
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    whole = start()
    whole.train()
    one, other = (get_peft_model_state_dict(each.model) for each in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The same trainer goes on too, and no callback is left on it.
    trainer.train(resume_from_checkpoint=True)
    assert not any("GentleStop" in type(each).__name__ for each in trainer.callback_handler.callbacks)


def test_a_second_interruption_stops_at_once(start: Any, tmp_path: Path) -> None:
    seen = Interrupting(times=2)
    with pytest.raises(KeyboardInterrupt):
        start(seen).train()
    assert seen.ended == 0 and not (tmp_path / "out" / "checkpoint-1").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_script_without_checkpoints_stops_at_once(start: Any, tmp_path: Path) -> None:
    seen = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        start(seen, save_strategy="no").train()
    assert seen.ended == 0 and not (tmp_path / "out" / "checkpoint-1").exists()


def test_a_script_that_heeds_the_signal_itself_still_does(start: Any) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    assert start(Interrupting()).train().global_step == 3 and heard == [signal.SIGINT]


def test_a_checkpoint_without_its_optimizer_is_said_to_be_one(start: Any) -> None:
    with pytest.raises(
        KeyboardInterrupt, match="continues from it, from its weights alone, with a fresh optimizer"
    ):
        start(Interrupting(), save_only_model=True).train()
