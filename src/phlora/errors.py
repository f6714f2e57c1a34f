"""The errors that a user of Phlora can meet, and the exit code of each.

A message says what was found and where, what was expected, what to do next, and the nearest valid name.
The tree is small on purpose:

    PhloraError
    ├── InputError             2   the user's input or configuration
    │   ├── ConfigError            a key or a value of the configuration
    │   ├── DataError              a data file or a row of it
    │   ├── ModelError             a model, a tokenizer or an adapter that cannot be used
    │   └── RunError               a run folder that cannot be used
    ├── EnvironmentProblem     3   what this machine lacks
    │   ├── MissingExtraError      an optional package
    │   ├── NoRoomError            disk or memory
    │   └── NetworkError           a hub that cannot be reached
    └── Finding                1   the command worked and found something
        └── NonFiniteError         the loss or a gradient is no number any more
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

_LONGEST_WORD = 400
_NOT_SHOWN = "(not shown)"
# `eos_token`, `max_new_tokens` and the like are no secrets.
_SECRET_NAME = (
    r"(?:use_)?(?:auth_|access_|(?:push_to_)?hub_|hf_)?token"
    r"|[\w-]*(?:secret|passw(?:or)?d|credential|api_?key)[\w-]*"
)
_SECRET_KEY = re.compile(rf"(?:{_SECRET_NAME})", re.IGNORECASE)
# Tokens and keys that are known by their look, and what stands before the @ of an address.
_SECRET_LOOKS = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bgh[a-z]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}")
_ADDRESS_OWNER = re.compile(r"\b([a-z][a-z0-9+.-]+:/{1,2})[^/\s`'\"]+(?=@)", re.IGNORECASE)
# `token=x`, `{token: x}` and `'token': 'x'`, as messages of other libraries and command lines have them.
_SECRET_SETTING = re.compile(
    rf"((?:(?<![\w-])(?:{_SECRET_NAME})\s*=|(?:[{{,]\s*|['\"])(?:{_SECRET_NAME})['\"]?\s*[:=])\s*)"
    r"(?:'[^']*'|\"[^\"]*\"|(?!None\b|null\b)[^\s,}'\"]+)",
    re.IGNORECASE,
)
EXIT_DONE = 0
EXIT_FINDING = 1
EXIT_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_INTERRUPTED = 130


class PhloraError(Exception):
    """Base of every error that Phlora raises for a person to read.

    Args:
        found: what was found, as a sentence without the final full stop.
        where: file:line, configuration key or module.
        expected: what would have been right.
        fix: the next action.
    """

    exit_code: ClassVar[int] = EXIT_INPUT

    def __init__(self, found: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        if _SECRET_KEY.fullmatch(where.rpartition(".")[2]):
            found = re.sub("`.*`", f"`{_NOT_SHOWN}`", found, flags=re.DOTALL)
        parts = (masked(part) for part in (found, where, expected, fix))
        self.found, self.where, self.expected, self.fix = parts
        super().__init__(self.found, self.where, self.expected, self.fix)

    def __str__(self) -> str:
        head = f"{self.where}: {self.found}" if self.where else self.found
        lines = [head if head.endswith((".", "?", "!")) else f"{head}."]
        if self.expected:
            lines.append(f"Expected: {self.expected}")
        if self.fix:
            lines.append(f"What to do: {self.fix}")
        # A name of thousands of letters is no help, and buries what is.
        return re.sub(rf"(\S{{{_LONGEST_WORD}}})\S+", r"\1…", "\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries (data workers); keyword-only arguments would be lost there.
        return (_rebuild, (type(self), self.found, self.where, self.expected, self.fix))


def _rebuild(kind: type[PhloraError], found: str, where: str, expected: str, fix: str) -> PhloraError:
    return kind(found, where=where, expected=expected, fix=fix)


class InputError(PhloraError):
    """The user's input or configuration is wrong."""


class ConfigError(InputError):
    """A key or a value of the configuration is wrong."""


class DataError(InputError):
    """A data file, or a row of it, cannot be used."""


class ModelError(InputError):
    """A model, tokenizer or adapter cannot be used."""


class RunError(InputError):
    """A run folder cannot be used."""


class EnvironmentProblem(PhloraError):
    """This machine lacks something."""

    exit_code = EXIT_ENVIRONMENT


class MissingExtraError(EnvironmentProblem):
    """Optional packages are not installed; `extras.require` raises it."""


class NoRoomError(EnvironmentProblem):
    """Not enough disk or memory."""


class NetworkError(EnvironmentProblem):
    """A hub cannot be reached, or offline mode forbids it."""


class Finding(PhloraError):
    """The command did its work and found something that a person has to look at."""

    exit_code = EXIT_FINDING


class NonFiniteError(Finding):
    """A loss or gradient is NaN or infinite; training on would only write garbage."""


def masked(value: Any, key: str = "") -> Any:
    """A value without what opens a door: known by the key that it stands under, or by its look.

    Messages, notes, logs and reports are handed on. Mappings and lists are gone through; other values stay.

    >>> masked({"token": "mine", "name": "https://me:mine@hub.example/model"})
    {'token': '(not shown)', 'name': 'https://(not shown)@hub.example/model'}
    """
    if value is not None and _SECRET_KEY.fullmatch(key):
        return _NOT_SHOWN
    if isinstance(value, Mapping):
        return {name: masked(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [masked(entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if not isinstance(value, str):
        return value
    value = _SECRET_LOOKS.sub(_NOT_SHOWN, _ADDRESS_OWNER.sub(rf"\1{_NOT_SHOWN}", value))
    return _SECRET_SETTING.sub(rf"\1{_NOT_SHOWN}", value)


def shown(value: object, *, limit: int = 80) -> str:
    """A value as a message quotes it: in backticks, on one line, not longer than a line, and without secrets."""
    try:
        text = f"{masked(value)}"
    except ValueError:  # an integer of more digits than Python writes
        text = "a number of thousands of digits"
    text = " ".join(text.split())
    return f"`{text if len(text) <= limit else text[:limit] + '…'}`"


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that `name` was most likely meant to be, or None; `cutoff` is the likeness that it needs, to 1."""
    # What is longer than any name is near to none, and comparing it takes its time.
    matches = difflib.get_close_matches(str(name)[:200], list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A sentence that names the nearest candidate and, when there are few, all of them."""
    known = sorted(set(candidates))
    match = nearest(name, known, cutoff=cutoff)
    if match:
        return f"did you mean `{match}`?"
    shown = ", ".join(f"`{candidate}`" for candidate in known[:24])
    return f"one of {shown}{' …' if len(known) > 24 else ''}"
