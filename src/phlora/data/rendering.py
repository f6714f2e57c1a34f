"""What a chat template wrote: the text of a chat, and where each message stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, TypeAlias

import jinja2

from phlora.data.rows import Message

Span: TypeAlias = tuple[int, int]


# What rendering raises: a template is a program, and may count too far, look up what is not there, fill the memory.
TEMPLATE_ERRORS: tuple[type[Exception], ...] = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
    *(MemoryError, RecursionError),
)


class TemplateRefusal(Exception):
    """The template cannot render this chat as it stands; the message says why."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat.

    Attributes:
        text: what the template wrote.
        messages: the messages as rendered; the system prompt may have moved into the first user turn.
        spans: per message the characters `[start, end)` of its content, None when it is empty and left out.
        ends: per message the character after its end-of-turn token (its content's end when there is none).
        notes: kinds of things a person should know: `system_folded, content_altered, missing_end_token,
            tools_as_text, default_system`.
        frame: what the contents were put into, where the rendering was joined rather than rendered.
        tools: what the template was given as tools; None where they are in the messages, as text.
    """

    text: str
    messages: Sequence[Message]
    spans: Sequence[Span | None]
    ends: Sequence[int]
    notes: frozenset[str]
    frame: Frame | None = field(default=None, compare=False)
    tools: list[Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's own text: `literals[0] content[order[0]] literals[1] … literals[-1]`."""

    literals: tuple[str, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """A skeleton in which the messages stand in order, each once or, where it is empty, not at all.

    Attributes:
        shape: per message its role and whether it says anything.
        literals: the template's text around the contents.
        order: the messages that have a place.
        tails: the characters after each content that belong to its turn's end.
        notes: as in `Rendering`.
    """

    shape: tuple[tuple[str, bool], ...]
    literals: tuple[str, ...]
    order: tuple[int, ...]
    tails: tuple[int, ...]
    notes: frozenset[str]

    def fill(self, messages: Sequence[Message]) -> Rendering:
        """The rendering of messages of this shape."""
        contents = [messages[index]["content"] for index in self.order]
        parts = list(chain.from_iterable(zip(self.literals, contents, strict=False)))
        borders = list(accumulate(map(len, parts)))
        spans: list[Span | None] = [None] * len(messages)
        ends = [0] * len(messages)
        for index, start, end, tail in zip(self.order, borders[::2], borders[1::2], self.tails, strict=True):
            spans[index] = (start, end)
            ends[index] = end + tail
        return Rendering("".join((*parts, self.literals[-1])), messages, spans, ends, self.notes, self)
