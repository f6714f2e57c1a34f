"""Rows on both sides of a longrope model's limit: each computes in a batch what it computes alone."""

from __future__ import annotations

import peft
import pytest
import torch
from shared_rows import (
    PAD,
    START,
    Row,
    assert_close,
    chat,
    lora_model,
    loss_and_gradients,
    on_device,
    some_ids,
)

from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator, share_step
from phlora.errors import ModelError
from phlora.evaluate.compare import score_loss
from phlora.models.lean_layers import speed_pass
from phlora.models.lm_head import token_losses
from phlora.models.rotary import longrope_limit

LIMIT = 64
# Tokens after a common start of 40: rows of 45 to 130 tokens, two of them at the limit and one past it.
TAILS = (5, 24, 24, 25, 60, 90, 9)
ROWS: list[Row] = [chat(START + some_ids(n, n + seed), [(42, 200)]) for seed, n in enumerate(TAILS)]
COLLATORS = {"padded": Collator(PAD), "packed": PackedCollator(), "shared": SharedPrefixCollator(LIMIT)}


@pytest.fixture
def model(device: str) -> peft.PeftModel:
    model = lora_model(device, longrope=True)
    assert longrope_limit(model.config) == LIMIT
    return model


@pytest.mark.parametrize("lean", [False, True], ids=["plain layers", "lean layers"])
@pytest.mark.parametrize("layout", COLLATORS)
def test_loss_and_every_gradient_are_those_of_rows_alone(
    model: peft.PeftModel, layout: str, lean: bool
) -> None:
    expected = loss_and_gradients(model, *[Collator(PAD)([row]) for row in ROWS])
    if lean:
        speed_pass(model)
    assert_close(loss_and_gradients(model, COLLATORS[layout](ROWS)), expected, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model: peft.PeftModel, reentrant: bool) -> None:
    expected = loss_and_gradients(model, *[Collator(PAD)([row]) for row in ROWS])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for collate in COLLATORS.values():
        assert_close(loss_and_gradients(model, collate(ROWS)), expected, 1e-12)


def test_the_micro_batches_of_a_step_meet_on_their_side_of_the_limit(model: peft.PeftModel) -> None:
    expected = loss_and_gradients(model, *[Collator(PAD)([row]) for row in ROWS])
    batches = [SharedPrefixCollator(LIMIT)(ROWS[:4]), SharedPrefixCollator(LIMIT)(ROWS[4:])]
    (together,) = share_step(batches, max_positions=1000)
    assert {len(group.rows) for group in together["segments"].groups if group.num_shared} == {4, 3}
    assert_close(loss_and_gradients(model, together), expected, 1e-12)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_held_out_row_is_scored_as_alone(model: peft.PeftModel, layout: str) -> None:
    alone = score_loss(model, ROWS, collate=Collator(PAD), batch_size=1)
    together = score_loss(model, ROWS, collate=COLLATORS[layout], batch_size=4)
    for ours, theirs in zip(together.per_row, alone.per_row, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_positions_that_are_given_tell_rows_of_padded_batches_too(model: peft.PeftModel) -> None:
    batch = on_device(model, Collator(PAD)(ROWS))
    expected = token_losses(model, batch)[0]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(token_losses(model, {**batch, "position_ids": positions})[0], expected)


def test_rows_of_both_sides_that_share_are_refused(model: peft.PeftModel) -> None:
    with pytest.raises(ModelError, match=r"rope_limit=64"):
        token_losses(model, on_device(model, SharedPrefixCollator()(ROWS)))
    # Nothing stays behind that would choose for the next batch.
    assert not model.get_decoder().rotary_emb._forward_hooks
