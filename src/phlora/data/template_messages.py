"""What of a chat's messages decides how a template renders them: roles, emptiness, white space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phlora.data.rendering import TemplateRefusal
from phlora.data.rows import Message

LOSS_KEYS = ("train", "weight")
_PLAIN_KEYS = frozenset(("role", "content", *LOSS_KEYS))


def without_loss_keys(messages: Sequence[Message]) -> list[Message]:
    """The messages as a template sees them: what they say of their own loss is none of its business."""
    return [{key: value for key, value in message.items() if key not in LOSS_KEYS} for message in messages]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Move the system prompt to the head of the first user turn.

    Raises:
        TemplateRefusal: there is no user turn.
    """
    system, rest = messages[0]["content"], list(messages[1:])
    for index, message in enumerate(rest):
        if message["role"] == "user":
            content = f"{system}\n\n{message['content']}" if system else message["content"]
            rest[index] = {**message, "content": content}
            return rest
    raise TemplateRefusal("the chat template has no system role, and the chat has no user turn to put it in")


def shape_of(messages: Sequence[Message], generation: bool) -> tuple[Any, ...] | None:
    """What a rendering depends on besides the contents; None where more than roles and contents is given."""
    if not all(message.keys() <= _PLAIN_KEYS for message in messages):
        return None
    return generation, *[(message["role"], bool(message["content"])) for message in messages]


def is_marked(message: Message) -> bool:
    """Emptiness chooses a branch in templates for system prompts and beside tool calls; keep it there."""
    return bool(message["content"]) or (message["role"] != "system" and "tool_calls" not in message)


def trimmed(content: str) -> Sequence[str]:
    """The content as a template may have trimmed it, the likeliest first."""
    if content == content.strip():
        return (content,)
    return (
        content,
        content.strip(),
        content.rstrip(),
        content.lstrip(),
        content.strip("\n"),
        content.rstrip("\n"),
        content.lstrip("\n"),
    )
