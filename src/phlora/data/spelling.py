"""Columns and message keys in the one spelling that `known_keys` has: `Weight`, `Sample Weight`, `sampleWeight`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from phlora.data.known_keys import COLUMNS, MESSAGE_KEYS, QUIET, Known
from phlora.data.rows import BadRow

_BETWEEN = re.compile(r"[\s_\-\u200b\ufeff]+")


def _folded(name: str) -> str:
    return _BETWEEN.sub("", name.casefold())


def _spellings(entries: tuple[Known, ...]) -> dict[str, str]:
    # `A` and `Q` may be choices, and what nothing is done with keeps its own name.
    names = (name for known in entries for name in known.names)
    return {_folded(name): name for name in names if len(name) > 1 and name not in QUIET}


_COLUMNS = _spellings(COLUMNS)
_MESSAGE_KEYS = _spellings(MESSAGE_KEYS)


def known_column(name: str) -> str:
    """The spelling of a column that is known; of any other its own.

    >>> known_column("Sample Weight"), known_column("Straße")
    ('sample_weight', 'Straße')
    """
    return _COLUMNS.get(_folded(name), name)


def with_known_columns(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with its known columns in their one spelling.

    Raises:
        BadRow: two of them are one column, and differ.
    """
    changes = _column_changes(tuple(record))
    return _respelled(record, changes, "the row") if changes else record


def with_known_message_keys(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The same for a message, or a part of one; `where` is what an error calls it."""
    changes = _message_changes(tuple(message))
    return _respelled(message, changes, where) if changes else message


@lru_cache(maxsize=1024)
def _column_changes(names: tuple[str, ...]) -> dict[str, str]:
    return _changes(names, _COLUMNS)


@lru_cache(maxsize=1024)
def _message_changes(names: tuple[str, ...]) -> dict[str, str]:
    return _changes(names, _MESSAGE_KEYS)


def _changes(names: tuple[str, ...], known: Mapping[str, str]) -> dict[str, str]:
    found = {name: known.get(_folded(name), name) for name in names}
    return {name: new for name, new in found.items() if new != name}


def _respelled(record: Mapping[str, Any], changes: Mapping[str, str], where: str) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in record.items():
        known = changes.get(name, name)
        if is_empty(value) and known in new:
            continue
        if not is_empty(new.get(known)) and new[known] != value:
            other = next(other for other in record if changes.get(other, other) == known and other != name)
            raise BadRow("two_columns", f"{where} has `{other}` and `{name}`, which differ", "one of them")
        new[known] = value
    return new


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, or a text, a list or an object without anything in it."""
    return value is None or (isinstance(value, str | list | dict) and not value)
