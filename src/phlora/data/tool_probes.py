"""What a chat has of tools, and the chats that show what of it a template writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phlora.data.rows import Message

_CALL = {"id": "probed123", "type": "function"}
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}


def speaks_of_tools(messages: Sequence[Message], tools: list[Any] | None) -> frozenset[str]:
    """What a chat has of `tools`, `calls` and `results`."""
    found = {"tools"} if tools else set()
    for message in messages:
        if message["role"] == "tool":
            found.add("results")
        elif "tool_calls" in message:
            found.add("calls")
    return frozenset(found)


def tool_probes() -> dict[str, tuple[list[Message], list[Any] | None, tuple[str, ...]]]:
    """By what is probed the messages, the tools, and the texts that a template with a place for it writes."""
    user = {"role": "user", "content": "x"}
    inner = {"name": "probed_call", "arguments": {"probed_key": "probed value"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{**_CALL, "function": inner}]}
    result = {
        "role": "tool",
        "name": "probed_call",
        "tool_call_id": _CALL["id"],
        "content": "probed result",
    }
    tool = {
        "type": "function",
        "function": {"name": "probed_tool", "description": "x", "parameters": _SCHEMA},
    }
    return {
        "tools": ([user], [tool], ("probed_tool",)),
        "calls": ([user, call], None, ("probed_call", "probed_key", "probed value")),
        "results": ([user, call, result], None, ("probed result",)),
    }
