"""Tools, calls and results as text, for chat templates that have no place for them; and back again.

The convention is the one of Hermes and Qwen, which most models that were trained on tools know:

    system      … <tools> one tool a line, as JSON </tools> …
    assistant   I look it up.
                <tool_call>
                {"name": "weather", "arguments": {"city": "Oslo"}}
                </tool_call>
    user        <tool_response>
                -3 °C
                </tool_response>

Results that follow each other share one user turn. A marker that stands in a text itself gets a backslash after its
`<`, one that has backslashes already gets one more; inside JSON a `<` is written `\\u003c`. So what is written is read
back exactly: `read_calls(write_calls(text, calls)) == (text, calls)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from phlora.data.rows import Message

_OPEN, _CLOSE = "<tool_call>\n", "\n</tool_call>"
_MARKER = re.compile(r"<(\\*)(/?(?:tool_call|tool_response|tools)>)")
_ESCAPED = re.compile(r"<\\(\\*/?(?:tool_call|tool_response|tools)>)")
_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def escape(text: str) -> str:
    """A text in which no marker stands."""
    return _MARKER.sub(r"<\\\1\2", text) if "<" in text else text


def unescape(text: str) -> str:
    """The text that was escaped."""
    return _ESCAPED.sub(r"<\1", text) if "<\\" in text else text


def write_calls(content: str, calls: Sequence[Any]) -> str:
    """What the assistant says when it calls tools.

    Args:
        calls: as OpenAI has them, `{"function": {"name", "arguments"}}`, or the inner objects; ids are left out.
    """
    written = [f"{_OPEN}{_json(_name_and_arguments(call))}{_CLOSE}" for call in calls]
    return "\n".join([escape(content), *written] if content else written)


def read_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """What `write_calls` wrote: the text before the calls, and the calls in OpenAI's form.

    A text whose calls are broken, as a model may write them, is taken as text alone.
    """
    start, written = text.find(_OPEN), text.rstrip()
    if start < 0 or not written.endswith(_CLOSE) or (start and text[start - 1] != "\n"):
        return unescape(text), []
    calls = []
    for part in written[start + len(_OPEN) : -len(_CLOSE)].split(f"{_CLOSE}\n{_OPEN}"):
        try:
            call = json.loads(part)
        except (ValueError, RecursionError):
            return unescape(text), []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return unescape(text), []
        calls.append({"type": "function", "function": call})
    return unescape(text[: max(0, start - 1)]), calls


def describe_tools(tools: Sequence[Any]) -> str:
    """What the system message says of the tools."""
    return _HEAD + "\n".join(map(_json, tools)) + _TAIL


def tools_as_text(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Message]:
    """The chat with its tools, calls and results in the contents of system, user and assistant turns."""
    written: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{escape(message['content'])}\n</tool_response>"
            if was_result:
                written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{text}"}
            else:
                written.append({**_kept(message), "role": "user", "content": text})
        else:
            calls = message.get("tool_calls") or ()
            written.append({**_kept(message), "content": write_calls(message["content"], calls)})
            if not calls:
                written[-1]["content"] = escape(message["content"])
        was_result = is_result
    if tools:
        described = describe_tools(tools)
        if written and written[0]["role"] == "system":
            system = written[0]["content"]
            written[0] = {**written[0], "content": f"{system}\n\n{described}" if system else described}
        else:
            written.insert(0, {"role": "system", "content": described})
    return written


def _kept(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id", "name")}


def _name_and_arguments(call: Any) -> dict[str, Any]:
    call = call.get("function") or call
    return {"name": call["name"], "arguments": call.get("arguments", {})}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
