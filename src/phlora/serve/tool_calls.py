"""Calls of tools in what a model has said: in the form that Phlora trains, and in those of common families.

    <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>       Hermes, Qwen, and whatever Phlora trained as text
    <|tool_call|>[{"name": …, "arguments": …}]<|/tool_call|>      Phi-4-mini
    [TOOL_CALLS] [{"name": …, "arguments": …}]                    Mistral
    <|python_tag|>{"name": …, "parameters": …}                    Llama 3
    <function=NAME>{…}</function>                                 Llama 3, custom tools

Special tokens are gone from a reply, so that the last four may also stand there bare. What is none of these is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from phlora.data.tools_text import read_calls

_LEADS = re.compile(r"<\|tool_call\|>|\[TOOL_CALLS\]|<\|python_tag\|>")
_ENDS = re.compile(r"(<\|/tool_call\|>|<\|eom_id\|>)\s*$")
_FUNCTION = re.compile(r"<function=([\w.-]{1,200})>([^<]*)</function>")


def calls_in(text: str, *, tools: Iterable[Any] | None) -> tuple[str, list[dict[str, Any]]]:
    """The text before the calls, and the calls in OpenAI's form; the text alone where there are none.

    Args:
        tools: those that were offered; JSON without a marker is a call only if it names one of them.
    """
    content, calls = read_calls(text)
    if calls or not tools:
        return content, calls
    lead = _LEADS.search(text)
    before, written = (text[: lead.start()], text[lead.end() :]) if lead else ("", text)
    if (function := _FUNCTION.search(text)) and not lead:
        before, written = text[: function.start()], _as_json(_FUNCTION.findall(text[function.start() :]))
    found = _objects(_ENDS.sub("", written).strip())
    known = {_name_of(tool) for tool in tools}
    if not found or (lead is None and any(call["name"] not in known for call in found)):
        return text, []
    return before.rstrip(), [{"type": "function", "function": call} for call in found]


def _as_json(found: Iterable[tuple[str, str]]) -> str:
    return (
        "[" + ",".join(f'{{"name": {json.dumps(name)}, "arguments": {text}}}' for name, text in found) + "]"
    )


def _objects(text: str) -> list[dict[str, Any]]:
    """The calls that a JSON object or list holds; none where it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return []
        arguments = entry.get("arguments", entry.get("parameters"))
        if not isinstance(arguments, dict):
            return []
        calls.append({"name": entry["name"], "arguments": arguments})
    return calls


def _name_of(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return function.get("name") if isinstance(function, dict) else None
