"""The code of a notebook's cells, exchanged in the text of its file: every other character of it stays as it is.

Reading a notebook as JSON and writing it again would write some numbers, escapes and spaces in another way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

Span = tuple[int, int]
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")


def with_code(text: str, changed: Mapping[int, str]) -> str:
    """The text of a notebook with other code in some cells.

    Args:
        text: the notebook, which is valid JSON with a list of `cells`.
        changed: the place of a cell among all cells -> its new code.
    """
    cells = _elements(text, _members(text, _behind_space(text, 0))["cells"][0])
    parts, at = [], 0
    for number, code in sorted(changed.items()):
        start, end = source = _members(text, cells[number][0])["source"]
        parts += [text[at:start], _source(text, source, code)]
        at = end
    return "".join([*parts, text[at:]])


def _source(text: str, old: Span, code: str) -> str:
    """Code as the old code is written: one text or a list of lines, laid out and escaped alike."""
    is_ascii = text.isascii()
    start, end = old
    if text[start] != "[":
        return json.dumps(code, ensure_ascii=is_ascii)
    spans = _elements(text, start)
    literals = [text[slice(*span)] for span in spans if text[span[0]] == '"']
    written = {json.loads(literal): literal for literal in literals}
    lines = [written.get(line) or json.dumps(line, ensure_ascii=is_ascii) for line in _LINES.findall(code)]
    if not lines:
        return "[]"
    before, behind = text[start + 1 : spans[0][0]], text[spans[-1][1] : end - 1]
    between = f",{before or ' '}" if len(spans) == 1 else text[spans[0][1] : spans[1][0]]
    return f"[{before}{between.join(lines)}{behind}]"


def _members(text: str, start: int) -> dict[str, Span]:
    """Where the values of an object stand; of a key that stands twice the last, as JSON is read."""
    found: dict[str, Span] = {}
    at = _behind_space(text, start + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        found[key], at = _value(text, _behind_space(text, _behind_space(text, at) + 1))
    return found


def _elements(text: str, start: int) -> list[Span]:
    """Where the entries of a list stand."""
    found: list[Span] = []
    at = _behind_space(text, start + 1)
    while text[at] != "]":
        span, at = _value(text, at)
        found.append(span)
    return found


def _value(text: str, start: int) -> tuple[Span, int]:
    """Where a value stands, and where the next one or the closing bracket does."""
    _, end = _DECODER.raw_decode(text, start)
    at = _behind_space(text, end)
    return (start, end), _behind_space(text, at + 1) if text[at] == "," else at


def _behind_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
