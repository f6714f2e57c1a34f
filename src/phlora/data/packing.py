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

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import overload

from phlora.data.table import TokenizedRow, TokenTable
from phlora.errors import DataError

# A group costs a few small attention calls in each layer; sharing less than this many positions does not pay.
_LEAST_SAVING = 16
# How far apart, in the order of lengths, rows may stand that change places between epochs.
_SWAP_REACH = 16
_EPOCH_STRIDE = 1_000_003


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
    def num_positions(self) -> int:
        """Positions that are computed."""
        return self.num_shared + sum(self.tail_lengths)

    @property
    def stop(self) -> int:
        """Stream position after the last tail."""
        return self.start + self.num_positions

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
    def longest(self) -> int:
        """Positions of the longest row."""
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
    two of them do. The best cut into runs follows by dynamic programming, in about n steps for each of the depths
    at which starts that lie in each other end.
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


def share_in_passes(
    rows: Sequence[Sequence[int]], *, max_positions: int, copy_cost: float = 0.0
) -> list[Segments]:
    """As `share_prefixes`, in as few streams as best fit finds, each small enough for one forward pass.

    A group that is too large for a pass stands, with its shared tokens, in several.

    Args:
        rows: their numbers are those of the groups in all streams.
        max_positions: of a pass; a row that is longer is a stream of its own.
        copy_cost: what attention that lays the shared keys before each tail takes for one of them, in positions.
    """
    whole = share_prefixes(rows)

    def size(group: Group) -> float:
        return group.num_positions + copy_cost * group.num_shared * len(group.rows)

    if sum(map(size, whole.groups)) <= max_positions:
        return [whole]
    pieces = [piece for group in whole.groups for piece in _cut(group, max_positions, copy_cost)]
    passes: list[list[Group]] = []
    rooms: list[float] = []
    for piece in sorted(pieces, key=size, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if size(piece) <= room]
        if fitting:
            number = min(fitting, key=rooms.__getitem__)
        else:
            number = len(passes)
            passes.append([])
            rooms.append(max_positions)
        passes[number].append(piece)
        rooms[number] -= size(piece)
    return [_stream(pieces) for pieces in passes]


def _cut(group: Group, max_positions: int, copy_cost: float) -> list[Group]:
    """The rows of a group in groups that fit, each behind the shared tokens; rows that share nothing one by one."""
    parts: list[list[tuple[int, int]]] = []
    room = 0.0
    for row, length in zip(group.rows, group.tail_lengths, strict=True):
        taken = length + copy_cost * group.num_shared
        if not parts or not group.num_shared or taken > room:
            parts.append([])
            room = max_positions - group.num_shared
        parts[-1].append((row, length))
        room -= taken
    cut = []
    for part in parts:
        # A row that is left alone shares with nobody.
        shared = group.num_shared if len(part) > 1 else 0
        cut.append(
            Group(0, shared, tuple(r for r, _ in part), tuple(n + group.num_shared - shared for _, n in part))
        )
    return cut


def _stream(pieces: Sequence[Group]) -> Segments:
    """Pieces one after the other, those that share nothing as one group at the end."""
    groups = [piece for piece in pieces if piece.num_shared]
    alone = [tail for piece in pieces if not piece.num_shared for tail in piece.tails()]
    if alone:
        alone.sort(key=lambda tail: -tail[2])
        groups.append(Group(0, 0, tuple(row for row, _, _ in alone), tuple(length for *_, length in alone)))
    start, placed = 0, []
    for group in groups:
        placed.append(dataclasses.replace(group, start=start))
        start = placed[-1].stop
    return Segments(tuple(placed))


def _best_runs(common: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (first, stop) of sorted rows that save the most positions; `common` is what neighbours share.

    best[stop] is the most that rows before `stop` can save, with where their last run begins; of equals, the
    latest. Beginnings from which a run to `stop` shares the same number of tokens are one level, and go on sharing
    the same in every longer run. So each level is asked for one beginning only, and keeps only such as may yet be
    its best.
    """
    best: list[tuple[int, int]] = [(0, 0), (0, 0)]
    levels: list[tuple[int, list[int]]] = []
    for stop, shared in enumerate(common, 2):
        _add_beginning(levels, stop - 2, shared - 1, best)
        candidates = [(best[stop - 1][0], stop - 1)]
        for gain, firsts in levels:
            first = firsts[-1]
            candidates.append((best[first][0] + (stop - first - 1) * gain - _LEAST_SAVING, first))
        best.append(max(candidates))
    runs, stop = [], len(common) + 1
    while stop:
        runs.append((best[stop][1], stop))
        stop = best[stop][1]
    return runs[::-1]


def _add_beginning(
    levels: list[tuple[int, list[int]]], first: int, gain: int, best: Sequence[tuple[int, int]]
) -> None:
    """Add a beginning to the levels, lowest gain first, when all runs become one row longer.

    Runs over the new pair of neighbours gain no more than the pair does for each row. With a lower gain a later
    beginning only gets better beside an earlier one, so those that a later one equals are dropped for good; what
    is left has its best beginning at the end.
    """
    if gain < 1:
        levels.clear()
        return
    firsts = [first]
    while levels and levels[-1][0] >= gain:
        firsts += levels.pop()[1]
    kept, most = [first], best[first][0] - first * gain
    for earlier in firsts[1:]:
        value = best[earlier][0] - earlier * gain
        if value > most:
            kept.append(earlier)
            most = value
    levels.append((gain, kept))


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


class TokenSequences(Sequence[list[TokenizedRow]]):
    """The sequences of an epoch: one row each, or packs, in which other rows meet in every epoch.

    The rows are taken from their table when a sequence is asked for. Every epoch has as many packs.

    Args:
        rows: at most `max_length` tokens each.
        max_length: of a pack; None leaves each row alone.
        seed: with the number of the epoch it decides all packs.
    """

    def __init__(self, rows: TokenTable, *, max_length: int | None = None, seed: int = 0) -> None:
        self.rows, self.max_length, self.seed = rows, max_length, seed
        self._packs: list[list[int]] | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Make the packs of an epoch; those of the one before are gone."""
        if self.max_length is not None:
            lengths = self.rows.lengths.tolist()
            self._packs = epoch_packs(lengths, max_length=self.max_length, seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self.rows) if self._packs is None else len(self._packs)

    @overload
    def __getitem__(self, index: int) -> list[TokenizedRow]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[TokenizedRow]]: ...
    def __getitem__(self, index: int | slice) -> list[TokenizedRow] | list[list[TokenizedRow]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if self._packs is None:
            return [self.rows[index]]
        return [self.rows[number] for number in self._packs[index]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        rows: list[int] = self.rows.lengths.tolist()
        if self._packs is None:
            return rows
        return [sum(rows[number] for number in pack) for pack in self._packs]


def epoch_packs(lengths: Sequence[int], *, max_length: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of one epoch: as `pack_rows`, as many in every epoch, with other rows together.

    How many packs there are follows from the lengths alone. Which rows of equal length stand in which pack is
    drawn anew; then rows of similar length change places wherever both packs have the room.
    """
    seed += _EPOCH_STRIDE * epoch
    packs = pack_rows(lengths, max_length=max_length, seed=seed)
    generator = random.Random(seed)
    place = {row: (number, slot) for number, pack in enumerate(packs) for slot, row in enumerate(pack)}
    room = [max_length - sum(lengths[row] for row in pack) for pack in packs]
    order = sorted(place, key=lengths.__getitem__)
    for index, short in enumerate(order[:-1]):
        long = order[min(index + generator.randint(1, _SWAP_REACH), len(order) - 1)]
        (here, short_slot), (there, long_slot) = place[short], place[long]
        more = lengths[long] - lengths[short]
        if here != there and more <= room[here]:
            packs[here][short_slot], packs[there][long_slot] = long, short
            place[short], place[long] = place[long], place[short]
            room[here] -= more
            room[there] += more
    return packs


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
