"""JSON in a text, read strictly: each key once, no NaN or Infinity, numbers that fit a float, whole characters."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from phlora.data.rows import BadRow
from phlora.data.values import MAX_DEPTH, MAX_NUMBER, as_sound

MAX_DIGITS = 4300  # of Python's own conversion
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """The sound value of a text, or a `BadRow` that says what is wrong with it."""
    text = text.strip("\x1e\ufeff \t\r\n")
    try:
        if _reads_sound(text):  # what the text shows need not be looked for in the value
            try:
                return _USUAL.decode(text)
            except _UnusualNumber:
                pass
        return as_sound(STRICT.decode(text))
    except (BadRow, ValueError, RecursionError) as error:
        return _as_bad(error)


def inner_json(text: str, where: str, expected: str = "") -> Any:
    """The value of JSON that stands in a text of a row.

    Raises:
        BadRow: it is none; `where` begins the message.
    """
    value = parse_json(text)
    if isinstance(value, BadRow):
        raise BadRow(value.kind, f"{where}: {value.message}", expected or value.expected)
    return value


def _as_bad(error: BadRow | ValueError | RecursionError) -> BadRow:
    if isinstance(error, BadRow):
        return error
    if isinstance(error, json.JSONDecodeError):
        return broken(error)
    if isinstance(error, RecursionError):
        return BadRow("broken_json", "the JSON is nested too deeply")
    return BadRow("number", f"a number has more than {MAX_DIGITS} digits", "a number that fits a float")


def _reads_sound(text: str) -> bool:
    """Whether a text can hold no half of a surrogate pair and nothing that is nested too deeply."""
    if _SURROGATE.search(text) or text.count("{") + text.count("[") > MAX_DEPTH:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def broken(error: json.JSONDecodeError) -> BadRow:
    """What is wrong with a text that is no JSON."""
    hint = "one JSON object a line"
    rest = error.doc[error.pos :].lstrip()[:1]
    if rest == "'" or error.doc.lstrip()[:2] in ("{'", "['"):
        hint = 'JSON, whose texts stand in double quotes; written with `json.dumps`, not `str`: {"text": "…"}'
    return BadRow("broken_json", f"broken JSON at column {error.colno}: {error.msg}", hint)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen and seen[key] != value:
            raise BadRow("duplicate_key", f"the key `{key}` stands twice in one object", "each key once")
        seen[key] = value
    return found


def _no_number(name: str) -> Any:
    raise BadRow("number", f"`{name}` is no JSON value", "null where a value is missing")


class _UnusualNumber(ValueError):
    """A number that `sound` has to look at."""


def _usual_int(text: str) -> int:
    value = int(text)
    if -MAX_NUMBER < value < MAX_NUMBER:
        return value
    raise _UnusualNumber


def _usual_float(text: str) -> float:
    value = float(text)
    if math.isfinite(value):
        return value
    raise _UnusualNumber


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
_USUAL = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_number, parse_int=_usual_int, parse_float=_usual_float
)
# Finds the end of a value that the other one refuses.
LENIENT = json.JSONDecoder(parse_int=float)
