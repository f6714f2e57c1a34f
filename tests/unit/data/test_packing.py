from __future__ import annotations

import random
from itertools import pairwise
from os.path import commonprefix

import pytest

from phlora.data.formats import Origin
from phlora.data.packing import (
    _LEAST_SAVING,
    Segments,
    TokenSequences,
    _best_runs,
    epoch_packs,
    pack_rows,
    share_in_passes,
    share_prefixes,
)
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


def checked(rows: list[list[int]]) -> Segments:
    """The layout of the rows, after every row has been read back along its path."""
    segments = share_prefixes(rows)
    stream: dict[int, int] = {}
    for number, row in enumerate(rows):
        path = segments.paths[number]
        assert len(path) == len(row)
        for position, token in zip(path, row, strict=True):
            assert stream.setdefault(position, token) == token
    assert sorted(stream) == list(range(segments.num_positions))
    assert sum(map(len, segments.paths.values())) == sum(map(len, rows))
    return segments


def test_a_common_start_stands_once_but_for_its_last_token():
    start = list(range(100))
    (group,) = checked([start + [200], start + [201, 202], start + [203]]).groups
    assert (group.num_shared, group.tail_lengths) == (99, (3, 2, 2))


def test_identical_rows_and_rows_that_begin_others_keep_a_tail_of_their_own():
    start = list(range(50))
    segments = checked([start, start, start + [7, 8]])
    assert [(g.num_shared, g.tail_lengths) for g in segments.groups] == [(49, (3, 1, 1))]


def test_rows_without_a_common_start_are_one_group_with_nothing_shared():
    segments = checked([[1, 2, 3], [4, 5], [6]])
    assert [(g.num_shared, g.rows) for g in segments.groups] == [(0, (0, 1, 2))]
    assert checked([[1]]).num_positions == 1


def test_starts_too_short_to_pay_are_not_shared():
    assert [g.num_shared for g in checked([[1, 2, 3, 4], [1, 2, 3, 5]]).groups] == [0]


def test_the_cut_into_groups_saves_the_most():
    system, few_shot = list(range(30)), list(range(100, 300))
    rows = [system + [400 + i] for i in range(4)] + [system + few_shot + [500 + i] for i in range(3)]
    segments = checked(rows)
    assert sorted((g.num_shared, len(g.rows)) for g in segments.groups) == [(29, 4), (229, 3)]
    # A deeper start that too few rows have stays a part of their tails.
    shallow = checked([system + [9] * 2 + [i] for i in range(2)] + [system + [400 + i] for i in range(6)])
    assert [(g.num_shared, len(g.rows)) for g in shallow.groups] == [(29, 8)]


def best_runs_of_all(common: list[int]) -> list[tuple[int, int]]:
    """What `_best_runs` returns, by trying every beginning of every run."""
    best = [(0, 0)]
    for stop in range(1, len(common) + 2):
        candidates = [(best[stop - 1][0], stop - 1)]
        for first in range(stop - 1):
            shared = min(common[first : stop - 1])
            if shared > 1:
                candidates.append((best[first][0] + (stop - first - 1) * (shared - 1) - _LEAST_SAVING, first))
        best.append(max(candidates))
    runs, stop = [], len(common) + 1
    while stop:
        runs.append((best[stop][1], stop))
        stop = best[stop][1]
    return runs[::-1]


@pytest.mark.parametrize("most", [3, 8, 20, 60, 200])
def test_the_best_runs_are_found_without_trying_all_beginnings(most):
    generator = random.Random(most)
    for _ in range(300):
        common = [generator.randrange(most) for _ in range(generator.randrange(40))]
        for order in (common, sorted(common), sorted(common, reverse=True)):
            assert _best_runs(order) == best_runs_of_all(order)


def test_the_best_runs_of_sorted_rows_are_found_without_trying_all_beginnings():
    generator = random.Random(0)
    for _ in range(150):
        rows = [[generator.randrange(9) for _ in range(30)]]
        for _ in range(generator.randrange(60)):
            # A few start anew, most depart from an earlier row somewhere.
            kept = generator.choice(rows)[: generator.choice((0, 5, 12, 20, 29))]
            rows.append(kept + [generator.randrange(9) for _ in range(30 - len(kept))])
        common = [len(commonprefix([left, right])) for left, right in pairwise(sorted(rows))]
        assert _best_runs(common) == best_runs_of_all(common)


def test_very_many_rows_with_one_start_are_one_run_at_once():
    generator = random.Random(0)
    common = [150 + generator.choice((0, 0, 0, 1, 2)) for _ in range(20_000)]
    assert _best_runs(common) == [(0, 20_001)]


def test_any_rows_can_be_read_back():
    generator = random.Random(0)
    for _ in range(50):
        starts = [[generator.randrange(3) for _ in range(generator.randrange(60))] for _ in range(3)]
        rows = [
            generator.choice(starts) + [generator.randrange(3) for _ in range(generator.randrange(1, 9))]
            for _ in range(generator.randrange(1, 12))
        ]
        assert checked(rows).num_positions <= sum(map(len, rows))


def test_rows_that_do_not_fit_into_one_pass_stand_in_several():
    generator = random.Random(1)
    for _ in range(50):
        starts = [[generator.randrange(99) for _ in range(generator.randrange(1, 60))] for _ in range(3)]
        rows = [
            generator.choice(starts) + [generator.randrange(99) for _ in range(generator.randrange(1, 20))]
            for _ in range(generator.randrange(1, 40))
        ]
        most = max(map(len, rows)) * generator.randrange(1, 4)
        passes = share_in_passes(rows, max_positions=most)
        assert sorted(row for segments in passes for row in segments.paths) == list(range(len(rows)))
        for segments in passes:
            assert segments.num_positions <= most
            stream: dict[int, int] = {}
            for number, path in segments.paths.items():
                for position, token in zip(path, rows[number], strict=True):
                    assert stream.setdefault(position, token) == token
            assert sorted(stream) == list(range(segments.num_positions))


def test_a_group_that_is_too_large_stands_with_its_start_in_several_passes():
    start = list(range(100))
    rows = [[*start, 200 + number, 7] for number in range(30)]
    passes = share_in_passes(rows, max_positions=144)
    assert [[(g.num_shared, len(g.rows)) for g in segments.groups] for segments in passes] == [[(99, 15)]] * 2
    # Shared keys that are copied for each row take room as well.
    assert len(share_in_passes(rows, max_positions=144, copy_cost=0.01)) == 3
    (alone,) = share_in_passes([start], max_positions=10)
    assert alone.num_positions == 100
