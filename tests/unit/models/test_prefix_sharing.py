"""When rows share the computation of their common starts, and what is said where they do not."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from phlora.adapters.attach import attach
from phlora.data.rows import Origin
from phlora.data.tokenize import TokenizedRow
from phlora.models.prefix_sharing import decide_sharing
from phlora.testing import tiny_phi3
from phlora.train.arguments import training_arguments

START = list(range(5, 65))


def row(ids: list[int]) -> TokenizedRow:
    return TokenizedRow(ids, [-100, *ids[1:]], None, Origin("chats.jsonl", 1))


ALIKE = [[row([*START, 70 + n, 80 + n])] for n in range(16)]
UNLIKE = [[row([100 + n, *START])] for n in range(16)]
UNEVEN = [[row([100 + n, *START[: 60 if n % 2 else 20]])] for n in range(16)]


def decide(
    sequences: Any,
    *,
    speed: str = "auto",
    lora: dict[str, Any] | None = None,
    longrope: bool = False,
    batch_size: int = 8,
    device: Any = None,
    **training: Any,
) -> Any:
    model = attach(tiny_phi3(longrope=longrope)[0], {"r": 2, **(lora or {})}).model
    settings = training_arguments(training, output_dir="unused")
    return decide_sharing(
        model, sequences, speed=speed, batch_size=batch_size, args=settings.args, device=device
    )


def test_rows_with_a_common_start_share_it() -> None:
    decision = decide(ALIKE)
    # 8 rows of 62 tokens: 59 once, and 2 of each; the last token predicts nothing.
    assert decision.on and decision.reason == f"{1 - (59 + 8 * 2) / (8 * 62):.0%} fewer positions to compute"


def test_the_micro_batches_of_a_step_share_as_one() -> None:
    decision = decide(ALIKE, gradient_accumulation_steps=2)
    assert decision.reason == (
        f"{1 - (59 + 16 * 2) / (16 * 62):.0%} fewer positions to compute, 2 micro-batches as 1"
    )
    assert decision.forecast.tokens == decision.forecast.padded_positions == 16 * 62
    assert decision.forecast.positions == 59 + 16 * 2


def test_rows_of_one_length_without_a_common_start_stay_as_they_are() -> None:
    decision = decide(UNLIKE)
    assert not decision.on and "would save 2%" in decision.reason


def test_rows_of_uneven_length_are_worth_a_stream_without_padding() -> None:
    assert decide(UNEVEN).on


def test_short_rows_one_by_one_are_merged_into_passes_no_longer_than_the_longest() -> None:
    one_by_one = {"batch_size": 1, "gradient_accumulation_steps": 16}
    decision = decide(UNEVEN, **one_by_one)
    assert decision.on and decision.reason.endswith("16 micro-batches as 11")
    assert not decide(UNLIKE, **one_by_one).on
    # Merging is measured on CPUs.
    assert not decide(UNEVEN, **one_by_one, device=torch.device("cuda")).on


def test_packs_always_lie_in_a_stream() -> None:
    assert decide(UNLIKE, packing=True).on
    assert not decide(UNLIKE, packing=True, speed="reference").on


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"speed": "reference"}, "speed is reference"),
        ({"lora": {"lora_dropout": 0.1}}, "lora_dropout is 0.1"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"loss_type": "dft"}, "loss_type dft"),
    ],
)
def test_whatever_would_not_be_exact_turns_it_off_and_is_named(settings: dict[str, Any], reason: str) -> None:
    decision = decide(ALIKE, **settings)
    assert not decision.on and reason in decision.reason


def test_rows_on_both_sides_of_a_longrope_limit_share_with_their_like() -> None:
    # Eight rows of 64 tokens and eight of 65, in two batches; the model's limit is 64.
    rows = [[row([*START, 70 + n, 80 + n, *[7] * (2 + n % 2)])] for n in range(16)]
    plain, longrope = (decide(rows, longrope=limited) for limited in (False, True))
    assert plain.on and longrope.on
    assert plain.forecast.positions < longrope.forecast.positions < longrope.forecast.padded_positions / 2


def test_an_evaluation_has_no_dropout() -> None:
    model = peft.get_peft_model(
        tiny_phi3()[0], peft.LoraConfig(target_modules="all-linear", lora_dropout=0.5)
    )
    assert decide_sharing(model, ALIKE, speed="auto", batch_size=8).on
    assert not decide_sharing(model, [], speed="auto", batch_size=8).on
