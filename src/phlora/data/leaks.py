"""Held-out rows of which training sees too much: the same row, nearly the same row, its answers, or its prompt."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from phlora.data.dataset import RowSubset
from phlora.data.rows import Problem
from phlora.data.similarity import KEY_BYTES, SMALL_TALK_ROWS

# kind, and what is said of the rows, the worst first
_LEAKS = (
    ("leaked_eval_row", "The held-out row also stands in the training data"),
    (
        "near_leaked_eval_row",
        "The held-out row nearly stands in the training data (case, punctuation or spacing differ)",
    ),
    (
        "leaked_answer",
        "Answers of the held-out row, with their questions or at the head of a chat, also stand within longer or "
        "shorter chats of the training data",
    ),
    ("leaked_prompt", "The prompt of the held-out row also stands in the training data, with another answer"),
)
# A chat leaks where this share of its exchanges is trained, beside those that many chats have, such as thanks.
_EXCHANGES_SHARE = 0.5


def find_leaks(train: RowSubset, held_out: RowSubset) -> list[Problem]:
    """What of the held-out rows stands in the training rows: one problem a kind, each row in the worst that it has.

    Rows of weight 0 are on no side. The message names the first pair.
    """
    train, held_out = _with_weight(train), _with_weight(held_out)
    found: dict[str, list[tuple[int, int]]] = {}
    same, near, prompts = (dict(zip(keys, train.numbers, strict=True)) for keys in _keys(train))
    exchanges, num_rows = {}, Counter[int]()
    heads: dict[int, list[int]] = defaultdict(list)
    for number in train.numbers:
        said = set(train.survey.exchanges_of(number))
        exchanges.update(dict.fromkeys(said, number))
        num_rows.update(said)
        if head := train.survey.heads[number]:
            heads[head].append(number)
    for number, key, near_key, prompt in zip(held_out.numbers, *_keys(held_out), strict=True):
        inside = _where_trained(held_out.survey.exchanges_of(number), exchanges, num_rows)
        others = (
            same.get(key),
            near.get(near_key),
            inside if inside is not None else _where_it_goes_on(held_out.survey.tails[number], heads),
            prompts.get(prompt),
        )
        for (kind, _), other in zip(_LEAKS, others, strict=True):
            if other is not None:
                found.setdefault(kind, []).append((number, other))
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


def _with_weight(rows: RowSubset) -> RowSubset:
    return RowSubset(rows.survey, [number for number in rows.numbers if rows.survey.is_trained[number]])


def _where_trained(
    said: Sequence[int], trained: Mapping[int, int], num_rows: Mapping[int, int]
) -> int | None:
    """A training row that holds an exchange of a row, where enough of those that are no small talk are trained."""
    said = [exchange for exchange in said if num_rows.get(exchange, 0) <= SMALL_TALK_ROWS]
    found = [trained[exchange] for exchange in said if exchange in trained]
    return found[-1] if found and len(found) >= _EXCHANGES_SHARE * len(said) else None


def _where_it_goes_on(answer: int, heads: Mapping[int, Sequence[int]]) -> int | None:
    """A training row that begins with the last answer of a row, unless many do."""
    found = heads.get(answer, ()) if answer else ()
    return found[0] if 0 < len(found) <= SMALL_TALK_ROWS else None


def num_leaks(problems: Sequence[Problem]) -> dict[str, int]:
    """How many held-out rows leak, by kind."""
    return {kind: sum(p.count for p in problems if p.kind == kind) for kind, _ in _LEAKS}


def _keys(rows: RowSubset) -> tuple[list[bytes], list[bytes], list[bytes]]:
    index = rows.survey

    def some(values: bytearray) -> list[bytes]:
        return [bytes(values[n * KEY_BYTES : (n + 1) * KEY_BYTES]) for n in rows.numbers]

    return [index.keys[n] for n in rows.numbers], some(index.near), some(index.prompts)
