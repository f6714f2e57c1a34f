"""Rows side by side, packed, or with their common starts computed once: the same loss, the same training."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from phlora import SFTTrainer
from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator
from phlora.evaluate.compare import score_loss
from phlora.models.embedded import tiny_phi3
from phlora.models.head import token_losses, trained_weight

PAD = 3
COLLATORS = {"packed": PackedCollator(), "shared": SharedPrefixCollator()}
Row = dict[str, Any]


def chat(ids: list[int], trained: list[tuple[int, int]], weight: float | None = None) -> Row:
    """A row that trains the tokens of some stretches."""
    labels = [-100] * len(ids)
    for first, stop in trained:
        labels[first:stop] = ids[first:stop]
    row: Row = {"input_ids": ids, "labels": labels}
    return row if weight is None else {**row, "weights": [weight * (label != -100) for label in labels]}


def some_ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, 250) for _ in range(count)]


START = some_ids(40, 0)
TAILS = [some_ids(n, n) for n in (9, 4, 17, 6, 12)]
ROWS: dict[str, list[Row]] = {
    "answers": [chat(START + tail, [(43, 99)]) for tail in TAILS],
    "everything": [chat(START + tail, [(0, 99)]) for tail in TAILS],
    "several turns, some of them shared": [
        chat(START + tail, [(10, 20), (35, 42), (44, 60)]) for tail in TAILS
    ],
    "turns that only some rows train": [
        chat(START + tail, [(10 + 5 * n, 35), (42, 60)]) for n, tail in enumerate(TAILS)
    ],
    "weights": [chat(START + tail, [(20, 60)], 0.25 * (1 + n)) for n, tail in enumerate(TAILS)],
    "two starts and rows alone": [chat(START + tail, [(30, 99)]) for tail in TAILS[:3]]
    + [chat(START[::-1] + tail, [(30, 99)]) for tail in TAILS]
    + [chat(some_ids(n, 90 + n), [(1, 99)]) for n in (3, 25)],
    "nothing in common": [chat(some_ids(n, n), [(2, 99)]) for n in (5, 30, 11)],
    "one row": [chat(START, [(5, 99)])],
    "twins and a row that begins others": [
        chat(START, [(20, 99)]),
        chat(START, [(20, 99)]),
        chat(START + TAILS[0], [(20, 99)]),
    ],
}


def lora_model(device: str = "cpu", **settings: Any) -> peft.PeftModel:
    """Double precision, and a B that is not zero, so that A has a gradient."""
    model = peft.get_peft_model(tiny_phi3(**settings)[0], LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Phi3RMSNorm):
                setattr(module, name, _double_norm(child))
    return model.double().to(device).train()


def _double_norm(norm: Phi3RMSNorm) -> torch.nn.RMSNorm:
    """transformers' norm rounds to float32 whatever the model's dtype, and would hide 1e-12."""
    double = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
    double.weight = norm.weight
    return double


def loss_and_gradients(model: peft.PeftModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch = on_device(model, batch)
    losses, _, weights = token_losses(model, batch)
    loss = (losses * weights).sum() / trained_weight(batch)
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


def on_device(model: peft.PeftModel, batch: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(model.device) if isinstance(x, torch.Tensor) else x for n, x in batch.items()}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Relative to the length of each tensor."""
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (ours[name] - value).norm() <= bound * value.norm(), name


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("layout", COLLATORS)
def test_loss_and_every_gradient_are_those_of_padded_rows(layout: str, name: str, device: str) -> None:
    model, rows = lora_model(device), ROWS[name]
    expected = loss_and_gradients(model, Collator(PAD)(rows))
    assert_close(loss_and_gradients(model, COLLATORS[layout](rows)), expected, 1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["padded", *COLLATORS])
def test_a_row_that_changes_moves_no_loss_of_another(layout: str, training: bool, device: str) -> None:
    model, collate = lora_model(device).train(training), {"padded": Collator(PAD), **COLLATORS}[layout]
    rows = [chat(START + tail, [(41, 99)]) for tail in sorted(TAILS, key=len, reverse=True)]
    counts = [len(row["input_ids"]) - 41 for row in rows]
    before = token_losses(model, on_device(model, collate(rows)))[0].split(counts)
    for changed, row in enumerate(rows):
        other = chat([*row["input_ids"][:-2], 251, 252], [(41, 99)])
        batch = collate([*rows[:changed], other, *rows[changed + 1 :]])
        after = token_losses(model, on_device(model, batch))[0].split(counts)
        for number, losses in enumerate(after):
            same = torch.allclose(losses, before[number], rtol=1e-12, atol=1e-12)
            assert same == (number != changed)


@pytest.mark.parametrize("window", [8, 45])
def test_a_sliding_window_is_the_same_window(window: int, device: str) -> None:
    model, rows = lora_model(device, sliding_window=window), ROWS["everything"]
    expected = loss_and_gradients(model, Collator(PAD)(rows))
    assert_close(loss_and_gradients(model, SharedPrefixCollator()(rows)), expected, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, device: str) -> None:
    model, rows = lora_model(device), ROWS["several turns, some of them shared"]
    expected = loss_and_gradients(model, Collator(PAD)(rows))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(loss_and_gradients(model, SharedPrefixCollator()(rows)), expected, 1e-12)


def test_the_trained_weight_counts_a_shared_token_once_for_each_row() -> None:
    for rows in ROWS.values():
        padded, shared = (
            trained_weight(collate(rows)) for collate in (Collator(PAD), SharedPrefixCollator())
        )
        assert float(padded) == float(shared)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_scored_as_alone(name: str, device: str) -> None:
    model, rows = lora_model(device), ROWS[name]
    expected = score_loss(model, rows, collate=Collator(PAD), batch_size=3)
    shared = score_loss(model, rows, collate=SharedPrefixCollator(), batch_size=4)
    assert shared.num_tokens == expected.num_tokens
    for ours, theirs in zip(shared.per_row, expected.per_row, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    with model.disable_adapter():
        base = score_loss(model, rows, collate=Collator(PAD), batch_size=3)
        assert base.loss != pytest.approx(expected.loss, rel=1e-4)
        assert score_loss(model, rows, collate=SharedPrefixCollator(), batch_size=8).loss == pytest.approx(
            base.loss, rel=1e-12
        )


def trained(folder: Path, rows: list[Row], collator: Any, *, device: str, **settings: Any) -> SFTTrainer:
    model, tokenizer = tiny_phi3()
    torch.manual_seed(0)
    args = trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        bf16=False,
        **{"gradient_checkpointing": False, **settings},
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        max_length=None,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:7]),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train()
    return trainer


def many_rows(*, weighted: bool = False) -> list[Row]:
    generator = random.Random(3)
    starts = [START, START[:25] + some_ids(15, 7)]
    return [
        chat(
            generator.choice(starts) + some_ids(generator.randrange(3, 20), n),
            [(12, 22), (41, 99)],
            0.5 * (1 + n % 3) if weighted else None,
        )
        for n in range(32)
    ]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_twenty_steps_take_the_same_path(tmp_path: Path, weighted: bool, device: str) -> None:
    """AdamW in single precision, shuffled rows, micro-batches of 3 with a short last one, checkpointing on one side."""
    rows = many_rows(weighted=weighted)
    settings = dict(
        device=device,
        max_steps=20,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    plain = trained(tmp_path / "plain", rows, Collator(PAD), **settings)
    shared = trained(
        tmp_path / "shared", rows, SharedPrefixCollator(), **settings, gradient_checkpointing=True
    )
    for ours, theirs in zip(shared.state.log_history, plain.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (theirs["step"], name)
    expected = get_peft_model_state_dict(plain.model)
    for name, weight in get_peft_model_state_dict(shared.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    assert shared.num_tokens == plain.num_tokens
    assert shared.num_positions < 0.7 * plain.num_positions


def test_held_out_loss_is_that_of_all_its_tokens_in_any_layout(tmp_path: Path, device: str) -> None:
    settings = dict(device=device, max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    rows = many_rows(weighted=True)
    trainers = [
        trained(tmp_path / str(number), rows, collator, **settings)
        for number, collator in enumerate((Collator(PAD), SharedPrefixCollator()))
    ]
    plain, shared = (trainer.evaluate() for trainer in trainers)
    assert shared["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert shared["eval_mean_token_accuracy"] == pytest.approx(plain["eval_mean_token_accuracy"])
    model = trainers[0].model.eval()
    with torch.no_grad():
        losses, _, weights = token_losses(model, on_device(model, Collator(PAD)(rows[:7])))
    assert plain["eval_loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)


def test_the_snippet_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(snippet, "performance.md", "exec"), {})
    assert "torch.Size([1, 7]) 7" in capsys.readouterr().out
