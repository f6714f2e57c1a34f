"""JSON in every layout it is met in: a row a line, a list of rows, an object that holds one, rows one after another.

Each row keeps the line that it begins in. A row that is no sound JSON, or whose values are not sound, is yielded as a
`BadRow`, and reading goes on where it can.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from phlora.data.json_text import LENIENT, MAX_DIGITS, STRICT, broken, parse_json
from phlora.data.readers.files import StoredFile
from phlora.data.readers.text import Line
from phlora.data.rows import BadRow, Record, kind_of
from phlora.data.values import as_sound
from phlora.errors import DataError

NUM_LINES_LOOKED_AT = 20
_SPACE = re.compile(r"[\s\x1e]*")
_SEPARATORS = re.compile(r"[\s,\x1e]*")  # \x1e: JSON text sequences
# Lists under these keys belong to a row; a list under another may be the rows themselves.
_ROW_LISTS = frozenset(
    "messages conversations conversation contents dialog dialogue turns tools functions images history prompt "
    "completion chosen rejected system chat_messages".split()
)


def read_json(file: StoredFile, lines: Iterator[Line]) -> Iterator[Record]:
    """The rows of a JSON or JSONL file, in whichever of the two layouts it really is."""
    first = list(itertools.islice(lines, NUM_LINES_LOOKED_AT))
    while first and not (head := list(_not_blank(first))):
        first = list(itertools.islice(lines, NUM_LINES_LOOKED_AT))
    if not first:
        return
    rest = itertools.chain(first, lines)
    if _is_a_row_a_line(head, len(first), file.kind):
        for line, text in _not_blank(rest):
            yield line, text if isinstance(text, BadRow) else parse_json(text)
    else:
        for line, value in _values(file, rest):
            yield line, value if isinstance(value, BadRow) else _sound(value)


def _sound(value: Any) -> Any:
    try:
        return as_sound(value)
    except BadRow as bad:
        return bad


def _not_blank(lines: Iterable[Line]) -> Iterator[Line]:
    return ((line, text) for line, text in lines if isinstance(text, BadRow) or not text.isspace())


def _is_a_row_a_line(head: list[Line], num_lines: int, kind: str) -> bool:
    """Whether the first lines are rows by themselves, as far as they are sound."""
    texts = [text.strip() for _, text in head if isinstance(text, str)]
    if not texts:
        return True
    first = _try(texts[0])
    is_alone = len(head) == 1 and num_lines < NUM_LINES_LOOKED_AT
    if is_alone and (kind == ".json" or _is_list_of_rows(first)):
        return False
    if isinstance(first, dict | list):
        return True
    whole = sum(text.startswith("{") and text.endswith("}") for text in texts)
    return whole > len(texts) / 2 and not texts[0].startswith("[")


def _try(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and not is_chat(value)


def is_chat(value: Any) -> bool:
    """Whether a list holds the turns of one chat, rather than rows."""
    return isinstance(value, list) and any(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def _values(file: StoredFile, lines: Iterable[Line]) -> Iterator[Record]:
    """Rows that are spread over lines: the elements of a list, or objects one after another."""
    parts = []
    first_line = 0
    for line, part in lines:
        if isinstance(part, BadRow):
            raise DataError(part.message, where=f"{file.name}:{line}", expected=part.expected)
        first_line = first_line or line
        parts.append(part)
    text = "".join(parts).lstrip("\ufeff")
    yield from _Scanner(file, text, first_line).rows()


class _Scanner:
    """Walks over a JSON text value by value and counts its lines."""

    def __init__(self, file: StoredFile, text: str, first_line: int) -> None:
        self.file, self.text = file, text
        self.line, self.counted = first_line, 0

    def rows(self) -> Iterator[Record]:
        start = self._after_space(0)
        if self.text[start : start + 1] == "[":
            whole = _try(self.text)
            if is_chat(whole):
                yield self._line_of(start), whole
            else:
                yield from self._elements(start)
            return
        value, end = self._value(start)
        if self._after_space(end) < len(self.text):
            yield from self._one_after_another(start)
            return
        inner = _rows_inside(value)
        if inner is None:
            yield self._line_of(start), value
        else:
            yield from self._elements(self._start_of(inner, start))

    def _elements(self, start: int) -> Iterator[Record]:
        position = self._after_space(start + 1)
        while self.text[position : position + 1] not in ("]", ""):
            line = self._line_of(position)
            value, end = self._value(position)
            yield line, value
            position = self._after_space(end)
            if self.text[position : position + 1] == ",":
                position = self._after_space(position + 1)
            elif self.text[position : position + 1] != "]":
                raise self._error(position, "a comma or the end of the list is missing")
        if position >= len(self.text):
            raise self._error(position, "the list is not closed")

    def _one_after_another(self, start: int) -> Iterator[Record]:
        position = start
        while position < len(self.text):
            line = self._line_of(position)
            value, end = self._value(position)
            yield line, value
            found = _SEPARATORS.match(self.text, end)
            position = found.end() if found else end

    def _value(self, position: int) -> tuple[Any, int]:
        try:
            return STRICT.raw_decode(self.text, position)
        except json.JSONDecodeError as error:
            raise self._error(error.pos, error.msg) from None
        except RecursionError:
            raise self._error(position, "it is nested too deeply") from None
        except BadRow as bad:
            return bad, self._end_of(position)
        except ValueError:
            return BadRow("number", f"a number has more than {MAX_DIGITS} digits"), self._end_of(position)

    def _end_of(self, position: int) -> int:
        try:
            return LENIENT.raw_decode(self.text, position)[1]
        except json.JSONDecodeError as error:
            raise self._error(error.pos, error.msg) from None
        except RecursionError:
            raise self._error(position, "it is nested too deeply") from None

    def _start_of(self, key: str, start: int) -> int:
        """Where the list under a key of the object at `start` begins."""
        position = self._after_space(start + 1)
        while True:
            name, end = json.JSONDecoder().raw_decode(self.text, position)
            position = self._after_space(self._after_space(end) + 1)  # past the colon
            if name == key and self.text[position] == "[":
                return position
            _, end = LENIENT.raw_decode(self.text, position)
            position = self._after_space(self._after_space(end) + 1)  # past the comma

    def _after_space(self, position: int) -> int:
        found = _SPACE.match(self.text, position)
        return found.end() if found else position

    def _line_of(self, position: int) -> int:
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def _error(self, position: int, message: str) -> DataError:
        line = self._line_of(min(position, len(self.text)))
        column = position - self.text.rfind("\n", 0, position)
        bad = broken(json.JSONDecodeError(message, self.text, min(position, len(self.text))))
        return DataError(
            f"Broken JSON at column {column}: {message}",
            where=f"{self.file.name}:{line}",
            expected=bad.expected if "quotes" in bad.expected else "a JSON list of rows, or a row a line",
            fix="correct the file, or name it .jsonl if it holds one object a line"
            if self.file.kind == ".json"
            else "correct the file",
        )


def _rows_inside(value: Any) -> str | None:
    """The key under which an object holds its rows, if it does: {"version": 1, "data": [{…}, {…}]}."""
    if not isinstance(value, dict):
        return None
    lists = [key for key, item in value.items() if isinstance(item, list) and item]
    if len(lists) != 1 or lists[0] in _ROW_LISTS:
        return None
    items = value[lists[0]]
    return lists[0] if all(isinstance(item, dict) for item in items) and not is_chat(items) else None


def require_rows(value: Any, name: str) -> None:
    """Refuse a JSON file that holds one bare value."""
    if not isinstance(value, dict | list):
        raise DataError(f"The file holds {kind_of(value)}", where=name, expected="a JSON list of rows")


def read_texts(lines: Iterator[Line]) -> Iterator[Record]:
    """A text for each line that is not blank."""
    for line, text in _not_blank(lines):
        yield line, text if isinstance(text, BadRow) else {"text": text.rstrip("\r\n")}
