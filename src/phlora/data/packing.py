"""Which rows share one sequence.

Packs are made best-fit decreasing over whole rows, so that no row is ever cut: each row, longest first, goes
where it leaves the least room. The rooms that exist are kept as the bits of one integer, so the tightest one
that fits is found with a shift instead of a search.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import overload

from phlora.data.table import TokenizedRow, TokenTable
from phlora.errors import DataError

# How far apart, in the order of lengths, rows may stand that change places between epochs.
_SWAP_REACH = 16
_EPOCH_STRIDE = 1_000_003


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
