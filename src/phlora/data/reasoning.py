"""What a model thought before it answered: `reasoning_content`, `reasoning` or `thinking` beside a message's content.

As text it stands before the answer between `<think>` and `</think>`, as the models write it that think.
"""

from __future__ import annotations

from collections.abc import Sequence

from phlora.data.known_keys import THOUGHTS
from phlora.data.rows import Message


def has_reasoning(messages: Sequence[Message]) -> bool:
    """Whether any message says what was thought."""
    # Most messages are a role and a content.
    return any([len(message) > 2 and any(key in message for key in THOUGHTS) for message in messages])


def with_reasoning_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with what was thought in their contents."""
    return [_as_text(message) for message in messages]


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The messages without what was thought."""
    return [{key: value for key, value in message.items() if key not in THOUGHTS} for message in messages]


def _as_text(message: Message) -> Message:
    thought = next(
        (message[key] for key in THOUGHTS if isinstance(message.get(key), str) and message[key]), None
    )
    (rest,) = without_reasoning([message])
    if thought is None:
        return rest
    return {**rest, "content": f"<think>\n{thought}\n</think>\n\n{rest['content']}"}
