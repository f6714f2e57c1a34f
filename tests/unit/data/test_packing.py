from __future__ import annotations

import random

import pytest

from phlora.data.packing import pack_rows
from phlora.errors import DataError


def test_every_row_stands_in_exactly_one_pack_that_holds_it():
    lengths = [random.Random(index).randint(1, 64) for index in range(500)]
    packs = pack_rows(lengths, max_length=64, seed=0)
    assert sorted(index for pack in packs for index in pack) == list(range(500))
    assert all(sum(lengths[index] for index in pack) <= 64 for pack in packs)


def test_best_fit_leaves_no_avoidable_room():
    assert len(pack_rows([5, 5, 4, 6, 3, 7], max_length=10, seed=0)) == 3
    packs = pack_rows([7, 6, 3, 2, 2], max_length=10, seed=0)
    assert sorted(sorted(pack) for pack in packs) == [[0, 2], [1, 3, 4]]


def test_packs_depend_on_the_seed_only():
    lengths = [8] * 32
    assert pack_rows(lengths, max_length=16, seed=3) == pack_rows(lengths, max_length=16, seed=3)
    assert pack_rows(lengths, max_length=16, seed=3) != pack_rows(lengths, max_length=16, seed=4)


def test_no_rows_and_a_row_that_is_too_long():
    assert pack_rows([], max_length=8, seed=0) == []
    with pytest.raises(DataError, match="Row 1 has 9 tokens"):
        pack_rows([3, 9], max_length=8, seed=0)
