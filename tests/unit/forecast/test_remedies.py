"""Single changes that make a run fit, and that they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from phlora.forecast.forecast import Circumstances, Evaluation, forecast_run
from phlora.forecast.remedies import Remedy, remedies
from phlora.forecast.render import render_remedies
from phlora.measure import FreeMemory

About = Callable[..., Circumstances]


def found_with(about: Circumstances, free: int) -> list[Remedy]:
    tight = replace(about, free=FreeMemory(free, "a test"))
    return remedies(tight, forecast_run(tight), timed=False)


def names(found: list[Remedy]) -> set[str]:
    return {name.partition(".")[2] for remedy in found for name in remedy.settings}


@pytest.fixture
def tight(about: About) -> tuple[Circumstances, int]:
    """A run that keeps everything, and a little less than it takes."""
    circumstances = about(level="keep", shared=False)
    return circumstances, forecast_run(circumstances).needed - 1000


def test_each_change_that_is_named_makes_it_fit(tight: tuple[Circumstances, int]) -> None:
    found = found_with(*tight)
    assert names(found) >= {"activation_memory", "per_device_train_batch_size", "storage_dtype", "max_length"}
    assert all(remedy.forecast.fits and remedy.forecast.needed < tight[1] for remedy in found)


def test_what_trains_the_same_comes_first(tight: tuple[Circumstances, int]) -> None:
    exact = [remedy.exact for remedy in found_with(*tight)]
    assert exact == sorted(exact, reverse=True) and exact[0] and not exact[-1]


def test_smaller_micro_batches_keep_the_rows_of_a_step(tight: tuple[Circumstances, int]) -> None:
    (settings,) = (r.settings for r in found_with(*tight) if "per_device_train_batch_size" in names([r]))
    assert settings == {
        "training_config.per_device_train_batch_size": 4,
        "training_config.gradient_accumulation_steps": 2,
    }


def test_a_shorter_length_says_how_many_rows_it_cuts(tight: tuple[Circumstances, int]) -> None:
    (remedy,) = (r for r in found_with(*tight) if "max_length" in names([r]))
    assert remedy.settings == {"training_config.max_length": 48} and "of 32 rows" in remedy.note
    assert "--set training_config.max_length=48" in render_remedies([remedy])


def test_nothing_is_named_where_nothing_helps(about: About) -> None:
    assert found_with(about(level="keep"), 1000) == []
    assert render_remedies([]) == "No single change makes it fit"


def test_times_are_compared(tight: tuple[Circumstances, int]) -> None:
    from phlora.forecast.forecast import with_seconds

    circumstances = replace(tight[0], free=FreeMemory(tight[1], "a test"))
    # Of a model of two layers the probe is the whole, for which there is room here alone.
    without = with_seconds(forecast_run(tight[0]), tight[0])
    assert all((remedy.slower or 0) > 0 for remedy in remedies(circumstances, without))


def test_where_answers_hold_most_fewer_of_them_are_advised(about: About) -> None:
    circumstances = about(evaluation=Evaluation(answers=2, max_new_tokens=20_000))
    assert "keys and values of answers" in forecast_run(circumstances).memory.parts
    found = found_with(circumstances, forecast_run(circumstances).needed - 1000)
    assert found[0].settings == {"evaluation.max_answers": 1} and found[0].exact
    # Nothing that training could change helps, but fewer held-out rows.
    assert "activation_memory" not in names(found)
