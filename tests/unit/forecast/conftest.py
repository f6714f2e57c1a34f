"""A run of the tiny model, for forecasts; `about(...)` changes what a test is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from phlora.adapters.attach import lora_settings
from phlora.data.packing import TokenSequences
from phlora.data.rows import Origin
from phlora.data.table import TableBuilder, TokenTable
from phlora.forecast.blueprint import draw_up
from phlora.forecast.forecast import Circumstances
from phlora.forecast.passes import Layout
from phlora.measure import FreeMemory
from phlora.models.storage import Storage
from phlora.models.tiny import tiny_phi3

START = list(range(5, 45))


def table(lengths: list[int], *, shared: bool) -> TokenTable:
    builder = TableBuilder()
    for number, length in enumerate(lengths):
        start = START if shared else [(number * 7 + place) % 200 + 3 for place in range(40)]
        ids = [*start, *range(50, 50 + length)]
        builder.add(ids, bytes([0] * 40 + [1] * length), None, Origin("chats.jsonl", number + 1))
    return builder.table()


@pytest.fixture(scope="session")
def about() -> Callable[..., Circumstances]:
    blueprint = draw_up(tiny_phi3()[0].config, lora_settings({"r": 4}), dtype=torch.float32)

    def made(*, shared: bool = True, free: int | None = 1 << 34, **changes: Any) -> Circumstances:
        rows = TokenSequences(table([5 + n % 20 for n in range(32)], shared=shared))
        given: dict[str, Any] = {
            "layout": Layout(8, shared=shared),
            "steps": 10,
            "resident": 0,
            "held_out": table([9, 12], shared=shared),
            "storage": Storage(dtype=torch.float32),
            "sequences": rows,
            **changes,
        }
        return Circumstances(
            blueprint=blueprint, device=torch.device("cpu"), free=FreeMemory(free, "a test"), **given
        )

    return made
