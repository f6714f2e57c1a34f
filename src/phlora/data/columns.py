"""Columns that say something about a row besides its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from phlora.data.rows import BadRow
from phlora.data.spelling import known_column
from phlora.errors import did_you_mean

# Columns by which rows are stratified without being asked, the likeliest first.
CATEGORIES = (
    "category",
    "task",
    "task_type",
    "task_name",
    "topic",
    "domain",
    "subject",
    "intent",
    "language",
    "lang",
)
_CATEGORIES = frozenset(CATEGORIES)
_WHOLE = re.compile(r"\A(-?\d+)\.0+\Z")


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or with dots of a key within one; None where there is none."""
    if path in record:
        return record[path]
    if (column := known_column(path)) in record:
        return record[column]
    value: Any = record
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_there(record: Mapping[str, Any], path: str) -> bool:
    """Whether a record has a column, whatever its value."""
    if path in record or known_column(path) in record:
        return True
    above, _, name = path.rpartition(".")
    return bool(above) and isinstance(inner := value_at(record, above), Mapping) and name in inner


def required_value(record: Mapping[str, Any], path: str, setting: str) -> str:
    """The value of a column that a setting names, as text.

    Raises:
        BadRow: there is none, or it says nothing: rows without one would be taken for one another's.
    """
    value = value_at(record, path)
    if (value is None and _is_there(record, path)) or (isinstance(value, str) and not value.strip()):
        message = f"the row's `{path}` is empty, and `{setting}` goes by it"
        raise BadRow("empty_column", message, "a value in each row, such as the row's own number")
    if value is None or isinstance(value, Mapping | list):
        message = f"the row has no `{path}`, which `{setting}` names"
        raise BadRow("missing_column", message, did_you_mean(path, map(str, record)))
    # A table has as text, or as a float, what is a whole number elsewhere.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _WHOLE.sub(r"\1", str(value).strip())


def category_of(record: Mapping[str, Any], stratify_by: str | None) -> str | None:
    """The category of a row: of the column asked for, else of the first known one that holds a text."""
    if stratify_by is not None:
        return required_value(record, stratify_by, "data.stratify_by")
    if _CATEGORIES.isdisjoint(record):
        return None
    for name in CATEGORIES:
        value = record.get(name)
        if isinstance(value, str) and value:
            return value
    return None
