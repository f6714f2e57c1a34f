"""One look at every value of a record before anything else sees it, and the renaming of columns.

What a tokenizer, a template or a hash cannot take (half a surrogate pair, a number beyond all floats, a list nested a
thousand deep) is refused here, with the place in the record, so that nothing behind has to expect it.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

from phlora.data.rows import BadRow, Record, kind_of, names_of
from phlora.data.spelling import with_known_columns
from phlora.errors import did_you_mean

MAX_DEPTH = 64
MAX_NUMBER = 1 << 1000  # fits a float
_SPOKEN = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, Decimal, UUID)
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def sound(value: Any, where: str = "", depth: int = 0) -> Any:
    """A value made of objects, lists, texts, numbers, truth values and null, as every later step expects it.

    Dates, decimals and numpy's values become plain ones; bytes and objects of other kinds stay, for the step that
    uses them to refuse.

    Raises:
        BadRow: a text with half of a surrogate pair, a number that is none or too large, a key that is no text,
            or more than `MAX_DEPTH` levels.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else encodable(value, where or "the row")
    if value is None or kind is bool:
        return value
    if kind is int:
        if -MAX_NUMBER < value < MAX_NUMBER:
            return value
        raise BadRow(
            "number", f"{_place(where)} holds a number of {_digits(value)} digits", "a smaller number"
        )
    if kind is float:
        if math.isfinite(value):
            return value
        raise BadRow("number", f"{_place(where)} holds {value}", "a number, or null where a value is missing")
    if depth > MAX_DEPTH:
        raise BadRow("too_deep", f"{_place(where[:40])} … is nested more than {MAX_DEPTH} levels deep")
    if kind is dict or isinstance(value, Mapping):
        return {
            _key(key, where): sound(item, f"{where}.{key}" if where else str(key), depth + 1)
            for key, item in value.items()
        }
    if kind is list or kind is tuple:
        return [sound(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    return _converted(value, where, depth)


def _plain(value: Any, depth: int = 0) -> Any:
    """`sound` of a value that is nothing but sound already, in a third of the time.

    Raises:
        ValueError, TypeError: `sound` has to look.
    """
    kind = type(value)
    if kind is str:
        if not value.isascii():
            value.encode()
        return value
    if kind is dict or kind is list:
        if depth > MAX_DEPTH:
            raise ValueError
        if kind is list:
            return [_plain(item, depth + 1) for item in value]
        if not "".join(value).isascii():
            raise ValueError
        return {
            key: item if type(item) is str and item.isascii() else _plain(item, depth + 1)
            for key, item in value.items()
        }
    is_number = (kind is int and -MAX_NUMBER < value < MAX_NUMBER) or (kind is float and math.isfinite(value))
    if is_number or kind is bool or value is None:
        return value
    raise ValueError


def _converted(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, str):
        return sound(str(value), where)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return sound(value.tolist(), where, depth + 1)
    return str(value) if isinstance(value, _SPOKEN) else value


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise BadRow("wrong_type", f"{_place(where)} has a key that is {kind_of(key)}", "keys that are text")
    return key if key.isascii() else encodable(key, f"a key of {where or 'the row'}")


def _place(where: str) -> str:
    return f"`{where[:200]}`" if where else "the row"


def _digits(value: int) -> int:
    return int(abs(value).bit_length() * math.log10(2)) + 1


def encodable(text: str, where: str) -> str:
    """The text, unless it holds half of a surrogate pair (`\\ud83d` alone), which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            "encoding",
            f"{where} holds half of a surrogate pair at character {error.start}",
            "whole characters",
        ) from None
    return text


def require_plain(value: Any, where: str) -> None:
    """Refuse what JSON does not know, such as bytes, inside a sound value.

    Raises:
        BadRow: there is some.
    """
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        if value is not None and not isinstance(value, str | int | float):
            raise BadRow("wrong_type", f"{where} holds {kind_of(value)}", "text, numbers, lists and objects")
        return
    for item in value:
        if type(item) is not str:
            require_plain(item, where)


def as_sound(value: Any) -> Any:
    """`sound` of a value that mostly is sound already."""
    try:
        return _plain(value)
    except (ValueError, TypeError):
        return sound(value)


def checked(
    records: Iterator[Record], columns: Mapping[str, str], *, is_sound: bool = False
) -> Iterator[Record]:
    """Sound records with renamed columns, known ones in their one spelling; a `BadRow` in place of each other.

    Args:
        is_sound: whether the reader has seen to that.
    """
    for line, record in records:
        if isinstance(record, BadRow):
            yield line, record
            continue
        try:
            found = record if is_sound else as_sound(record)
            if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found):
                found = {"messages": found}  # a chat that is a bare list of its turns
            elif isinstance(found, dict) and "row" in found and found.keys() <= _VIEWER:
                found = _row_of_the_viewer(found)
            if isinstance(found, dict):
                found = with_known_columns(renamed(found, columns) if columns else found)
            yield line, found
        except BadRow as bad:
            yield line, bad


_VIEWER = frozenset(("row", "row_idx", "truncated_cells"))


def _row_of_the_viewer(found: dict[str, Any]) -> Any:
    """The row inside what the hub's viewer answers with.

    Raises:
        BadRow: the viewer cut some of its cells.
    """
    if not isinstance(found["row"], dict):
        return found
    if found.get("truncated_cells"):
        raise BadRow("truncated", "the hub's viewer cut cells of the row", "the rows of the data set itself")
    return found["row"]


# ------------------------------------------------------------------------------------------------ columns


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the columns that a mapping names under their new names; the others stay.

    >>> renamed({"Frage": "Hi", "meta": {"reply": "Hello"}}, {"question": "Frage", "answer": "meta.reply"})
    {'question': 'Hi', 'answer': 'Hello'}

    Args:
        columns: new name -> the name of a column, or a path into one: `a.b`, `a[0].b`.

    Raises:
        BadRow: a column is missing.
    """
    values = {new: _at(record, path) for new, path in columns.items()}
    used = {path if path in record else _steps(path)[0] for path in columns.values()}
    kept = {name: value for name, value in record.items() if name not in used and name not in values}
    return values | kept


def _steps(path: str) -> list[str | int]:
    return [int(number) if number else name for name, number in _STEP.findall(path)]


def _at(record: Mapping[str, Any], path: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for step in _steps(path):
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            value = value[step]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            hint = did_you_mean(path, record) if record else ""
            raise BadRow(
                "missing_column", f"the row has no `{path}`; it has the keys {names_of(record)}", hint
            )
    return value
