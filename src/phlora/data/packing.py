"""Which rows share one sequence: best-fit decreasing over whole rows, so that no row is ever cut.

Best fit puts each row, longest first, where it leaves the least room. The rooms that exist are kept as the
bits of one integer, so the tightest one that fits is found with a shift instead of a search.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from phlora.errors import DataError


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
