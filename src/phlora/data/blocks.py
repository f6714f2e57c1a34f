"""The blocks of which a message consists with some providers: texts, calls, results of tools and reasoning.

OpenAI's, Anthropic's and Bedrock's content parts and Gemini's parts are read; images and sounds are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from phlora.data.rows import BadRow, Message, kind_of

# What every reader says of what it cannot turn into text.
TEXT_ONLY = "text only: images, sounds and files of other kinds cannot be trained"
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def text_of_parts(
    parts: list[Any], key: str, message: Message, turn: int
) -> tuple[str | None, list[Message]]:
    """The text of a list of blocks; calls and reasoning go into the message, results become messages."""
    texts: list[str] = []
    results: list[Message] = []
    flags: list[Any] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise BadRow("wrong_type", f"turn {turn} has {kind_of(part)} among the parts of `{key}`", "text")
        text = part_text(part)
        if text is not None:
            texts.append(text)
            flags.append(part.get("train"))
            continue
        read = next((read for name, read in _BLOCKS.items() if _is_block(part, name)), None)
        if read is None:
            kind = str(part.get("type", "") or next(iter(part), ""))[:40]
            raise BadRow(
                "wrong_type",
                f"turn {turn} has a part of the kind `{kind}` in `{key}`",
                TEXT_ONLY,
            )
        read(part, message, results, turn)
    _take_part_flags(flags, message, turn)
    return "".join(texts), results


def part_text(part: Any) -> str | None:
    """The text of a text block, in each spelling of it; None for other blocks."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is not None and kind not in _TEXT_PARTS:
        return None
    value = next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
    if isinstance(value, Mapping):
        value = value.get("value")
    if part.get("thought") is True and isinstance(value, str):
        return None  # Gemini's reasoning, which is no text of the answer
    if isinstance(value, str):
        return value
    if kind in _TEXT_PARTS or value is not None and "text" in part:
        raise BadRow("wrong_type", f"the text of a part is {kind_of(value)}", "text")
    return None


def _take_part_flags(flags: list[Any], message: Message, turn: int) -> None:
    """`train` beside the parts marks the whole message where they agree."""
    given = [flag for flag in flags if flag is not None]
    if not given:
        return
    if len(given) != len(flags) or any(flag is not given[0] for flag in given):
        raise BadRow(
            "part_flags",
            f"turn {turn} marks only some of its parts with `train`",
            "one for the whole message",
        )
    message.setdefault("train", given[0])


def _is_block(part: Mapping[str, Any], name: str) -> bool:
    return part.get("type") == name or ("type" not in part and name in part)


def _take_call(part: Mapping[str, Any], message: Message, results: list[Message], turn: int) -> None:
    block = next((part[key] for key in ("toolUse", "functionCall", "function_call") if key in part), part)
    if not isinstance(block, Mapping):
        raise BadRow("wrong_type", f"turn {turn} has {kind_of(block)} as a call", "an object")
    arguments: Any = next((block[key] for key in ("input", "args", "arguments") if key in block), {})
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": block.get("name"), "arguments": arguments},
    }
    number = block.get("id", block.get("toolUseId"))
    calls = message.setdefault("tool_calls", [])
    if not isinstance(calls, list):
        raise BadRow("wrong_type", f"turn {turn} has {kind_of(calls)} as `tool_calls`", "a list of calls")
    calls.append({**call, "id": number} if number else call)


def _take_result(part: Mapping[str, Any], message: Message, results: list[Message], turn: int) -> None:
    keys = ("toolResult", "functionResponse", "function_response")
    block = next((part[key] for key in keys if key in part), part)
    if not isinstance(block, Mapping):
        raise BadRow("wrong_type", f"turn {turn} has {kind_of(block)} as a result", "an object")
    content = next((block[key] for key in ("content", "response") if key in block), "")
    if isinstance(content, list):
        pieces = [part_text(item) if not isinstance(item, str) else item for item in content]
        content = "".join(
            piece if piece is not None else json.dumps(_json_of(item), ensure_ascii=False)
            for piece, item in zip(pieces, content, strict=True)
        )
    result: Message = {
        "role": "tool",
        "content": content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
    }
    number = block.get("tool_use_id", block.get("toolUseId"))
    name = block.get("name")
    result |= {"tool_call_id": number} if isinstance(number, str) else {}
    results.append(result | ({"name": name} if isinstance(name, str) else {}))


def _json_of(item: Any) -> Any:
    if isinstance(item, Mapping) and item.get("type") in ("image", "document", "video"):
        raise BadRow("wrong_type", f"the result of a tool is {item['type']}", "text")
    return item.get("json", item) if isinstance(item, Mapping) else item


def _take_reasoning(part: Mapping[str, Any], message: Message, results: list[Message], turn: int) -> None:
    value = next((part[key] for key in ("thinking", "text", "content") if isinstance(part.get(key), str)), "")
    block = part.get("reasoningContent")
    if isinstance(block, Mapping) and isinstance(block.get("reasoningText"), Mapping):
        value = str(block["reasoningText"].get("text", ""))
    message["reasoning_content"] = str(message.get("reasoning_content", "")) + value


_BLOCKS: dict[str, Callable[[Mapping[str, Any], Message, list[Message], int], None]] = {
    "tool_use": _take_call,
    "toolUse": _take_call,
    "functionCall": _take_call,
    "function_call": _take_call,
    "tool_result": _take_result,
    "toolResult": _take_result,
    "functionResponse": _take_result,
    "function_response": _take_result,
    "thinking": _take_reasoning,
    "reasoning": _take_reasoning,
    "reasoningContent": _take_reasoning,
    "thought": _take_reasoning,
}
