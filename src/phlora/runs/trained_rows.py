"""Which rows a run trained on, so that a later evaluation never calls one of them held out.

`trained.keys` in the run folder holds the first 8 bytes of the `row_key` of each trained row, sorted: equal for rows
that differ in spacing or Unicode form only, and nothing that says what is in a row. Of a million rows one stranger in
10^13 would be taken for a trained one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from phlora.data.rows import Row, row_key
from phlora.files import replaced_file
from phlora.runs.folder import TRAINED_KEYS_FILE, RunFolder

_KEY_BYTES = 8


def write_trained_keys(keys: Iterable[bytes], path: Path) -> None:
    """Write the keys of the rows that are trained on; each is a `row_key` as bytes."""
    with replaced_file(path) as part:
        part.write_bytes(b"".join(sorted({key[:_KEY_BYTES] for key in keys})))


def count_trained(run: RunFolder, rows: Sequence[Row]) -> int | None:
    """How many of these rows the run trained on.

    None where the run does not say: it is of an earlier version, or its file of keys is damaged.
    """
    file = run.path / TRAINED_KEYS_FILE
    trained = _read_keys(file.read_bytes()) if file.is_file() else None
    if trained is None:
        return None
    return sum(bytes.fromhex(row_key(row))[:_KEY_BYTES] in trained for row in rows)


def _read_keys(content: bytes) -> set[bytes] | None:
    """The keys in a file, None where they are not what `write_trained_keys` writes: whole, sorted, at least one."""
    keys = [content[i : i + _KEY_BYTES] for i in range(0, len(content), _KEY_BYTES)]
    is_whole = bool(keys) and len(keys[-1]) == _KEY_BYTES
    return set(keys) if is_whole and all(a < b for a, b in pairwise(keys)) else None
