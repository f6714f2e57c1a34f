"""Which rows are held out."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence

from phlora.errors import DataError


def split_keys(
    keys: Sequence[str | bytes], *, eval_size: float | int, seed: int
) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the held-out rows; rows of equal keys always stay on one side.

    Args:
        eval_size: a share of the rows when below 1, else a number of rows. The held-out side never gets more;
            groups of duplicates can make it smaller.

    Raises:
        DataError: there are not enough different rows to leave some on both sides.
    """
    wanted = _num_eval_rows(len(keys), eval_size)
    groups: dict[str | bytes, int] = {}
    group_of = array("q", (groups.setdefault(key, len(groups)) for key in keys))
    sizes = Counter(group_of)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    held_out: set[int] = set()
    num_held_out = 0
    for group in order if wanted else ():
        if num_held_out + sizes[group] <= wanted:
            held_out.add(group)
            num_held_out += sizes[group]
    if wanted and num_held_out in (0, len(keys)):
        raise DataError(
            f"The {len(keys)} rows hold only {len(groups)} different ones, so no eval set can be split off",
            expected="duplicates stay on one side of the split",
            fix="remove the duplicates, add rows, or give an eval file",
        )
    sides: tuple[list[int], list[int]] = [], []
    for index, group in enumerate(group_of):
        sides[group in held_out].append(index)
    return sides


def _num_eval_rows(num_rows: int, eval_size: float | int) -> int:
    if eval_size < 0:
        raise DataError(f"eval_size is {eval_size}", expected="a share below 1, or a number of rows")
    wanted = max(1, round(num_rows * eval_size)) if 0 < eval_size < 1 else int(eval_size)
    if wanted >= num_rows and wanted > 0:
        raise DataError(
            f"The eval set would take {wanted} of {num_rows} rows and leave none to train on",
            expected=f"eval_size below {num_rows} rows, or a share such as 0.1",
            fix="lower eval_size or give more data",
        )
    return wanted
