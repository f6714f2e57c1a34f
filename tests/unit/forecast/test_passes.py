"""The passes that are forecast are those that the trainer's collators make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from phlora.forecast.forecast import Circumstances
from phlora.forecast.passes import Layout, Passes, passes_of


def passes(about: Circumstances, **changes: object) -> Passes:
    layout = replace(about.layout, **changes)  # type: ignore[arg-type]
    return passes_of(about.sequences, layout, config=about.blueprint.config, device=about.device)


def test_positions_count_what_is_computed_and_not_the_rows(about: Callable[..., Circumstances]) -> None:
    shared, alone = passes(about(shared=True)), passes(about(shared=False))
    assert shared.tokens == alone.tokens
    # Of 8 rows 39 tokens stand once.
    assert 39 < shared.positions <= shared.tokens - 7 * 39
    assert shared.largest.rows == 1 and shared.largest.segments is not None
    assert alone.largest.rows == 8 and alone.largest.masked


def test_a_padded_pass_is_as_wide_as_the_longest_row_of_the_data(about: Callable[..., Circumstances]) -> None:
    found = passes(about(shared=False))
    assert found.largest.length == 40 + 24 and found.largest.positions == 8 * 64


def test_accumulated_micro_batches_that_share_become_fewer_passes(
    about: Callable[..., Circumstances],
) -> None:
    shared = passes(about(), batch_size=4, accumulated=4)
    alone = passes(about(shared=False), batch_size=4, accumulated=4)
    assert shared.most_of_a_step < alone.most_of_a_step == 4
    assert shared.largest.positions <= 4 * 64


def test_a_row_alone_has_no_mask(about: Callable[..., Circumstances]) -> None:
    assert not passes(about(shared=False), batch_size=1).largest.masked


def test_the_typical_batch_is_one_of_the_data(about: Callable[..., Circumstances]) -> None:
    found = passes(about())
    assert found.typical["input_ids"].numel() == found.typical_positions
    assert found.typical["shift_labels"].shape == found.typical["input_ids"].shape


def test_a_layout_of_few_rows_is_no_problem(about: Callable[..., Circumstances]) -> None:
    few = about(sequences=about().sequences[:1])
    found = passes_of(few.sequences, Layout(8), config=few.blueprint.config, device=few.device)
    assert found.largest.rows == 1 and found.most_of_a_step == 1
