"""What one row of data is: where it stands, what it says, and what was found wrong with others."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Message: TypeAlias = dict[str, Any]
Severity = Literal["error", "warning", "note"]
DIGEST_BYTES = 16
_CONTENT = json.JSONEncoder(sort_keys=True, default=str)


class BadRow(Exception):
    """A row that cannot be used; becomes a `DataError` or a `Problem` where its origin is known."""

    def __init__(self, kind: str, message: str, expected: str = "") -> None:
        self.kind, self.message, self.expected = kind, message, expected
        super().__init__(message)


Record: TypeAlias = tuple[int, Any]  # line or row number, and the parsed value or the BadRow


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: the file and its line (JSONL, CSV) or its row number, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: a chat (`messages`), a plain `prompt` and `completion`, or a plain `text`.

    A message holds `role` (system, user, assistant or tool) and `content`, and optionally `tool_calls`,
    `name`, `train` (bool), `weight` (loss weight of its tokens) and whatever else its chat template reads.
    `weight` is the loss weight of each trained token of the row: the weight of its file. `group` and `category`
    are what the split goes by besides the text: rows of one group stay on one side, and each category has its share.
    """

    messages: tuple[Message, ...] | None
    prompt: str | None
    completion: str | None
    text: str | None
    tools: list[Any] | None
    origin: Origin
    weight: float = 1.0
    group: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found in the data: an `error` makes a row unusable, a `warning` deserves a look."""

    kind: str
    severity: Severity
    message: str
    origins: tuple[Origin, ...] = ()
    count: int = 1


def row_key(row: Row) -> str:
    """A digest of what the row says: equal for rows that differ in spacing or Unicode form only."""
    if row.messages is not None:
        parts: list[Any] = [
            [message["role"], _normal(message["content"]), message.get("tool_calls")]
            for message in row.messages
        ]
    else:
        parts = [_normal(part) for part in (row.prompt, row.completion, row.text) if part is not None]
    text = json.dumps([parts, row.tools], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_digest(row: Row) -> bytes:
    """A digest of the exact content of a row and its weight."""
    content = [row.messages, row.prompt, row.completion, row.text, row.tools, row.weight]
    return hashlib.blake2b(_CONTENT.encode(content).encode(), digest_size=DIGEST_BYTES).digest()


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """The `fingerprint` of rows whose `row_digest` is known."""
    digest = hashlib.sha256()
    for part in digests:
        digest.update(part)
    return digest.hexdigest()


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def kind_of(value: Any) -> str:
    """A value's kind in plain words; numbers with the value."""
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    if value is None:
        return "nothing (null)"
    shown = f" ({value!r})" if isinstance(value, int | float) and -1e20 < value < 1e20 else ""
    return kinds.get(type(value), f"a {type(value).__name__}") + shown


def names_of(keys: Iterable[Any], most: int = 24) -> str:
    """Names in backquotes, the first ones where there are many."""
    names = [f"`{str(key)[:60]}`" for key in itertools.islice(keys, most + 1)]
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])]) or "(none)"
