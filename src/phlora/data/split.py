"""Which rows are held out: whole conversations, by a hash of what they open with.

Rows that open with the same words (the system prompt and the first question), and rows of the same group where a
column names groups, are one conversation and stay on one side. So do a row for each turn of a chat, rows with other
answers to the same question, and rows that begin with an exchange out of the middle of another row, or with the answer
that another one ends with, as where each turn stands with the last ones before it. An opening that very many
conversations share, such as a greeting, does not make them one: they are then told apart by the next question. Rows of
weight 0 are never held out.

Whether a conversation is held out depends on its own hash and the seed, not on the others. Guaranteed is:

- A share: rows that are added move no other row to the other side. The number of held-out rows is therefore
  near the share, not exact; where chance would give less than half or more than twice of it, which happens in small
  sets only, the conversations next in the order of their hashes make up for it, and these may move.
- A number of rows: the conversations with the lowest hashes, as many as fit. Added rows can push a held-out row into
  training, never a trained one out of it, up to conversations that are too large for what is left.
- Adding a row that belongs to two conversations makes them one, which then stands on one side.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from phlora.data.dataset import RowIndex
from phlora.data.similarity import KEY_BYTES, NUM_OPENINGS, SMALL_TALK_ROWS
from phlora.errors import DataError

# An opening that more than this share of all rows have, and from which at least so many conversations go on, is a
# greeting.
_GREETING_SHARE = 0.2
_GREETING_CONVERSATIONS = 20
_MOST_CATEGORIES = 50
_ROWS_A_CATEGORY = 10
_FULL = 1 << 64


@dataclass(frozen=True)
class Split:
    """The numbers of the rows on both sides, in order, and what a person should know about it."""

    train: list[int]
    held_out: list[int]
    num_conversations: int
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def split_rows(
    index: RowIndex, *, eval_size: float | int, seed: int, stratify_by: str | None = None
) -> Split:
    """Split the rows of an index; see the module.

    Args:
        stratify_by: the column that was asked for. Without, a known column is used where it is worth it.

    Raises:
        DataError: there are not enough different rows to leave some on both sides.
    """
    # A row of weight 0 would take a seat and be left empty.
    numbers = [number for number, weight in enumerate(index.is_trained) if weight] or list(range(len(index)))
    categories = [index.categories[number] for number in numbers]
    uses_categories = stratify_by is not None or useful_categories(categories)
    split = split_conversations(
        _digests_of(index.openings, NUM_OPENINGS * KEY_BYTES, numbers),
        _digests_of(index.near, KEY_BYTES, numbers),
        exchanges=[index.exchanges_of(number) for number in numbers],
        heads=[index.heads[number] for number in numbers],
        tails=[index.tails[number] for number in numbers],
        eval_size=eval_size,
        seed=seed,
        groups=None if index.groups is None else [index.groups[number] for number in numbers],
        categories=[str(name) for name in categories] if uses_categories else None,
        category_column=stratify_by or "category",
    )
    held_out = [numbers[place] for place in split.held_out]
    others = set(held_out)
    return replace(split, train=[n for n in range(len(index)) if n not in others], held_out=held_out)


def _digests_of(digests: bytearray, width: int, numbers: Sequence[int]) -> bytes:
    """The digests of some rows, one after the other as those of all rows are."""
    return b"".join(digests[number * width : (number + 1) * width] for number in numbers)


@dataclass(frozen=True, slots=True)
class _Conversation:
    rank: int
    rows: list[int]


def split_conversations(
    openings: bytes | bytearray,
    near: bytes | bytearray,
    *,
    exchanges: Sequence[Sequence[int]],
    heads: Sequence[int],
    tails: Sequence[int],
    eval_size: float | int,
    seed: int,
    groups: Sequence[bytes] | None = None,
    categories: Sequence[str] | None = None,
    category_column: str = "",
) -> Split:
    """Split rows into training and held-out ones; see the module for what is guaranteed.

    Args:
        openings, near: of `similarity.RowKeys`, of all rows one after the other.
        exchanges, heads, tails: of `similarity.RowKeys`, per row.
        eval_size: a share of the rows when below 1, else a number of rows.
        groups: what is to stay together besides, per row.
        categories: hold out the same share of each, per row; `category_column` is their name.

    Raises:
        DataError: there are not enough different rows to leave some on both sides.
    """
    num_rows = len(near) // KEY_BYTES
    wanted = _num_eval_rows(num_rows, eval_size)
    keys = _with_windows(_opening_keys(openings, num_rows), exchanges, heads)
    keys = _with_answers_before(keys, heads, tails)
    conversations = _gather(keys if groups is None else _joined(keys, groups), seed)
    if not wanted:
        return Split(list(range(num_rows)), [], len(conversations))
    warnings, notes = [], []
    if len(conversations) == 1:
        if groups is not None:
            raise DataError(
                "All rows belong to one group", fix="group by another column, or give an eval file"
            )
        conversations = _gather([bytes(near[n * KEY_BYTES :][:KEY_BYTES]) for n in range(num_rows)], seed)
        _require_different(num_rows, len(conversations))
        warnings.append(
            "All rows begin with the same prompt, so the split is by row: held-out rows share their prompt "
            "with rows that are trained on"
        )
    held_out: set[int] = set()
    strata = _strata(conversations, categories)
    if len(strata) > 1:
        notes.append(
            f"Each of the {len(strata)} values of `{category_column}` has its share of held-out rows"
        )
    sizes = [sum(len(item.rows) for item in stratum) for stratum in strata]
    shares = [eval_size] * len(strata) if eval_size < 1 else _allotted(int(eval_size), sizes)
    for stratum, size, share in zip(strata, sizes, shares, strict=True):
        held_out |= _chosen(stratum, size, share)
    if not held_out:
        held_out = _chosen(conversations, num_rows, eval_size)
    if not held_out:
        held_out = set(min(conversations, key=lambda item: (len(item.rows), item.rank)).rows)
    if not wanted / 2 <= len(held_out) <= 2 * wanted:
        warnings.append(
            f"{len(held_out)} rows are held out rather than {wanted}, since the {num_rows} rows are only "
            f"{len(conversations)} conversations, which stay whole"
        )
    sides: tuple[list[int], list[int]] = [], []
    for number in range(num_rows):
        sides[number in held_out].append(number)
    return Split(*sides, len(conversations), warnings, notes)


def useful_categories(categories: Sequence[str | None]) -> bool:
    """Whether a column that was not asked for is worth stratifying by: few values, each in many rows."""
    counts = Counter(categories)
    return None not in counts and 1 < len(counts) <= min(
        _MOST_CATEGORIES, len(categories) // _ROWS_A_CATEGORY
    )


def _opening_keys(openings: bytes | bytearray, num_rows: int) -> list[bytes]:
    """What each row opens with: as many questions as tell conversations apart that share a greeting."""
    width = NUM_OPENINGS * KEY_BYTES

    def opening(number: int, depth: int) -> bytes:
        start = number * width + depth * KEY_BYTES
        return bytes(openings[start : start + KEY_BYTES])

    keys = [opening(number, 0) for number in range(num_rows)]
    for depth in range(1, NUM_OPENINGS):
        counts = Counter(keys)
        common = {key for key, count in counts.items() if count > _GREETING_SHARE * num_rows}
        going_on: dict[bytes, set[bytes]] = defaultdict(set)
        for number, key in enumerate(keys):
            if key in common:
                going_on[key].add(opening(number, depth))
        greetings = {key for key, further in going_on.items() if len(further) > _GREETING_CONVERSATIONS}
        if not greetings:
            break
        keys = [opening(number, depth) if key in greetings else key for number, key in enumerate(keys)]
    return keys


def _with_windows(keys: list[bytes], exchanges: Sequence[Sequence[int]], heads: Sequence[int]) -> list[bytes]:
    """One key for rows that begin in the middle of each other, as where each turn stands with the few before it.

    An exchange that many rows begin with, or that stands amid many, is a greeting or thanks and ties nothing.
    """
    begun: dict[int, list[bytes]] = defaultdict(list)
    amid: dict[int, list[bytes]] = defaultdict(list)
    for key, said in zip(keys, exchanges, strict=True):
        if said:
            begun[said[0]].append(key)
    for key, said, head in zip(keys, exchanges, heads, strict=True):
        # A row that begins with an answer is out of the middle of a chat, and so is its first exchange.
        for exchange in said if head else said[1:]:
            if exchange in begun:
                amid[exchange].append(key)
    return _tied(keys, amid, begun)


def _with_answers_before(keys: list[bytes], heads: Sequence[int], tails: Sequence[int]) -> list[bytes]:
    """One key for a row that begins with an answer and the rows that end with it, as windows of odd length do.

    An answer that many rows begin or end with is a greeting or thanks and ties nothing.
    """
    begin: dict[int, list[bytes]] = defaultdict(list)
    end: dict[int, list[bytes]] = defaultdict(list)
    for key, head in zip(keys, heads, strict=True):
        if head:
            begin[head].append(key)
    for key, tail in zip(keys, tails, strict=True):
        if tail in begin:
            end[tail].append(key)
    return _tied(keys, end, begin)


def _tied(
    keys: list[bytes], some: Mapping[int, Sequence[bytes]], others: Mapping[int, Sequence[bytes]]
) -> list[bytes]:
    """One key for the rows that say the same in two places, unless many say it in one of them."""
    parents: dict[bytes, bytes] = {}
    for said, found in some.items():
        if max(len(found), len(others[said])) <= SMALL_TALK_ROWS:
            for key in (*found, *others[said]):
                _unite(parents, key, found[0])
    return [_root(parents, key) for key in keys] if parents else keys


def _unite(parents: dict[bytes, bytes], one: bytes, other: bytes) -> None:
    """Give two items one root, the smaller of theirs."""
    one, other = _root(parents, one), _root(parents, other)
    parents[max(one, other)] = min(one, other)


def _root(parents: dict[bytes, bytes], item: bytes) -> bytes:
    while parents.setdefault(item, item) != item:
        parents[item] = parents[parents[item]]
        item = parents[item]
    return item


def _joined(keys: Sequence[bytes], groups: Sequence[bytes]) -> list[bytes]:
    """One key for all rows that are tied together by equal keys or equal groups: their smallest group."""
    parents: dict[bytes, bytes] = {}
    for key, group in zip(keys, groups, strict=True):
        # A group is never the child of a key, and the smaller group is the root.
        _unite(parents, b"g" + group, b"k" + key)
    return [_root(parents, b"g" + group) for group in groups]


def _gather(keys: Sequence[bytes], seed: int) -> list[_Conversation]:
    """Rows of equal keys as conversations, each with its place in the order of hashes."""
    rows: dict[bytes, list[int]] = {}
    for number, key in enumerate(keys):
        rows.setdefault(key, []).append(number)
    salt = str(seed).encode()[:64]
    return sorted(
        (
            _Conversation(
                int.from_bytes(hashlib.blake2b(key, digest_size=8, key=salt).digest(), "big"), numbers
            )
            for key, numbers in rows.items()
        ),
        key=lambda item: item.rank,
    )


def _strata(
    conversations: Sequence[_Conversation], categories: Sequence[str] | None
) -> list[list[_Conversation]]:
    """Conversations by the category of their first row."""
    if categories is None:
        return [list(conversations)]
    strata: dict[str, list[_Conversation]] = defaultdict(list)
    for item in conversations:
        strata[categories[item.rows[0]]].append(item)
    return [strata[name] for name in sorted(strata)]


def _chosen(conversations: Sequence[_Conversation], num_rows: int, eval_size: float | int) -> set[int]:
    """Rows of the conversations, given in the order of their hashes, that are held out."""
    if eval_size < 1:
        wanted = num_rows * eval_size
        limit = eval_size * _FULL
        least = wanted / 2 if wanted >= 1 else round(wanted)
        most = min(max(2 * wanted, 1), (num_rows + wanted) / 2)
    else:
        limit, least, most = 0.0, eval_size, eval_size
    chosen: set[int] = set()
    for item in conversations:
        if len(chosen) >= least and item.rank >= limit:
            break
        if len(chosen) + len(item.rows) <= min(most, num_rows - 1):
            chosen.update(item.rows)
    return chosen


def _allotted(wanted: int, sizes: Sequence[int]) -> list[int]:
    """A number of rows divided in proportion to sizes."""
    total = sum(sizes)
    exact = [wanted * size / total for size in sizes]
    parts = [int(value) for value in exact]
    by_rest = sorted(range(len(sizes)), key=lambda n: (parts[n] - exact[n], n))
    for number in by_rest[: wanted - sum(parts)]:
        parts[number] += 1
    return parts


def _require_different(num_rows: int, num_different: int) -> None:
    if num_different < 2:
        raise DataError(
            f"The {num_rows} rows hold only {num_different} different ones, so no eval set can be split off",
            expected="duplicates stay on one side of the split",
            fix="remove the duplicates, add rows, or give an eval file",
        )


# -------------------------------------------------------------------------------- runs of earlier versions


def split_keys(
    keys: Sequence[str | bytes], *, eval_size: float | int, seed: int
) -> tuple[list[int], list[int]]:
    """The split by single rows of earlier versions, with which runs that they began are continued."""
    import random

    wanted = _num_eval_rows(len(keys), eval_size)
    groups: dict[str | bytes, int] = {}
    group_of = array("q", (groups.setdefault(key, len(groups)) for key in keys))
    sizes: Mapping[int, int] = Counter(group_of)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    held_out: set[int] = set()
    num_held_out = 0
    for group in order if wanted else ():
        if num_held_out + sizes[group] <= wanted:
            held_out.add(group)
            num_held_out += sizes[group]
    if wanted and num_held_out in (0, len(keys)):
        _require_different(len(keys), 1)
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
