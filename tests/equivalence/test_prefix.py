"""Rows side by side, packed, or with their common starts computed once: the same loss, the same training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from shared_rows import (
    PAD,
    ROWS,
    START,
    TAILS,
    assert_close,
    chat,
    lora_model,
    loss_and_gradients,
    many_rows,
    on_device,
    trained,
)

from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator
from phlora.evaluate.compare import score_loss
from phlora.models import lm_head
from phlora.models.lm_head import LossTerms, token_losses, trained_weight

COLLATORS = {"packed": PackedCollator(), "shared": SharedPrefixCollator()}


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


@pytest.mark.parametrize("terms", [LossTerms(label_smoothing=0.2), LossTerms(0.1, z_loss=0.01)], ids=str)
def test_label_smoothing_and_z_loss_count_for_each_row_that_shares(terms: LossTerms, device: str) -> None:
    model, rows = lora_model(device), ROWS["weights"]
    expected = loss_and_gradients(model, Collator(PAD)(rows), terms=terms)
    assert_close(loss_and_gradients(model, SharedPrefixCollator()(rows), terms=terms), expected, 1e-12)


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


def run_snippets() -> dict[str, Any]:
    """What the Python snippets of the documentation define, after they ran."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "performance.md", "exec"), names)
    return names


def test_the_snippets_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_snippets()
    assert "torch.Size([1, 5]) 7" in capsys.readouterr().out


def test_many_answers_to_one_prompt_cost_little_more_than_the_prompt(device: str) -> None:
    model, positions = lora_model(device).eval(), []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    # Of unequal length, two of them alike, one the beginning of another.
    answers = [*TAILS, TAILS[0], TAILS[0][:2]]
    ours = run_snippets()["log_probabilities"](model, START, answers)
    assert positions == [len(START) - 1 + sum(map(len, answers))]
    for found, answer in zip(ours, answers, strict=True):
        ids = torch.tensor([START + answer], device=device)
        with torch.no_grad():
            of_next = model(input_ids=ids).logits[0, len(START) - 1 : -1].log_softmax(-1)
        expected = of_next.gather(-1, ids[0, len(START) :, None]).sum()
        assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("collator", [Collator(PAD), SharedPrefixCollator()], ids=["padded", "shared"])
def test_evaluation_holds_no_more_at_once_than_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collator: Any, device: str
) -> None:
    """Positions of a forward pass and logits of a chunk: what the peak of memory grows with."""
    monkeypatch.setattr(lm_head, "_CHUNK_BYTES", 4 * 288 * 16)
    settings = dict(device=device, max_steps=11, per_device_train_batch_size=3, per_device_eval_batch_size=3)
    trainer = trained(tmp_path, many_rows()[:7], collator, **settings)
    assert trainer.model.config.vocab_size == 288
    trunk, output = lm_head.trunk_and_head(trainer.model)
    most: dict[tuple[str, bool], int] = {}

    def note(name: str, size: int) -> None:
        key = (name, trainer.model.training)
        most[key] = max(most.get(key, 0), size)

    trunk.embed_tokens.register_forward_hook(lambda _, args, out: note("positions", args[0].numel()))
    output.register_forward_hook(lambda _, args, out: note("logits", len(out)))
    trainer.train()
    trainer.evaluate()
    score_loss(trainer.model, many_rows()[:7], collate=collator, batch_size=3)
    # What padded training rows take in the batch of the longest one; eleven steps are more than three epochs.
    largest = 3 * max(len(row["input_ids"]) for row in many_rows()[:7])
    assert most["positions", True] <= largest
    assert most["positions", True] == largest or isinstance(collator, SharedPrefixCollator)
    assert 0 < most["positions", False] <= largest
    assert most["logits", False] == most["logits", True] == 16
