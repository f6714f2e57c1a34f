"""Calls of tools in a reply, in the forms of several families; anything else is text."""

from __future__ import annotations

import pytest

from phlora.data.tools_text import write_calls
from phlora.serve.tool_calls import calls_in

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (write_calls("I look.", [OSLO]), "I look."),
        (f"I look.\n<|tool_call|>[{CALL}]<|/tool_call|>", "I look."),
        (f"[{CALL}]", ""),
        (f"[TOOL_CALLS] [{CALL}]", ""),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}<|eom_id|>', ""),
        (CALL, ""),
        ('I look. <function=weather>{"city": "Oslo"}</function>', "I look."),
    ],
)
def test_a_call_is_read_in_the_forms_of_several_families(text: str, before: str) -> None:
    assert calls_in(text, tools=TOOLS) == (before, [{"type": "function", "function": OSLO}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is cold.",
        '{"name": "Ana", "arguments": {}}',
        '{"name": "weather"}',
        "[TOOL_CALLS] [",
        "[" * 9999,
        "[]",
    ],
)
def test_anything_else_is_text(text: str) -> None:
    assert calls_in(text, tools=TOOLS) == (text, [])


def test_without_tools_json_is_text() -> None:
    assert calls_in(CALL, tools=None) == (CALL, [])


def test_several_calls_keep_their_order() -> None:
    text = f'[{CALL}, {{"name": "weather", "arguments": {{"city": "Bergen"}}}}]'
    cities = [call["function"]["arguments"]["city"] for call in calls_in(text, tools=TOOLS)[1]]
    assert cities == ["Oslo", "Bergen"]
