"""`activation_memory: auto` keeps what fits, and what does not fit is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from phlora.forecast import memory
from phlora.forecast.forecast import Circumstances, Evaluation, as_json, forecast_run, levels_of, with_seconds
from phlora.forecast.render import render

About = Callable[..., Circumstances]


def needed(about: About, level: str) -> int:
    return forecast_run(about(level=level)).needed


def test_less_is_kept_from_level_to_level(about: About) -> None:
    keep, mlp, layer = (needed(about, level) for level in ("keep", "recompute_mlp", "recompute"))
    assert layer < mlp < keep


def test_auto_takes_the_first_level_that_fits_with_room_to_spare(
    about: About, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Libraries are most of what so small a model takes.
    monkeypatch.setattr(memory, "LATER_LIBRARIES", 0)
    sizes = {level: needed(about, level) for level in ("keep", "recompute_mlp", "recompute")}
    assert forecast_run(about(free=None)).level == "keep"
    for free in (1.11 * sizes["keep"], 1.11 * sizes["recompute_mlp"], 1.0 * sizes["recompute"]):
        spare = [level for level, size in sizes.items() if 1.1 * size <= free]
        just_so = [level for level, size in sizes.items() if size <= free]
        found = forecast_run(about(free=int(free)))
        assert (found.fits, found.level) == (True, (spare or just_so)[0]), free
    assert found.level != "keep"
    assert "keeping everything takes" in forecast_run(about(free=int(1.11 * sizes["recompute_mlp"]))).reason


def test_where_nothing_fits_the_least_is_forecast_and_said(about: About) -> None:
    found = forecast_run(about(free=1000))
    assert not found.fits and found.level == "recompute"
    assert "even computing the layers again" in found.reason


def test_what_is_asked_for_is_not_changed(about: About) -> None:
    found = forecast_run(about(level="keep", free=1000))
    assert (found.level, found.reason, found.fits) == ("keep", "asked for", False)


def test_layers_of_the_libraries_cannot_compute_half_again(about: About) -> None:
    assert levels_of(about()) == ["keep", "recompute_mlp", "recompute"]
    assert levels_of(about(speed="reference")) == ["keep", "recompute"]


def test_what_the_process_holds_already_is_not_needed_again(about: About) -> None:
    empty, full = (forecast_run(about(resident=resident)) for resident in (0, 1 << 30))
    assert full.memory.peak - empty.memory.peak == 1 << 30
    assert full.needed == empty.needed


def test_seconds_are_those_of_all_steps_and_evaluations(about: About) -> None:
    circumstances = about(evaluation=Evaluation(during=2, enabled=True, answers=2, max_new_tokens=4))
    found = with_seconds(forecast_run(circumstances), circumstances)
    assert found.seconds is not None and found.seconds.step > 0
    assert found.seconds.training == pytest.approx(10 * found.seconds.step)
    assert found.seconds.evaluation > 0
    without = replace(circumstances, evaluation=Evaluation(enabled=False))
    assert with_seconds(found, without).seconds.evaluation == 0  # type: ignore[union-attr]


def test_both_readers_learn_the_same(about: About) -> None:
    circumstances = about()
    found = with_seconds(forecast_run(circumstances), circumstances)
    document = json.loads(json.dumps(as_json(found)))
    assert document["fits"] and document["activation_memory"]["level"] == "keep"
    assert sum(document["memory"]["cpu"].values()) == document["peak_bytes"] == found.memory.peak
    text = render(found)
    for word in (
        "stored in float32",
        "memory on cpu",
        "libraries",
        "fits",
        "activation_memory keep",
        "a step",
    ):
        assert word in text


def test_a_time_that_is_not_sure_is_given_as_a_range(about: About) -> None:
    circumstances = about()
    found = with_seconds(forecast_run(circumstances), circumstances)
    assert found.seconds is not None
    least, most = found.seconds.step_range
    assert least <= found.seconds.step <= most
    assert as_json(found)["seconds"]["step_range"] == [least, most]
    unsure, sure = (
        render(replace(found, seconds=replace(found.seconds, step=8.9, step_range=these)))
        for these in ((7.0, 14.0), (8.8, 9.1))
    )
    assert "8.9 s a step (7.0 s to 14 s: the rounds that measured it differ)" in unsure
    assert "8.9 s a step, " in sure
