"""Texts beside a question and its answer: the passage that it asks about, and what would be lost without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phlora.data.known_keys import CONTEXTS
from phlora.data.rows import BadRow, kind_of, names_of
from phlora.data.spelling import is_empty

_TEXTS = ("sentences", "contexts", "context", "text", "texts", "paragraphs", "passages", "content")
_MAX_DEPTH = 4
# A shorter text stands in many another by chance.
_MIN_PART = 12


def context_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first column with a passage, and its text; None where there is none.

    Read are a text, a list of texts (paragraphs), HotpotQA's titles with the sentences of each, and objects that hold
    one of these under `text`, `contexts` or the like, with a `title` or without.

    Raises:
        BadRow: a list or an object in which no text is found.
    """
    for name in CONTEXTS:
        value = record.get(name)
        if isinstance(value, str | list | dict) and not is_empty(value):
            text = _text(value, name, 0)
            if text.strip():
                return name, text
    return None


def _text(value: Any, where: str, depth: int) -> str:
    if isinstance(value, str):
        return value
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return _text_of_object(value, where, depth)
        if isinstance(value, list) and value:
            if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], list):
                return _titled(value[0], value[1], where, depth)
            if depth and all(isinstance(item, str) for item in value):
                return " ".join(item.strip() for item in value)
            return "\n\n".join(
                _text(item, f"{where}[{number}]", depth + 1) for number, item in enumerate(value)
            )
    raise BadRow("wrong_type", f"`{where}` is {kind_of(value)}", "a text, or a list of texts")


def _text_of_object(value: Mapping[str, Any], where: str, depth: int) -> str:
    name = next((name for name in _TEXTS if not is_empty(value.get(name))), None)
    if name is None:
        raise BadRow(
            "wrong_type",
            f"`{where}` is an object with {names_of(value)}",
            f"a text, or a list of texts; `--columns context={where}.NAME` names one within it",
        )
    found, titles = value[name], value.get("title")
    if isinstance(titles, list) and isinstance(found, list) and len(titles) == len(found):
        pairs = zip(titles, found, strict=True)
        return "\n\n".join(_titled(title, text, f"{where}.{name}", depth) for title, text in pairs)
    if isinstance(titles, str) and titles.strip():
        return _titled(titles, found, f"{where}.{name}", depth)
    return _text(found, f"{where}.{name}", depth)


def _titled(title: Any, text: Any, where: str, depth: int) -> str:
    said = _text(text, where, depth + 1)
    return f"{title}\n{said}" if isinstance(title, str) and title.strip() else said


def says_more(value: Any, said: Sequence[str], *, name: str) -> bool:
    """Whether a column holds text that does not stand in its row.

    Args:
        said: the texts of the row.
        name: of the column; one for a passage may hold the name of a document, a single word.
    """
    if isinstance(value, str):
        text = value.strip()
        if (
            not text
            or (name in CONTEXTS and len(text.split()) < 2)
            or any(text == other.strip() for other in said)
        ):
            return False
        if len(text) >= _MIN_PART and any(text in other for other in said):
            return False
        # A chat beside its own rendering.
        return not (said and all(other.strip() in text for other in said))
    if isinstance(value, list):
        return any(says_more(item, said, name=name) for item in value)
    if isinstance(value, Mapping):
        # Of a message what it says counts, not who says it.
        texts = [value[key] for key in ("content", "value") if key in value] or list(value.values())
        return any(says_more(item, said, name=name) for item in texts)
    return False
