"""A pace is that of the whole model, and a probe leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from phlora.adapters.attach import lora_settings
from phlora.config import quantization_config
from phlora.forecast.blueprint import draw_up
from phlora.forecast.forecast import Circumstances
from phlora.forecast.passes import passes_of
from phlora.forecast.probe import Pace, measure_pace
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
