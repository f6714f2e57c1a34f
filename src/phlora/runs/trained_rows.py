"""Which rows a run trained on, so that a later evaluation never calls one of them held out.

`trained.keys` in the run folder holds two sorted lists of digests of the trained rows (`data.similarity`), and nothing
that says what is in a row: those by which rows are nearly the same, and those of their prompts.

    8 bytes   `_FORMAT`
    8 bytes   the number of the first, little-endian
    8 bytes   each of the first, then each of the second

Of a million rows one stranger in 10^13 would be taken for a trained one. A file of an earlier version holds the
`row_key` of each row alone, which is equal for rows that differ in spacing or Unicode form only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from phlora.data.rows import Row, row_key
from phlora.data.similarity import KEY_BYTES, row_keys
from phlora.files import replaced_file
from phlora.runs.folder import TRAINED_KEYS_FILE, RunFolder

# No list of an earlier version begins so: its second eight bytes would have to be larger.
_FORMAT = b"\xffphlora2"


@dataclass(frozen=True, kw_only=True)
class TrainedKeys:
    """Digests of the rows that a run trains on, of `KEY_BYTES` each.

    Attributes:
        near: equal for rows that say nearly the same.
        prompts: of all before the last answer.
    """

    near: Collection[bytes] = ()
    prompts: Collection[bytes] = ()


@dataclass(frozen=True, kw_only=True)
class TrainedCount:
    """How many of some rows a run trained on.

    Attributes:
        same: those that it trained on, or on rows that say nearly the same.
        same_prompt: others, whose prompt it trained with another answer; None where the run does not say.
    """

    same: int
    same_prompt: int | None = None


def write_trained_keys(keys: TrainedKeys, path: Path) -> None:
    """Write the digests of the rows that are trained on."""
    near, prompts = sorted(set(keys.near)), sorted(set(keys.prompts))
    with replaced_file(path) as part:
        part.write_bytes(b"".join([_FORMAT, len(near).to_bytes(KEY_BYTES, "little"), *near, *prompts]))


def count_trained(run: RunFolder, rows: Sequence[Row]) -> TrainedCount | None:
    """How many of these rows the run trained on.

    None where the run does not say: it is of an earlier version, or its file of keys is damaged.
    """
    file = run.path / TRAINED_KEYS_FILE
    content = file.read_bytes() if file.is_file() else b""
    if not content.startswith(_FORMAT):
        exact = _read_keys(_split(content))
        return TrainedCount(same=sum(_exact_key(row) in exact for row in rows)) if exact else None
    first, *keys = _split(content[len(_FORMAT) :]) or [b""]
    number = int.from_bytes(first, "little")
    near, prompts = _read_keys(keys[:number]), _read_keys(keys[number:])
    if near is None or prompts is None or len(near) != number:
        return None
    found = [row_keys(row) for row in rows]
    same = sum(keys.near in near for keys in found)
    return TrainedCount(
        same=same, same_prompt=sum(keys.prompt in prompts and keys.near not in near for keys in found)
    )


def _exact_key(row: Row) -> bytes:
    return bytes.fromhex(row_key(row))[:KEY_BYTES]


def _split(content: bytes) -> list[bytes]:
    return [content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES)]


def _read_keys(keys: Sequence[bytes]) -> set[bytes] | None:
    """The keys in a list, None where it is not as it was written: whole, sorted, at least one."""
    is_whole = bool(keys) and len(keys[-1]) == KEY_BYTES
    return set(keys) if is_whole and all(a < b for a, b in pairwise(keys)) else None
