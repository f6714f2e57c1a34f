"""Which rows share one sequence, and which tokens they share in it.

Packs are made best-fit decreasing over whole rows, so that no row is ever cut: each row, longest first, goes
where it leaves the least room. The rooms that exist are kept as the bits of one integer, so the tightest one
that fits is found with a shift instead of a search.

Inside one forward pass rows are laid out as groups: tokens that all rows of a group begin with stand once, the
rest of each row (its tail) follows, one tail after the other. Rows without a common start are a group with
nothing shared. The last common token is not shared: it predicts a different token in each row, so every tail
begins with its own copy of it, and every position has one target at most.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from phlora.errors import DataError

# A group costs a few small attention calls in each layer; sharing less than this many positions does not pay.
_LEAST_SAVING = 16


@dataclass(frozen=True)
class Group:
    """Rows behind the tokens that they share, in one stretch of a stream.

    Attributes:
        start: stream position of the first shared token.
        num_shared: tokens that stand once for all rows; 0: none.
        rows: numbers of the rows, in the order of their tails.
        tail_lengths: tokens of each row after the shared ones, longest first, at least 1 each.
    """

    start: int
    num_shared: int
    rows: tuple[int, ...]
    tail_lengths: tuple[int, ...]

    @property
    def tails_start(self) -> int:
        """Stream position of the first tail."""
        return self.start + self.num_shared

    @property
    def stop(self) -> int:
        """Stream position after the last tail."""
        return self.tails_start + sum(self.tail_lengths)

    def tails(self) -> Iterator[tuple[int, int, int]]:
        """(row, stream position, length) of each tail."""
        start = self.tails_start
        for row, length in zip(self.rows, self.tail_lengths, strict=True):
            yield row, start, length
            start += length


@dataclass(frozen=True)
class Segments:
    """How the rows of one forward pass lie in its stream: groups, one after the other."""

    groups: tuple[Group, ...]

    @property
    def num_positions(self) -> int:
        """Positions that are computed."""
        return self.groups[-1].stop

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(g.rows) * g.num_shared + sum(g.tail_lengths) for g in self.groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(g.num_shared + g.tail_lengths[0] for g in self.groups)

    @cached_property
    def paths(self) -> dict[int, list[int]]:
        """Row number -> the stream positions of its tokens, first to last."""
        return {
            row: [*range(group.start, group.tails_start), *range(start, start + length)]
            for group in self.groups
            for row, start, length in group.tails()
        }


def share_prefixes(rows: Sequence[Sequence[int]]) -> Segments:
    """Lay rows out so that few positions are computed: groups of rows, each behind its longest common start.

    Rows with a common start are neighbours once sorted, and what a run of neighbours shares is the least that
    two of them do. The best cut into runs follows by dynamic programming, O(n^2) in the number of rows.
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    common = [_common_start(rows[left], rows[right]) for left, right in pairwise(order)]
    groups, alone, start = [], [], 0
    for first, stop in _best_runs(common):
        if stop - first == 1:
            alone.append(order[first])
        else:
            shared = min(common[first : stop - 1]) - 1
            groups.append(_group(start, shared, order[first:stop], rows))
            start = groups[-1].stop
    if alone:
        groups.append(_group(start, 0, alone, rows))
    return Segments(tuple(groups))


def _best_runs(common: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (first, stop) of sorted rows that save the most positions; `common` is what neighbours share."""
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(common) + 2):
        candidates, shared = [(best[stop - 1][0], stop - 1)], None
        for first in range(stop - 2, -1, -1):
            shared = common[first] if shared is None else min(shared, common[first])
            if shared < 2:
                break
            saving = (stop - first - 1) * (shared - 1) - _LEAST_SAVING
            candidates.append((best[first][0] + saving, first))
        best.append(max(candidates))
    runs, stop = [], len(common) + 1
    while stop:
        runs.append((best[stop][1], stop))
        stop = best[stop][1]
    return runs[::-1]


def _common_start(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens are equal. Halving compares slices, which is much faster than token by token."""
    least, most = 0, min(len(left), len(right))
    while least < most:
        middle = (least + most + 1) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _group(start: int, shared: int, members: Sequence[int], rows: Sequence[Sequence[int]]) -> Group:
    members = sorted(members, key=lambda index: -len(rows[index]))
    return Group(start, shared, tuple(members), tuple(len(rows[index]) - shared for index in members))


def pack_rows(lengths: Sequence[int], *, max_length: int, seed: int) -> list[list[int]]:
    """Group row indices into packs of at most `max_length` tokens.

    The seed decides among rows of equal length and shuffles the packs.

    Raises:
        DataError: a row is longer than a pack.
    """
    if lengths and max(lengths) > max_length:
        index = max(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"Row {index} has {lengths[index]} tokens and does not fit into a pack of {max_length}",
            fix="raise max_length, or tokenise with the same max_length",
        )
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    order.sort(key=lengths.__getitem__, reverse=True)
    packs: list[list[int]] = []
    packs_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for index in order:
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(index)
        packs_with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    generator.shuffle(packs)
    return packs
