from __future__ import annotations

import random

import pytest

from phlora.data.packing import TokenSequences, epoch_packs, pack_rows
from phlora.data.rows import Origin
from phlora.data.table import TableBuilder
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


def mates(packs: list[list[int]]) -> set[tuple[int, int]]:
    """Pairs of rows that stand in one pack."""
    return {(one, other) for pack in packs for one in pack for other in pack if one < other}


@pytest.mark.parametrize("seed", range(3))
def test_epochs_have_as_many_packs_with_other_rows_together(seed):
    lengths = [random.Random(index).randint(1, 64) for index in range(500)]
    epochs = [epoch_packs(lengths, max_length=128, seed=seed, epoch=epoch) for epoch in range(3)]
    for packs in epochs:
        assert len(packs) == len(pack_rows(lengths, max_length=128, seed=99))
        assert sorted(index for pack in packs for index in pack) == list(range(500))
        assert all(sum(lengths[index] for index in pack) <= 128 for pack in packs)
    assert len(mates(epochs[0]) & mates(epochs[1])) < 0.2 * len(mates(epochs[0]))
    assert epochs[1] == epoch_packs(lengths, max_length=128, seed=seed, epoch=1)


def test_rows_of_different_length_change_places_where_there_is_room():
    lengths = list(range(20, 40))
    packs = [epoch_packs(lengths, max_length=80, seed=0, epoch=epoch) for epoch in range(2)]
    assert mates(packs[0]) != mates(packs[1])


def test_sequences_are_rows_or_the_packs_of_an_epoch():
    table = TableBuilder()
    for number in range(1, 40):
        table.add([number] * number, bytes([1]) * number, None, Origin("chats.jsonl", number))
    rows = table.table()
    alone = TokenSequences(rows)
    assert [[row] for row in rows] == list(alone) and alone.lengths == list(range(1, 40))
    packed = TokenSequences(rows, max_length=64, seed=1)
    first = [[row.origin.line for row in pack] for pack in packed]
    assert packed.lengths == [sum(pack) for pack in first] and packed[-1:] == [packed[len(packed) - 1]]
    packed.set_epoch(1)
    assert [[row.origin.line for row in pack] for pack in packed] != first
    packed.set_epoch(0)
    assert [[row.origin.line for row in pack] for pack in packed] == first
