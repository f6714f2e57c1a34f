"""One optimizer step is the same step however it is cut: into micro-batches, packs, or by weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict

from phlora import SFTTrainer
from phlora.data.collate import Collator, PackedCollator
from phlora.testing import quiet_config, tiny_phi3

# SGD keeps an update proportional to its gradient, so fp32 rounding stays rounding.
TOLERANCE = dict(rtol=1e-4, atol=1e-6)
LENGTHS = (5, 31, 12, 8, 40, 3, 17, 22)


def token_rows(*, weighted: bool = False, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        trained_from = 1 + number % (length - 1)
        labels = [-100] * trained_from + ids[trained_from:]
        row: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if weighted:
            row["weights"] = [0.25 + number % 3 if label != -100 else 0.0 for label in labels]
        rows.append(row)
    return rows


def adapter_after(
    folder: Path, rows: list[dict[str, Any]], *, collator: Any = None, **settings: Any
) -> dict[str, Any]:
    """The adapter after a few steps of plain gradient descent over the rows in their order."""
    model, tokenizer = tiny_phi3()
    torch.manual_seed(0)
    args = quiet_config(
        folder,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        max_length=None,
        **settings,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"),
        processing_class=tokenizer,
        data_collator=collator or Collator(tokenizer.pad_token_id),
    )
    trainer.train()
    assert trainer.state.global_step == args.max_steps
    return get_peft_model_state_dict(trainer.model)


def assert_same(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    assert any(float(weight.abs().max()) > 1e-3 for name, weight in reference.items() if "lora_B" in name)
    for name, weight in reference.items():
        torch.testing.assert_close(
            ours[name], weight, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("batch", "accumulated"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_equals_one_big_batch(
    tmp_path: Path, batch: int, accumulated: int, weighted: bool
) -> None:
    rows = token_rows(weighted=weighted)
    whole = adapter_after(tmp_path, rows, max_steps=3, per_device_train_batch_size=8)
    parts = adapter_after(
        tmp_path,
        rows,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )
    assert_same(parts, whole)


def test_a_short_last_window_counts_its_own_tokens_only(tmp_path: Path) -> None:
    """Five rows in windows of three: the second step has two rows, on both sides."""
    rows = token_rows(lengths=LENGTHS[:5])
    whole = adapter_after(tmp_path, rows, max_steps=2, per_device_train_batch_size=3)
    parts = adapter_after(
        tmp_path, rows, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3
    )
    assert_same(parts, whole)


def test_weights_scale_tokens_and_a_common_factor_cancels(tmp_path: Path) -> None:
    rows = token_rows()
    plain = adapter_after(tmp_path, rows, max_steps=2, per_device_train_batch_size=8)
    doubled = [{**row, "weights": [2.0 * (label != -100) for label in row["labels"]]} for row in rows]
    assert_same(adapter_after(tmp_path, doubled, max_steps=2, per_device_train_batch_size=8), plain)
    uneven = adapter_after(tmp_path, token_rows(weighted=True), max_steps=2, per_device_train_batch_size=8)
    assert any(not torch.allclose(uneven[name], plain[name], **TOLERANCE) for name in plain)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_pack_equals_its_rows_side_by_side(tmp_path: Path, weighted: bool) -> None:
    rows = token_rows(weighted=weighted)
    side_by_side = adapter_after(tmp_path, rows, max_steps=3, per_device_train_batch_size=8)
    packed = adapter_after(
        tmp_path, rows, max_steps=3, per_device_train_batch_size=8, collator=PackedCollator()
    )
    assert_same(packed, side_by_side)
