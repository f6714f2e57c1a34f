"""Each row of a batch is rotated with the factors that transformers gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phlora.data.prefixes import share_prefixes
from phlora.errors import ModelError
from phlora.models.rotary import rotated_by_row
from phlora.testing import tiny_phi3

LIMIT = 64


@pytest.fixture(scope="module")
def trunk() -> Any:
    return tiny_phi3(longrope=True)[0].double().get_decoder()


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def angles(trunk: Any, positions: Tensor) -> Tensor:
    """Cosine and sine of what the trunk rotates by: (B, T, 2 E)."""
    x = torch.zeros(1, 1, 64, dtype=torch.float64)
    return torch.cat(trunk.rotary_emb(x, position_ids=positions), -1)


def alone(trunk: Any, length: int) -> Tensor:
    return angles(trunk, torch.arange(length)[None])[0]


def test_a_short_row_beside_a_long_one_turns_as_alone(trunk: Any) -> None:
    lengths = [40, LIMIT, LIMIT + 1, 100]
    mask = torch.tensor([[1] * n + [0] * (100 - n) for n in lengths])
    with rotated_by_row(trunk, {"input_ids": ids(4, 100), "attention_mask": mask}):
        found = angles(trunk, torch.arange(100).expand(4, 100))
    for row, length in enumerate(lengths):
        assert torch.equal(found[row, :length], alone(trunk, length))
    # They do differ, so that the test says something.
    assert not torch.allclose(alone(trunk, LIMIT)[1:], alone(trunk, LIMIT + 1)[1:LIMIT])


def test_packed_rows_are_told_by_their_positions(trunk: Any) -> None:
    lengths = [30, 70, LIMIT, 65]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with rotated_by_row(trunk, {"input_ids": ids(1, sum(lengths)), "position_ids": positions}):
        found = angles(trunk, positions)[0]
    for part, length in zip(found.split(lengths), lengths, strict=True):
        assert torch.equal(part, alone(trunk, length))


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1])
def test_a_batch_without_a_mask_is_whole_rows(trunk: Any, length: int) -> None:
    with rotated_by_row(trunk, {"input_ids": ids(2, length)}):
        found = angles(trunk, torch.arange(length).expand(2, length))
    assert torch.equal(found[0], alone(trunk, length)) and torch.equal(found[1], found[0])


def test_rows_on_one_side_share_their_start_and_on_both_are_refused(trunk: Any) -> None:
    start = list(range(20))

    def inputs(*tails: int) -> dict[str, Any]:
        rows = [start + [100 + row] * tail for row, tail in enumerate(tails)]
        segments = share_prefixes(rows)
        return {"input_ids": ids(1, segments.num_positions), "segments": segments}

    both_long = inputs(50, 60)
    path = both_long["segments"].paths[1]
    positions = torch.zeros(1, both_long["input_ids"].shape[1], dtype=torch.long)
    for row_path in both_long["segments"].paths.values():
        positions[0, row_path] = torch.arange(len(row_path))
    with rotated_by_row(trunk, both_long):
        found = angles(trunk, positions)[0]
    assert torch.equal(found[path], alone(trunk, 80))
    with (
        pytest.raises(ModelError, match=r"Rows of 25 and 80 tokens share .*past 64(?s:.*)rope_limit=64"),
        rotated_by_row(trunk, inputs(5, 60)),
    ):
        pass


def test_nothing_is_hooked_where_there_is_nothing_to_choose_and_nothing_stays_behind(trunk: Any) -> None:
    plain = tiny_phi3()[0].get_decoder()
    for decoder, length in ((plain, 200), (trunk, LIMIT)):
        with rotated_by_row(decoder, {"input_ids": ids(1, length)}):
            assert not decoder.rotary_emb._forward_hooks
    with pytest.raises(RuntimeError, match="stop"), rotated_by_row(trunk, {"input_ids": ids(1, 100)}):
        assert trunk.rotary_emb._forward_hooks
        raise RuntimeError("stop")
    assert not trunk.rotary_emb._forward_hooks
