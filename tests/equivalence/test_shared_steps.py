"""The micro-batches of an optimizer step laid out together: the same step, in fewer forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import get_peft_model_state_dict
from shared_rows import (
    PAD,
    ROWS,
    START,
    assert_close,
    chat,
    lora_model,
    loss_and_gradients,
    many_rows,
    some_ids,
    trained,
)

from phlora.data.collate import Collator, SharedPrefixCollator, share_step

Rows = list[dict[str, Any]]


def micro_batches(rows: Rows, collate: Any, size: int) -> list[dict[str, Any]]:
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("max_positions", [None, 120, 1000])
def test_a_step_laid_out_together_is_the_same_step(name: str, max_positions: int | None, device: str) -> None:
    model, rows = lora_model(device), ROWS[name]
    expected = loss_and_gradients(model, *micro_batches(rows, Collator(PAD), 2))
    together = share_step(micro_batches(rows, SharedPrefixCollator(), 2), max_positions=max_positions)
    assert_close(loss_and_gradients(model, *together), expected, 1e-12)
    if max_positions == 1000:
        assert len(together) == 1


@pytest.mark.parametrize("copy_cost", [0.0, 1 / 6])
def test_no_pass_computes_more_than_the_largest_padded_micro_batch(copy_cost: float) -> None:
    rows = many_rows()
    for size in (1, 2, 3, 5):
        padded = micro_batches(rows, Collator(PAD), size)
        shared = micro_batches(rows, SharedPrefixCollator(), size)
        together = share_step(shared, copy_cost=copy_cost)
        largest = max(batch["input_ids"].numel() for batch in padded)
        assert max(batch["input_ids"].numel() for batch in together) <= largest
        assert len(together) <= len(shared)
        positions, before = (sum(b["input_ids"].numel() for b in batches) for batches in (together, shared))
        assert positions <= before
        assert sum(batch["num_tokens"] for batch in together) == sum(len(row["input_ids"]) for row in rows)
    assert len(share_step(micro_batches(rows, SharedPrefixCollator(), 8))) == 1


def test_a_row_for_each_micro_batch_leaves_room_for_no_other() -> None:
    rows = [chat(START + some_ids(9, seed), [(41, 99)]) for seed in range(4)]
    together = share_step(micro_batches(rows, SharedPrefixCollator(), 1))
    assert [batch["input_ids"].numel() for batch in together] == [48] * 4


def test_smoothed_steps_take_the_path_of_trls_trainer(tmp_path: Path, device: str) -> None:
    """Their loss is the library's label smoother on padded rows."""
    rows = many_rows()
    settings = dict(
        device=device,
        max_steps=20,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        label_smoothing_factor=0.1,
    )
    with pytest.warns(FutureWarning):
        theirs = trained(tmp_path / "trl", rows, Collator(PAD), trainer=trl.SFTTrainer, **settings)
    ours = trained(tmp_path / "shared", rows, SharedPrefixCollator(), **settings)
    for mine, expected in zip(ours.state.log_history[:20], theirs.state.log_history[:20], strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4), expected["step"]
    adapter = get_peft_model_state_dict(theirs.model)
    for name, weight in get_peft_model_state_dict(ours.model).items():
        torch.testing.assert_close(weight, adapter[name], rtol=1e-3, atol=2e-5, msg=name)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_twenty_accumulated_steps_take_the_same_path(
    tmp_path: Path, weighted: bool, with_lengths: bool, device: str
) -> None:
    """AdamW in single precision over shuffled rows, with a short last step in each epoch."""
    rows = many_rows(weighted=weighted)
    if with_lengths:
        rows = [{**row, "length": len(row["input_ids"])} for row in rows]
    settings = dict(
        device=device,
        max_steps=20,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
    )
    plain = trained(tmp_path / "plain", rows, Collator(PAD), **settings)
    shared = trained(tmp_path / "shared", rows, SharedPrefixCollator(), **settings)
    assert len(shared.state.log_history) == len(plain.state.log_history)
    for ours, theirs in zip(shared.state.log_history, plain.state.log_history, strict=True):
        assert ours["step"] == theirs["step"] and ours["epoch"] == theirs["epoch"]
        for name in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens", "learning_rate"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (theirs["step"], name)
    expected = get_peft_model_state_dict(plain.model)
    for name, weight in get_peft_model_state_dict(shared.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    assert shared.num_tokens == plain.num_tokens
    assert shared.num_positions < 0.6 * plain.num_positions
    assert plain.num_passes == plain.num_micro_batches == shared.num_micro_batches
    assert shared.num_passes <= 0.7 * shared.num_micro_batches


def test_a_resumed_run_lays_its_steps_out_alike(tmp_path: Path, device: str) -> None:
    rows = [{**row, "length": len(row["input_ids"])} for row in many_rows()]
    settings = dict(
        device=device,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=4,
        max_steps=8,
    )
    whole = trained(tmp_path / "whole", rows, SharedPrefixCollator(), **settings)
    resumed = trained(
        tmp_path / "half",
        rows,
        SharedPrefixCollator(),
        **settings,
        resume=tmp_path / "whole" / "checkpoint-4",
    )
    assert resumed.num_passes < resumed.num_micro_batches
    expected = get_peft_model_state_dict(whole.model)
    for name, weight in get_peft_model_state_dict(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
