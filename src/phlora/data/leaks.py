"""Held-out rows of which training sees too much: the same row, nearly the same row, or the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

from phlora.data.dataset import RowSubset
from phlora.data.rows import Problem
from phlora.data.similarity import KEY_BYTES

# kind, and what is said of the rows
_LEAKS = (
    ("leaked_eval_row", "The held-out row also stands in the training data"),
    (
        "near_leaked_eval_row",
        "The held-out row nearly stands in the training data (case, punctuation or spacing differ)",
    ),
    ("leaked_prompt", "The prompt of the held-out row also stands in the training data, with another answer"),
)


def find_leaks(train: RowSubset, held_out: RowSubset) -> list[Problem]:
    """What of the held-out rows stands in the training rows: one problem a kind, each row in the worst that it has.

    The message names the first pair.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    known = [dict(zip(keys, train.numbers, strict=True)) for keys in _keys(train)]
    for number, *keys in zip(held_out.numbers, *_keys(held_out), strict=True):
        for (kind, _), key, numbers in zip(_LEAKS, keys, known, strict=True):
            if key in numbers:
                found.setdefault(kind, []).append((number, numbers[key]))
                break
    return [
        Problem(
            kind,
            "warning",
            f"{message}; the first: {held_out.survey.origin(pairs[0][0])} as {train.survey.origin(pairs[0][1])}",
            tuple(held_out.survey.origin(number) for number, _ in pairs),
            len(pairs),
        )
        for kind, message in _LEAKS
        if (pairs := found.get(kind))
    ]


def num_leaks(problems: Sequence[Problem]) -> dict[str, int]:
    """How many held-out rows leak, by kind."""
    return {kind: sum(p.count for p in problems if p.kind == kind) for kind, _ in _LEAKS}


def _keys(rows: RowSubset) -> tuple[list[bytes], list[bytes], list[bytes]]:
    index = rows.survey

    def some(values: bytearray) -> list[bytes]:
        return [bytes(values[n * KEY_BYTES : (n + 1) * KEY_BYTES]) for n in rows.numbers]

    return [index.keys[n] for n in rows.numbers], some(index.near), some(index.prompts)
