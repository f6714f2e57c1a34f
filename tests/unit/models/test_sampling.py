"""How the next token is chosen, against transformers' own warpers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phlora.errors import ConfigError
from phlora.models.sampling import GREEDY, Sampling, _left_to_draw_from


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(top_k)
    logits = 3 * torch.randn(200)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    weights, order = _left_to_draw_from(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    ours = torch.zeros(200).scatter(0, order, weights / weights.sum())
    torch.testing.assert_close(ours, scores.softmax(-1)[0], atol=1e-6, rtol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    pick = Sampling(temperature=1.0, top_k=3, seed=0).picker()
    drawn = torch.bincount(torch.tensor([pick(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(drawn[:3], logits[:3].softmax(-1), atol=0.03, rtol=0)
    assert drawn[3] == 0


def test_next_to_no_temperature_is_greedy_and_not_infinite() -> None:
    logits = torch.tensor([1.0, 1.0 + 1e-6, -5.0])
    assert Sampling(temperature=1e-12, seed=0).picker()(logits) == 1 == GREEDY.picker()(logits)


def test_replies_of_one_seed_differ_and_repeat() -> None:
    logits = torch.zeros(1000)
    sampling = Sampling(temperature=1.0, seed=5)
    first, again, next_reply = (sampling.picker(reply)(logits) for reply in (0, 0, 1))
    assert first == again != next_reply
    assert next_reply == Sampling(temperature=1.0, seed=6).picker()(logits)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": 1.5}, "top_p"),
        ({"temperature": 1, "top_k": -1}, "top_k"),
        ({"temperature": 1, "top_k": 2.5}, "top_k"),
        ({"temperature": 1, "seed": -3}, "seed"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**settings)
    assert error.value.where == where and error.value.expected


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 40}], ids=str)
def test_what_only_draws_heed_is_refused_where_nothing_is_drawn(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does nothing at temperature 0") as error:
        Sampling(**setting)
    assert "temperature" in error.value.fix
