"""The held-out rows: decided by the seed, never the repeat of a training row."""

from __future__ import annotations

import pytest

from phlora.data.dataset import load_rows
from phlora.data.rows import row_key
from phlora.data.split import split_keys
from phlora.errors import DataError


def _texts(*texts):
    return load_rows([{"text": text} for text in texts]).rows


def _split(rows, **options):
    return tuple([rows[n] for n in side] for side in split_keys([row_key(row) for row in rows], **options))


def test_split_depends_on_the_seed_only_and_keeps_order():
    rows = _texts(*(f"row {index}" for index in range(40)))
    train, held_out = _split(rows, eval_size=0.25, seed=1)
    assert (train, held_out) == _split(rows, eval_size=0.25, seed=1)
    assert held_out != _split(rows, eval_size=0.25, seed=2)[1]
    assert (len(train), len(held_out)) == (30, 10)
    assert [row.origin.line for row in train] == sorted(row.origin.line for row in train)
    assert len(_split(rows, eval_size=7, seed=1)[1]) == 7
    assert _split(rows, eval_size=0, seed=1) == (rows, [])


def test_duplicates_never_stand_on_both_sides():
    rows = _texts(*(f"row  {index // 4}" if index % 2 else f"row {index // 4} " for index in range(40)))
    for seed in range(10):
        train, held_out = _split(rows, eval_size=0.2, seed=seed)
        assert len(held_out) == 8
        assert not {row_key(row) for row in train} & {row_key(row) for row in held_out}


@pytest.mark.parametrize("eval_size", [3, 4, 0.99, -1])
def test_impossible_eval_sizes(eval_size):
    with pytest.raises(DataError):
        _split(_texts("a", "b", "c"), eval_size=eval_size, seed=0)


def test_rows_that_are_all_the_same_cannot_be_split():
    with pytest.raises(DataError, match="1 different"):
        _split(_texts("a", "a ", "a"), eval_size=1, seed=0)
