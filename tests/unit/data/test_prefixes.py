"""Rows laid out in groups within groups: nothing lost, nothing mixed, and as few positions as can be."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from phlora.data.prefixes import _LEAST_SAVING, Group, Segments, share_in_passes, share_prefixes


def read_back(segments: Segments, rows: list[list[int]]) -> None:
    """Every row along its path, and every position on a path."""
    stream: dict[int, int] = {}
    for number, path in segments.paths.items():
        assert len(path) == len(rows[number]) and path == sorted(path)
        for position, token in zip(path, rows[number], strict=True):
            assert stream.setdefault(position, token) == token
    assert sorted(stream) == list(range(segments.num_positions))
    last_tokens = [path[-1] for path in segments.paths.values()]
    assert len(set(last_tokens)) == len(last_tokens)


def checked(rows: list[list[int]]) -> Segments:
    """The layout of the rows, after they have been read back."""
    segments = share_prefixes(rows)
    assert sorted(segments.paths) == list(range(len(rows)))
    read_back(segments, rows)
    assert segments.longest == max(map(len, rows))
    return segments


def outline(segments: Segments) -> list[tuple[int, int, int]]:
    """(shared with the groups around it, its own shared tokens, rows in no group within) of each group."""
    return [(g.num_shared - len(g.shared), len(g.shared), len(g.rows)) for g in segments.groups]


def test_a_common_start_stands_once_but_for_its_last_token():
    start = list(range(100))
    outermost, group = checked([start + [200], start + [201, 202], start + [203]]).groups
    assert (group.shared, group.tail_lengths) == (range(99), (3, 2, 2))
    assert (outermost.num_shared, outermost.rows, outermost.num_within) == (0, (), 1)


def test_identical_rows_and_rows_that_begin_others_keep_a_tail_of_their_own():
    start = list(range(50))
    _, group = checked([start, start, start + [7, 8]]).groups
    assert (group.num_shared, group.tail_lengths) == (49, (3, 1, 1))


def test_rows_without_a_common_start_are_one_group_with_nothing_shared():
    (group,) = checked([[1, 2, 3], [4, 5], [6]]).groups
    assert (group.shared, group.rows) == (range(0), (0, 1, 2))
    assert checked([[1]]).num_positions == 1


def test_starts_too_short_to_pay_are_not_shared():
    assert outline(checked([[1, 2, 3, 4], [1, 2, 3, 5]])) == [(0, 0, 2)]


def test_rows_that_go_on_alike_share_behind_what_all_share():
    system, few_shot, alone = list(range(30)), list(range(100, 300)), [900, 901]
    rows = [alone, *(system + [400 + i] for i in range(4))]
    rows += [system + few_shot + [500 + i] for i in range(3)]
    segments = checked(rows)
    assert outline(segments) == [(0, 0, 1), (0, 29, 4), (29, 200, 3)]
    assert segments.groups[2].outer == (segments.groups[1].shared,)
    assert sorted(segments.rows_of(1)) == [1, 2, 3, 4, 5, 6, 7] and set(segments.rows_of(2)) == {5, 6, 7}
    assert segments.num_positions == 2 + 29 + 4 * 2 + 200 + 3 * 2
    # Two tokens that two rows share are worth no group of their own.
    shallow = checked([system + [9] * 2 + [i] for i in range(2)] + [system + [400 + i] for i in range(6)])
    assert outline(shallow) == [(0, 0, 0), (0, 29, 8)]


def test_one_row_for_each_turn_of_a_conversation_computes_it_once():
    turns = [[100 * turn + place for place in range(40)] for turn in range(12)]
    rows = [[token for turn in turns[: count + 1] for token in turn] for count in range(12)]
    segments = checked(rows)
    # The last token of each row but the longest stands twice.
    assert segments.num_positions == len(rows[-1]) + 11
    assert len(segments.groups) == 12 and len(segments.groups[-1].outer) == 10


def test_a_thousand_groups_within_each_other():
    rows = [list(range(20 * count)) for count in range(1, 1001)]
    segments = share_prefixes(rows)
    assert len(segments.groups) == 1000 and segments.num_positions == len(rows[-1]) + 999
    passes = share_in_passes(rows, max_positions=len(rows[-1]) + 500)
    assert len(passes) == 2 and sum(len(segments.paths) for segments in passes) == 1000


def positions_of(rows: list[list[int]], starts: list[tuple[int, ...]]) -> int:
    """What is computed when these starts, but for their last tokens, are groups that cost what they have to save."""

    def bare(tokens: tuple[int, ...]) -> int:
        return len(tokens) - max(
            (len(s) - 1 for s in starts if s != tokens and tokens[: len(s)] == s), default=0
        )

    return sum(_LEAST_SAVING - 1 + bare(start) for start in starts) + sum(
        bare((*row, -1)) - 1 for row in rows
    )


def possible_starts(rows: list[list[int]]) -> list[tuple[int, ...]]:
    """All that two rows have in common."""
    starts = set()
    for left, right in combinations(rows, 2):
        common = 0
        while common < min(len(left), len(right)) and left[common] == right[common]:
            common += 1
        if common > 1:
            starts.add(tuple(left[:common]))
    return sorted(starts)


@pytest.mark.parametrize("step", [1, 3, 8, 20])
def test_no_other_choice_of_groups_computes_less(step):
    """Against every subset of the possible groups."""
    generator = random.Random(step)
    for _ in range(60):
        rows = [[generator.randrange(9) for _ in range(generator.randrange(1, 4 * step))]]
        for _ in range(generator.randrange(8)):
            start = generator.choice(rows)
            rows.append(start[: generator.randrange(len(start) + 1)])
            rows[-1] = rows[-1] + [
                generator.randrange(9) for _ in range(generator.randrange(1, 2 * step + 1))
            ]
        starts = possible_starts(rows)
        least = min(
            positions_of(rows, list(chosen))
            for count in range(len(starts) + 1)
            for chosen in combinations(starts, count)
        )
        segments = checked(rows)
        assert segments.num_positions + _LEAST_SAVING * (len(segments.groups) - 1) == least


def test_very_many_rows():
    generator = random.Random(0)
    starts = [[generator.randrange(9) for _ in range(150)] for _ in range(20)]
    rows = [
        generator.choice(starts)[: generator.choice((60, 150))] + [generator.randrange(99) for _ in range(9)]
        for _ in range(20_000)
    ]
    segments = share_prefixes(rows)
    assert len(segments.groups) == 1 + 2 * 20
    assert segments.num_positions == 20 * 149 + 20_000 * 10


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
            read_back(segments, rows)


def test_a_group_that_is_too_large_stands_with_its_start_in_several_passes():
    start = list(range(100))
    rows = [[*start, 200 + number, 7] for number in range(30)]
    passes = share_in_passes(rows, max_positions=144)
    assert [outline(segments) for segments in passes] == [[(0, 0, 0), (0, 99, 15)]] * 2
    # Shared keys that are copied for each row take room as well.
    assert len(share_in_passes(rows, max_positions=144, copy_cost=0.01)) == 3
    (alone,) = share_in_passes([start], max_positions=10)
    assert alone.num_positions == 100


def copied(group: Group) -> int:
    """Shared tokens before its own shared tokens and its tails, each once for each of these."""
    return (group.num_shared - len(group.shared)) * bool(group.shared) + group.num_shared * len(group.rows)


@pytest.mark.parametrize("copy_cost", [0.0, 0.2])
def test_groups_within_groups_fit_into_their_passes(copy_cost):
    generator = random.Random(7)
    for _ in range(50):
        rows = [[generator.randrange(99) for _ in range(generator.randrange(20, 60))]]
        for _ in range(generator.randrange(40)):
            start = generator.choice(rows)
            rows.append(
                start[: generator.randrange(len(start) + 1)] + [generator.randrange(99) for _ in range(25)]
            )
        most = 2 * max(map(len, rows))
        passes = share_in_passes(rows, max_positions=most, copy_cost=copy_cost)
        assert sorted(row for segments in passes for row in segments.paths) == list(range(len(rows)))
        for segments in passes:
            read_back(segments, rows)
            copies = sum(copied(group) for group in segments.groups)
            alone = len(segments.paths) == 1
            assert segments.num_positions + copy_cost * copies <= most or alone
        assert sum(s.num_positions for s in passes) <= sum(map(len, rows))


def test_a_group_within_a_group_stands_with_all_that_is_before_it_in_several_passes():
    system, examples = list(range(40)), list(range(100, 160))
    rows = [[*system, *examples, 200 + n, 7] for n in range(20)] + [[*system, 300 + n, 8] for n in range(20)]
    (whole,) = share_in_passes(rows, max_positions=219)
    assert outline(whole) == [(0, 0, 0), (0, 39, 20), (39, 60, 20)]
    passes = share_in_passes(rows, max_positions=150)
    assert [outline(segments)[1:] for segments in passes] == [[(0, 99, 17)], [(0, 99, 3)], [(0, 39, 20)]]


@pytest.mark.parametrize("copy_cost", [0.1, 0.25, 0.5])
def test_the_copies_before_the_shared_tokens_of_a_group_within_take_room_too(copy_cost):
    starts = [[*range(40), 100 * branch, *range(300, 330)] for branch in range(1, 4)]
    rows = [[*start, 1000 + number, *range(number)] for start in starts for number in range(8)]
    for most in range(150, 400, 5):
        for segments in share_in_passes(rows, max_positions=most, copy_cost=copy_cost):
            read_back(segments, rows)
            assert segments.num_positions + copy_cost * sum(map(copied, segments.groups)) <= most
