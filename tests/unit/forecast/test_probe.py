"""A pace is that of the whole model, and a probe leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from phlora.adapters.attach import lora_settings
from phlora.config import quantization_config
from phlora.forecast import probe
from phlora.forecast.blueprint import draw_up
from phlora.forecast.forecast import Circumstances
from phlora.forecast.passes import passes_of
from phlora.forecast.probe import Pace, Rounds, measure_pace
from phlora.models.storage import Storage
from phlora.models.tiny import tiny_phi3

About = Callable[..., Circumstances]


def pace(about: Circumstances, **changes: Any) -> Pace:
    passes = passes_of(about.sequences, about.layout, config=about.blueprint.config, device=about.device)
    settings: dict[str, Any] = {"device": about.device, "seconds": 0.1, "decoded_rows": 2, **changes}
    return measure_pace(about.blueprint, about.storage, passes.typical, **settings)


@pytest.mark.parametrize("level", ["keep", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("speed", ["auto", "reference"])
def test_every_kind_of_step_is_taken(about: About, level: str, speed: str) -> None:
    found = pace(about(shared=False), level=level, speed=speed)
    assert (
        found.both_ways > found.forward > 0 and found.update > 0 and found.token > 0 and found.positions > 0
    )
    assert found.prompt == found.forward / found.positions


@pytest.mark.parametrize("layers", [1, 7])
def test_the_number_of_layers_does_not_matter(about: About, layers: int) -> None:
    config = tiny_phi3(longrope=layers == 7)[0].config
    config.num_hidden_layers = layers
    blueprint = draw_up(config, lora_settings({"r": 2}), dtype=torch.float32)
    assert pace(replace(about(), blueprint=blueprint)).both_ways > 0


def test_a_quantised_base_is_probed_as_it_is_stored(about: About) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = Storage(dtype=torch.bfloat16, quantization=quantization_config("nf4"))
    assert pace(about(storage=quantized)).both_ways > 0


def test_weights_in_16_bits_are_probed_as_they_are_stored(about: About) -> None:
    assert pace(about(storage=Storage(dtype=torch.bfloat16))).both_ways > 0


def test_random_numbers_of_the_run_stay_where_they_are(about: About) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pace(about())
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[int], Rounds]]:
    """The layers of each round that is taken, and what was found; a round takes what `seconds` says of it."""
    stack = SimpleNamespace(layers=nn.ModuleList([nn.Identity(), nn.Identity()]))
    model: Any = SimpleNamespace(get_base_model=lambda: SimpleNamespace(get_decoder=lambda: stack))

    def taken(seconds: Callable[[int, int], float], *, most_seconds: float) -> tuple[list[int], Rounds]:
        rounds: list[int] = []

        def seconds_of(work: Callable[[], None], device: torch.device) -> float:
            work()
            return seconds((len(rounds) - 1) // 2, rounds[-1])

        monkeypatch.setattr(probe, "_seconds_of", seconds_of)
        prepare = lambda: lambda: rounds.append(len(stack.layers))  # noqa: E731
        found = probe._taking_turns(model, prepare, torch.device("cpu"), most_seconds)
        assert len(stack.layers) == 2
        return rounds, found

    return taken


def test_one_and_two_layers_take_turns_and_the_cold_rounds_do_not_count(turns: Any) -> None:
    rounds, found = turns(lambda number, layers: 0.5 + 0.25 * layers if number else 2.0, most_seconds=60)
    assert rounds == [1, 2] * 4
    assert found.of_layers(32) == pytest.approx(0.5 + 0.25 * 32) and found.are_steady


def test_rounds_go_on_until_they_agree_or_the_time_is_over(turns: Any) -> None:
    def faster_and_faster(number: int, layers: int) -> float:
        return layers * 0.9**number

    assert turns(faster_and_faster, most_seconds=60)[0] == [1, 2] * 9
    assert turns(faster_and_faster, most_seconds=0)[0] == [1, 2] * 4
    # Where a round takes so long, one that is not cold has to do.
    assert turns(lambda number, layers: 9.0, most_seconds=0)[0] == [1, 2] * 2


def test_a_disturbed_round_does_not_count_and_says_how_sure_the_rest_is() -> None:
    quiet = Rounds({1: [0.75, 0.76], 2: [1.0, 1.01]}, {1: 9.0, 2: 9.0})
    assert quiet.of_layers(32) == pytest.approx(0.75 + 31 * 0.25) and quiet.are_steady
    # Of 31 further layers, each of which adds a hundredth more or less.
    assert quiet.range_of_layers(32) == pytest.approx((0.76 + 31 * 0.24, 0.75 + 31 * 0.26))
    disturbed = Rounds({1: [0.75, 4.0, 0.76], 2: [3.0, 1.0, 1.6]}, {1: 9.0, 2: 9.0})
    assert disturbed.of_layers(32) == quiet.of_layers(32) and not disturbed.are_steady
    least, most = disturbed.range_of_layers(32)
    assert least < quiet.of_layers(32) < most == pytest.approx(0.75 + 31 * 0.85)


def test_one_round_alone_is_as_sure_as_the_cold_one_before_it() -> None:
    alone = Rounds({1: [0.75], 2: [1.0]}, {1: 0.8, 2: 2.0})
    assert alone.of_layers(3) == pytest.approx(1.25) and not alone.are_steady
    assert alone.range_of_layers(3) == pytest.approx((0.8 + 2 * 0.2, 0.75 + 2 * 1.25))
    assert Rounds({1: [0.5, 0.6]}, {1: 2.0}).range_of_layers(1) == (0.5, 0.6)
