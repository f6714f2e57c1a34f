"""The layout of row blocks."""

from __future__ import annotations

import pytest
import torch

from phlora.errors import ConfigError
from phlora.lora import rank_slices, row_blocks, split_rows

QKV = {"q_proj": 3072, "k_proj": 1024, "v_proj": 1024}


def test_rows_of_unequal_blocks():
    q, v = row_blocks(QKV, ["v_proj", "q_proj"], r=16, scaling=2.0)
    assert (q.name, q.rows, q.size) == ("q_proj", slice(0, 3072), 3072)
    assert (v.name, v.rows, v.size) == ("v_proj", slice(4096, 5120), 1024)
    assert (q.r, q.scaling) == (16, 2.0)


def test_ranks_and_factors_by_name():
    q, v = row_blocks(
        QKV, ["q_proj", "v_proj"], r={"q_proj": 8, "v_proj": 3}, scaling={"q_proj": 2.0, "v_proj": 0.5}
    )
    assert [(b.r, b.scaling) for b in (q, v)] == [(8, 2.0), (3, 0.5)]
    assert list(rank_slices([q, v])) == [slice(0, 8), slice(8, 11)]


def test_nothing_enabled_is_no_blocks():
    assert row_blocks(QKV, [], r=4, scaling=1.0) == ()


def test_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match="q_proj"):
        row_blocks(QKV, ["q_porj"], r=4, scaling=1.0)


def test_stacked_rows_are_split_as_views():
    blocks = row_blocks({"q": 4, "k": 2, "v": 2}, ["q", "v"], r=3, scaling=1.0)
    lora_B = torch.arange(18.0).view(6, 3)
    q, v = split_rows(lora_B, blocks)
    assert torch.equal(q, lora_B[:4]) and torch.equal(v, lora_B[4:])
    assert q.data_ptr() == lora_B.data_ptr()
