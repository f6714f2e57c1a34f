"""What one row of data is: where it stands, what it says, and what was found wrong with others."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, Literal, TypeAlias

from phlora.config import TrainOn
from phlora.errors import DataError

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
    `untrained_by` is the column that made the weight 0.
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
    untrained_by: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found in the data: an `error` makes a row unusable, a `warning` deserves a look."""

    kind: str
    severity: Severity
    message: str
    origins: tuple[Origin, ...] = ()
    count: int = 1


def last_assistant(messages: Sequence[Message]) -> int:
    """The index of the last assistant turn, or -1."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return index
    return -1


def is_trained(message: Message, train_on: TrainOn, *, is_last: bool) -> bool:
    """Whether a message is trained; its own `train` wins over `train_on`.

    Args:
        is_last: whether it is the last assistant turn.
    """
    if "train" in message:
        wanted = bool(message["train"])
    elif train_on == "last":
        wanted = is_last
    else:
        wanted = train_on == "all" or message["role"] == "assistant"
    return wanted and message.get("weight") != 0


def says_untrained(row: Row) -> str:
    """What a row of weight 0 says, with the column that says it."""
    by = f"`{row.untrained_by}`" if row.untrained_by else "its weight is 0"
    return f"the row says that it is not trained ({by})"


def why_untrained(row: Row, train_on: TrainOn) -> str | None:
    """How a row says that nothing of it is trained, by its weight or flag or by those of its messages; else None."""
    if row.weight == 0:
        return says_untrained(row)
    messages = row.messages or ()
    if not any("train" in message or "weight" in message for message in messages):
        return None
    last = last_assistant(messages)
    if any(is_trained(m, train_on, is_last=number == last) for number, m in enumerate(messages)):
        return None
    return "the row's messages say that none of them is trained"


def row_key(row: Row) -> str:
    """A digest of what the row says: equal for rows that differ in spacing or Unicode form only."""
    return _digest(_key_json(row)).hex()


def key_mark(row: Row) -> bytes:
    """What is equal where `row_key` is, in half the time and within this process only."""
    if row.messages is None:
        said: Any = tuple(
            _normal(part) for part in (row.prompt, row.completion, row.text) if part is not None
        )
    else:
        said = tuple(
            [
                (
                    message["role"],
                    _normal(message["content"]),
                    _CONTENT.encode(message["tool_calls"]) if message.get("tool_calls") is not None else None,
                )
                for message in row.messages
            ]
        )
    tools = None if row.tools is None else _CONTENT.encode(row.tools)
    return hash((said, tools)).to_bytes(8, "big", signed=True)


def row_digest(row: Row) -> bytes:
    """A digest of the exact content of a row and its weight."""
    return _digest(_plain_chat_json(row) if _is_plain_chat(row) else _content_json(row))


def row_mark(row: Row) -> int:
    """A number that tells rows apart as `row_digest` does, in a tenth of the time and within this process only."""
    if _is_plain_chat(row):
        messages = row.messages or ()
        return hash((row.weight, *[m["role"] for m in messages], *[m["content"] for m in messages]))
    return hash(row_digest(row))


def key_and_digest(row: Row) -> tuple[bytes, bytes]:
    """`row_key` as bytes and `row_digest`, in one go."""
    if not _is_plain_chat(row):
        return _digest(_key_json(row)), _digest(_content_json(row))
    keys, contents = [], []
    for message in row.messages or ():
        role, content = _quoted(message["role"]), message["content"]
        exact = _quoted(content)
        normal = _normal(content)
        keys.append(f"[{role}, {exact if normal is content else _quoted(normal)}, null]")
        contents.append(f'{{"content": {exact}, "role": {role}}}')
    return _digest(f"[[{', '.join(keys)}], null]"), _digest(_chat_json(contents, row.weight))


def _key_json(row: Row) -> str:
    if row.messages is not None:
        parts: list[Any] = [
            [message["role"], _normal(message["content"]), message.get("tool_calls")]
            for message in row.messages
        ]
    else:
        parts = [_normal(part) for part in (row.prompt, row.completion, row.text) if part is not None]
    return _CONTENT.encode([parts, row.tools])


def _content_json(row: Row) -> str:
    return _CONTENT.encode([row.messages, row.prompt, row.completion, row.text, row.tools, row.weight])


def _is_plain_chat(row: Row) -> bool:
    """Whether a row is messages of a role and a content each: their JSON is put together in a third of the time."""
    if row.messages is None or row.tools is not None or row.text is not None:
        return False
    if row.prompt is not None or row.completion is not None:
        return False
    for message in row.messages:
        if len(message) != 2:
            return False
    return True


def _plain_chat_json(row: Row) -> str:
    messages = [
        f'{{"content": {_quoted(message["content"])}, "role": {_quoted(message["role"])}}}'
        for message in row.messages or ()
    ]
    return _chat_json(messages, row.weight)


def _chat_json(messages: Iterable[str], weight: float) -> str:
    """`_content_json` of a plain chat."""
    number = repr(weight) if type(weight) is float and math.isfinite(weight) else _CONTENT.encode(weight)
    return f"[[{', '.join(messages)}], null, null, null, null, {number}]"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """The `fingerprint` of rows whose `row_digest` is known."""
    digest = hashlib.sha256()
    for part in digests:
        digest.update(part)
    return digest.hexdigest()


def _normal(text: str) -> str:
    return single_spaced(text if text.isascii() else unicodedata.normalize("NFC", text))


def single_spaced(text: str) -> str:
    """The words of a text with one space between them; most texts have that already."""
    # White space other than the space is not printable.
    if text.isprintable() and "  " not in text and text[:1] != " " != text[-1:]:
        return text
    return " ".join(text.split())


def each_row(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows one by one, told from what was not read by `load_rows`: dicts, a path, a data set.

    Raises:
        DataError: something else stands among them, or in their place.
    """

    def refused(found: Any, where: str) -> DataError:
        return DataError(
            f"{kind_of(found)} was given",
            where=where,
            expected="rows as Phlora reads them",
            fix="phlora.load_rows(...).rows reads them from files, dicts and data sets",
        )

    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise refused(rows, "rows")
    for number, row in enumerate(rows):
        if not isinstance(row, Row):
            raise refused(row, f"rows[{number}]")
        yield row


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


def sentence(text: str) -> str:
    """A text that begins with a capital letter, as messages do."""
    return text[:1].upper() + text[1:]


def names_of(keys: Iterable[Any], most: int = 24) -> str:
    """Names in backquotes, the first ones where there are many."""
    names = [f"`{str(key)[:60]}`" for key in itertools.islice(keys, most + 1)]
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])]) or "(none)"
